"""Times what `soap` does on a CPU instead of LAPACK's QR decomposition.

    python tools/time_decompositions.py

The two take turns, so that a busy machine slows both. LAPACK decomposes one matrix
after the other: with a batched call XLA's thread pool could wait for itself.
"""

import statistics
import time

import jax
import jax.numpy as jnp
from jax import lax

from stablegrad_optax._orthogonal import gram_schmidt

SHAPES = ((100, 32), (20, 64), (10, 256), (1, 1024))  # matrices, width
ROUNDS = 7


@jax.jit
def lapack(matrices: jax.Array) -> jax.Array:
    """The factors Q of a stack of matrices, one after the other."""
    return lax.map(lambda matrix: jnp.linalg.qr(matrix)[0], matrices)


@jax.jit
def by_blocks(matrices: jax.Array) -> jax.Array:
    """The factors Q of a stack of matrices by block Gram-Schmidt."""
    return gram_schmidt(matrices, "highest")


def main() -> None:
    """Print a line for each shape."""
    for count, width in SHAPES:
        matrices = jax.random.normal(jax.random.key(0), (count, width, width))
        times: dict[str, list[float]] = {}
        for function in (lapack, by_blocks) * (ROUNDS + 1):
            start = time.perf_counter()
            function(matrices).block_until_ready()
            times.setdefault(function.__name__, []).append(time.perf_counter() - start)
        basis = by_blocks(matrices)
        error = jnp.abs(basis.mT @ basis - jnp.eye(width)).max()
        old, new = (statistics.median(each[1:]) * 1e3 for each in times.values())
        print(
            f"{count} of {width} x {width}: LAPACK {old:.1f} ms, block "
            f"Gram-Schmidt {new:.1f} ms, ratio {new / old:.2f}, error {error:.0e}"
        )


if __name__ == "__main__":
    main()

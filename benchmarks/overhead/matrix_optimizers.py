"""Times AdamW, Muon and SOAP on 50 layers of width 32: step, refresh, compilation.

    python -m benchmarks.overhead.matrix_optimizers

The optimizers take turns, so that a busy machine slows all of them. Compilation is in
seconds of the processor.
"""

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from benchmarks.overhead import trees
from stablegrad_optax import soap

LAYERS, WIDTH, ROUNDS, STEPS = 50, 32, 15, 10

OPTIMIZERS: dict[str, Callable[[float], optax.GradientTransformation]] = {
    "adamw": optax.adamw,
    "muon": optax.contrib.muon,
    "soap": soap,
    "soap, every step a refresh": lambda rate: soap(rate, precondition_frequency=1),
}


def parameters() -> trees.Tree:
    """Normal kernels and biases of dense layers."""
    keys = jax.random.split(jax.random.key(0), LAYERS)
    return {
        f"layer_{i}": {
            "kernel": jax.random.normal(key, (WIDTH, WIDTH)) / WIDTH**0.5,
            "bias": jnp.zeros(WIDTH),
        }
        for i, key in enumerate(keys)
    }


def main() -> None:
    """Print a line for each optimizer."""
    params = parameters()
    steps, states, seconds, times = {}, {}, {}, {name: [] for name in OPTIMIZERS}
    for name, make in OPTIMIZERS.items():
        tx = make(1e-3)
        states[name] = tx.init(params)
        start = time.process_time()
        lowered = jax.jit(tx.update).lower(params, states[name], params)
        steps[name] = lowered.compile()
        seconds[name] = time.process_time() - start
    for _ in range(ROUNDS):
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(STEPS):
                _, states[name] = step(params, states[name], params)
            jax.block_until_ready(states[name])
            times[name].append((time.perf_counter() - start) / STEPS * 1e3)
    for name in OPTIMIZERS:
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(states[name]))
        print(
            f"{name}: step {statistics.median(times[name]):.2f} ms, compilation "
            f"{seconds[name]:.2f} s, state {size / 1e6:.2f} MB"
        )


if __name__ == "__main__":
    main()

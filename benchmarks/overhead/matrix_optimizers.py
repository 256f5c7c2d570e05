"""Times AdamW, Muon and SOAP on 50 layers of width 32: step, refresh, compilation.

    python -m benchmarks.overhead.matrix_optimizers [--compiled {tpu,gpu}]

The optimizers take turns, so that a busy machine slows all of them. Compilation is in
seconds of the processor.

With --compiled nothing is executed: the compiler of a TPU v5e or an H100 says what it
makes of a step for the perceptron of the demo. A loop whose length it does not say
counts as one round, and a call of a library as one kernel.
"""

import statistics
import time
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax
import tyro

from benchmarks.overhead import compilers, costs, programs, trees
from benchmarks.overhead.optimizers import Chain
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


def compile_for(target: Literal["tpu", "gpu"]) -> None:
    """Print the kernels and bytes of a step of each optimizer."""
    device = compilers.load(target).device
    tree = trees.abstract(trees.pinn(), jnp.dtype("float32"))
    for name, optimizer in OPTIMIZERS.items():
        chain = Chain(optimizer=optimizer)
        compiled = programs.lower(chain, tree, lambda leaf: device).compile()
        always, branches = costs.count(compiled.as_text(), unknown_rounds=1)
        print(
            f"{name}: {always.kernels} kernels, {always.num_bytes / 1e6:.1f} MB, and "
            f"{branches.kernels} kernels in conditionals"
        )


def measure() -> None:
    """Print the times of each optimizer on this machine."""
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


def main(*, compiled: Literal["tpu", "gpu"] | None = None) -> None:
    """Measure AdamW, Muon and SOAP.

    Args:
        compiled: the machine to compile for; by default steps are timed on this one.
    """
    if compiled is None:
        measure()
    elif message := compilers.missing(compiled):
        raise SystemExit(message)
    else:
        compile_for(compiled)


if __name__ == "__main__":
    tyro.cli(main)

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Sharding

from benchmarks.lib.command_line import fail, parse
from benchmarks.overhead import compilers, costs, programs, trees
from benchmarks.overhead.optimizers import Chain
from stablegrad_optax import soap

PROG = "python -m benchmarks.overhead.matrix_optimizers"
LAYERS, WIDTH, ROUNDS, STEPS = 50, 32, 15, 10

OPTIMIZERS: dict[str, Callable[[float], optax.GradientTransformation]] = {
    "adamw": optax.adamw,
    "muon": optax.contrib.muon,
    "soap": soap,
    "soap, every step a refresh": lambda rate: soap(rate, precondition_frequency=1),
}


@dataclass(frozen=True)
class Options:
    compiled: Literal["tpu", "gpu"] | None = None
    """The machine to compile for; by default steps are timed on this one."""


def compile_for(device: Sharding) -> None:
    """Print the kernels and bytes of a step of each optimizer."""
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
    layer = {"kernel": (WIDTH, WIDTH), "bias": (WIDTH,)}
    shapes = {f"layer{i}": layer for i in range(LAYERS)}
    params = trees.normal(shapes, jnp.dtype("float32"), WIDTH**-0.5)
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


def main(args: Sequence[str] | None = None) -> None:
    """Measures on this machine, or compiles for another one."""
    options = parse(Options, args, prog=PROG, description=__doc__)
    if options.compiled is None:
        measure()
        return
    try:
        compiler = compilers.load(options.compiled)
    except ValueError as error:  # it is not installed
        fail(PROG, str(error))
    compile_for(compiler.device)


if __name__ == "__main__":
    main()

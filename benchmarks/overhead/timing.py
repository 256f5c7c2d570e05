"""Times of optimizer steps: optimizers in turn, each over AdamW in the same round."""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.lib.timing import Times, interleave
from benchmarks.overhead import trees
from benchmarks.overhead.optimizers import BASELINE, CHAINS, Chain
from benchmarks.overhead.programs import State, step_of, temporary_bytes


class Update(NamedTuple):
    """One optimizer on one tree."""

    times: Times
    temporary_bytes: int


def time_updates(
    shapes: trees.Shapes,
    dtype: jnp.dtype,
    names: list[str],
    rounds: int,
    on_compile: Callable[[str], None] = lambda name: None,
) -> dict[str, Update]:
    """Times optimizers on one tree; they share one copy of parameters and moments."""
    grads = trees.normal(shapes, dtype)
    shared = _Shared(optax.scale_by_adam().init(grads), jax.tree.map(jnp.copy, grads))
    stretches, temporary = {}, {}
    for name in names:
        on_compile(name)
        stretches[name], temporary[name] = _stretch(CHAINS[name], grads, shared)
    times = interleave(stretches, rounds, BASELINE)
    return {name: Update(times[name], temporary[name]) for name in names}


class _Shared:
    """Arrays of the gradient's size, which optimizers use in turn."""

    def __init__(self, adam: optax.ScaleByAdamState, params: trees.Tree):
        self.adam, self.params = adam, params


def _stretch(
    chain: Chain, grads: trees.Tree, shared: _Shared
) -> tuple[Callable[[int], None], int]:
    before, optimizer = chain.parts()
    state = State(before.init(grads), jax.eval_shape(optimizer.init, grads))
    step = step_of(chain)
    compiled = step.lower(grads, state, grads).compile()  # and kept for the calls

    def is_adam(node: object) -> bool:
        return isinstance(node, optax.ScaleByAdamState)

    def run(steps: int) -> None:
        nonlocal state
        state = jax.tree.map(
            lambda node: shared.adam if is_adam(node) else node, state, is_leaf=is_adam
        )
        for _ in range(steps):
            state, shared.params = step(grads, state, shared.params)
        (shared.adam,) = filter(is_adam, jax.tree.leaves(state, is_leaf=is_adam))
        jax.block_until_ready(shared.params)

    return run, temporary_bytes(compiled)


def copy_bandwidth(num_bytes: int = 2**29, rounds: int = 9) -> float:
    """Bytes read and written in a second by a loop over a large array, the best."""
    array = jnp.zeros(num_bytes // 4, jnp.float32)
    increment = jax.jit(lambda x: x + 1, donate_argnums=0)
    seconds = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        array = jax.block_until_ready(increment(array))
        seconds.append(time.perf_counter() - begin)
    return 2 * num_bytes / min(seconds[1:])

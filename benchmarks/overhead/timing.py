"""Times of optimizer steps: arms in turn, each over adamw in the same round."""

import math
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.overhead import trees
from benchmarks.overhead.arms import ARMS, BASELINE, Arm
from benchmarks.overhead.programs import State, step_of, temporary_bytes

STRETCH = 0.03  # seconds, at least, between two looks at the clock


class Times(NamedTuple):
    """Of one arm, by round."""

    seconds: np.ndarray  # f[rounds], of one step
    ratio: np.ndarray  # f[rounds], over adamw's of the same round

    def record(self) -> dict[str, float | list[float]]:
        """Medians and quartiles, for a line of results."""
        return {
            "ms": _digits(1e3 * np.median(self.seconds)),
            "ms_quartiles": _quartiles(1e3 * self.seconds),
            "ratio": _digits(np.median(self.ratio)),
            "ratio_quartiles": _quartiles(self.ratio),
            "rounds": len(self.seconds),
        }


def interleave(
    stretches: Mapping[str, Callable[[int], None]], rounds: int, baseline: str
) -> dict[str, Times]:
    """Runs all arms in turn, so that a disturbance meets every one of them.

    Args:
        stretches: arm -> a function that takes so many steps and waits for them.
        rounds: how often each has its turn; one more before that warms up.
        baseline: whose time the ratios divide by.
    """
    steps = {arm: _steps_in_a_stretch(stretch) for arm, stretch in stretches.items()}
    seconds: dict[str, list[float]] = {arm: [] for arm in stretches}
    rng = np.random.default_rng(0)
    for _ in range(rounds):
        # Each arm follows each other one, whatever that leaves in the caches.
        for arm in rng.permutation(list(stretches)).tolist():
            begin = time.perf_counter()
            stretches[arm](steps[arm])
            seconds[arm].append((time.perf_counter() - begin) / steps[arm])
    base = np.array(seconds[baseline])
    return {arm: Times(np.array(s), np.array(s) / base) for arm, s in seconds.items()}


def _steps_in_a_stretch(stretch: Callable[[int], None]) -> int:
    stretch(1)  # warms up
    begin = time.perf_counter()
    stretch(1)
    return max(1, math.ceil(STRETCH / (time.perf_counter() - begin)))


class Update(NamedTuple):
    """One arm on one tree."""

    times: Times
    temporary_bytes: int


def time_updates(
    shapes: trees.Shapes,
    dtype: jnp.dtype,
    arms: list[str],
    rounds: int,
    on_compile: Callable[[str], None] = lambda arm: None,
) -> dict[str, Update]:
    """The arms on one tree. All share one copy of parameters and moments."""
    grads = trees.normal(shapes, dtype)
    shared = _Shared(optax.scale_by_adam().init(grads), jax.tree.map(jnp.copy, grads))
    stretches, temporary = {}, {}
    for name in arms:
        on_compile(name)
        stretches[name], temporary[name] = _stretch(ARMS[name], grads, shared)
    times = interleave(stretches, rounds, BASELINE)
    return {name: Update(times[name], temporary[name]) for name in arms}


class _Shared:
    """What is of the gradient's size, in turn of one arm and of another."""

    def __init__(self, adam: optax.ScaleByAdamState, params: trees.Tree):
        self.adam, self.params = adam, params


def _stretch(
    arm: Arm, grads: trees.Tree, shared: _Shared
) -> tuple[Callable[[int], None], int]:
    before, optimizer = arm.parts()
    state = State(before.init(grads), jax.eval_shape(optimizer.init, grads))
    step = step_of(arm)
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


def _quartiles(values: np.ndarray) -> list[float]:
    return [_digits(value) for value in np.quantile(values, (0.25, 0.75))]


def _digits(value: float) -> float:
    return float(f"{value:.4g}")

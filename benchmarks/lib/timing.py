"""Times of steps: optimizers in turn, each over a baseline in the same round."""

import math
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from benchmarks.lib.train import Batch, Training

STRETCH = 0.03  # seconds, at least, between two looks at the clock


class Times(NamedTuple):
    """The times of one optimizer, by round."""

    seconds: np.ndarray  # f[rounds], of one step
    ratio: np.ndarray  # f[rounds], over the baseline's of the same round

    def record(self) -> dict[str, float | list[float]]:
        """Returns medians and quartiles, for a line of results."""
        return {
            "ms": _digits(1e3 * np.median(self.seconds)),
            "ms_quartiles": _quartiles(1e3 * self.seconds),
            "ratio": _digits(np.median(self.ratio)),
            "ratio_quartiles": _quartiles(self.ratio),
            "rounds": len(self.seconds),
        }


def time_trainings(
    trainings: Mapping[str, Training], rounds: int, baseline: str
) -> dict[str, Times]:
    """Times a step of each: the batch, the gradient and the update, of one run."""
    return interleave(
        {arm: _stretch(training) for arm, training in trainings.items()},
        rounds,
        baseline,
    )


def _stretch(training: Training) -> Callable[[int], None]:
    batch = Batch([training], [1e-3], [0])
    return lambda steps: batch.advance(batch.step + steps)


def interleave(
    stretches: Mapping[str, Callable[[int], None]], rounds: int, baseline: str
) -> dict[str, Times]:
    """Runs all optimizers in turn, so that a disturbance meets every one of them.

    Args:
        stretches: Optimizer -> a function that takes so many steps and waits for them.
        rounds: How often each has its turn; one more round before warms up.
        baseline: The optimizer whose time the ratios divide by.
    """
    steps = {arm: _steps_in_a_stretch(stretch) for arm, stretch in stretches.items()}
    seconds: dict[str, list[float]] = {arm: [] for arm in stretches}
    rng = np.random.default_rng(0)
    for _ in range(rounds):
        # Each follows each other one, whatever that leaves in the caches.
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


def _quartiles(values: np.ndarray) -> list[float]:
    return [_digits(value) for value in np.quantile(values, (0.25, 0.75))]


def _digits(value: float) -> float:
    return float(f"{value:.4g}")

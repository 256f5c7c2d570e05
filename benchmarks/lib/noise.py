"""How much of a difference between arms is no more than their seeds.

Every number is a fixed one: resampling starts from the same random state each time.
"""

import operator
from collections.abc import Callable, Mapping

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
NUM_RESAMPLES = 2000

# What is made of the errors of an arm's seeds, along the last axis.
Statistic = Callable[..., np.ndarray]
# (an error, the lowest) -> what lies between them
Compare = Callable[[np.ndarray, np.ndarray], np.ndarray]


def resampled(
    errors: np.ndarray,
    statistic: Statistic = np.median,
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """The statistic of as many seeds, drawn with replacement: f[NUM_RESAMPLES]."""
    rng = np.random.default_rng(0) if rng is None else rng
    drawn = rng.integers(len(errors), size=(NUM_RESAMPLES, len(errors)))
    return statistic(np.asarray(errors)[drawn], axis=-1)


def interval(resamples: np.ndarray) -> tuple[float, float]:
    """Where the middle 95 % lie: the percentile interval of a bootstrap."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resamples, (tail, 1 - tail), method="inverted_cdf")
    return float(low), float(high)


def meet(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether two intervals have a number in common."""
    return one[0] <= other[1] and other[0] <= one[1]


def failure_p(*cells: tuple[int, int, int, int]) -> float:
    """The probability, if two arms fail equally often, of counts so far apart.

    Fisher's exact test, two sides, of several cells stratified: how many of both fail
    is each cell's own, so that one in which all runs fail, or none, says nothing and
    dilutes nothing.

    Args:
        cells: failed runs and all runs of the one arm, then of the other, in each.
    """
    chances, observed = np.ones(1), 0  # f[failures of the one arm]
    for failed, runs, other_failed, other_runs in cells:
        drawn = runs + other_runs, failed + other_failed, runs
        chances = np.convolve(chances, stats.hypergeom.pmf(np.arange(runs + 1), *drawn))
        observed += failed
    # Equal chances differ by rounding.
    return float(chances[chances <= chances[observed] * (1 + 1e-7)].sum().clip(max=1))


def level(
    errors: Mapping[str, np.ndarray],
    failed: Mapping[str, int],
    statistic: Statistic = np.median,
) -> set[str]:
    """The arms that the seeds of a cell cannot tell from its best one, itself included.

    Their bootstrap intervals meet that of the arm with the lowest statistic, and their
    failures are not more than its by chance (`failure_p` above 0.05). To meet is less
    than to be equal: more seeds may still tell them apart. One seed tells nothing.

    Args:
        errors: arm -> f[seeds].
        failed: arm -> how many of them failed.
        statistic: of the errors, lower is better.
    """
    best = min(errors, key=lambda arm: statistic(errors[arm], axis=-1))
    spans = {arm: interval(resampled(of, statistic)) for arm, of in errors.items()}

    def is_level(arm: str) -> bool:
        if min(len(errors[arm]), len(errors[best])) < 2:
            return True
        counts = failed[arm], len(errors[arm]), failed[best], len(errors[best])
        return meet(spans[arm], spans[best]) and failure_p(counts) > 1 - CONFIDENCE

    return {arm for arm in errors if is_level(arm)}


def floor(
    errors: np.ndarray,
    statistic: Statistic = np.median,
    compare: Compare = operator.truediv,
) -> tuple[float, float]:
    """What the middle one of equal arms loses to the best of them, by chance alone.

    The arms' errors are exchanged among them, each seed's for itself, as they may be if
    the arms do not differ. A distance that is not above it says nothing.

    Args:
        errors: f[arms, seeds].
        statistic: of each arm's errors, lower is better.
        compare: (the median of the arms' statistics, the lowest) -> what is lost.

    Returns:
        Its median, and what it stays under with 95 %.
    """

    def lost(*of_arms: np.ndarray, axis: int = -1) -> np.ndarray:
        scores = np.stack([statistic(of_arm, axis=axis) for of_arm in of_arms])
        return compare(np.median(scores, axis=0), scores.min(axis=0))

    if min(errors.shape) == 1:  # nothing can be exchanged
        return (float(lost(*errors)),) * 2
    null = stats.permutation_test(
        tuple(errors),
        lost,
        permutation_type="samples",
        vectorized=True,
        n_resamples=NUM_RESAMPLES,
        rng=np.random.default_rng(0),
    ).null_distribution
    middle, high = np.quantile(null, (0.5, CONFIDENCE), method="inverted_cdf")
    return float(middle), float(high)

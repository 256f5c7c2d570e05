"""Failures and medians of a few seeds, with intervals, and one test for two samples."""

from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
NUM_RESAMPLES = 2000

Interval = tuple[float, float]
Statistic = Callable[..., np.ndarray]  # of the values of the seeds, along the last axis


def failure_interval(failed: int, runs: int) -> Interval:
    """Returns Wilson's interval of the share of runs that fail."""
    found = stats.binomtest(failed, runs).proportion_ci(CONFIDENCE, "wilson")
    return float(found.low), float(found.high)


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, statistic: Statistic = np.median
) -> Interval:
    """Returns the percentile interval of a bootstrap over seeds, always the same one.

    It holds a single value if there is a single seed or if all seeds are equal.
    """
    values = np.asarray(values, float)
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    found = stats.bootstrap(
        (values,),
        statistic,
        confidence_level=CONFIDENCE,
        n_resamples=NUM_RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def rank_test(one: np.ndarray, other: np.ndarray) -> float:
    """Returns the two-sided p-value of Mann and Whitney's test.

    It is exact, with ties, for up to eight seeds each. Failed runs may be infinite.
    """
    exchange = stats.PermutationMethod(n_resamples=13_000, rng=np.random.default_rng(0))
    return float(stats.mannwhitneyu(one, other, method=exchange).pvalue)


def overlap(one: Interval, other: Interval) -> bool:
    """Says whether two intervals have a number in common."""
    return one[0] <= other[1] and other[0] <= one[1]

"""Statistics of scores: which learning rate is best, and which optimizers differ."""

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]

SIGNIFICANCE = 0.05  # the level of the test over all pairs of optimizers
_POWER = 0.8  # the power of the test with the estimated number of seeds


def choose_rate(scores: Floats) -> int:
    """Returns the position of the best rate in scores f[rates, seeds], rates ascending.

    The rate has the fewest failures. Of several, it has no failure at the next larger
    rate, because the best rate often stands next to one that diverges. Then the lowest
    worst score decides, then the lowest mean rank, which matters where every rate has
    failures, then the smaller rate.
    """
    failures = np.isinf(scores).sum(axis=1)
    # The largest rate has no next one, so its own failures count instead.
    next_fails = np.append(failures[1:], failures[-1]) > 0
    mean_ranks = ranks(scores.reshape(-1)).reshape(scores.shape).mean(axis=1)

    def key(i: int) -> tuple[float, ...]:
        return failures[i], next_fails[i], scores[i].max(), mean_ranks[i], i

    return min(range(len(scores)), key=key)


def rank_test(first: Floats, second: Floats) -> float:
    """Returns the exact two-sided p-value of the Mann-Whitney test, with ties.

    It is the share of all ways to divide the pooled ranks into two groups of these
    sizes whose rank sum lies at least as far from its mean as the observed one.
    """
    doubled = np.rint(2 * ranks(np.concatenate([first, second]))).astype(int)
    total, size = int(doubled.sum()), len(first)
    # ways[k, s] counts the subsets of k ranks whose doubled sum is s.
    ways = np.zeros((size + 1, total + 1))
    ways[0, 0] = 1
    for rank in doubled:
        ways[1:, rank:] += ways[:-1, : total + 1 - rank]
    count = ways[-1]
    mean = total * size / len(doubled)
    distance = np.abs(np.arange(total + 1) - mean)
    observed = abs(int(doubled[:size].sum()) - mean)
    return float(count[distance >= observed - 1e-9].sum() / count.sum())


def fewest_seeds(num_optimizers: int) -> int:
    """Returns with how many seeds the test can distinguish any two optimizers."""
    target = limit(num_optimizers)
    return next(n for n in range(1, 100) if 2 / math.comb(2 * n, n) < target)


def limit(num_optimizers: int) -> float:
    """Returns the p-value below which two of so many optimizers differ (Bonferroni)."""
    return SIGNIFICANCE / max(math.comb(num_optimizers, 2), 1)


def seeds_to_decide(best: Floats, second: Floats, num_optimizers: int) -> float:
    """Estimates how many seeds show that the first optimizer is better.

    It is Noether's formula for the Mann-Whitney test, with the observed probability
    that a run of the first is better than a run of the second; infinite if that
    probability is at most one half.
    """
    pooled = ranks(np.concatenate([best, second]))
    size = len(best)
    smallest = size * (size + 1) / 2
    probability = 1 - (pooled[:size].sum() - smallest) / (size * len(second))
    if probability <= 0.5:
        return math.inf
    normal = NormalDist()
    z = normal.inv_cdf(1 - limit(num_optimizers) / 2) + normal.inv_cdf(_POWER)
    estimate = math.ceil(z**2 / (6 * (probability - 0.5) ** 2))
    return max(estimate, fewest_seeds(num_optimizers), size + 1)


def median(values: Floats) -> float:
    """Returns the median, without a warning where half of infinity is infinity."""
    ordered = np.sort(values)
    low, high = ordered[(len(values) - 1) // 2], ordered[len(values) // 2]
    return float(low if low == high else (low + high) / 2)


def ranks(values: Floats) -> Floats:
    """Returns the ranks from 1; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]

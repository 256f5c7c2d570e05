"""What tells arms apart from their seeds, against closed forms, SciPy and counting."""

import operator
from collections import Counter
from itertools import combinations, permutations, product

import numpy as np
import pytest
from scipy import stats

from benchmarks.lib import noise
from benchmarks.lib.regret import regret, regret_table, versus_table
from benchmarks.lib.summary import Score, floor, level
from benchmarks.lib.tables import floor_row, ranged


def score(*errors, failed=0, first_seed=0):
    """Its last `failed` runs failed."""
    return Score(
        tuple(
            {
                "seed": first_seed + seed,
                "error": error,
                "failed": seed >= len(errors) - failed,
                "learning_rate": 0.1,
            }
            for seed, error in enumerate(errors)
        )
    )


# Intervals


@pytest.mark.parametrize("num", [3, 5, 11])
def test_a_resampled_median_has_the_distribution_of_an_order_statistic(num):
    errors = np.arange(num, dtype=float)
    resamples = noise.resampled(errors)
    # The median of n draws is below x_k if more than half of them are: a binomial
    # probability; 2000 resamples know it to 4 standard errors.
    for k in range(1, num):
        below = stats.binom.sf(num // 2, num, k / num)
        tolerance = 4 * np.sqrt(below * (1 - below) / noise.NUM_RESAMPLES) + 1e-12
        assert np.mean(resamples < k) == pytest.approx(below, abs=tolerance)


def test_the_interval_is_scipys():
    errors = np.random.default_rng(3).lognormal(size=10)
    low, high = noise.interval(noise.resampled(errors))
    theirs = stats.bootstrap(
        (errors,), np.median, method="percentile", n_resamples=20000, rng=1
    ).confidence_interval
    # A median of resamples lies on one of few values; the ends are at the same ones
    # or their neighbours' midpoints.
    assert low == pytest.approx(theirs.low, rel=0.15)
    assert high == pytest.approx(theirs.high, rel=0.15)


def test_the_interval_covers_the_median_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    spans = [
        noise.interval(noise.resampled(rng.lognormal(size=10))) for _ in range(400)
    ]
    covered = np.mean([low <= 1.0 <= high for low, high in spans])
    # For ten seeds a percentile interval of the median is somewhat short or long of
    # 95 %; three standard errors of 400 trials are 3 %.
    assert 0.88 < covered < 0.99


def test_three_seeds_have_their_whole_range_as_interval():
    assert noise.interval(noise.resampled(np.array([1.0, 2.0, 4.0]))) == (1.0, 4.0)


# Level


def test_an_arm_is_level_if_its_interval_meets_that_of_the_best():
    column = {
        "best": score(0.10, 0.11, 0.12),
        "near": score(0.12, 0.13, 0.14),
        "far": score(0.13, 0.14, 0.15),
    }
    assert level(column) == {"best", "near"}


def test_an_arm_that_fails_more_often_is_not_level():
    errors = [0.1, 0.11, 0.12] * 4
    column = {
        "best": score(*errors),
        "five": score(*errors, failed=5),
        "six": score(*errors, failed=6),
    }
    # 0 of 12 against 5 of 12: p = 0.037; against 4: 0.093.
    assert noise.failure_p((0, 12, 4, 12)) == pytest.approx(0.0932, abs=1e-4)
    assert level(column) == {"best"}
    assert level({**column, "four": score(*errors, failed=4)}) == {"best", "four"}


def test_fishers_p_is_the_share_of_equal_tables():
    # All 4 failures of 12 are of one arm of 6: 2 (6 over 4) of (12 over 4) ways.
    assert noise.failure_p((4, 6, 0, 6)) == pytest.approx(2 * 15 / 495)
    assert noise.failure_p((0, 9, 0, 9)) == 1
    for counts in ((3, 20, 11, 17), (5, 12, 5, 12), (19, 20, 0, 4)):
        one, of_one, other, of_other = counts
        table = [[one, of_one - one], [other, of_other - other]]
        expected = stats.fisher_exact(table).pvalue
        assert noise.failure_p(counts) == pytest.approx(expected)


def test_fishers_p_of_several_cells_compares_each_in_itself():
    # Of two runs each: all four failures of both cells are the other arm's, each with
    # 1 of (4 over 2) ways, or the one's.
    cells = (0, 2, 2, 2), (0, 2, 2, 2)
    assert noise.failure_p(*cells) == pytest.approx(2 / 36)
    # One in which all fail, and one in which none does, change nothing.
    assert noise.failure_p(*cells, (5, 5, 5, 5), (0, 5, 0, 5)) == pytest.approx(2 / 36)


def test_fishers_p_of_several_cells_counts_every_exchange_of_runs():
    failed = [(0, 3, 2), (1, 3, 3), (0, 2, 1)]  # of the one, runs of each, of the other
    pools = [[1] * (a + b) + [0] * (2 * n - a - b) for a, n, b in failed]
    ways = [combinations(pool, len(pool) // 2) for pool in pools]
    totals = Counter(sum(map(sum, chosen)) for chosen in product(*ways))
    observed = totals[sum(a for a, *_ in failed)]
    expected = sum(count for count in totals.values() if count <= observed)
    found = noise.failure_p(*((a, n, b, n) for a, n, b in failed))
    assert found == pytest.approx(expected / totals.total())


def test_one_seed_tells_nothing():
    assert level({"a": score(0.1), "b": score(0.9)}) == {"a", "b"}


# The floor


def counted(errors, compare=operator.truediv):
    """The floor's distribution, every exchange of every seed counted out."""
    orders = list(permutations(range(len(errors))))
    lost = []
    for chosen in product(orders, repeat=errors.shape[1]):
        exchanged = np.stack([errors[list(o), i] for i, o in enumerate(chosen)], axis=1)
        medians = np.median(exchanged, axis=1)
        lost.append(compare(np.median(medians), medians.min()))
    return np.quantile(lost, (0.5, 0.95), method="inverted_cdf")


@pytest.mark.parametrize("compare", [operator.truediv, operator.sub])
@pytest.mark.parametrize(("arms", "seeds"), [(2, 4), (3, 4), (2, 10), (4, 2)])
def test_the_floor_is_that_of_all_exchanges(arms, seeds, compare):
    errors = np.random.default_rng(5).lognormal(size=(arms, seeds))
    found = noise.floor(errors, compare=compare)
    assert found == pytest.approx(counted(errors, compare))


def test_the_floor_of_many_exchanges_is_near_a_simulation_of_equal_arms():
    rng = np.random.default_rng(7)
    medians = np.median(rng.lognormal(sigma=0.3, size=(4000, 8, 10)), axis=-1)
    lost = np.median(medians, axis=1) / medians.min(axis=1)
    floors = [noise.floor(rng.lognormal(sigma=0.3, size=(8, 10))) for _ in range(10)]
    # The mean of ten tables' floors: each knows its spread to some 10 %.
    expected = np.quantile(lost, (0.5, 0.95)) - 1
    assert np.mean(floors, axis=0) - 1 == pytest.approx(expected, rel=0.2)


def test_what_cannot_be_exchanged_is_what_it_is():
    assert noise.floor(np.array([[1.0, 2.0, 3.0]])) == (1, 1)
    assert noise.floor(np.array([[1.0], [2.0], [4.0]])) == (2, 2)


def test_a_cells_floor_is_that_of_its_level_arms_on_the_seeds_they_share():
    near, far = score(0.10, 0.12, 0.14), score(0.8, 0.9, 0.95)
    other = score(0.11, 0.13, 0.15, first_seed=1)
    column = {"a": near, "b": other, "far": far}
    num, *found = floor(column)
    assert num == 2
    assert found == list(noise.floor(np.array([[0.12, 0.14], [0.11, 0.13]])))
    assert floor({"a": near, "far": far}) is None
    text = floor_row([column, {"a": near, "far": far}])
    assert text == ["*noise floor*", f"{found[0]:.2f}, 95 % {found[1]:.2f} (of 2)", "-"]


# Tables


TABLE = {
    ("1",): {
        "A": score(0.10, 0.11, 0.12),
        "B": score(0.10, 0.13, 0.12),
        "C": score(0.50, 0.51, 0.52),
    },
    ("2",): {
        "A": score(0.20, 0.22, 0.21),
        "B": score(0.19, 0.21, 0.23),
        "C": score(0.90, 0.97, 0.95, failed=3),
    },
}


def test_regrets_within_noise_are_level_and_others_are_not():
    by_arm = {r.arm: r for r in regret(TABLE)}
    assert {arm for arm, r in by_arm.items() if r.level} == {"A", "B"}
    assert by_arm["C"].failure_p == pytest.approx(
        stats.fisher_exact([[0, 3], [3, 0]])[1]
    )
    for r in by_arm.values():
        low, high = r.worst_interval()
        assert 1 <= low <= high
    # The lowest that the worst of C's costs can be, and the highest.
    low, high = by_arm["C"].worst_interval()
    assert 0.90 / 0.21 <= low <= by_arm["C"].worst <= high <= 0.52 / 0.10


def test_a_regret_table_marks_all_level_arms_alike_and_shows_the_floor():
    text = regret_table(TABLE, "cells")
    assert "would still seem to cost" in text
    rows = [
        line for line in text.splitlines() if line.startswith(("| A", "| B", "| C"))
    ]
    assert [row.count("**") for row in rows] == [2, 2, 0]


def test_one_arm_against_another_shows_the_interval_of_the_ratio():
    same = {("1",): {"A": score(0.1, 0.1), "B": score(0.2, 0.2)}}
    assert "| 0.50 [0.50, 0.50] |" in versus_table(same, [("A", "B")])


def test_a_number_is_marked_and_its_interval_stands_beside_it():
    assert ranged(0.5, (0.25, 1.0), ".2f", bold=True) == "**0.50** [0.25, 1.00]"


def test_a_rate_at_an_end_of_its_set_is_told():
    runs = score(0.1, 0.2).records
    assert Score(runs, (0.01, 0.1, 1.0)).rate == "1e-01"
    assert Score(runs, (0.01, 0.1)).rate == "1e-01 (end of its set)"
    assert Score(runs, (0.1, 1.0)).rate == "1e-01 (end of its set)"
    assert Score(runs).rate == "1e-01"


def test_an_arm_of_fewer_cells_is_not_the_first():
    table = {cell: dict(arms) for cell, arms in TABLE.items()}
    table["1",]["perfect"] = score(0.09, 0.09, 0.09)
    *_, last = regrets = regret(table)
    assert [r.arm for r in regrets] == ["A", "B", "C", "perfect"]
    # In its cell A's interval, from 0.10 / 0.09 on, does not meet its own.
    assert last.worst_interval() == (1, 1)
    assert not last.level

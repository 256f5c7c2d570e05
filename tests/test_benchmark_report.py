"""Tests what finished runs say: statistics, scores, tables, windows of rates."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from benchmarks.lib.grid import Ledger
from benchmarks.lib.suite import (
    Preset,
    Protocol,
    Suite,
    entries,
    lowest_median,
    problems,
)
from benchmarks.report import figures, pages
from benchmarks.report.pages import Page
from benchmarks.report.rates import (
    rates_figure,
    rates_table,
    window,
)
from benchmarks.report.scores import Quantity, Score, scores, sweeps, tied
from benchmarks.report.statistics import (
    bootstrap_interval,
    failure_interval,
    overlap,
    rank_test,
)
from benchmarks.report.tables import overview_table, score_table
from benchmarks.suites.calibration_page import ending, named
from stablegrad_optax._report_remedies import VERDICTS, remedies


def reported(problem, name, *errors, rate=0.1):
    return [
        {
            "problem": problem,
            "optimizer": name,
            "learning_rate": rate,
            "phase": "reported",
            "seed": seed,
            "error": error if math.isfinite(error) else None,
            "failed": not error <= 0.5,
        }
        for seed, error in enumerate(errors)
    ]


def score(*errors, rate=0.1):
    return Score(tuple(reported("1", "Adam", *errors, rate=rate)))


# Statistics


@pytest.mark.parametrize(("failed", "runs"), [(0, 20), (3, 20), (20, 20)])
def test_wilsons_interval_is_its_formula(failed, runs):
    z, share = stats.norm.ppf(0.975), failed / runs
    middle = (share + z**2 / (2 * runs)) / (1 + z**2 / runs)
    root = math.sqrt(share * (1 - share) / runs + z**2 / (4 * runs**2))
    half = z / (1 + z**2 / runs) * root
    expected = middle - half, middle + half
    assert failure_interval(failed, runs) == pytest.approx(expected, abs=1e-12)


def test_the_interval_of_a_median_is_that_of_all_resamples():
    """All 256 resamples of four seeds can be counted; 2000 are close to that."""
    values = np.array([0.1, 0.2, 0.4, 0.8])
    medians = [np.median(drawn) for drawn in itertools.product(values, repeat=4)]
    expected = np.quantile(medians, (0.025, 0.975))
    assert bootstrap_interval(values) == pytest.approx(expected, abs=0.06)
    assert bootstrap_interval([0.3]) == (0.3, 0.3)
    assert bootstrap_interval([0.3, 0.3]) == (0.3, 0.3)


def test_the_rank_test_counts_all_exchanges():
    one, other = np.array([1.0, 2.0, 2.0, 3.0]), np.array([2.0, 4.0, np.inf, np.inf])
    ranks = stats.rankdata(np.concatenate([one, other]))
    sums = [sum(drawn) for drawn in itertools.combinations(ranks, 4)]
    distance = abs(ranks[:4].sum() - 18)
    expected = np.mean([abs(total - 18) >= distance - 1e-9 for total in sums])
    assert rank_test(one, other) == pytest.approx(expected)
    assert rank_test(one, one) == 1


def test_intervals_overlap_where_they_share_a_number():
    assert overlap((0, 1), (1, 2))
    assert overlap((0, 3), (1, 2))
    assert not overlap((0, 1), (1.1, 2))


# Scores


TABLE = [
    *reported("1", "Adam", 0.10, 0.12, 0.11),
    *reported("1", "AdamW", 0.20, 0.22, math.nan),
    *reported("1", "Muon", 0.9, 2.0, 3.0),
    *reported("2", "Adam", 0.05, 0.04, 0.06),
    *reported("2", "AdamW", 0.04, 0.04, 0.04),
    # No optimizer solves this problem in every run.
    *reported("3", "Adam", 0.6, 0.6, 0.6),
]


def test_scores_count_failures_and_cap_errors():
    tuning = {**TABLE[0], "phase": "tuning", "error": 1e-9}
    table = scores([tuning, *TABLE], ("problem",), lowest_median)
    assert list(table) == [("1",), ("2",), ("3",)]
    muon = table["1",]["Muon"]
    assert (muon.middle, muon.failures) == (1.0, "3/3")
    assert table["1",]["AdamW"].values.tolist() == [0.20, 0.22, 1.0]
    assert table["1",]["AdamW"].failed.tolist() == [False, False, True]


def test_runs_at_a_rate_that_is_no_longer_chosen_do_not_count():
    old, new = (
        reported("1", "Adam", 0.5, 0.6),
        reported("1", "Adam", 0.1, 0.2, rate=0.3),
    )
    tuning = [{**old[0], "phase": "tuning"}]
    (found,) = scores([*tuning, *old], ("problem",), lowest_median)["1",].values()
    assert found.records == tuple(old)
    tuning.append({**new[0], "phase": "tuning"})
    both = scores([*tuning, *old, *new], ("problem",), lowest_median)
    (found,) = both["1",].values()
    assert found.records == tuple(new)
    assert found.rates == (0.1, 0.3)
    assert found.is_at_an_end
    assert scores([*tuning, *old], ("problem",), lowest_median) == {}


def test_a_quantity_has_its_own_scale_direction_and_statistic():
    accuracy = Quantity(
        "accuracy", "accuracy", 100.0, missing=0.0, higher_is_better=True
    )
    rows = [
        {"seed": i, "accuracy": x, "failed": False} for i, x in enumerate((0.5, None))
    ]
    found = Score(tuple(rows), accuracy)
    assert found.values.tolist() == [50.0, 0.0]
    assert found.middle == 25.0


def test_the_best_is_tied_with_what_its_intervals_overlap():
    column = {
        "Adam": score(0.10, 0.11, 0.12),
        "AdamW": score(0.11, 0.12, 0.13),
        "Muon": score(0.30, 0.31, 0.32),
    }
    assert tied(column) == {"Adam", "AdamW"}
    # Equal errors, and failures that are not equal by chance.
    often = score(*[0.1] * 11, *[0.9] * 9)
    assert tied({"Adam": score(*[0.1] * 20), "AdamW": often}) == {"Adam"}


def test_tables_have_a_line_for_each_optimizer():
    table = scores(TABLE, ("problem",), lowest_median)
    lines = score_table(table["1",]).splitlines()
    assert lines[2] == "| Adam | 0/3 | **0.11** | 0.1 to 0.12 | 1e-01 |"
    assert lines[4].startswith("| Muon | 3/3 | 1 |")
    overview = overview_table(table)
    assert "All 2 problems" in overview
    assert "| AdamW | 1/6 | 3% to 56% | 1/2 |" in overview
    assert overview_table({("1",): table["1",]}) == ""


# Learning rates


def test_a_window_holds_the_rates_that_are_about_as_good_as_the_best():
    by_rate = {
        0.001: score(0.4, 0.4, rate=0.001),  # more than 3 times the lowest
        0.003: score(0.2, 0.2, rate=0.003),
        0.01: score(0.1, 0.1, rate=0.01),
        0.03: score(0.1, 0.2, rate=0.03),
        0.1: score(0.05, 0.9, rate=0.1),  # half of the runs fail
    }
    best, lowest, highest = window(by_rate)
    assert (best.learning_rate, lowest, highest) == (0.01, 0.003, 0.03)
    text = rates_table({"Adam": by_rate})
    assert "| Adam | 0.1 | 0.1 to 0.1 | 0/2 | 1.0e-02 | 10 |" in text
    few = {rate: by_rate[rate] for rate in (0.003, 0.01)}
    assert "| 3.33+ |" in rates_table({"Adam": few})
    assert "| none |" in rates_table({"Adam": {0.1: by_rate[0.1]}})


def test_sweeps_keep_every_rate_and_are_drawn():
    rows = [
        r for rate in (0.1, 0.3) for r in reported("1", "Adam", 0.2, 0.9, rate=rate)
    ]
    found = sweeps(rows, ("problem",))
    assert list(found["1",]["Adam"]) == [0.1, 0.3]
    assert [s.failures for s in found["1",]["Adam"].values()] == ["1/2", "1/2"]
    (ax,) = rates_figure(found, str).axes
    assert [len(line.get_xdata()) for line in ax.lines] == [2, 2]  # and the crosses
    assert rates_figure({}, str) is None


def test_a_suite_without_tuning_is_reported_by_rate(tmp_path):
    """Its page has a figure and two numbers for each optimizer, and says what lacks."""
    groups = entries("all", problems(network=["a", "b"], steps=[3]), ("Adam", "Muon"))
    preset = Preset(groups, Protocol((), (0, 1, 2), None), "no time", "a test")
    suite = Suite("rates", "a test", {"all": preset}, training=None)
    origin = {
        "device": "cpu",
        "jax": "1",
        "stablegrad_optax": "1",
        "date": "2026-01-01",
    }
    records = [
        {**run.as_record(), "error": error, "failed": error > 0.5, **origin}
        for run in Ledger(preset).missing(preset.entries)
        for error in [10 * run.learning_rate]
    ]
    pages.write(Page.default(suite), records, suite, tmp_path)
    text = (tmp_path / "rates.md").read_text()
    # Adam has five rates from 3e-4: the errors of the first two are within 3 times.
    assert "| Adam | 0.003 | 0.003 to 0.003 | 0/3 | 3.0e-04 | 1+ |" in text
    assert text.count("| Muon | 0.01 | 0.01 to 0.01 | 0/3 | 1.0e-03 | 2+ |") == 2
    assert "rates_all_rates.png" in text
    assert (tmp_path / "rates_all_rates.png").stat().st_size > 1000
    assert "Not finished" not in text
    pages.write(Page.default(suite), records[:-1], suite, tmp_path)
    assert "**Not finished: 65 of 66 runs.**" in (tmp_path / "rates.md").read_text()


def test_an_optimizer_has_one_line_in_all_figures():
    """A method and a changed constant are lines of the panel of their base."""
    lines = {
        "Muon": ("Muon", "alone"),
        "range-safe Muon": ("Muon", "range-safe norm"),
        "clip + range-safe Muon": ("range-safe Muon", "clip"),
        "StableGrad + SOAP": ("SOAP", "StableGrad"),
        "AdamW (b2=0.9, eps=1e-16)": ("AdamW (b2=0.9)", "smaller eps"),
        "LAMB": ("layer-wise rates", "LAMB"),
        "LARS": ("layer-wise rates", "LARS"),
    }
    assert {name: figures.base_and_line(name) for name in lines} == lines
    sweep = {name: {0.1: score(0.1, 0.9), 0.3: score(0.2, 0.2)} for name in lines}
    figure = rates_figure({("1",): sweep}, str)
    panels = {ax.texts[0].get_text(): ax for ax in figure.axes if ax.texts}
    assert list(panels) == [
        "Muon",
        "range-safe Muon",
        "SOAP",
        "AdamW (b2=0.9, eps=1e-16)",  # without the unchanged one, so of its own
        "layer-wise rates",
    ]
    # The control is compared with Muon, and with the method before it.
    assert len(panels["Muon"].collections) == len(panels["range-safe Muon"].collections)
    assert {"x", "None"} == {line.get_marker() for line in figure.axes[0].lines}


# The calibration's page


BAD, GOOD = (
    (0.8, 0.81, math.nan, 0.83, 0.84, math.nan),
    (0.1, 0.11, 0.12, 0.13, 0.14, 0.15),
)
NETWORKS = {
    # name: errors of AdamW, errors of the remedy, verdict, verdict with history
    "helped, seen": (BAD, GOOD, "large", "exploding at initialization"),
    "helped, not seen": (BAD, GOOD, "no trouble seen", "no trouble seen"),
    "fine, seen at first": (GOOD, GOOD, "large", "no trouble seen"),
    "fine, seen": (GOOD, BAD, "unbalanced between layers", "unbalanced between layers"),
    "dead": (GOOD, GOOD, "dead weights", "dead weights"),
    # Significant, and yet not by much.
    "a little": (
        [0.12 + 0.001 * i for i in range(6)],
        [0.11] * 6,
        "no trouble seen",
        "no trouble seen",
    ),
}


def test_the_calibration_counts_false_alarms_and_misses():
    table, initialized, measured = {}, {}, []
    for name, (adamw, remedy, first, late) in NETWORKS.items():
        table[name, 200, "own"] = {
            "AdamW": score(*adamw),
            "clip + AdamW (b2=0.9)": score(*adamw),
            "StableGrad + AdamW (b2=0.9)": score(*adamw),
        }
        # Another preset may hold the arm of other weights.
        initialized[name, 200, "Glorot"] = {"AdamW": score(*remedy)}
        measured.append(
            {
                "network": name,
                "steps": 200,
                "weights": "own",
                "max_std": 1.0,
                "std_ratio": None,
                "below_adam_eps": 0.0,
                "verdict": first,
                "verdict_with_history": late,
            }
        )
    text = ending(measured, {"cpu": table, "initializer": initialized})
    for name in NETWORKS:
        helped = "Glorot weights" if name.startswith("helped") else "none"
        lines = [x for x in text.splitlines() if x.startswith(f"| {name} |")]
        assert [x.endswith(f"| {helped} |") for x in lines] == [True, False]
    assert "| the first gradient | 2/4 | 1/2 |" in text
    assert "| the first hundred steps | 1/4 | 1/2 |" in text
    row = "| helped, seen | 1e+00 | inf | 0% | large | exploding at initialization |"
    assert row in text


# What the report's table calls a remedy, and what the calibration does of it; each
# learning rate is tuned.
ARMS = {
    "initializer": "Glorot weights",
    "eps": "eps=1e-16",
    "b2": "b2=0.9",
    "clip": "clip, b2=0.9",
    "scale control": "StableGrad, b2=0.9",
}


def test_the_calibration_tries_what_the_report_names():
    for verdict in VERDICTS:
        arms = [ARMS[r.name] for r in remedies(verdict) if r.name in ARMS]
        is_quiet = verdict in ("no trouble seen", "dead weights")
        assert list(named(verdict)) == (list(ARMS.values()) if is_quiet else arms)

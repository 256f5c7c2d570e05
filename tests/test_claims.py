"""What is said of two arms, against numbers worked out by hand."""

import numpy as np
import pytest
from scipy import stats

from benchmarks.lib import claims, noise
from benchmarks.lib.arms import Arm
from benchmarks.lib.claims import Claim
from benchmarks.lib.summary import Score, cell_of
from benchmarks.suites.pinn import PRESETS
from benchmarks.suites.pinn_claims import CELL, CLAIMS


def score(errors, num_failed=0):
    return Score(
        tuple(
            {"seed": seed, "error": error, "failed": seed < num_failed}
            for seed, error in enumerate(errors)
        )
    )


LOW, HIGH = np.linspace(0.1, 0.2, 10), np.linspace(0.4, 0.6, 10)
COLUMN = {
    "low": score(LOW),
    "high": score(HIGH),
    "near": score(LOW + 0.005),
    "fails": score(np.where(np.arange(10) < 6, 1.0, HIGH), num_failed=6),
    "lost": score(np.ones(10), num_failed=10),
    "zero": score(np.zeros(10)),
}


def row(says, one, other, others=()):
    """The last entries of the row of a claim."""
    named = [Claim("A sentence.", says, one, other, (("cell",),)), *others]
    text = claims.table(named, [{}, {("cell",): COLUMN}], lambda cell: cell[0])
    line = text.splitlines()[4]
    assert line.startswith(f"| A sentence. | cell | {one} | {other} | ")
    return [entry.strip() for entry in line.split("|")][5:-1]


def test_errors_are_compared_by_mann_and_whitneys_test():
    failed, ratio, seeds, p, verdict = row("errs less", "low", "high")
    assert (failed, seeds, verdict) == ("0 of 10, 0 of 10", "10", "carried")
    assert ratio.startswith("0.30 [0.")
    assert float(p) == pytest.approx(stats.mannwhitneyu(LOW, HIGH).pvalue, rel=0.05)
    assert row("errs less", "high", "low")[-1] == "**the opposite**"
    assert row("errs less", "low", "near")[-1] == "not carried"


def test_failures_are_compared_by_fishers():
    failed, *_, p, verdict = row("fails less", "low", "fails")
    # 6 of 20 all of one arm: 2 (10 over 6) of the (20 over 6) ways.
    assert (failed, p, verdict) == ("0 of 10, 6 of 10", "0.011", "carried")
    assert row("fails less", "fails", "low")[-1] == "**the opposite**"
    assert row("fails less", "low", "high")[-1] == "not carried"


def test_with_more_rows_more_is_asked():
    others = [Claim("Another.", "errs less", "low", "high", (("cell",),) * 9)]
    assert row("fails less", "low", "fails", others)[-1] == "not carried"
    assert row("errs less", "low", "high", others)[-1] == "carried"


def test_rows_that_ask_for_no_p_raise_none():
    others = [Claim("Another.", "is level", "low", "high", (("cell",),) * 9)]
    assert row("fails less", "low", "fails", others)[-1] == "carried"


def test_level_arms_and_lost_ones():
    assert row("is level", "low", "near")[-1] == "carried"
    assert row("is level", "low", "high")[-1] == "not carried"
    assert row("is level", "lost", "lost")[-1] == "both fail"


def test_where_errors_are_0_there_is_no_ratio():
    _, ratio, *_, verdict = row("errs less", "high", "zero")
    assert (ratio, verdict) == ("-", "**the opposite**")
    assert row("errs less", "zero", "high")[-1] == "carried"


def test_what_is_not_run_is_said():
    assert row("errs less", "low", "nowhere") == ["-", "-", "-", "-", "not run"]


def test_arms_of_different_presets_are_not_compared():
    claim = Claim("A sentence.", "errs less", "low", "high", (("cell",),))
    parts = [{("cell",): {name: COLUMN[name]}} for name in ("low", "high")]
    assert "| not run |" in claims.table([claim], parts, lambda cell: cell[0])


def test_the_preset_with_the_most_seeds_counts():
    claim = Claim("A sentence.", "errs less", "low", "high", (("cell",),))
    few = {name: score(errors[:4]) for name, errors in (("low", LOW), ("high", HIGH))}
    for parts in (few, COLUMN), (COLUMN, few):
        text = claims.table([claim], [{("cell",): p} for p in parts], lambda c: c[0])
        assert "| 0 of 10, 0 of 10 |" in text


def test_cells_may_be_counted_together():
    claim = Claim(
        "A sentence.", "fails less", "low", "high", (("a",), ("b",)), together=True
    )
    arms = {"low": score(LOW, 1), "high": score(HIGH, 4)}
    both = {("a",): arms, ("b",): arms}
    text = claims.table([claim], [both], lambda cell: cell[0])
    assert "| 2 cells together | low | high | 2 of 20, 8 of 20 |" in text
    p = noise.failure_p((1, 10, 4, 10), (1, 10, 4, 10))
    assert f"| 20 | {p:.2g} | not carried |" in text
    assert "| not run |" in claims.table([claim], [{("a",): arms}], lambda c: c[0])


def test_every_claim_is_of_arms_and_a_cell_of_one_preset():
    run = {
        (cell_of(e.settings, CELL), e.settings["arm"], preset)
        for preset, of in PRESETS.items()
        for e in of.entries
    }
    for claim in CLAIMS:
        for cell in claim.cells:
            assert any(
                {(cell, Arm.of(arm).name, p) for arm in (claim.one, claim.other)} <= run
                for p in PRESETS
            ), (claim, cell)

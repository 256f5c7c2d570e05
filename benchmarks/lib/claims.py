"""Sentences about two arms, each with the cells and seeds that carry it or do not."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from benchmarks.lib import noise
from benchmarks.lib.summary import Cell, Score, Scores, failure_p, level
from benchmarks.lib.tables import markdown_table, ranged

_Both = tuple[Score, Score]  # of one arm and of the other


@dataclass(frozen=True)
class Claim:
    """That one arm does something beside another, in some cells.

    Attributes:
        sentence: as a text may have it.
        says: "fails less", "errs less" or "is level".
        one: the arm that does.
        other: the arm beside it.
        cells: one row of the table each.
        together: whether they are one row instead, of all their runs.
    """

    sentence: str
    says: Literal["fails less", "errs less", "is level"]
    one: str
    other: str
    cells: tuple[Cell, ...]
    together: bool = False


def table(
    claims: Sequence[Claim], presets: Iterable[Scores], title: Callable[[Cell], str]
) -> str:
    """Markdown: whether the seeds carry each claim, in each of its cells.

    To fail less is tested by `failure_p`, to err less by Mann and Whitney's test of the
    errors, both two-sided, at 0.05 over the number of rows that were run and ask for a
    p. To be level asks for none: it is `noise.level` of the two, not to be told apart
    by so many seeds.

    Args:
        claims: what is claimed.
        presets: the scores of each; arms are compared within one of them, where more
            than one has both in that with the most seeds.
        title: what a cell is called.
    """
    presets = list(presets)
    found: list[tuple[Claim, str, list[_Both]]] = []
    for claim in claims:
        rows_of = [(title(cell), (cell,)) for cell in claim.cells]
        if claim.together:
            rows_of = [(f"{len(claim.cells)} cells together", claim.cells)]
        for where, cells in rows_of:
            run = [both for cell in cells if (both := _scores(claim, cell, presets))]
            found.append((claim, where, run if len(run) == len(cells) else []))
    num_tests = sum(bool(run) and claim.says != "is level" for claim, _, run in found)
    threshold, rows = 0.05 / max(1, num_tests), []
    for claim, where, run in found:
        evidence = ["-", "-", "-", "-", "not run"]
        if run:
            evidence = _evidence(claim, run, threshold)
        rows.append([claim.sentence, where, claim.one, claim.other, *evidence])
    head = ["claim", "cell", "one arm", "the other", "failed runs"]
    head += ["ratio of the errors", "seeds", "p", "so"]
    return (
        "What may be said, and what carries it. p is Fisher's for failures (of cells "
        "together stratified: each is compared in itself), Mann and "
        f"Whitney's for errors, two-sided; with {num_tests} rows that were run and ask "
        f"for one it must be below {threshold:.2g}. Level is what so many seeds do not "
        "tell apart.\n\n"
        f"{markdown_table(head, rows, num_names=4)}"
    )


def _scores(claim: Claim, cell: Cell, presets: Iterable[Scores]) -> _Both | None:
    """Both arms' in the cell, of the preset that has the most seeds of both."""
    columns = (scores.get(cell, {}) for scores in presets)
    both = [
        (arms[claim.one], arms[claim.other])
        for arms in columns
        if {claim.one, claim.other} <= arms.keys()
    ]
    return max(both, key=lambda pair: min(s.num_runs for s in pair), default=None)


def _evidence(claim: Claim, cells: Sequence[_Both], threshold: float) -> list[str]:
    """Failures, ratio, seeds, p, and what follows."""
    one, other = (
        Score(tuple(record for score in arm for record in score.records))
        for arm in zip(*cells, strict=True)
    )
    ratio, interval = ratio_of_medians(one, other)
    if claim.says == "fails less":
        p = failure_p(cells)
        distance = one.num_failed / one.num_runs - other.num_failed / other.num_runs
    else:
        p = float(stats.mannwhitneyu(one.errors, other.errors).pvalue)
        distance = one.median - other.median
    verdict = "not carried"
    if claim.says == "is level":
        if len(level({"one": one, "other": other})) == 2:
            verdict = "carried"
    elif p < threshold:
        verdict = "carried" if distance < 0 else "**the opposite**"
    if one.num_failed == one.num_runs and other.num_failed == other.num_runs:
        verdict = "both fail"
    return [
        f"{one.num_failed} of {one.num_runs}, {other.num_failed} of {other.num_runs}",
        ranged(ratio, interval, ".2f", bold=False) if other.median else "-",
        str(min(one.num_runs, other.num_runs)),
        f"{p:.2g}",
        verdict,
    ]


def ratio_of_medians(one: Score, other: Score) -> tuple[float, tuple[float, float]]:
    """And its bootstrap interval, the seeds of each arm drawn for itself.

    Neither is a number where the other's errors are 0.
    """
    rng = np.random.default_rng(0)
    drawn = [noise.resampled(score.errors, rng=rng) for score in (one, other)]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = float(np.divide(one.median, other.median))
        return ratio, noise.interval(np.divide(*drawn))

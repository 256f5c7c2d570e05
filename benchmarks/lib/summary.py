"""What finished runs say: a score of every arm in every cell, and its regret.

A cell is what is trained, whatever the arm; its name is a tuple of settings.
"""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.lib.arms import SEPARATOR, in_order
from benchmarks.lib.runs import Record, capped_error
from benchmarks.lib.suite import Choice, lowest_median

Cell = tuple[str | int, ...]


@dataclass(frozen=True)
class Score:
    """The reported runs of one arm in one cell, at its chosen learning rate."""

    records: tuple[Record, ...]  # one for each seed

    @property
    def median(self) -> float:
        """Of the relative errors, each 1 at most: what predicting zero scores."""
        return float(np.median([capped_error(record) for record in self.records]))

    @property
    def num_runs(self) -> int:
        return len(self.records)

    @property
    def num_failed(self) -> int:
        return sum(record["failed"] for record in self.records)

    @property
    def solved(self) -> bool:
        return not self.num_failed

    @property
    def learning_rate(self) -> float:
        return self.records[0]["learning_rate"]

    @property
    def failures(self) -> str:
        return f"({self.num_failed}/{self.num_runs})"

    @property
    def ms_per_step(self) -> float:
        return float(np.median([record["ms_per_step"] for record in self.records]))


Scores = dict[Cell, dict[str, Score]]  # cell -> arm -> score


def scores(
    records: Iterable[Record], names: Sequence[str], choose: Choice = lowest_median
) -> Scores:
    """The reported runs, by cell and arm, in the order of the file.

    Where the optimizer belongs to the cell an arm's name is that of its treatment.

    Where an arm's rate is tuned only the runs at the rate that is chosen count: a file
    keeps those of an earlier, smaller set of rates.

    Args:
        records: the lines of a results file.
        names: the settings that make a cell.
        choose: how rates were chosen.
    """
    tuned: dict[tuple[Cell, str], list[Record]] = {}
    reported: dict[tuple[Cell, str], list[Record]] = {}
    for record in records:
        arm = record["arm"]
        if "optimizer" in names:
            arm, _, _ = arm.partition(SEPARATOR)
        key = tuple(record[name] for name in names), arm
        by_phase = tuned if record["phase"] == "tuning" else reported
        by_phase.setdefault(key, []).append(record)
    table: Scores = {}
    for (cell, arm), runs in reported.items():
        if of_tuning := tuned.get((cell, arm)):
            rate = choose(of_tuning)
            runs = [run for run in runs if run["learning_rate"] == rate]
        if runs:
            table.setdefault(cell, {})[arm] = Score(tuple(runs))
    return table


def complete(table: Scores) -> Scores:
    """The cells in which every arm of the table was run."""
    every = {arm for arms in table.values() for arm in arms}
    return {cell: arms for cell, arms in table.items() if arms.keys() == every}


def solvable(table: Scores) -> Scores:
    """The cells in which some arm never failed."""
    return {
        cell: arms
        for cell, arms in table.items()
        if any(score.solved for score in arms.values())
    }


@dataclass(frozen=True)
class Regret:
    """What choosing one arm everywhere costs against the best arm of each cell.

    A failure in a cell is a failure of any of its runs. Cells in which every arm
    failed say nothing about the choice and are left out.

    Attributes:
        arm: its name.
        costs: its median error beside the lowest median error of any arm, by cell:
            their ratio, or as `compare` says.
        failed: the cells in which it failed though another arm did not.
        num_failed_runs: in all cells that are not left out.
        num_runs: likewise.
    """

    arm: str
    costs: Mapping[Cell, float]
    failed: tuple[Cell, ...]
    num_failed_runs: int
    num_runs: int

    @property
    def worst(self) -> float:
        return max(self.costs.values())

    @property
    def median(self) -> float:
        return float(np.median(list(self.costs.values())))


def regret(
    table: Scores, compare: Callable[[float, float], float] = operator.truediv
) -> list[Regret]:
    """The regret of every arm, the best first: fewest failed cells, least worst cost.

    Args:
        table: best with the same arms in each cell, as `complete` gives them; an arm
            that misses some cells is compared in the others.
        compare: (median error, the lowest of the cell) -> what the choice costs there.
    """
    table = solvable(table)
    best = {
        cell: min(score.median for score in arms.values())
        for cell, arms in table.items()
    }
    by_arm: dict[str, dict[Cell, Score]] = {}
    for cell, arms in table.items():
        for arm, score in arms.items():
            by_arm.setdefault(arm, {})[cell] = score
    regrets = [
        Regret(
            arm,
            {cell: compare(score.median, best[cell]) for cell, score in of_arm.items()},
            tuple(cell for cell, score in of_arm.items() if not score.solved),
            sum(score.num_failed for score in of_arm.values()),
            sum(score.num_runs for score in of_arm.values()),
        )
        for arm, of_arm in by_arm.items()
    ]
    return sorted(regrets, key=lambda r: (len(r.failed), r.worst))


def provenance(records: Sequence[Record]) -> str:
    """Seeds, devices and versions of runs."""

    def all_of(key: str, phase: str | None = None) -> list:
        chosen = (r for r in records if phase in (None, r["phase"]))
        return sorted({record[key] for record in chosen})

    def seeds(phase: str) -> str:
        values = all_of("seed", phase)
        whole = len(values) > 2 and values == list(range(values[0], values[-1] + 1))
        if whole:
            return f"{values[0]} to {values[-1]}"
        return ", ".join(map(str, values)) or "none"

    return (
        f"reported seeds {seeds('reported')}, tuning seeds {seeds('tuning')}; "
        f"{', '.join(all_of('device'))}; jax {', '.join(all_of('jax'))}, "
        f"stablegrad_optax {', '.join(all_of('stablegrad_optax'))}; "
        f"{all_of('date')[0][:10]} to {all_of('date')[-1][:10]}"
    )


def regret_table(
    regrets: Sequence[Regret],
    cells: str,
    *,
    cost: str = "the median error over that of the cell's best arm",
    digits: int = 2,
) -> str:
    """Markdown: what choosing one arm in all cells costs.

    Args:
        regrets: as `regret` gives them.
        cells: their name.
        cost: what its costs are.
        digits: of them, after the point.
    """
    if not regrets:
        return f"None of the {cells} is finished in which any arm never failed.\n"
    num_cells = len({cell for r in regrets for cell in r.costs})
    rows = [
        [
            r.arm,
            str(len(r.costs)),
            str(len(r.failed)),
            f"{r.num_failed_runs} of {r.num_runs}",
            f"{r.worst:.{digits}f}",
            f"{r.median:.{digits}f}",
        ]
        for r in regrets
    ]
    head = [
        "arm",
        "cells it was run in",
        "of them failed in though another arm did not",
        "failed runs",
        "cost in the worst cell",
        "in the median cell",
    ]
    return (
        f"Regret over the {num_cells} {cells} in which at least one arm never failed; "
        f"the cost is {cost}. Arms of fewer cells are compared in those alone:\n\n"
        f"{markdown_table(head, rows)}"
    )


def versus_table(table: Scores, pairs: Iterable[tuple[str, str]]) -> str:
    """Markdown: one arm against another, in the solvable cells that have both.

    The last column is the probability, if both arms failed equally often, of numbers
    of failed runs at least so far apart (Fisher's exact test, two sides).

    Args:
        table: of all cells.
        pairs: of arms; those of which no cell has both are left out.
    """
    rows = []
    for pair in pairs:
        both = [
            (arms[pair[0]], arms[pair[1]])
            for arms in solvable(table).values()
            if arms.keys() >= set(pair)
        ]
        if not both:
            continue
        ratios = np.array([ours.median / theirs.median for ours, theirs in both])
        failed = np.sum([[s.num_failed for s in of_cell] for of_cell in both], axis=0)
        runs = np.sum([[s.num_runs for s in of_cell] for of_cell in both], axis=0)
        p = stats.fisher_exact([failed, runs - failed]).pvalue
        rows.append(
            [
                *pair,
                f"{np.sum(ratios < 1)} of {len(ratios)}",
                f"{np.median(ratios):.2f}",
                f"{failed[0]} of {runs[0]} against {failed[1]} of {runs[1]}",
                f"{p:.2g}",
            ]
        )
    head = [
        "one arm",
        "against",
        "cells in which its error is lower",
        "median ratio of the errors",
        "failed runs",
        "Fisher's p",
    ]
    return markdown_table(head, rows, num_names=2) if rows else ""


def arms_table(
    columns: Mapping[str, Mapping[str, Any]],
    entry: Callable[[Mapping[str, Any], str], str],
    first: Iterable[str],
) -> str:
    """Markdown: a line an arm, "-" where a column lacks it.

    Args:
        columns: head -> arm -> what was found.
        entry: (column, arm) -> what is written.
        first: the arms that come first; the others follow as in the vocabulary.
    """
    rows = [
        [arm, *(entry(c, arm) if arm in c else "-" for c in columns.values())]
        for arm in in_order(columns.values(), first)
    ]
    return markdown_table(["arm", *columns], rows)


def markdown_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, num_names: int = 1
) -> str:
    """Its first columns are names and left-aligned, the others numbers."""
    num_numbers = len(head) - num_names
    lines = [head, ["---"] * num_names + ["---:"] * num_numbers, *rows]
    escaped = [[entry.replace("|", "\\|") for entry in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)

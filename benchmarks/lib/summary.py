"""What finished runs say: a score of every arm in every cell, and its regret.

A cell is what is trained, whatever the arm; its name is a tuple of settings.
"""

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.lib import noise
from benchmarks.lib.arms import SEPARATOR
from benchmarks.lib.runs import Record, capped_error
from benchmarks.lib.suite import Choice, lowest_median

Cell = tuple[str | int, ...]


@dataclass(frozen=True)
class Score:
    """The reported runs of one arm in one cell, at its chosen learning rate.

    Attributes:
        records: one for each seed.
        rates: those that it was chosen from, increasing; none if it was given.
    """

    records: tuple[Record, ...]
    rates: tuple[float, ...] = ()

    @property
    def by_seed(self) -> list[Record]:
        return sorted(self.records, key=lambda record: record["seed"])

    @property
    def errors(self) -> np.ndarray:
        """Relative, f[seeds] by seed; each 1 at most: what predicting zero scores."""
        return np.array([capped_error(record) for record in self.by_seed])

    @property
    def median(self) -> float:
        return float(np.median(self.errors))

    @property
    def interval(self) -> tuple[float, float]:
        """The bootstrap interval of the median over seeds."""
        return noise.interval(noise.resampled(self.errors))

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
    def rate(self) -> str:
        """As a table has it: whether a better one may lie beyond the set is said."""
        is_end = self.learning_rate in (*self.rates[:1], *self.rates[-1:])
        return f"{self.learning_rate:.0e}" + " (end of its set)" * is_end

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
        rates: tuple[float, ...] = ()
        if of_tuning := tuned.get((cell, arm)):
            rate = choose(of_tuning)
            runs = [run for run in runs if run["learning_rate"] == rate]
            rates = tuple(sorted({run["learning_rate"] for run in of_tuning}))
        if runs:
            table.setdefault(cell, {})[arm] = Score(tuple(runs), rates)
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


def level(
    column: Mapping[str, Score], statistic: noise.Statistic = np.median
) -> set[str]:
    """The arms that a cell's seeds cannot tell from its best; see `noise.level`."""
    return noise.level(
        {arm: score.errors for arm, score in column.items()},
        {arm: score.num_failed for arm, score in column.items()},
        statistic,
    )


def floor(
    column: Mapping[str, Score],
    statistic: noise.Statistic = np.median,
    compare: noise.Compare = operator.truediv,
) -> tuple[int, float, float] | None:
    """The number of level arms of a cell and their `noise.floor`; None for one alone.

    Only seeds that all of them have count.
    """
    arms = [column[arm] for arm in level(column, statistic)]
    seeds = set.intersection(*({r["seed"] for r in arm.records} for arm in arms))
    if len(arms) < 2 or not seeds:
        return None
    shared = [
        Score(tuple(r for r in arm.records if r["seed"] in seeds)) for arm in arms
    ]
    errors = np.stack([score.errors for score in shared])
    return len(arms), *noise.floor(errors, statistic, compare)


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
        worst_interval: the bootstrap interval over seeds of `worst`, a maximum, which
            noise only raises: it may lie above it.
        median_interval: likewise of `median`.
        failure_p: Fisher's, of its failures and those of the first arm of the list.
        level: whether no more than noise is between it and the first of the list.
    """

    arm: str
    costs: Mapping[Cell, float]
    failed: tuple[Cell, ...]
    num_failed_runs: int
    num_runs: int
    worst_interval: tuple[float, float]
    median_interval: tuple[float, float]
    failure_p: float = 1.0
    level: bool = True

    @property
    def worst(self) -> float:
        return max(self.costs.values())

    @property
    def median(self) -> float:
        return float(np.median(list(self.costs.values())))


def regret(table: Scores, compare: noise.Compare = operator.truediv) -> list[Regret]:
    """The regret of every arm, the best first: fewest failed cells, least worst cost.

    Args:
        table: best with the same arms in each cell, as `complete` gives them; an arm
            that misses some cells is compared in the others.
        compare: (median error, the lowest of the cell) -> what the choice costs there.
    """
    table = solvable(table)
    rng = np.random.default_rng(0)
    costs: dict[str, dict[Cell, float]] = {}
    resampled: dict[str, list[np.ndarray]] = {}
    for cell, arms in table.items():
        best = min(score.median for score in arms.values())
        medians = {a: noise.resampled(s.errors, rng=rng) for a, s in arms.items()}
        lowest = np.min(list(medians.values()), axis=0)
        for arm, score in arms.items():
            costs.setdefault(arm, {})[cell] = compare(score.median, best)
            resampled.setdefault(arm, []).append(compare(medians[arm], lowest))
    regrets = []
    for arm, of_arm in costs.items():
        of_cells = {cell: table[cell][arm] for cell in of_arm}
        regrets.append(
            Regret(
                arm,
                of_arm,
                tuple(cell for cell, score in of_cells.items() if not score.solved),
                sum(score.num_failed for score in of_cells.values()),
                sum(score.num_runs for score in of_cells.values()),
                noise.interval(np.max(resampled[arm], axis=0)),
                noise.interval(np.median(resampled[arm], axis=0)),
            )
        )
    regrets.sort(key=lambda r: (len(r.failed), r.worst))
    return [_beside(regrets[0], r, table) for r in regrets]


def _beside(first: Regret, other: Regret, table: Scores) -> Regret:
    """`other`, compared with `first` in the cells that have both."""
    both = [table[c] for c in other.costs.keys() & first.costs.keys()]

    def counts(arm: str) -> tuple[int, int]:
        of_arm = [arms[arm] for arms in both]
        return sum(s.num_failed for s in of_arm), sum(s.num_runs for s in of_arm)

    p = noise.failure_p(*counts(first.arm), *counts(other.arm))
    meets = noise.meet(first.worst_interval, other.worst_interval)
    return replace(other, failure_p=p, level=meets and p > 1 - noise.CONFIDENCE)


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
    table: Scores,
    cells: str,
    *,
    compare: noise.Compare = operator.truediv,
    cost: str = "the median error over that of the cell's best arm",
    digits: int = 2,
) -> str:
    """Markdown: what choosing one arm in all cells costs, and what of it is noise.

    Args:
        table: of scores, as for `regret`.
        cells: their name.
        compare: as for `regret`.
        cost: what its costs are.
        digits: of them, after the point.
    """
    regrets = regret(table, compare)
    if not regrets:
        return f"None of the {cells} is finished in which any arm never failed.\n"

    def spread(value: float, interval: tuple[float, float], *, bold: bool) -> str:
        return ranged(value, interval, f".{digits}f", bold=bold)

    rows = [
        [
            r.arm,
            str(len(r.costs)),
            str(len(r.failed)),
            f"{r.num_failed_runs} of {r.num_runs}",
            f"{r.failure_p:.2g}",
            spread(r.worst, r.worst_interval, bold=r.level),
            spread(r.median, r.median_interval, bold=False),
        ]
        for r in regrets
    ]
    head = [
        "arm",
        "cells it was run in",
        "of them failed in though another arm did not",
        "failed runs",
        "Fisher's p against the first row's",
        "cost in the worst cell",
        "in the median cell",
    ]
    whole = solvable(table)
    return (
        f"Regret over the {len(whole)} {cells} in which at least one arm never failed; "
        f"the cost is {cost}. Arms of fewer cells are compared in those alone. In "
        "brackets: the 95 % bootstrap interval over seeds; that of a maximum may lie "
        "above it. Bold: level with the first row, its interval is met and p is above "
        f"0.05 (not corrected for the number of arms).{_floors(whole, compare, digits)}"
        f"\n\n{markdown_table(head, rows)}"
    )


def _floors(table: Scores, compare: noise.Compare, digits: int) -> str:
    """A sentence on the noise floors of the cells."""
    found = [floor(arms, compare=compare) for arms in table.values()]
    middles, highs = np.array([f[1:] for f in found if f] or [(np.nan,) * 2]).T
    if np.isnan(middles).all():
        return ""
    return (
        " Noise floor: if the arms that are level with a cell's best were equal, the "
        "middle one of them would still seem to cost "
        f"{np.median(middles):.{digits}f} in the median cell and "
        f"{highs.max():.{digits}f} (95 %) in the noisiest."
    )


def floor_row(
    columns: Iterable[Mapping[str, Score]], form: str = ".2f", **how: Any
) -> list[str]:
    """The noise floor of each column, the last row of a table of errors.

    Args:
        columns: arm -> score.
        form: of a number.
        **how: as for `floor`.
    """
    row = ["*noise floor*"]
    for column in columns:
        found = floor(column, **how)
        if found is None:
            row.append("-")
            continue
        num, middle, high = found
        row.append(f"{middle:{form}}, 95 % {high:{form}} (of {num})")
    return row


def legend(lost: str = "the median error of the middle one over the best's") -> str:
    """What the marks of a table of errors mean, and its `floor_row`.

    Args:
        lost: what the floor is of.
    """
    return (
        "In brackets: the 95 % bootstrap interval over seeds. Bold: level with the "
        "column's best; the intervals meet, and failures are not more by chance "
        f"(Fisher's p above 0.05). Noise floor: {lost}, if the bold ones (of so many) "
        "were equal: its median, and what it stays under with 95 %."
    )


def ranged(
    value: float, interval: tuple[float, float], form: str, *, bold: bool
) -> str:
    """A number and its interval, the number marked if its arm is level."""
    low, high = (format(end, form) for end in interval)
    number = format(value, form)
    return f"{f'**{number}**' if bold else number} [{low}, {high}]"


def versus_table(table: Scores, pairs: Iterable[tuple[str, str]]) -> str:
    """Markdown: one arm against another, in the solvable cells that have both.

    In brackets is the bootstrap interval over seeds; where it holds 1 the errors do not
    tell the arms apart. The last column is the probability, if both arms failed equally
    often, of numbers of failed runs at least so far apart (Fisher's exact test, two
    sides).

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
        rng = np.random.default_rng(0)
        resampled = [
            np.divide(*(noise.resampled(score.errors, rng=rng) for score in of_cell))
            for of_cell in both
        ]
        interval = noise.interval(np.median(resampled, axis=0))
        failed = np.sum([[s.num_failed for s in of_cell] for of_cell in both], axis=0)
        runs = np.sum([[s.num_runs for s in of_cell] for of_cell in both], axis=0)
        p = noise.failure_p(failed[0], runs[0], failed[1], runs[1])
        rows.append(
            [
                *pair,
                f"{np.sum(ratios < 1)} of {len(ratios)}",
                ranged(float(np.median(ratios)), interval, ".2f", bold=False),
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


def markdown_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, num_names: int = 1
) -> str:
    """Its first columns are names and left-aligned, the others numbers."""
    num_numbers = len(head) - num_names
    lines = [head, ["---"] * num_names + ["---:"] * num_numbers, *rows]
    escaped = [[entry.replace("|", "\\|") for entry in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)

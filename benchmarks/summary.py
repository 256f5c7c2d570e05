"""What finished runs say: a score of every arm in every cell, and its regret.

A cell is what is trained, whatever the arm; its name is a tuple of settings.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.runs import Record, capped_error

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
    def ms_per_step(self) -> float:
        return float(np.median([record["ms_per_step"] for record in self.records]))


Scores = dict[Cell, dict[str, Score]]  # cell -> arm -> score


def scores(records: Iterable[Record], names: Sequence[str]) -> Scores:
    """The reported runs, by cell and arm, in the order of the file.

    Args:
        records: the lines of a results file.
        names: the settings that make a cell.
    """
    gathered: dict[Cell, dict[str, list[Record]]] = {}
    for record in records:
        if record["phase"] == "reported":
            cell = tuple(record[name] for name in names)
            arms = gathered.setdefault(cell, {})
            arms.setdefault(record["arm"], []).append(record)
    return {
        cell: {arm: Score(tuple(of_arm)) for arm, of_arm in arms.items()}
        for cell, arms in gathered.items()
    }


def complete(table: Scores) -> Scores:
    """The cells in which every arm of the table was run."""
    every = {arm for arms in table.values() for arm in arms}
    return {cell: arms for cell, arms in table.items() if arms.keys() == every}


@dataclass(frozen=True)
class Regret:
    """What choosing one arm everywhere costs against the best arm of each cell.

    A failure in a cell is a failure of any of its runs. Cells in which every arm
    failed say nothing about the choice and are left out.

    Attributes:
        arm: its name.
        ratios: its median error over the lowest median error of any arm, by cell.
        failed: the cells in which it failed though another arm did not.
        num_failed_runs: in all cells that are not left out.
        num_runs: likewise.
    """

    arm: str
    ratios: Mapping[Cell, float]
    failed: tuple[Cell, ...]
    num_failed_runs: int
    num_runs: int

    @property
    def worst(self) -> float:
        return max(self.ratios.values())

    @property
    def median(self) -> float:
        return float(np.median(list(self.ratios.values())))


def regret(table: Scores) -> list[Regret]:
    """The regret of every arm, the best first: fewest failed cells, least worst ratio.

    Args:
        table: cells with the same arms each, as `complete` gives them.
    """
    solvable = {
        cell: arms
        for cell, arms in table.items()
        if any(score.solved for score in arms.values())
    }
    if not solvable:
        return []
    best = {
        cell: min(score.median for score in arms.values())
        for cell, arms in solvable.items()
    }
    every = next(iter(solvable.values()))
    regrets = [
        Regret(
            arm,
            {cell: arms[arm].median / best[cell] for cell, arms in solvable.items()},
            tuple(cell for cell, arms in solvable.items() if not arms[arm].solved),
            sum(arms[arm].num_failed for arms in solvable.values()),
            sum(arms[arm].num_runs for arms in solvable.values()),
        )
        for arm in every
    ]
    return sorted(regrets, key=lambda r: (len(r.failed), r.worst))

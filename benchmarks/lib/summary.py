"""What finished runs say: a score of every arm in every cell, and what is noise.

A cell is what is trained, whatever the arm; its name is a tuple of settings.
"""

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.lib import noise
from benchmarks.lib.arms import SEPARATOR
from benchmarks.lib.runs import Record, Settings, capped_error, of_tuning
from benchmarks.lib.suite import Choice, lowest_median

Cell = tuple[str | int, ...]


def cell_of(settings: Settings, names: Iterable[str]) -> Cell:
    """That of a run of the settings; `names` are those that make a cell."""
    return tuple(settings[name] for name in names)


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
    def failed(self) -> np.ndarray:
        """bool[seeds] by seed."""
        return np.array([record["failed"] for record in self.by_seed])

    @property
    def steps(self) -> np.ndarray:
        """i[records], updates done."""
        return np.array(self.records[0]["curve"]["step"])

    def curve(self, name: str) -> np.ndarray:
        """f[seeds, records] by seed; what was not finite is not a number."""
        return np.array([record["curve"][name] for record in self.by_seed], float)

    @property
    def layers(self) -> np.ndarray:
        """log10 of the std of each kernel's gradient, one seed: f[records, kernels]."""
        (layers,) = (r["layers"] for r in self.records if "layers" in r)
        return np.array(layers, float)

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

    def key(of: Settings) -> tuple[Cell, str]:
        arm = str(of["arm"])
        if "optimizer" in names:
            arm, _, _ = arm.partition(SEPARATOR)
        return cell_of(of, names), arm

    tuned: dict[tuple[Cell, str], list[Record]] = {}
    reported: dict[tuple[Cell, str], list[Record]] = {}
    for record in records:
        by_phase = tuned if record["phase"] == "tuning" else reported
        by_phase.setdefault(key(record), []).append(record)
    table: Scores = {}
    for (cell, arm), runs in reported.items():
        rates: tuple[float, ...] = ()
        if tuning := tuned.get(key(of_tuning(runs[0]))):
            rate = choose(tuning)
            runs = [run for run in runs if run["learning_rate"] == rate]
            rates = tuple(sorted({run["learning_rate"] for run in tuning}))
        if runs:
            table.setdefault(cell, {})[arm] = Score(tuple(runs), rates)
    return table


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


def failure_p(cells: Iterable[tuple[Score, Score]]) -> float:
    """`noise.failure_p` of two arms in some cells."""
    return noise.failure_p(
        *(
            (one.num_failed, one.num_runs, other.num_failed, other.num_runs)
            for one, other in cells
        )
    )


def floor(
    column: Mapping[str, Score],
    statistic: noise.Statistic = np.median,
    compare: noise.Compare = operator.truediv,
) -> tuple[int, float, float] | None:
    """The number of level arms of a cell and their `noise.floor`; None for one alone.

    Only seeds that all of them have count.
    """
    best = level(column, statistic)
    arms = [column[arm] for arm in column if arm in best]
    seeds = set.intersection(*({r["seed"] for r in arm.records} for arm in arms))
    if len(arms) < 2 or not seeds:
        return None
    shared = [
        Score(tuple(r for r in arm.records if r["seed"] in seeds)) for arm in arms
    ]
    errors = np.stack([score.errors for score in shared])
    return len(arms), *noise.floor(errors, statistic, compare)


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

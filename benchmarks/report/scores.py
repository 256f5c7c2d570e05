"""Scores of finished runs, for every optimizer on every problem.

A problem is the tuple of its settings, in an order that a page names.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from benchmarks.lib.optimizers import in_order
from benchmarks.lib.runs import Record, Settings, tuning_settings
from benchmarks.lib.suite import Choice
from benchmarks.report.statistics import (
    Interval,
    Statistic,
    bootstrap_interval,
    failure_interval,
    overlap,
)

Problem = tuple[str | int, ...]


@dataclass(frozen=True)
class Quantity:
    """The number that a page shows of a run.

    Attributes:
        label: With its unit, as an axis has it.
        key: Of the records.
        scale: What the recorded number is multiplied by.
        form: How a number is written.
        missing: What a run without a finite number counts as, before the scale.
        largest: No run counts more than this, before the scale.
        higher_is_better: Else lower is better.
        statistic: Of the seeds, and its name.
    """

    label: str
    key: str = "error"
    scale: float = 1.0
    form: str = ".3g"
    missing: float = 1.0
    largest: float = np.inf
    higher_is_better: bool = False
    statistic: tuple[str, Statistic] = ("median", np.median)


ERROR = Quantity("error", largest=1.0)  # 1 is what predicting zero, or a guess, has


@dataclass(frozen=True)
class Score:
    """The reported runs of one optimizer on one problem, at one learning rate.

    Attributes:
        records: One for each seed, by seed.
        quantity: What is shown of them.
        rates: The set that the rate was chosen from, increasing; none if it was given.
    """

    records: tuple[Record, ...]
    quantity: Quantity = ERROR
    rates: tuple[float, ...] = ()

    @cached_property
    def values(self) -> np.ndarray:
        """f[seeds], in the order of the seeds."""
        q = self.quantity
        found = [q.missing if r[q.key] is None else r[q.key] for r in self.records]
        return q.scale * np.minimum(found, q.largest)

    @cached_property
    def middle(self) -> float:
        return float(self.quantity.statistic[1](self.values, axis=-1))

    @cached_property
    def interval(self) -> Interval:
        return bootstrap_interval(self.values, self.quantity.statistic[1])

    @property
    def failed(self) -> np.ndarray:
        """bool[seeds], in the order of the seeds."""
        return np.array([record["failed"] for record in self.records])

    @property
    def num_failed(self) -> int:
        return int(self.failed.sum())

    @property
    def num_runs(self) -> int:
        return len(self.records)

    @property
    def failures(self) -> str:
        return f"{self.num_failed}/{self.num_runs}"

    @property
    def learning_rate(self) -> float:
        return self.records[0]["learning_rate"]

    @property
    def is_at_an_end(self) -> bool:
        """Says whether a better rate may lie beyond the set that it was chosen from."""
        return self.learning_rate in (*self.rates[:1], *self.rates[-1:])

    @property
    def steps(self) -> np.ndarray:
        """i[records], the updates done."""
        return np.array(self.records[0]["curve"]["step"])

    def curve(self, name: str) -> np.ndarray:
        """f[seeds, records]; what was not finite is NaN."""
        return np.array([record["curve"][name] for record in self.records], float)


Column = Mapping[str, Score]  # optimizer -> score
Table = dict[Problem, dict[str, Score]]
Sweeps = dict[Problem, dict[str, dict[float, Score]]]  # the last key is the rate


@dataclass
class _Runs:
    tuned: list[Record] = field(default_factory=list)
    reported: list[Record] = field(default_factory=list)


def _grouped(
    records: Iterable[Record], key: Callable[[Settings], tuple[Problem, str]]
) -> dict[tuple[Problem, str], _Runs]:
    """Returns the runs of each problem and optimizer, in the order of the file."""
    groups: dict[tuple[Problem, str], _Runs] = {}
    for record in records:
        group = groups.setdefault(key(record), _Runs())
        is_tuning = record["phase"] == "tuning"
        (group.tuned if is_tuning else group.reported).append(record)
    return groups


def _by_seed(records: Iterable[Record]) -> tuple[Record, ...]:
    return tuple(sorted(records, key=lambda record: record["seed"]))


def scores(
    records: Iterable[Record],
    names: Sequence[str],
    choose: Choice,
    quantity: Quantity = ERROR,
) -> Table:
    """Returns the reported runs by problem and optimizer.

    Where a rate is tuned only the runs at the chosen rate count: a file keeps the runs
    of an earlier, smaller set of rates.

    Args:
        records: The lines of a results file.
        names: The settings that make a problem.
        choose: How rates were chosen.
        quantity: What is shown.
    """

    def key(settings: Settings) -> tuple[Problem, str]:
        problem = tuple(settings[name] for name in names)
        return problem, str(settings["optimizer"])

    groups = _grouped(records, key)
    table: Table = {}
    for (problem, optimizer), group in groups.items():
        if not (runs := group.reported):
            continue
        rates: tuple[float, ...] = ()
        if tuned := groups.get(key(tuning_settings(runs[0])), _Runs()).tuned:
            rate = choose(tuned)
            runs = [run for run in runs if run["learning_rate"] == rate]
            rates = tuple(sorted({run["learning_rate"] for run in tuned}))
        if runs:
            score = Score(_by_seed(runs), quantity, rates)
            table.setdefault(problem, {})[optimizer] = score
    return {problem: _sorted(column) for problem, column in table.items()}


def _sorted(column: dict[str, Score]) -> dict[str, Score]:
    return {name: column[name] for name in in_order(column)}


def sweeps(
    records: Iterable[Record], names: Sequence[str], quantity: Quantity = ERROR
) -> Sweeps:
    """Returns the reported runs by problem, optimizer and learning rate.

    Args:
        records: The lines of a results file.
        names: The settings that make a problem.
        quantity: What is shown.
    """
    table: Sweeps = {}
    for record in records:
        if record["phase"] == "reported":
            problem = tuple(record[name] for name in names)
            by_rate = table.setdefault(problem, {}).setdefault(record["optimizer"], {})
            by_rate.setdefault(record["learning_rate"], []).append(record)
    return {
        problem: {
            name: {
                rate: Score(_by_seed(column[name][rate]), quantity)
                for rate in sorted(column[name])
            }
            for name in in_order(column)
        }
        for problem, column in table.items()
    }


def tied(column: Column) -> set[str]:
    """Returns the optimizers that the seeds cannot tell from the best one, and it.

    Both its interval and Wilson's interval of its failures overlap those of the best.
    """
    sign = -1 if next(iter(column.values())).quantity.higher_is_better else 1
    best = min(column.values(), key=lambda score: sign * score.middle)

    def failures(score: Score) -> Interval:
        return failure_interval(score.num_failed, score.num_runs)

    return {
        name
        for name, score in column.items()
        if overlap(score.interval, best.interval)
        and overlap(failures(score), failures(best))
    }


def solvable(table: Table) -> Table:
    """Returns the problems on which some optimizer never failed."""
    return {
        problem: column
        for problem, column in table.items()
        if any(not score.num_failed for score in column.values())
    }


def provenance(records: Sequence[Record]) -> str:
    """Returns seeds, devices, versions and dates of runs."""

    def values(key: str, phase: str | None = None) -> list:
        chosen = (r for r in records if phase in (None, r["phase"]))
        return sorted({record[key] for record in chosen})

    def seeds(phase: str) -> str:
        found = values("seed", phase)
        if len(found) > 2 and found == list(range(found[0], found[-1] + 1)):
            return f"{found[0]} to {found[-1]}"
        return ", ".join(map(str, found)) or "none"

    return (
        f"reported seeds {seeds('reported')}, tuning seeds {seeds('tuning')}; "
        f"{', '.join(values('device'))}; jax {', '.join(values('jax'))}, "
        f"stablegrad_optax {', '.join(values('stablegrad_optax'))}; "
        f"{values('date')[0][:10]} to {values('date')[-1][:10]}"
    )

"""A file of finished runs: one JSON line each, written whole, read back to resume.

A line holds a run's settings, `learning_rate`, `seed`, `phase`, and what came of it:
`error` (null if not finite), `failed`, `ms_per_step`, `device`, `jax`, `date`, ....
"""

import fcntl
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

RESULTS = Path(__file__).parent / "results"

Settings = Mapping[str, str | int]
Record = dict[str, Any]  # one line


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        settings: all that says what is trained, but for the next two.
        learning_rate: of the schedule's start.
        seed: of the initial weights and of the data.
        phase: "tuning": it serves to choose the learning rate; "reported": it serves
            the tables and figures.
        detailed: whether it keeps the quantities that are too large for every line.
    """

    settings: Settings
    learning_rate: float
    seed: int
    phase: Literal["tuning", "reported"]
    detailed: bool = False

    def as_record(self) -> Record:
        return {
            **self.settings,
            "learning_rate": self.learning_rate,
            "seed": self.seed,
            "phase": self.phase,
        }


@dataclass(frozen=True)
class Protocol:
    """Which seeds choose the learning rate and which are reported.

    Attributes:
        tuning_seeds: may be empty where one learning rate alone is given.
        reported_seeds: none of the former.
    """

    tuning_seeds: tuple[int, ...]
    reported_seeds: tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """The runs of one line of a table: one arm in one cell.

    Attributes:
        settings: as in `Run`.
        learning_rates: the fixed set to choose from.
        cost: of one run, in any unit that is the same for all entries.
    """

    settings: Settings
    learning_rates: tuple[float, ...]
    cost: float = 1.0

    def tuning(self, protocol: Protocol) -> list[Run]:
        if len(self.learning_rates) == 1:
            return []
        return [
            Run(self.settings, rate, seed, "tuning")
            for rate in self.learning_rates
            for seed in protocol.tuning_seeds
        ]

    def reported(self, protocol: Protocol, tuned: Sequence[Record]) -> list[Run]:
        """The fresh runs, at the rate that the records of `tuning` choose."""
        (rate,) = self.learning_rates[:1]
        if len(self.learning_rates) > 1:
            rate = choose_learning_rate(tuned)
        first, *_ = protocol.reported_seeds
        return [
            Run(self.settings, rate, seed, "reported", detailed=seed == first)
            for seed in protocol.reported_seeds
        ]

    def num_runs(self, protocol: Protocol) -> int:
        return len(self.tuning(protocol)) + len(protocol.reported_seeds)


class Ledger:
    """Which runs of a grid are there and which are missing.

    Args:
        entries: the grid; their settings have the same names.
        protocol: the seeds.
        records: the lines of a file; those of other runs are ignored.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        protocol: Protocol,
        records: Iterable[Record] = (),
    ):
        self._entries = entries
        self._protocol = protocol
        (names,) = {tuple(sorted(entry.settings)) for entry in entries}
        self._names = (*names, "learning_rate", "seed", "phase")
        self._records: dict[tuple, Record] = {}
        self.add(records)
        self.num_runs = sum(entry.num_runs(protocol) for entry in entries)
        self.cost = sum(entry.cost * entry.num_runs(protocol) for entry in entries)

    def add(self, records: Iterable[Record]) -> None:
        for record in records:
            self._records[self._key(record)] = record

    def missing(self, group: Sequence[Entry]) -> list[Run]:
        """The runs of entries that can be computed now: first those that tune."""
        tuning = self._absent(run for e in group for run in e.tuning(self._protocol))
        return tuning or self._absent(run for e in group for run in self._reported(e))

    def done(self) -> tuple[int, float]:
        """The number of runs that are there, and their cost."""
        num_runs, cost = 0, 0.0
        for entry in self._entries:
            tuning = entry.tuning(self._protocol)
            absent = self._absent(tuning)
            num_done = len(tuning) - len(absent)
            if not absent:
                reported = self._reported(entry)
                num_done += len(reported) - len(self._absent(reported))
            num_runs += num_done
            cost += num_done * entry.cost
        return num_runs, cost

    def _reported(self, entry: Entry) -> list[Run]:
        tuning = entry.tuning(self._protocol)
        return entry.reported(self._protocol, [self._of(run) for run in tuning])

    def _absent(self, wanted: Iterable[Run]) -> list[Run]:
        return [
            run for run in wanted if self._key(run.as_record()) not in self._records
        ]

    def _of(self, run: Run) -> Record:
        return self._records[self._key(run.as_record())]

    def _key(self, record: Record) -> tuple:
        return tuple(record.get(name) for name in self._names)


def choose_learning_rate(tuned: Iterable[Record]) -> float:
    """The rate with the lowest median error over tuning seeds, failures last.

    A failed run counts as an infinite error. Between rates whose medians are infinite
    the one with fewer failures wins, then the one with the lower mean error (1 at
    most); between equals the lowest rate.
    """
    by_rate: dict[float, list[Record]] = {}
    for record in tuned:
        by_rate.setdefault(record["learning_rate"], []).append(record)

    def rank(rate: float) -> tuple[float, int, float, float]:
        records = by_rate[rate]
        failures = sum(record["failed"] for record in records)
        errors = [math.inf if r["failed"] else r["error"] for r in records]
        capped = [capped_error(record) for record in records]
        return _median(errors), failures, float(np.mean(capped)), rate

    return min(by_rate, key=rank)


def _median(errors: Sequence[float]) -> float:
    """`np.median`, but half of infinity is infinity without a warning."""
    ordered = sorted(errors)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def capped_error(record: Record) -> float:
    """The relative error, 1 at most and where not finite: that of predicting zero."""
    error = record["error"]
    return 1.0 if error is None else min(error, 1.0)


def finite(value: float, digits: int | None = None) -> float | None:
    """A number as JSON knows it, to so many significant digits; else None."""
    if not math.isfinite(value):
        return None
    return float(value) if digits is None else float(f"{value:.{digits}g}")


def read(path: Path) -> list[Record]:
    """The finished runs; none where there is no file yet.

    A last line that was cut off by a crash is ignored: its run is not finished.

    Raises:
        ValueError: in one line, if any other line is not a JSON object.
    """
    if not path.exists():
        return []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    records = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("it must be a JSON object")
        except ValueError as error:
            raise ValueError(f"{path}, line {number}, is not a run: {error}") from None
        records.append(record)
    return records


def append(path: Path, records: Iterable[Record]) -> None:
    """Add lines, all of them in one write, and wait until they are on the disk.

    Several processes may append to one file. What a crash left of a last line is
    removed first.
    """
    lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _remove_torn_line(file)
        file.write(lines.encode())
        os.fsync(file.fileno())


def _remove_torn_line(file: Any) -> None:
    size = file.seek(0, os.SEEK_END)
    if not size:
        return
    file.seek(size - 1)
    if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)

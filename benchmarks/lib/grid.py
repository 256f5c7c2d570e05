"""Runs what is missing of a grid and shows the progress; it may be stopped any time."""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import datetime
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from benchmarks.lib import runs
from benchmarks.lib.machine import origin
from benchmarks.lib.runs import Record, Run
from benchmarks.lib.suite import Entry, Preset, Suite

# (runs of one group, tick) -> a record for each. It calls tick now and then and lets
# through what tick raises.
Compute = Callable[[Sequence[Run], Callable[[], None]], list[Record]]


class Ledger:
    """Knows which runs of a preset are finished and which are missing.

    Args:
        preset: The grid; the settings of its entries have the same names.
        records: The lines of a file; lines of other runs are ignored.
    """

    def __init__(self, preset: Preset, records: Iterable[Record] = ()):
        self._entries, self._protocol = preset.entries, preset.protocol
        (names,) = {tuple(sorted(entry.settings)) for entry in self._entries}
        self._names = (*names, "learning_rate", "seed", "phase")
        self._records: dict[tuple, Record] = {}
        self.add(records)
        self.num_runs = preset.num_runs
        self.cost = sum(entry.total_cost(self._protocol) for entry in self._entries)

    def add(self, records: Iterable[Record]) -> None:
        for record in records:
            self._records[self._key(record)] = record

    def missing(self, group: Sequence[Entry]) -> list[Run]:
        """Returns the runs that can be computed now: first those that tune."""
        tuning = self._absent(run for e in group for run in e.tuning(self._protocol))
        return tuning or self._absent(run for e in group for run in self._reported(e))

    def done(self) -> tuple[int, float]:
        """Returns the number of finished runs and their cost."""
        num_runs, cost = 0, 0.0
        for entry in self._entries:
            tuning = entry.tuning(self._protocol)
            absent = self._absent(tuning)
            num_tuning, num_reported = len(tuning) - len(absent), 0
            if not absent:
                reported = self._reported(entry)
                num_reported = len(reported) - len(self._absent(reported))
            num_runs += num_tuning + num_reported
            cost += num_tuning * entry.tuning_cost + num_reported * entry.cost
        return num_runs, cost

    def _reported(self, entry: Entry) -> list[Run]:
        tuning = entry.tuning(self._protocol)
        return entry.reported(self._protocol, [self._record(run) for run in tuning])

    def _absent(self, wanted: Iterable[Run]) -> list[Run]:
        return [
            run for run in wanted if self._key(run.as_record()) not in self._records
        ]

    def _record(self, run: Run) -> Record:
        return self._records[self._key(run.as_record())]

    def _key(self, record: Record) -> tuple:
        return tuple(record.get(name) for name in self._names)


class _Stopped(Exception):
    """Raised inside a batch that is to be abandoned."""


def run_grid(
    preset: Preset,
    compute: Compute,
    path: Path,
    *,
    console: Console,
    minutes: float | None = None,
    workers: int = 1,
) -> int:
    """Computes the runs that `path` does not hold yet, and appends them to it.

    The tuning runs of a group are one batch, its reported runs the next.

    Args:
        preset: The grid.
        compute: Trains the runs of a batch.
        path: The file of JSON lines; a batch is written when it is done.
        console: Shows the progress, in a line for each batch if it is not a terminal.
        minutes: Stops after this time and abandons the batches under way.
        workers: How many groups are computed at a time, each by a thread.

    Returns:
        The exit code: 0 when everything is there or the time is up, 1 if a batch
        failed, 130 if it was interrupted.

    Raises:
        OSError: If finished runs could not be written; nothing is computed after it.
    """
    ledger = Ledger(preset, runs.read(path))
    board = _Board(ledger, console)
    stop, begin = threading.Event(), time.monotonic()
    unwritten: list[OSError] = []

    def tick() -> None:
        if minutes is not None and time.monotonic() - begin > 60 * minutes:
            stop.set()
        if stop.is_set():
            raise _Stopped

    def work(group: Sequence[Entry]) -> None:
        while batch := ledger.missing(group):
            tick()
            records = [
                {**run.as_record(), **result, **origin()}
                for run, result in zip(batch, compute(batch, tick), strict=True)
            ]
            try:
                runs.append(path, records)
            except OSError as error:
                unwritten.append(error)
                stop.set()
                raise _Stopped from error
            board.finished(batch, records)

    interrupted = False
    with board, ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work, group) for group in preset.groups]
        try:
            for future in as_completed(futures):
                error = future.exception()
                if error is not None and not isinstance(error, _Stopped):
                    board.failed(error)
        except KeyboardInterrupt:
            interrupted = True
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
    there = f"{board.counts()} are in {path}"
    if unwritten:
        raise OSError(f"{there}, the last batch could not be written: {unwritten[0]}")
    if interrupted:
        there = f"Interrupted: {there}; the same command goes on from there"
    elif stop.is_set():
        there = f"Stopped after {minutes:g} minutes: {there}; the same command goes on"
    console.print(f"{there}.", highlight=False, soft_wrap=True)
    return 130 if interrupted else int(board.has_failed)


class _Board:
    """The progress bar: runs done, time left, the last batch, the last failure."""

    def __init__(self, ledger: Ledger, console: Console):
        self.has_failed = False
        self._ledger = ledger
        self._console = console
        self._lock = threading.Lock()
        self._progress = Progress(
            SpinnerColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[counts]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[last]}"),
            console=console,
            # Batches take minutes: a shorter memory would know no speed.
            speed_estimate_period=3600,
        )
        self._task = self._progress.add_task(
            "",
            total=ledger.cost,
            completed=ledger.done()[1],
            counts=self.counts(),
            last="",
        )

    def __enter__(self) -> None:
        if self._console.is_terminal:
            self._progress.start()

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._progress.stop()

    def counts(self) -> str:
        return f"{self._ledger.done()[0]} of {self._ledger.num_runs} runs"

    def finished(self, batch: Sequence[Run], records: Sequence[Record]) -> None:
        with self._lock:
            self._ledger.add(records)
            last = _describe(batch[0], records)
            self._progress.update(
                self._task,
                completed=self._ledger.done()[1],
                counts=self.counts(),
                last=last,
            )
            if not self._console.is_terminal:
                now = datetime.now().strftime("%H:%M:%S")
                self._print(f"{now}  {self.counts()}  {last}")

    def failed(self, error: BaseException) -> None:
        """Show an error, in one line, and go on with the other groups."""
        self.has_failed = True
        message = " ".join(f"{type(error).__name__}: {error}".split())
        self._print(f"A batch failed: {message[:300]}")

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True, markup=False)


def _describe(first: Run, records: Sequence[Record]) -> str:
    shown = first.settings.items()
    what = " ".join(str(v) for k, v in shown if k != "preset")
    error = float(np.median([runs.capped_error(record) for record in records]))
    failures = sum(record["failed"] for record in records)
    return (
        f"{what}: {first.phase}, median error {error:.3g}, "
        f"{failures} of {len(records)} failed"
    )


def measure_missing(suite: Suite, preset: Preset, path: Path, console: Console) -> None:
    """Measures the problems of a preset that `path` holds no measurement of.

    Each measurement is written when it is done.

    Args:
        suite: Says what is measured; nothing without `measure`.
        preset: The grid.
        path: The file of JSON lines.
        console: Shows a line for each measurement.

    Raises:
        OSError: If a measurement could not be written.
    """
    if suite.measure is None:
        return
    names = suite.problem
    done = {
        tuple(record.get(name) for name in names)
        for record in runs.read(path)
        if record["phase"] == runs.MEASURED
    }
    for entry in preset.entries:
        problem = tuple(entry.settings[name] for name in names)
        if problem not in done:
            done.add(problem)
            settings = dict(zip(names, problem, strict=True))
            record = {**settings, "phase": runs.MEASURED, **suite.measure(settings)}
            runs.append(path, [{**record, **origin()}])
            what = ", ".join(map(str, problem))
            console.print(f"measured {what}", highlight=False, soft_wrap=True)

"""Runs what is missing of a grid, shows how far it is, and may be stopped any time."""

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
from benchmarks.lib.suite import Entry, Preset

# (runs of one group, tick) -> what came of each. It calls tick now and then, and lets
# through what tick raises.
Compute = Callable[[Sequence[Run], Callable[[], None]], list[Record]]


class Ledger:
    """Which runs of a preset are there and which are missing.

    Args:
        preset: the grid; the settings of its entries have the same names.
        records: the lines of a file; those of other runs are ignored.
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
        """The runs of entries that can be computed now: first those that tune."""
        tuning = self._absent(run for e in group for run in e.tuning(self._protocol))
        return tuning or self._absent(run for e in group for run in self._reported(e))

    def done(self) -> tuple[int, float]:
        """The number of runs that are there, and their cost."""
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
        return entry.reported(self._protocol, [self._of(run) for run in tuning])

    def _absent(self, wanted: Iterable[Run]) -> list[Run]:
        return [
            run for run in wanted if self._key(run.as_record()) not in self._records
        ]

    def _of(self, run: Run) -> Record:
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
    """Compute the runs that `path` does not hold yet, and append them to it.

    The missing runs of a group that tune are one batch, those reported the next.

    Args:
        preset: the grid.
        compute: trains the runs of a batch.
        path: of the JSON lines; they are written when a batch is done.
        console: where progress is shown; a line for each batch if it is no terminal.
        minutes: stop after so long, abandoning the batches under way.
        workers: how many groups are computed at a time, each by a thread.

    Returns:
        The exit code: 0 when everything is there or the time is up, 1 if a batch
        failed, 130 if it was interrupted.

    Raises:
        OSError: if finished runs could not be written; nothing is computed after it.
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
    what = " ".join(str(v) for k, v in shown if k not in ("preset", "optimizer"))
    error = float(np.median([runs.capped_error(record) for record in records]))
    failures = sum(record["failed"] for record in records)
    return (
        f"{what}: {first.phase}, median error {error:.3g}, "
        f"{failures} of {len(records)} failed"
    )

"""Runs what is missing of a grid, shows how far it is, and may be stopped any time."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import UTC, datetime
from pathlib import Path

import jax
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

import stablegrad_optax
from benchmarks import figures, runs
from benchmarks.command_line import fail
from benchmarks.runs import Entry, Ledger, Protocol, Record, Run

# (runs of one group, tick) -> what came of each. It calls tick now and then, and lets
# through what tick raises.
Compute = Callable[[Sequence[Run], Callable[[], None]], list[Record]]


class _Stopped(Exception):
    """Raised inside a batch that is to be abandoned."""


def command(
    prog: str,
    groups: Sequence[Sequence[Entry]],
    protocol: Protocol,
    compute: Compute,
    path: Path,
    *,
    minutes: float | None,
    workers: int,
) -> int:
    """`run_grid` for the command `prog`; a wrong option or file costs one line."""
    if minutes is not None and not minutes > 0:
        fail(prog, f"--minutes must be above 0, got {minutes:g}")
    if workers < 1:
        fail(prog, f"--workers must be at least 1, got {workers}")
    try:
        return run_grid(
            groups,
            protocol,
            compute,
            path,
            console=Console(),
            minutes=minutes,
            workers=workers,
        )
    except (ValueError, OSError) as error:  # what the file holds
        fail(prog, str(error))


def run_grid(
    groups: Sequence[Sequence[Entry]],
    protocol: Protocol,
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
        groups: entries whose runs may be computed side by side, in this order.
        protocol: the seeds.
        compute: trains the runs of a batch.
        path: of the JSON lines; they are written when a batch is done.
        console: where progress is shown; a line for each batch if it is no terminal.
        minutes: stop after so long, abandoning the batches under way.
        workers: how many groups are computed at a time, each by a thread.

    Returns:
        The exit code: 0 when everything is there or the time is up, 1 if a batch
        failed, 130 if it was interrupted.
    """
    entries = [entry for group in groups for entry in group]
    ledger = Ledger(entries, protocol, runs.read(path))
    board = _Board(ledger, console)
    stop, begin = threading.Event(), time.monotonic()

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
            runs.append(path, records)
            board.finished(records)

    interrupted = False
    with board, ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work, group) for group in groups]
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

    def finished(self, records: Sequence[Record]) -> None:
        with self._lock:
            self._ledger.add(records)
            last = _describe(records)
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


def _describe(records: Sequence[Record]) -> str:
    first = records[0]
    names = ("problem", "init", "depth", "model", "norm", "data")
    names += ("task", "numbers", "disturbance", "weight_decay", "arm")
    what = " ".join(str(first[name]) for name in names if name in first)
    error = float(np.median([runs.capped_error(record) for record in records]))
    failures = sum(record["failed"] for record in records)
    return (
        f"{what}: {first['phase']}, median error {error:.3g}, "
        f"{failures} of {len(records)} failed"
    )


def origin() -> Record:
    """Device, versions and date, for a record."""
    return {
        "device": figures.device_name(),
        "jax": jax.__version__,
        "stablegrad_optax": stablegrad_optax.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }

"""The file of finished runs: one JSON line each, written whole, read back to resume.

A line holds the settings of a run, `learning_rate`, `seed`, `phase`, and what came of
it: `error` (null if not finite), `failed`, `ms_per_step`, `device`, `jax`, `date` and
more. A command that runs appends plain lines to `<suite>.jsonl`; `archive` moves them
into `<suite>.jsonl.gz`, which is what the repository keeps. Both are read as one.
"""

import fcntl
import gzip
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

RESULTS = Path(__file__).parents[1] / "results"

Settings = Mapping[str, str | int]
Record = dict[str, Any]  # one line
Phase = Literal["tuning", "reported"]
MEASURED = "measured"  # the phase of a line that is not of a training

# What every line has, and what the line of a training has as well.
_KEYS = {"phase": str, "device": str, "jax": str, "date": str}
_KEYS_OF_RUN = {"preset": str, "optimizer": str, "seed": int, "failed": bool}
_KEYS_OF_RUN |= {"learning_rate": (int, float), "error": (int, float, type(None))}


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        settings: The problem and the optimizer.
        learning_rate: The highest of the schedule.
        seed: Of the initial weights and of the data.
        phase: A "tuning" run serves to choose the learning rate, a "reported" run
            serves the tables and figures.
    """

    settings: Settings
    learning_rate: float
    seed: int
    phase: Phase

    def as_record(self) -> Record:
        return {
            **self.settings,
            "learning_rate": self.learning_rate,
            "seed": self.seed,
            "phase": self.phase,
        }


def tuning_settings(settings: Settings) -> Settings:
    """Returns the settings of the runs that tune for a reported run.

    They may be shorter: `tuning_steps`, where given, are then their `steps`.
    """
    if "tuning_steps" not in settings:
        return settings
    return {**settings, "steps": settings["tuning_steps"]}


def capped_error(record: Record) -> float:
    """Returns the error, at most 1: predicting zero has that, and NaN counts as it."""
    error = record["error"]
    return 1.0 if error is None else min(error, 1.0)


def finite(value: float, digits: int | None = None) -> float | None:
    """Returns the number to so many significant digits; None if it is not finite."""
    if not math.isfinite(value):
        return None
    return float(value) if digits is None else float(f"{value:.{digits}g}")


def read(path: Path) -> list[Record]:
    """Returns the finished runs and measurements; none where there is no file yet.

    Raises:
        ValueError: In one line, if a line is neither.
    """
    records = read_lines(path)
    for number, record in enumerate(records, start=1):
        kinds = _KEYS if record.get("phase") == MEASURED else _KEYS | _KEYS_OF_RUN
        for key, kind in kinds.items():
            if key not in record:
                raise _not_a_run(path, number, f"it has no {key}")
            if not isinstance(record[key], kind):
                raise _not_a_run(path, number, f"its {key} is {record[key]!r}")
    return records


def read_lines(path: Path) -> list[Record]:
    """Returns the JSON objects of a file and of its archive, one a line.

    A last line that was cut off by a crash is ignored: its run is not finished.

    Raises:
        ValueError: In one line, if any other line is not a JSON object.
    """
    if not path.exists():
        return _parse(path, _archived(path), b"")
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # `archive` moves lines under its lock
        return _parse(path, _archived(path), file.read())


def _parse(path: Path, archived: bytes, text: bytes) -> list[Record]:
    whole = archived + text[: text.rfind(b"\n") + 1]
    records = []
    # A crash between the two writes of `archive` leaves its lines in both files.
    for number, line in enumerate(dict.fromkeys(whole.splitlines()), start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise _not_a_run(path, number, str(error)) from None
        if not isinstance(record, dict):
            raise _not_a_run(path, number, "it must be a JSON object")
        records.append(record)
    return records


def _archive_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.gz")


def _archived(path: Path) -> bytes:
    compressed = _archive_path(path)
    if not compressed.exists():
        return b""
    try:
        return gzip.decompress(compressed.read_bytes())
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{compressed} is damaged: {error}") from None


def archive(path: Path) -> None:
    """Moves the lines of a file into its archive; several processes may append.

    The archive is replaced as a whole before the file is emptied, so that a crash or a
    full disk loses no line.

    Raises:
        OSError: If the archive cannot be written; both files are then as before.
        ValueError: If a line is not a JSON object.
    """
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("r+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        records = _parse(path, _archived(path), file.read())
        compressed = _archive_path(path)
        unfinished = compressed.with_name(f".{compressed.name}.{os.getpid()}.tmp")
        try:
            # Without a time stamp equal runs make equal files.
            with unfinished.open("wb") as target:
                target.write(gzip.compress(_lines(records), 9, mtime=0))
                target.flush()
                os.fsync(target.fileno())
            os.replace(unfinished, compressed)
        finally:
            unfinished.unlink(missing_ok=True)
        file.truncate(0)


def _not_a_run(path: Path, number: int, why: str) -> ValueError:
    return ValueError(f"{path}, line {number}, is not a run: {why}")


def _lines(records: Iterable[Record]) -> bytes:
    lines = (json.dumps(record, allow_nan=False) + "\n" for record in records)
    return "".join(lines).encode()


def append(path: Path, records: Iterable[Record]) -> None:
    """Adds lines, all of them or none, and waits until they are on the disk.

    Several processes may append to one file. What a crash left of a last line is
    removed first.

    Raises:
        OSError: If the disk is full; the file is then as before.
    """
    lines = _lines(records)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        size = _without_torn_line(file)
        left = memoryview(lines)
        try:
            while left:  # on a disk that is nearly full a write may be short
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise


def _without_torn_line(file: BinaryIO) -> int:
    """Removes a line without an end; returns the size of the file then."""
    size = file.seek(0, os.SEEK_END)
    if size:
        file.seek(size - 1)
        if file.read(1) != b"\n":
            file.seek(0)
            size = file.read().rfind(b"\n") + 1
            file.truncate(size)
    return size


@contextmanager
def at_work(path: Path, preset: str) -> Iterator[None]:
    """Keeps a second command from computing the same runs.

    Args:
        path: The file of results.
        preset: Runs of another preset may go to the same file meanwhile.

    Raises:
        ValueError: In one line, if another process computes them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.{preset}.lock")
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another command is at preset {preset} of {path}; wait for it, or "
                "give another file with --results"
            ) from None
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)

"""A file of finished runs: one JSON line each, written whole, read back to resume.

A line holds a run's settings, `learning_rate`, `seed`, `phase`, and what came of it:
`error` (null if not finite), `failed`, `ms_per_step`, `device`, `jax`, `date`, ....
"""

import fcntl
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

RESULTS = Path(__file__).parents[1] / "results"

Settings = Mapping[str, str | int]
Record = dict[str, Any]  # one line
Phase = Literal["tuning", "reported"]

# What every line has, and what those of a training have.
_KEYS = {"arm": str, "phase": str, "device": str, "jax": str, "date": str}
_KEYS_OF_RUN = {"preset": str, "learning_rate": (int, float), "seed": int}
_KEYS_OF_RUN |= {"error": (int, float, type(None)), "failed": bool}


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        settings: all that says what is trained, but for the next two.
        learning_rate: the highest of the schedule.
        seed: of the initial weights and of the data.
        phase: "tuning": it serves to choose the learning rate; "reported": it serves
            the tables and figures.
        detailed: whether it keeps the quantities that are too large for every line.
    """

    settings: Settings
    learning_rate: float
    seed: int
    phase: Phase
    detailed: bool = False

    def as_record(self) -> Record:
        return {
            **self.settings,
            "learning_rate": self.learning_rate,
            "seed": self.seed,
            "phase": self.phase,
        }


def of_tuning(settings: Settings) -> Settings:
    """What the runs that tune have of a reported run's settings.

    They may be shorter: `tuning_steps`, if there are any, are then their `steps`.
    """
    if "tuning_steps" not in settings:
        return settings
    return {**settings, "steps": settings["tuning_steps"]}


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
    """The finished runs, and timings; none where there is no file yet.

    Raises:
        ValueError: in one line, if a line is neither.
    """
    records = read_lines(path)
    for number, record in enumerate(records, start=1):
        kinds = _KEYS if record.get("phase") == "timing" else _KEYS | _KEYS_OF_RUN
        for key, kind in kinds.items():
            if key not in record:
                raise _not_a_run(path, number, f"it has no {key}")
            if not isinstance(record[key], kind):
                raise _not_a_run(path, number, f"its {key} is {record[key]!r}")
    return records


def read_lines(path: Path) -> list[Record]:
    """The JSON objects of a file, one a line; none where there is no file yet.

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
        except ValueError as error:
            raise _not_a_run(path, number, str(error)) from None
        if not isinstance(record, dict):
            raise _not_a_run(path, number, "it must be a JSON object")
        records.append(record)
    return records


def _not_a_run(path: Path, number: int, why: str) -> ValueError:
    return ValueError(f"{path}, line {number}, is not a run: {why}")


def append(path: Path, records: Iterable[Record]) -> None:
    """Add lines, all of them or none, and wait until they are on the disk.

    Several processes may append to one file. What a crash left of a last line is
    removed first.

    Raises:
        OSError: if they cannot be written, for the disk is full; the file is as before.
    """
    lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        size = _without_torn_line(file)
        left = memoryview(lines.encode())
        try:
            while left:  # on a disk that is nearly full a write may be short
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise


def _without_torn_line(file: Any) -> int:
    """Removes it; returns the size of the file then."""
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
        path: of the results.
        preset: whose runs; those of another one may go to the same file meanwhile.

    Raises:
        ValueError: in one line, if another process is at it.
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

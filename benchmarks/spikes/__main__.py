"""Train with spikes, low precision, corrupted inputs and decay, and keep every run.

Every arm is put before Adam, AdamW or Lion. Where a rate is tuned, it is for each arm
the best of its set by the error on validation examples over the tuning seeds, failures
last; fresh seeds are then reported on test examples. Arms have equal steps, initial
weights, batches and noise. Finished runs are one JSON line each; a command that was
stopped goes on where it was. `python -m benchmarks.report spikes` draws them.

cpu: models of 8 to 43 thousand parameters. million: one spike in the training of a
language model of 1.3 million parameters, half an hour. gpu: 5 seeds, one of 4.9 million
parameters; it was never run. smoke: seconds. Nothing is downloaded.
$JAX_COMPILATION_CACHE_DIR keeps compiled programs between commands.
"""

import math
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks import grid
from benchmarks.command_line import parse
from benchmarks.runs import RESULTS, Record, Run, finite
from benchmarks.spikes.data import Split
from benchmarks.spikes.presets import PRESETS
from benchmarks.spikes.tasks import Task, task_of
from benchmarks.spikes.train import Curves, train

PROG = "python -m benchmarks.spikes"


@dataclass(frozen=True)
class Options:
    preset: Literal["smoke", "cpu", "million", "gpu"] = "cpu"
    """Which grid."""

    minutes: float | None = None
    """Stop after so long, above 0; by default not before the end."""

    workers: int = 1
    """Runs computed at a time, at least 1; one uses about one core of a CPU."""

    results: Path = RESULTS / "spikes.jsonl"
    """Where finished runs are, and go."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the grid; returns the exit code."""
    options = parse(Options, args, prog=PROG, description=__doc__)
    preset = PRESETS[options.preset]
    return grid.command(
        PROG,
        preset.groups(options.preset),
        preset.protocol,
        train_runs,
        options.results,
        minutes=options.minutes,
        workers=options.workers,
    )


def train_runs(runs: Sequence[Run], tick: Callable[[], None]) -> list[Record]:
    """Train runs in turn: tuning ones for validation, reported ones for test.

    Args:
        runs: with the settings of `benchmarks.spikes.presets.Cell`.
        tick: called at every record; what it raises ends the training.
    """
    records = []
    for run in runs:
        of_run = run.settings
        task = task_of(of_run["task"], of_run["size"], of_run["numbers"])
        split: Split = "validation" if run.phase == "tuning" else "test"
        curves = train(
            task,
            of_run["arm"],
            optimizer=of_run["optimizer"],
            learning_rate=run.learning_rate,
            seed=run.seed,
            steps=of_run["steps"],
            batch=of_run["batch"],
            disturbance=of_run["disturbance"],
            spike=of_run["spike"],
            weight_decay=float(of_run["weight_decay"]),
            loss_scaling=of_run["numbers"] == "float16",
            split=split,
            on_record=lambda step: tick(),
        )
        records.append(_record(run, task, curves, split))
    return records


def _record(run: Run, task: Task, curves: Curves, split: Split) -> Record:
    """What came of a run.

    It has failed (diverged, or learned nothing) if its last loss is not finite, or if
    its error is not below the task's `failure_error`: see `benchmarks.spikes.tasks`.
    """
    score = float(curves.score[-1])
    error = task.error(score, split)
    is_lost = not (math.isfinite(curves.loss[-1]) and math.isfinite(error))
    record: Record = {
        "score": finite(score, digits=6),
        "error": finite(error, digits=6),
        "failed": bool(is_lost or error >= task.failure_error),
        "ms_per_step": finite(curves.ms_per_step, digits=4),
        "num_params": curves.num_params,
        "python": platform.python_version(),  # whose library is the text
    }
    if run.phase == "reported":
        record["curve"] = {
            "step": curves.steps.tolist(),
            "loss": [finite(float(loss), digits=5) for loss in curves.loss],
        }
    return record


if __name__ == "__main__":
    sys.exit(main())

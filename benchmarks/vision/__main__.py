"""Train image classifiers with every arm, and keep every run.

Each arm's learning rate is the best of a fixed set by the accuracy on validation images
over the tuning seeds, failures last; fresh seeds are then reported on test images. Arms
have equal steps, initial weights and batches. Finished runs are one JSON line each; a
command that was stopped goes on where it was. `python -m benchmarks.report vision`
draws them.

cpu: the digits of scikit-learn, about an hour on 2 idle cores. cifar: few steps on
CIFAR-10 (JPEG), needs --data-dir. gpu: 5 seeds, full widths, needs --data-dir;
`--minutes 8` cuts it in pieces. smoke: seconds. $JAX_COMPILATION_CACHE_DIR keeps
compiled programs between commands.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from benchmarks import grid
from benchmarks.command_line import fail, parse
from benchmarks.runs import RESULTS, Record, Run, finite
from benchmarks.vision.data import Data, load
from benchmarks.vision.models import MODELS
from benchmarks.vision.presets import PRESETS
from benchmarks.vision.train import Curves, train

PROG = "python -m benchmarks.vision"


@dataclass(frozen=True)
class Options:
    preset: Literal["smoke", "cpu", "cifar", "gpu"] = "cpu"
    """Which grid."""

    data_dir: Path | None = None
    """The folder that holds mnist.npz and cifar10_jpeg_full.npz, itself or one folder
    below it; digits needs none."""

    minutes: float | None = None
    """Stop after so long, above 0; by default not before the end."""

    workers: int = 1
    """Runs computed at a time, at least 1; one uses about one core of a CPU."""

    results: Path = RESULTS / "vision.jsonl"
    """Where finished runs are, and go."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the grid; returns the exit code."""
    options = parse(Options, args, prog=PROG, description=__doc__)
    preset = PRESETS[options.preset]
    names = {cell.data for cell in preset.cells}
    try:
        data = {name: load(name, options.data_dir) for name in names}
    except (ValueError, OSError) as error:  # the folder, and what its files hold
        fail(PROG, str(error))
    return grid.command(
        PROG,
        preset.groups(options.preset),
        preset.protocol,
        partial(train_runs, data),
        options.results,
        minutes=options.minutes,
        workers=options.workers,
    )


def train_runs(
    data: dict[str, Data], runs: Sequence[Run], tick: Callable[[], None]
) -> list[Record]:
    """Train runs in turn: tuning ones for validation, reported ones for test.

    Args:
        data: by name.
        runs: with the settings of `benchmarks.vision.presets.Cell`.
        tick: called at every record; what it raises ends the training.
    """
    records = []
    for run in runs:
        of_run = run.settings
        images = data[of_run["data"]]
        model = MODELS[of_run["model"]](
            width=of_run["width"], norm=of_run["norm"], num_classes=images.num_classes
        )
        curves = train(
            model,
            images,
            of_run["arm"],
            optimizer=of_run["optimizer"],
            learning_rate=run.learning_rate,
            seed=run.seed,
            steps=of_run["steps"],
            batch=of_run["batch"],
            split="validation" if run.phase == "tuning" else "test",
            num_scored=of_run["scored"],
            on_record=lambda step: tick(),
        )
        records.append(_record(run, curves, images.failure_accuracy))
    return records


def _record(run: Run, curves: Curves, failure_accuracy: float) -> Record:
    """`error` is the share of wrong images, which the shared code ranks arms by."""
    accuracy = float(curves.accuracy[-1])
    lost = not np.isfinite(curves.loss[-1])
    record: Record = {
        "accuracy": finite(accuracy, digits=6),
        "error": finite(1 - accuracy, digits=6),
        "failed": bool(lost or accuracy <= failure_accuracy),
        "ms_per_step": finite(curves.ms_per_step, digits=4),
    }
    if run.phase == "tuning":
        return record
    with np.errstate(divide="ignore", invalid="ignore"):
        exponents = np.log10(curves.grad_std)
        quartiles = np.quantile(exponents, (0, 0.25, 0.5, 0.75, 1), axis=1).T
    record["curve"] = {
        "step": curves.steps.tolist(),
        "accuracy": [finite(float(a), digits=4) for a in curves.accuracy],
        "loss": [finite(float(loss), digits=4) for loss in curves.loss],
    }
    # log10 of the std of the kernels' gradients: least, quartiles, largest.
    record["quartiles"] = _rounded(quartiles)
    if run.detailed:
        record["layers"] = _rounded(exponents)
    return record


def _rounded(exponents: np.ndarray) -> list[list[float | None]]:
    return [[finite(float(e)) for e in row] for row in exponents.round(1)]


if __name__ == "__main__":
    sys.exit(main())

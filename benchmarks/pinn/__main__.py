"""Train physics-informed networks with every optimizer, and keep every run.

Each arm's learning rate is chosen on tuning seeds, from its set: the lowest median
relative error, failures last. It is then reported on fresh seeds. Arms have equal
steps, initial weights and points. Finished runs are one JSON line each; a command
that was stopped goes on where it was. `python -m benchmarks.report pinn` draws them.

cpu: 25 cells, about 3 hours on 2 idle cores. gpu: wider and longer, the initializers
side by side; `--minutes 8` cuts it in pieces. twenty-seeds: ten arms at a fixed rate
with 20 seeds, in the two cells where clipping and b2=0.9 failed. smoke: seconds.
$JAX_COMPILATION_CACHE_DIR keeps compiled programs between commands.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks import grid
from benchmarks.command_line import parse
from benchmarks.pinn.batch import train_batch
from benchmarks.pinn.presets import PRESETS
from benchmarks.runs import RESULTS

PROG = "python -m benchmarks.pinn"


@dataclass(frozen=True)
class Options:
    preset: Literal["smoke", "twenty-seeds", "cpu", "gpu"] = "cpu"
    """Which grid."""

    minutes: float | None = None
    """Stop after so long, above 0; by default not before the end."""

    workers: int | None = None
    """Batches computed at a time, at least 1; by default 2 for cpu, 1 for others."""

    results: Path = RESULTS / "pinn.jsonl"
    """Where finished runs are, and go."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the grid; returns the exit code."""
    options = parse(Options, args, prog=PROG, description=__doc__)
    preset = PRESETS[options.preset]
    return grid.command(
        PROG,
        preset.groups(options.preset),
        preset.protocol,
        train_batch,
        options.results,
        minutes=options.minutes,
        workers=preset.workers if options.workers is None else options.workers,
    )


if __name__ == "__main__":
    sys.exit(main())

"""Time a training step of every arm over that of arm "none", in one process.

The arms have their turns in every round, so that a disturbance of the machine meets all
of them. One JSON line each goes to benchmarks/results/vision.jsonl;
`python -m benchmarks.report vision` makes the table.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from benchmarks import runs
from benchmarks.command_line import fail, parse
from benchmarks.grid import origin
from benchmarks.overhead.timing import interleave
from benchmarks.vision.arms import ARMS
from benchmarks.vision.data import Data, load
from benchmarks.vision.models import MODELS
from benchmarks.vision.presets import Cell
from benchmarks.vision.train import (
    Recipe,
    Variables,
    compute_gradient,
    init_optimizer,
    start,
    update,
)

PROG = "python -m benchmarks.vision.times"
CELLS = (Cell("ResNet-56", 8), Cell("ResNet-56", 8, optimizer="AdamW"))
BASELINE = "none"


@dataclass(frozen=True)
class Options:
    rounds: int = 21
    """How often each arm has its turn, at least 1."""

    results: Path = runs.RESULTS / "vision.jsonl"
    """Where the lines go."""


def main(args: Sequence[str] | None = None) -> int:
    """Time all arms in all cells; returns the exit code."""
    options = parse(Options, args, prog=PROG, description=__doc__)
    if options.rounds < 1:
        fail(PROG, f"--rounds must be at least 1, got {options.rounds}")
    console, data = Console(), load("digits")
    for cell in CELLS:
        records = time_arms(cell, data, options.rounds)
        runs.append(options.results, records)
        for record in records:
            line = f"{cell.model}, {cell.optimizer}, {record['arm']}"
            console.print(f"{line}: {record['ratio']:.3f}", highlight=False)
    return 0


def time_arms(cell: Cell, data: Data, rounds: int) -> list[runs.Record]:
    """The ratios of all arms of a cell, with their quartiles over rounds."""
    stretches = {arm: _stretch(cell, data, arm) for arm in cell.arms}
    times = interleave(stretches, rounds, BASELINE)
    return [
        {
            "phase": "timing",
            "model": cell.model,
            "width": cell.width,
            "norm": cell.norm,
            "data": cell.data,
            "optimizer": cell.optimizer,
            "batch": cell.batch,
            "arm": arm,
            **times[arm].record(),
            **origin(),
        }
        for arm in cell.arms
    ]


def _stretch(cell: Cell, data: Data, arm: str) -> Callable[[int], None]:
    """Takes so many steps of one training, always with the same batch."""
    model = MODELS[cell.model](
        width=cell.width, norm=cell.norm, num_classes=data.num_classes
    )
    variables = start(model, data, jax.random.key(0))
    setup = (cell.optimizer, arm, cell.steps)
    opt_state = init_optimizer(*setup, variables.params)
    images = jax.device_put(data.splits["train"])
    recipe, indices = Recipe.of(data), np.arange(cell.batch, dtype=np.int32)
    rate = ARMS[arm].rates(cell.optimizer, (1e-3,))[0]

    def run(steps: int) -> None:
        nonlocal variables, opt_state
        for _ in range(steps):
            found = compute_gradient(
                model, recipe, variables, images, indices, jax.random.key(0)
            )
            params, opt_state = update(*setup, rate, variables.params, opt_state, found)
            variables = Variables(params, found.batch_stats)
        jax.block_until_ready(variables)

    return run


if __name__ == "__main__":
    sys.exit(main())

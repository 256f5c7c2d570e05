"""Run the benchmarks' grids, and make tables and figures of finished runs."""

import sys

if __name__ == "__main__":
    from benchmarks.lib.start import start

    sys.exit(start("benchmarks.__main__"))

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks import suites
from benchmarks.lib import runs
from benchmarks.lib.command_line import fail, parse
from benchmarks.lib.suite import Suite

PROG = "python -m benchmarks"
Name = Literal[*suites.NAMES]


@dataclass(frozen=True)
class Run:
    """Train what is missing of a grid, and keep every run.

    Where an arm's learning rate is tuned it is chosen on tuning seeds, from a fixed
    set, and reported on fresh seeds. Arms have equal steps, initial weights and
    batches. Finished runs are one JSON line each; a command that was stopped goes on
    where it was. $JAX_COMPILATION_CACHE_DIR keeps compiled programs between commands.
    """

    suite: tyro.conf.Positional[Name | None] = None
    """Which suite."""

    preset: str = "cpu"
    """Which grid of it; --list shows them."""

    list: bool = False
    """Show suites, presets and about how long they take; run nothing."""

    minutes: float | None = None
    """Stop after so long, above 0; by default not before the end."""

    workers: int | None = None
    """Batches computed at a time, at least 1; by default the preset's."""

    results: Path | None = None
    """Where finished runs are, and go; by default benchmarks/results/<suite>.jsonl."""


@dataclass(frozen=True)
class Time:
    """Time a training step of every arm over that of no treatment, in one process.

    The arms have their turns in every round, so that a disturbance of the machine meets
    all of them. `report` makes the table of the lines that this adds to the results.
    """

    suite: tyro.conf.Positional[Name]
    """Whose arms."""

    rounds: int = 21
    """How often each arm has its turn, at least 1."""

    results: Path | None = None
    """Where the lines go; by default benchmarks/results/<suite>.jsonl."""


@dataclass(frozen=True)
class Report:
    """Make the tables and figures of a suite from its finished runs alone.

    They go beside the runs: `<suite>.md` and `<suite>_<preset>_<figure>.png`. Runs that
    are still missing leave gaps.
    """

    suite: tyro.conf.Positional[Name]
    """Whose runs."""

    results: Path | None = None
    """The file of runs; by default benchmarks/results/<suite>.jsonl."""


def main(args: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    options = parse(Run | Report | Time, args, prog=PROG, description=__doc__)
    if isinstance(options, Report):
        return report(options)
    if isinstance(options, Time):
        return time(options, suites.load(options.suite))
    if options.list:
        Console().print(overview())
        return 0
    if options.suite is None:
        fail(PROG, f"run needs a suite of {', '.join(suites.NAMES)}, or --list")
    return run(options, suites.load(options.suite))


def overview() -> Table:
    """All suites and presets."""
    table = Table(box=None, pad_edge=False)
    for head in ("suite", "preset", "runs", "takes about", ""):
        table.add_column(head, justify="right" if head == "runs" else "left")
    for name in suites.NAMES:
        for preset, of in suites.load(name).presets.items():
            table.add_row(name, preset, str(of.num_runs), of.takes, of.about)
    return table


def run(options: Run, suite: Suite) -> int:
    """Compute what is missing; a wrong option or file costs one line."""
    from benchmarks.lib.grid import run_grid
    from benchmarks.lib.train import train_batch

    prog = f"{PROG} run {suite.name}"
    if options.preset not in suite.presets:
        fail(
            prog,
            f"--preset must be one of {', '.join(suite.presets)}, got {options.preset}",
        )
    preset = suite.presets[options.preset]
    workers = preset.workers if options.workers is None else options.workers
    if options.minutes is not None and not options.minutes > 0:
        fail(prog, f"--minutes must be above 0, got {options.minutes:g}")
    if workers < 1:
        fail(prog, f"--workers must be at least 1, got {workers}")
    path = options.results or runs.RESULTS / f"{suite.name}.jsonl"
    try:
        with runs.at_work(path, options.preset):
            for first, *_ in preset.groups:  # missing data is told before the training
                suite.training(first.settings, "reported")
            return run_grid(
                preset,
                partial(train_batch, suite.training, suite.keep),
                path,
                console=Console(),
                minutes=options.minutes,
                workers=workers,
            )
    except (ValueError, OSError) as error:  # what the file holds, or cannot take
        fail(prog, str(error))


def report(options: Report) -> int:
    """Write a suite's page and figures."""
    from benchmarks.lib import pages

    prog = f"{PROG} report {options.suite}"
    path = options.results or runs.RESULTS / f"{options.suite}.jsonl"
    try:
        records = runs.read(path)
        if not records:
            raise ValueError(
                f"{path} holds no runs; {PROG} run {options.suite} makes them"
            )
        suite, page = suites.load(options.suite), suites.load_page(options.suite)
        written = pages.write(page, records, suite, path.parent)
    except (ValueError, OSError) as error:
        fail(prog, str(error))
    for file in written:
        print(file)
    return 0


def time(options: Time, suite: Suite) -> int:
    """Time all arms of the suite's `timed` cells."""
    from benchmarks.lib.machine import origin
    from benchmarks.lib.timing import time_trainings

    prog = f"{PROG} time {suite.name}"
    if options.rounds < 1:
        fail(prog, f"--rounds must be at least 1, got {options.rounds}")
    if not suite.timed:
        fail(prog, f"the suite {suite.name} has no step that is timed")
    path, console = options.results or runs.RESULTS / f"{suite.name}.jsonl", Console()
    for cell in suite.timed:
        trainings = {
            settings["arm"]: suite.training(settings, "reported") for settings in cell
        }
        times = time_trainings(
            trainings, options.rounds, baseline=next(iter(trainings))
        )
        records = [
            {
                **settings,
                "phase": "timing",
                **times[settings["arm"]].record(),
                **origin(),
            }
            for settings in cell
        ]
        try:
            runs.append(path, records)
        except OSError as error:
            fail(prog, str(error))
        for record in records:
            console.print(f"{record['arm']}: {record['ratio']:.3f}", highlight=False)
    return 0

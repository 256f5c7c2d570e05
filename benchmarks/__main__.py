"""Run the benchmarks' grids, and make tables and figures of finished runs."""

import sys

if __name__ == "__main__":
    from benchmarks import start

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

    Where a learning rate is tuned it is chosen on tuning seeds, from a fixed set, and
    reported on fresh seeds. Optimizers have equal steps, initial weights and batches. A
    finished run is one JSON line, and a command that was stopped goes on where it was.
    $JAX_COMPILATION_CACHE_DIR keeps compiled programs between commands.
    """

    suite: tyro.conf.Positional[Name | None] = None
    """Which suite."""

    preset: str = "cpu"
    """Which grid of it; --list shows them."""

    list: bool = False
    """Show suites, presets and about how long they take; run nothing."""

    minutes: float | None = None
    """Stop after this time, above 0; by default not before the end."""

    workers: int | None = None
    """Batches computed at a time, at least 1; by default the preset's."""

    results: Path | None = None
    """The file of finished runs; by default benchmarks/results/<suite>.jsonl."""


@dataclass(frozen=True)
class Report:
    """Make the tables and figures of a suite from its finished runs alone.

    They go next to the runs: `<suite>.md` and `<suite>_<preset>_<figure>.png`. Runs
    that are missing leave gaps. The lines of `<suite>.jsonl` move into the compressed
    file `<suite>.jsonl.gz`.
    """

    suite: tyro.conf.Positional[Name]
    """Which suite."""

    results: Path | None = None
    """The file of finished runs; by default benchmarks/results/<suite>.jsonl."""


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    options = parse(Run | Report, args, prog=PROG, description=__doc__)
    if isinstance(options, Report):
        return report(options)
    if options.list:
        Console().print(overview())
        return 0
    if options.suite is None:
        fail(PROG, f"run needs a suite of {', '.join(suites.NAMES)}, or --list")
    return run(options, suites.load(options.suite))


def overview() -> Table:
    """Returns all suites and presets."""
    table = Table(box=None, pad_edge=False)
    for head in ("suite", "preset", "runs", "takes about", ""):
        table.add_column(head, justify="right" if head == "runs" else "left")
    for name in suites.NAMES:
        for preset, grid in suites.load(name).presets.items():
            table.add_row(name, preset, str(grid.num_runs), grid.takes, grid.about)
    return table


def run(options: Run, suite: Suite) -> int:
    """Computes what is missing; a wrong option or file costs one line."""
    from benchmarks.lib.curves import train_batch
    from benchmarks.lib.grid import measure_missing, run_grid

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
    path, console = _path(options), Console()
    try:
        with runs.at_work(path, options.preset):
            for first, *_ in preset.groups:  # missing data is told before the training
                suite.training(first.settings, "reported")
            measure_missing(suite, preset, path, console)
            return run_grid(
                preset,
                partial(train_batch, suite.training, suite.keep),
                path,
                console=console,
                minutes=options.minutes,
                workers=workers,
            )
    except KeyboardInterrupt:
        console.print("Interrupted; the same command goes on from there.")
        return 130
    except (ValueError, OSError) as error:  # what the file holds, or cannot take
        fail(prog, str(error))


def report(options: Report) -> int:
    """Writes a suite's page and figures."""
    from benchmarks.report import pages

    prog, path = f"{PROG} report {options.suite}", _path(options)
    try:
        records = runs.read(path)
        if not records:
            raise ValueError(
                f"{path} holds no runs; {PROG} run {options.suite} makes them"
            )
        suite, page = suites.load(options.suite), suites.load_page(options.suite)
        written = pages.write(page, records, suite, path.parent)
        runs.archive(path)
    except (ValueError, OSError) as error:
        fail(prog, str(error))
    for file in written:
        print(file)
    return 0


def _path(options: Run | Report) -> Path:
    """Returns the file of lines; the compressed file next to it may be named too."""
    path = options.results or runs.RESULTS / f"{options.suite}.jsonl"
    return path.with_suffix("") if path.suffix == ".gz" else path

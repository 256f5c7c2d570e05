"""Make the tables and figures of a suite again, from its finished runs alone.

They go beside the runs: `<suite>.md` and `<suite>_<preset>_<figure>.png`. Runs that
are still missing leave gaps.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import tyro

import benchmarks.pinn.report
import benchmarks.spikes.report
import benchmarks.vision.report
from benchmarks import pages, runs
from benchmarks.command_line import fail, parse

PROG = "python -m benchmarks.report"

# suite -> (runs, folder) -> the files written
SUITES: dict[str, Callable[[list[runs.Record], Path], list[Path]]] = {
    "pinn": partial(pages.write, benchmarks.pinn.report.PAGE),
    "spikes": partial(pages.write, benchmarks.spikes.report.PAGE),
    "vision": benchmarks.vision.report.write,
}


@dataclass(frozen=True)
class Options:
    suite: tyro.conf.Positional[Literal["pinn", "spikes", "vision"]]
    """Whose runs."""

    results: Path | None = None
    """The file of runs; by default benchmarks/results/<suite>.jsonl."""


def main(args: Sequence[str] | None = None) -> int:
    """Write a suite's report; returns the exit code."""
    options = parse(Options, args, prog=PROG, description=__doc__)
    path = options.results or runs.RESULTS / f"{options.suite}.jsonl"
    try:
        records = runs.read(path)
    except (ValueError, OSError) as error:
        fail(PROG, str(error))
    if not records:
        fail(PROG, f"{path} holds no runs; python -m benchmarks.{options.suite} makes")
    for written in SUITES[options.suite](records, path.parent):
        print(written)
    return 0


if __name__ == "__main__":
    sys.exit(main())

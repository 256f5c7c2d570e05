"""Measure what a gradient transformation adds to a step of AdamW, in one command.

Steps are timed in turn and paired, AdamW against itself among them; then whole training
steps and compilation. Each result is shown as it comes and kept as a JSON line; a
command that was stopped goes on where it was. In the end tables and figures stand next
to the lines. All of it takes about an hour on 2 idle cores; the times mean nothing
while others use the machine.

With --compiled nothing is executed: the compiler of a TPU v5e or an H100, which needs
neither, says what a step would move, launch and keep there.
"""

import sys

if __name__ == "__main__":
    from benchmarks import start

    sys.exit(start("benchmarks.overhead.__main__"))

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import matplotlib

matplotlib.use("Agg")  # figures are saved, no window opens

from rich.console import Console

from benchmarks.lib import runs
from benchmarks.lib.command_line import fail, parse
from benchmarks.lib.runs import Record
from benchmarks.overhead import compilers, page
from benchmarks.overhead.measurements import NAMES, TASKS, Measurements
from benchmarks.overhead.optimizers import (
    BASELINE,
    CLIP,
    COMPILED,
    LEFT_OUT,
    METHODS_OF_THE_PACKAGE,
    TIMED,
)

TIMED_TREES = ("e", "a", "d", "b", "c")
COMPILED_TREES = ("d", "e", "g", "a", "b", "f")
PROG = "python -m benchmarks.overhead"


@dataclass(frozen=True)
class Options:
    parts: tuple[Literal["updates", "training", "compile"], ...] = (
        "updates",
        "training",
        "compile",
    )
    """What is measured, in this order."""

    compiled: Literal["tpu", "gpu"] | None = None
    """Compile for this machine instead of measuring. Needs the extra of its name:
    jax[tpu], jax[cuda12]."""

    trees: tuple[Literal["a", "b", "c", "d", "e", "f", "g"], ...] = ()
    """a: ResNet-50, 161 arrays, 26 million parameters. b: GPT-2 small, 148 arrays, 124
    million. c: 2000 arrays of 1024. d: one array of 100 million. e: the 65 arrays of
    the demo's network. f: 400 arrays of 1024. g: 6 blocks of GPT-2. By default a to e;
    with --compiled all but c."""

    dtypes: tuple[Literal["float32", "bfloat16", "float16"], ...] = (
        "float32",
        "bfloat16",
    )
    """Of parameters, gradients and moments."""

    rounds: int = 25
    """How often each optimizer has its turn, at least 2."""

    leaves: tuple[int, ...] = (10, 100, 1000, 2000)
    """Numbers of equal arrays to compile for."""

    output: Path = runs.RESULTS
    """The folder of overhead.jsonl, overhead.md and the figures."""

    quick: bool = False
    """The smallest of everything, in a minute: shows that it works, and no more."""


def main(args: Sequence[str] | None = None) -> int:
    """Measures what is missing and writes the page; returns the exit code."""
    options = parse(Options, args, prog=PROG, description=__doc__)
    if options.rounds < 2:
        fail(PROG, f"--rounds must be at least 2, got {options.rounds}")
    if min(options.leaves, default=1) < 1:
        fail(PROG, f"--leaves must be at least 1, got {min(options.leaves)}")
    if options.compiled:
        try:
            compilers.load(options.compiled)
        except ValueError as error:  # it is not installed
            fail(PROG, str(error))
    if not options.trees:
        trees = COMPILED_TREES if options.compiled else TIMED_TREES
        options = replace(options, trees=trees)
    if options.quick:
        options = replace(
            options, trees=("e",), dtypes=("float32",), rounds=2, leaves=(10,)
        )
    console, path = Console(), options.output / "overhead.jsonl"
    try:
        with console.status("starting") as status:
            measurements = Measurements(path, options.rounds, status.update)
            for records in _measure(measurements, options):
                for record in records:
                    console.print(_line(record), highlight=False, soft_wrap=True)
        written = page.write(measurements.records, options.output)
        runs.archive(path)
    except (ValueError, OSError) as error:  # what the file holds, where it should go
        fail(PROG, str(error))
    for file in written:
        console.print(str(file), highlight=False, soft_wrap=True)
    return 0


def _measure(measurements: Measurements, options: Options) -> Iterator[list[Record]]:
    if options.compiled:
        for tree in options.trees:
            for dtype in options.dtypes:
                yield measurements.compiled(options.compiled, tree, dtype, COMPILED)
        return
    for part in options.parts:
        if part == "updates":
            for dtype in options.dtypes:
                for tree in options.trees:
                    left_out = LEFT_OUT.get((tree, dtype), ())
                    names = [name for name in TIMED if name not in left_out]
                    yield measurements.updates(tree, dtype, names)
        elif part == "training":
            for network in list(TASKS)[-1:] if options.quick else TASKS:
                names = (BASELINE, *METHODS_OF_THE_PACKAGE)
                yield measurements.training(network, names)
        else:
            for leaves in options.leaves:
                names = (BASELINE, *METHODS_OF_THE_PACKAGE, CLIP)
                yield measurements.compile(leaves, names)


def _line(record: Record) -> str:
    """Returns one result as it comes."""
    what = ", ".join(str(record[name]) for name in NAMES[record["kind"]])
    if "error" in record:
        return f"{what}: failed: {record['error']}"
    if "bytes" in record:
        return f"{what}: {record['bytes'] / 1e6:.5g} MB, {record['kernels']} kernels"
    if "ratio" in record:
        return f"{what}: {record['ms']:.4g} ms, {record['ratio']:.3f}"
    return f"{what}: {record['trace'] + record['compile']:.2f} s"

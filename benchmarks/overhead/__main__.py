"""Measure what a gradient transformation adds to a step of adamw, in one command.

Times interleaved and paired, adamw against itself among them; temporary memory, kernels
and all-reduces of the compiled programs; time to compile; whole training steps. Each
result is shown as it comes and kept as a JSON line; a command that was stopped goes on
where it was. Tables and a figure stand beside the lines in the end. All of it takes
about an hour on 2 idle cores; the times mean nothing while others use the machine.

With --compiled nothing is executed: the compiler of a TPU v5e or an H100, which needs
neither, says what a step would move, launch and keep there.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jax
import matplotlib

matplotlib.use("Agg")  # figures are saved, no window opens

from rich.console import Console

from benchmarks.lib.command_line import fail, parse
from benchmarks.lib.runs import RESULTS
from benchmarks.overhead import compilers, report
from benchmarks.overhead.arms import ARMS, BASELINE, LEFT_OUT, OURS
from benchmarks.overhead.suite import COMPILED, CROSS_COMPILED, Record, Suite

TIMED_TREES = ("e", "a", "d", "b", "c")
COMPILED_TREES = ("d", "e", "g", "a", "b", "f")
PROG = "python -m benchmarks.overhead"


@dataclass(frozen=True)
class Options:
    parts: tuple[
        Literal["updates", "compile", "kernels", "sharded", "training"], ...
    ] = ("kernels", "sharded", "updates", "training", "compile")
    """What is measured, in this order."""

    compiled: Literal["tpu", "gpu"] | None = None
    """Compile for this machine in place of all other parts. Needs the extra of its
    name: jax[tpu], jax[cuda12]."""

    trees: tuple[Literal["a", "b", "c", "d", "e", "f", "g"], ...] = ()
    """a: ResNet-50, 161 leaves, 26 million parameters. b: GPT-2 small, 148 leaves, 124
    million. c: 2000 leaves of 1024. d: one leaf of 100 million. e: the 65 leaves of the
    demo's network. f: 400 leaves of 1024. g: 6 blocks of GPT-2. By default a to e; with
    --compiled all but c."""

    dtypes: tuple[Literal["float32", "bfloat16", "float16"], ...] = (
        "float32",
        "bfloat16",
    )
    """Of parameters, gradients and moments."""

    rounds: int = 25
    """How often each optimizer has its turn, at least 2."""

    leaves: tuple[int, ...] = (10, 100, 1000, 2000)
    """Numbers of equal leaves to compile for."""

    networks: tuple[Literal["resnet20", "pinn"], ...] = ("resnet20", "pinn")
    """Whose whole training steps are timed."""

    output: Path = RESULTS
    """The folder of overhead.jsonl, overhead.md and overhead.png."""

    quick: bool = False
    """The smallest of everything, in a minute: shows that it works, and no more."""


def main(args: Sequence[str] | None = None) -> int:
    """Measure what is missing, write the report; returns the exit code."""
    options = parse(Options, args, prog=PROG, description=__doc__)
    if options.rounds < 2:
        fail(PROG, f"--rounds must be at least 2, got {options.rounds}")
    if min(options.leaves, default=1) < 1:
        fail(PROG, f"--leaves must be at least 1, got {min(options.leaves)}")
    if options.compiled:
        if message := compilers.missing(options.compiled):
            fail(PROG, message)
        # Else JAX looks for the machine whose compiler is here.
        jax.config.update("jax_platforms", "cpu")
    if not options.trees:
        options = replace(
            options, trees=COMPILED_TREES if options.compiled else TIMED_TREES
        )
    if options.quick:
        options = replace(
            options,
            trees=("e",),
            dtypes=("float32",),
            rounds=2,
            leaves=(10,),
            networks=("pinn",),
        )
    console = Console()
    path = options.output / "overhead.jsonl"
    try:
        with console.status("starting") as status:
            suite = Suite(path, options.rounds, status.update)
            for records in _measure(suite, options):
                if records:
                    console.print(report.as_table(records))
    except (ValueError, OSError) as error:  # what the file holds, where it should go
        fail(PROG, str(error))
    for written in [path, *report.write(suite.records, options.output)]:
        console.print(str(written), highlight=False)
    return 0


def _measure(suite: Suite, options: Options) -> Iterator[list[Record]]:
    if options.compiled:
        for tree in options.trees:
            for dtype in options.dtypes:
                yield suite.compiled(options.compiled, tree, dtype, CROSS_COMPILED)
        return
    yield suite.machine()
    for part in options.parts:
        if part == "kernels":
            for width in (32, 256):
                yield suite.kernels(width, list(ARMS))
        elif part == "sharded":
            for leaves in (10,) if options.quick else (10, 60, 100):
                yield suite.sharded(leaves, COMPILED)
        elif part == "updates":
            for dtype in options.dtypes:
                for tree in options.trees:
                    left_out = LEFT_OUT.get((tree, dtype), ())
                    arms = [arm for arm in ARMS if arm not in left_out]
                    yield suite.updates(tree, dtype, arms)
        elif part == "training":
            for network in options.networks:
                yield suite.training(network, (BASELINE, *OURS))
        else:
            for leaves in options.leaves:
                yield suite.compile(leaves, COMPILED)


if __name__ == "__main__":
    sys.exit(main())

"""A deep network learns a differential equation: which remedy does it need?

The first half trains one physics-informed network of 50 layers from Equinox's default
weights, with AdamW, Muon, clipping then Muon, and StableGrad then Muon, and once more
from Glorot weights with Muon alone. The second half trains a network of 8 layers from
Glorot weights with a loss in another unit. Prints the errors against the exact solution
and saves a figure.
"""

import sys

if __name__ == "__main__":
    from benchmarks import start

    sys.exit(start("benchmarks.demo"))

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Literal

import matplotlib

matplotlib.use("Agg")  # the demo saves its figure and opens no window

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from benchmarks.lib.command_line import fail, parse
from benchmarks.lib.curves import History, train_together
from benchmarks.lib.machine import provenance
from benchmarks.lib.optimizers import Optimizer
from benchmarks.lib.train import Moment, Rule, Training, record_steps
from benchmarks.report import figures
from benchmarks.tasks.pinn.network import Network
from benchmarks.tasks.pinn.problems import PROBLEMS, Problem, relative_l2
from benchmarks.tasks.pinn.references import ReferenceFile, read_burgers
from benchmarks.tasks.pinn.scanned import Scanned
from benchmarks.tasks.pinn.task import (
    FAILURE_ERROR,
    Pinn,
    evaluation,
    failed,
    predict,
)

PROG = "python -m benchmarks.demo"
SHOWN = "StableGrad + Muon"  # whose gradients the figure shows
OPTIMIZERS = ("AdamW", "Muon", "clip + Muon", SHOWN)
REMEDY = "Muon from Glorot weights"
# A solution of micrometres, in metres, has residuals 1e-6 times as large.
LOSS_UNIT, UNIT_DEPTH = 1e-12, 8
DEPTH = {"poisson": 50, "burgers": 16}
STEPS = {"poisson": 1500, "burgers": 3000}
AGREEMENT = 1e-3  # the scores against Cole-Hopf and against a file


@dataclass(frozen=True)
class Options:
    problem: Literal["poisson", "burgers"] = "poisson"
    """poisson: Laplace(u) = q on the unit square, u = sin(pi x) sin(pi y). burgers: u_t
    + u u_x = (0.01/pi) u_xx, x in [-1, 1], t in [0, 1], u(x, 0) = -sin(pi x), scored
    against the Cole-Hopf solution."""

    reference: Path | None = None
    """A MATLAB file with x, t and usol to score Burgers against as well."""

    depth: int | None = None
    """Number of hidden layers, at least 2; by default 50 for poisson, 16 for
    burgers."""

    width: int = 32
    """Units in each hidden layer, at least 1."""

    gain: float | None = None
    """Standard deviation of normal initial weights times sqrt(fan-in), above 0: 5/3
    makes gradients explode, 1 keeps their size, 0.3 makes them vanish. By default the
    weights are those of Equinox and PyTorch, uniform within 1 / sqrt(fan-in), from
    which they vanish too."""

    steps: int | None = None
    """Number of updates, at least 1; by default 1500 for poisson, 3000 for burgers."""

    seed: int = 0
    """Of the initial weights and of the points, 0 to 2**32 - 1."""

    learning_rate: float = 2e-3
    """At the first step, above 0; it falls to 0 along a half cosine."""

    output: Path | None = None
    """Where the figure goes (.png, .pdf or .svg); by default out/demo_<problem>.png."""


@dataclass(frozen=True)
class Half:
    """The trainings that one row of the figure compares.

    Attributes:
        title: of the row.
        trainings: name of the optimizer -> what it trains.
    """

    title: str
    trainings: Mapping[str, Training]

    def key(self, name: str) -> str:
        """The name of a training among those of both halves."""
        return f"{self.title}: {name}"


@dataclass(frozen=True)
class Row:
    """One line of the table; errors are relative L2."""

    half: str
    optimizer: str
    error: float
    error_to_file: float | None
    ms_per_step: float

    @property
    def verdict(self) -> str:
        return "failed" if failed(self.error) else "solved"


def main(args: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    options = parse(Options, args, prog=PROG, description=__doc__)
    try:
        reference = check(options)
    except ValueError as error:
        fail(PROG, str(error))
    console = Console()
    try:
        run(options, reference, console)
    except KeyboardInterrupt:
        console.print("Stopped: no figure was written.")
        return 130
    return 0


def check(options: Options) -> ReferenceFile | None:
    """Refuse values that cannot work, before any time is spent.

    Returns:
        The content of `options.reference`.

    Raises:
        ValueError: naming the option, the value and what is allowed.
    """
    for name, least in (("depth", 2), ("width", 1), ("steps", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}")
    for name in ("gain", "learning_rate"):
        value = getattr(options, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} must be a finite number above 0, got {value}")
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed must be from 0 to 2**32 - 1, got {options.seed}")
    output = output_path(options)
    suffix = output.suffix
    if suffix.lower() not in figures.FIGURE_SUFFIXES:
        allowed = ", ".join(figures.FIGURE_SUFFIXES)
        raise ValueError(
            f"--output must end in one of {allowed}, got {suffix or '?'!r}"
        )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent):
            pass
        if output.is_dir():
            raise IsADirectoryError(f"{output} is a folder")
    except OSError as error:
        raise ValueError(f"--output cannot be written: {error}") from None
    if options.reference is None:
        return None
    if options.problem != "burgers":
        raise ValueError(
            f"--reference needs --problem burgers, got --problem {options.problem}"
        )
    return read_burgers(options.reference)


def output_path(options: Options) -> Path:
    return options.output or Path("out") / f"demo_{options.problem}.png"


def run(
    options: Options, reference: ReferenceFile | None, console: Console
) -> list[Row]:
    """Train, print the table, save the figure; returns the table's rows."""
    begin = time.perf_counter()
    problem = PROBLEMS[options.problem]()
    depth = options.depth or DEPTH[options.problem]
    steps = options.steps or STEPS[options.problem]
    recorded = record_steps(steps, early=16, even=40)
    glorot = Scanned(depth, options.width, initializer="glorot")
    default = replace(glorot, initializer="uniform")
    if options.gain is not None:
        default = replace(glorot, initializer="normal", gain=options.gain)
    terms = [replace(term, weight=LOSS_UNIT * term.weight) for term in problem.terms]
    in_unit = replace(problem, terms=tuple(terms))
    shallow = replace(glorot, depth=UNIT_DEPTH)

    def training(problem: Problem, network: Network, optimizer: str) -> Training:
        rule = Rule(Optimizer.named(optimizer), steps)
        return Training(Pinn(problem, network), rule, recorded, evaluation(problem))

    halves = (
        Half(
            f"{depth} layers, {_weights(options)}",
            {name: training(problem, default, name) for name in OPTIMIZERS}
            | {REMEDY: training(problem, glorot, "Muon")},
        ),
        Half(
            f"{UNIT_DEPTH} layers, Glorot weights, loss times {LOSS_UNIT:g}",
            {name: training(in_unit, shallow, name) for name in OPTIMIZERS},
        ),
    )
    console.print(
        f"{problem.equation}: width {options.width}, tanh, {steps} steps, seed "
        f"{options.seed}",
        highlight=False,
    )
    histories = _train_with_progress(halves, options, console)
    rows = _rows(problem, halves, histories, reference)
    console.print(_table(rows, reference, options))
    if reference is not None:
        _compare_references(reference, problem, options, console)
    path = output_path(options)
    figures.save(_figure(problem, halves, histories, options), path)
    console.print(
        f"Figure: {path}   ({time.perf_counter() - begin:.0f} s)", highlight=False
    )
    return rows


def _weights(options: Options) -> str:
    if options.gain is None:
        return "Equinox's default weights"
    return f"weights of gain {options.gain:.3g}"


def _train_with_progress(
    halves: Sequence[Half], options: Options, console: Console
) -> dict[str, History]:
    trainings = {
        half.key(name): training
        for half in halves
        for name, training in half.trainings.items()
    }
    first = next(iter(trainings))
    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )
    steps = trainings[first].rule.steps
    # Not started, so that the time left is estimated from steps, not compilation.
    training = progress.add_task("compiling", total=steps, start=False)
    try:
        with Live(progress, console=console) as live:

            def show(record: dict[str, Moment]) -> None:
                progress.start_task(training)
                done = record[first].step
                progress.update(training, completed=done, description="training")
                live.update(Group(progress, _current_errors(record)))

            return train_together(
                trainings,
                rate=options.learning_rate,
                seed=options.seed,
                on_record=show,
            )
    finally:
        console.line()  # where the output is no terminal, Live does not end its line


def _current_errors(record: dict[str, Moment]) -> Table:
    table = Table.grid(padding=(0, 2))
    for arm, moment in record.items():
        table.add_row(f"  {arm}", f"error {moment.scores['error'][0]:.3g}")
    return table


def _rows(
    problem: Problem,
    halves: Sequence[Half],
    histories: dict[str, History],
    reference: ReferenceFile | None,
) -> list[Row]:
    """Scores every run, on the grid of the reference file if there is one."""
    rows = []
    for half in halves:
        for name, training in half.trainings.items():
            history = histories[half.key(name)]
            error, to_file = history.scores["error"][-1], None
            if reference is not None:
                axes = reference.x, reference.t
                prediction = predict(training.task.network, history.params, axes)
                error = relative_l2(prediction, problem.solution(*axes))
                to_file = float(relative_l2(prediction, reference.values))
            rows.append(
                Row(half.title, name, float(error), to_file, history.ms_per_step)
            )
    return rows


def _table(rows: list[Row], reference: ReferenceFile | None, options: Options) -> Table:
    table = Table(
        caption=f"error: relative L2; failed: above {FAILURE_ERROR} or not a number"
    )
    exact = "Cole-Hopf" if options.problem == "burgers" else "exact solution"
    table.add_column("optimizer", no_wrap=True)
    table.add_column(f"error against {exact}", justify="right")
    if reference is not None:
        table.add_column("against the file", justify="right")
    table.add_column("result")
    table.add_column("ms per step", justify="right")
    for half, group in groupby(rows, lambda row: row.half):
        table.add_section()
        table.add_row(f"[bold]{half}")
        for row in group:
            to_file = [] if row.error_to_file is None else [f"{row.error_to_file:.5f}"]
            table.add_row(
                f"  {row.optimizer}",
                f"{row.error:.5f}",
                *to_file,
                f"[{'red' if row.verdict == 'failed' else 'green'}]{row.verdict}",
                f"{row.ms_per_step:.1f}",
            )
    return table


def _compare_references(
    reference: ReferenceFile, problem: Problem, options: Options, console: Console
) -> None:
    exact = problem.solution(reference.x, reference.t)
    difference = relative_l2(reference.values, exact)
    verdict = "agree" if difference <= AGREEMENT else "DISAGREE: trust the former"
    console.print(
        f"Cole-Hopf and {options.reference.name}: relative L2 difference "
        f"{difference:.1e}, they {verdict}.",
        highlight=False,
    )


def _figure(
    problem: Problem,
    halves: Sequence[Half],
    histories: dict[str, History],
    options: Options,
) -> Figure:
    figure, panels = plt.subplots(
        2, 3, figsize=(13, 8), width_ratios=[1.35, 1, 1], layout="constrained"
    )
    for half, (error, before, after) in zip(halves, panels, strict=True):
        runs = {name: histories[half.key(name)] for name in half.trainings}
        shown = runs[SHOWN]
        errors = {name: run.scores["error"] for name, run in runs.items()}
        figures.error_curves(error, shown.steps, errors, failure=FAILURE_ERROR)
        error.set_title(half.title)
        limit = figures.log_limit([shown.stds, shown.scaled])
        figures.heat_map(before, shown.steps, shown.stds, limit=limit)
        before.set_title(f"{SHOWN}: gradient std")
        mesh = figures.heat_map(after, shown.steps, shown.scaled, limit=limit)
        after.set_title("after scaling (white: 1)")
        figure.colorbar(
            mesh,
            ax=[before, after],
            label=r"$\log_{10}$ std of $\partial L/\partial W$",
        )
    figure.suptitle(f"{problem.name.capitalize()}: {problem.equation}", fontsize=13)
    figure.supxlabel(
        "A good initializer solves the deep network without scale control. You need "
        "scale control where you cannot change the initialization,\nwhere gradients "
        "drift during training, or where the loss has another unit, as below: a "
        "solution of micrometres, in metres.\n"
        f"Width {options.width}, tanh, learning rate {options.learning_rate:g} (cosine "
        f"to 0), seed {options.seed}. {provenance()}",
        fontsize=9,
        color="0.3",
    )
    return figure

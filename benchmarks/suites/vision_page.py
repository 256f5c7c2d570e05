"""Tables and figures of the vision grids, from the file of their runs alone."""

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure

from benchmarks.lib import figures, noise, panels
from benchmarks.lib.arms import SEPARATOR, among
from benchmarks.lib.pages import Page, num_cells
from benchmarks.lib.regret import regret_table
from benchmarks.lib.runs import Record
from benchmarks.lib.summary import Cell, Score, Scores, level
from benchmarks.lib.tables import arms_table, error_table, ranged
from benchmarks.suites.vision import TREATMENTS
from benchmarks.suites.vision_claims import CELL, CLAIMS

CHANCE = {"cifar100": 1.0}  # per cent; 10 where a data set is not named
# The arms of the figures with lines; tables and the dots have all of them.
FOCUS = (
    "none",
    "clip 1",
    "AGC 0.01",
    "StableGrad 0.01",
    "StableGrad prediction",
    "StableGrad 0.01, biases untouched",
    "GradientAutoscaled",
    "mean removal",
    "GradientStabilizer",
    "unit norm by leaf",
)
HISTOGRAMS = ("none", "clip 1", "StableGrad 0.01")
_DASHED = {"color": "0.3", "linewidth": 1, "linestyle": "--"}
NUM_HISTOGRAMS = 3  # cells, the first of the preset that have these arms


# Markdown

_TEXT = """\
Accuracies on test images after the last step. A run fails if its accuracy is not \
above 1.5 times chance (15 % for ten classes) or its loss not a number. Where a rate \
is "tuned", each arm's is the one of its fixed set with the lowest median error \
over the tuning seeds on validation images, failures last, unless a preset names \
another rule; "tuned on 300 steps": the runs it was chosen on had so many, with a \
whole schedule of their own, the reported ones more. Else all arms have the rate \
that is named, in their own scale: under momentum 0.03 times it for the two \
"prediction" arms, 0.01 times it for "z-score", whose gradients are larger by as much. \
"0.01" is the constant reference; "prediction" is the \
prediction's gradient per example; "mean removal" is Gradient Autoscaled \
Normalization without its factor. All arms have equal steps, initial weights and \
batches; float32; 5 % warm-up, then a half cosine to 0."""


def _summary(table: Scores) -> str:
    tuned = {cell: arms for cell, arms in table.items() if _is_tuned(cell)}
    return regret_table(
        tuned,
        "cells with tuned rates",
        compare=_points,
        cost="in points of median accuracy behind the best arm of the cell",
        digits=1,
    )


def _points(error: np.ndarray, lowest: np.ndarray) -> np.ndarray:
    return 100 * (error - lowest)


def _accuracy_tables(table: Scores) -> str:
    """For each data set and norm: arms against models and optimizers."""
    blocks: dict[Cell, list[Cell]] = {}
    for cell in table:
        blocks.setdefault(cell[:2], []).append(cell)
    parts = []
    for (data, norm), cells in blocks.items():
        columns = {_setting(cell): table[cell] for cell in cells}
        parts.append(
            error_table(
                f"{data}, {_norm(norm)}",
                columns,
                _entry,
                TREATMENTS,
                what="Mean accuracy in %",
                lost="points from the middle mean to the best",
                form=".1f",
                statistic=np.mean,
                compare=_points,
            )
        )
    return "\n".join(parts)


def _is_tuned(cell: Cell) -> bool:
    return str(cell[CELL.index("rate")]).startswith("tuned")


def _how(cell: Cell) -> str:
    rate = cell[CELL.index("rate")]
    return f"{rate}" if _is_tuned(cell) else f"rate {rate}"


def _norm(norm: str) -> str:
    return "with BatchNorm" if norm == "batch" else "without BatchNorm"


def _setting(cell: Cell) -> str:
    _, _, model, width, optimizer, _, batch, steps = cell
    return (
        f"{model}, width {width}, {optimizer}, {_how(cell)}, {steps} steps of {batch}"
    )


def _name(cell: Cell) -> str:
    data, norm, *_ = cell
    return f"{data}, {_norm(norm)}, {_setting(cell)}"


def _accuracies(score: Score) -> np.ndarray:
    """Per cent, f[seeds]; one that is not finite counts as 0."""
    return 100 * np.array([record["accuracy"] or 0.0 for record in score.by_seed])


def _entry(column: dict[str, Score], arm: str) -> str:
    score = column[arm]
    percent = _accuracies(score)
    interval = noise.interval(noise.resampled(percent, np.mean))
    bold = arm in level(column, np.mean)
    return (
        f"{ranged(percent.mean(), interval, '.1f', bold=bold)} "
        f"{score.failures} at {score.rate}"
    )


def _times_section(records: Sequence[Record]) -> str:
    """The last measurement of each cell."""
    columns: dict[str, dict[str, Record]] = {}
    for record in records:
        what = "{model}, width {width}, {}, {optimizer}"
        cell = what.format(_norm(record["norm"]), **record)
        treatment, _, _ = record["arm"].partition(SEPARATOR)
        columns.setdefault(cell, {})[treatment] = record

    def entry(column: Mapping[str, Record], arm: str) -> str:
        low, high = column[arm]["ratio_quartiles"]
        return f"{column[arm]['ratio']:.3f} [{low:.3f}, {high:.3f}]"

    first = records[-1]
    return (
        "\n## Time of a step\n\nOf training (gradient and update) over that of arm "
        '"none", arms in turn in one process: median over rounds [quartiles]. '
        f"{first['data']}, batch {first['batch']}; {first['device']}, jax "
        f"{first['jax']}; {first['date'][:10]}.\n\n"
        + arms_table(columns, entry, TREATMENTS)
    )


# Figures


def _title(cell: Cell) -> str:
    data, norm, model, _, optimizer, *_ = cell
    return f"{model}, {_norm(norm)}\n{data}, {optimizer}, {_how(cell)}"


def _target(table: Scores, cell: Cell) -> float | None:
    """What the net of a cell without BatchNorm reaches with it and no arm, in per cent.

    With the best of the optimizers that it was trained with; None if with none.
    """

    def net(cell: Cell) -> Cell:
        data, _, model, width, _, _, *amount = cell
        return data, model, width, *amount

    means = [
        _accuracies(column["none"]).mean()
        for other, column in table.items()
        if net(other) == net(cell) and other[1] == "batch" and "none" in column
    ]
    return None if cell[1] == "batch" else max(means, default=None)


def _suptitle(figure: Figure, table: Scores, title: str) -> None:
    """The title, and what the dashed lines are where there are any."""
    if any(_target(table, cell) is not None for cell in table):
        title += ";\ndashed: mean of the same net with BatchNorm and no arm"
    figure.suptitle(title, fontsize=10)


def _failure_percent(cell: Cell) -> float:
    return 1.5 * CHANCE.get(str(cell[0]), 10.0)


def _accuracy_figure(table: Scores) -> Figure:
    """One dot a seed; every arm, every cell."""
    figure, axes, _ = panels.seeds(table, TREATMENTS, _title, _accuracies, np.mean)
    for cell, ax in axes.items():
        ax.axvline(_failure_percent(cell), **figures.DOTTED)
        if (target := _target(table, cell)) is not None:
            ax.axvline(target, **_DASHED)
        ax.set(xlim=(0, 100), xlabel="test accuracy (%)")
    _suptitle(
        figure,
        table,
        "One dot a seed, crosses: failed (dotted line), bars: mean; rows without dots "
        "were not run",
    )
    return figure


def _curves_figure(table: Scores) -> Figure:
    """Accuracy against step in all cells."""
    # An arm has one colour in every figure.
    arms = {arm: FOCUS.index(arm) for arm in among(table.values(), FOCUS)}
    figure, axes = figures.panels(len(table), 2.4, sharey=True)
    for ax, (cell, column) in zip(axes, table.items(), strict=True):
        panels.curves(ax, column, arms, lambda score: 100 * score.curve("accuracy"))
        ax.axhline(_failure_percent(cell), **figures.DOTTED)
        if (target := _target(table, cell)) is not None:
            ax.axhline(target, **_DASHED)
        ax.set(xlabel="step", ylim=(0, 100))
        ax.set_title(_title(cell), fontsize=8)
    for ax in figures.first_column(axes):
        ax.set_ylabel("test accuracy (%)")
    figures.legend(figure, arms)
    _suptitle(
        figure,
        table,
        "Median over seeds; bands from lowest to highest; dotted: failed below",
    )
    return figure


def _gradients_figure(table: Scores) -> Figure | None:
    """Histograms over kernels of the gradient's std, by step, in the first cells."""
    arms = among(table.values(), HISTOGRAMS)
    cells = [c for c in table if all(arm in table[c] for arm in arms)][:NUM_HISTOGRAMS]
    if not cells or not arms:
        return None
    size = 1.5 + 2.9 * len(arms), 1.3 + 2.4 * len(cells)
    figure, axes = figures.grid(len(cells), len(arms), size, sharex="row", sharey="row")
    for row, cell in zip(axes, cells, strict=True):
        for ax, arm in zip(row, arms, strict=True):
            mesh = _histogram(ax, table[cell][arm])
            ax.set_title(f"{_title(cell)}\n{arm}" if ax is row[0] else arm, fontsize=8)
            ax.set(xscale="log", yscale="log", xlabel="step")
        row[0].set_ylim(_std_limits([table[cell][arm] for arm in arms]))
        row[0].set_ylabel(r"std of $\partial L/\partial W$")
    figure.colorbar(mesh, ax=axes, label="share of the kernels, first reported seed")
    title = (
        "Gradient std of every kernel, before the arm acts; lines: median and "
        "quartiles over kernels, median over seeds; bands from lowest to highest seed"
    )
    figure.suptitle(
        textwrap.fill(title, min(85, int(12 * figure.get_figwidth()))), fontsize=10
    )
    return figure


def _std_limits(of_arms: Sequence[Score]) -> tuple[float, float]:
    exponents = np.concatenate([score.layers.ravel() for score in of_arms])
    finite = exponents[np.isfinite(exponents)]
    return 10 ** (finite.min() - 0.5), 10 ** (finite.max() + 0.5)


def _histogram(ax: Axes, score: Score) -> QuadMesh:
    """log10 std against step: shares of one seed, quartiles of all."""
    steps, exponents = score.steps, score.layers
    finite = exponents[np.isfinite(exponents)]
    low, high = (finite.min(), finite.max()) if finite.size else (-1.0, 1.0)
    edges = np.arange(np.floor(4 * low) / 4, high + 0.5, 0.25)
    shares = np.stack([np.histogram(row, edges)[0] for row in exponents])
    middle = np.sqrt(steps[1:] * steps[:-1])
    mesh = ax.pcolormesh(
        np.concatenate([steps[:1] / 1.3, middle, steps[-1:] * 1.1]),
        10**edges,
        shares.T / exponents.shape[1],
        cmap="Greys",
        vmin=0,
        vmax=0.5,
        rasterized=True,
    )
    quartiles = np.array([r["quartiles"] for r in score.records], float)
    for place, index in ((1, 3), (2, 0), (3, 3)):
        values = 10 ** quartiles[..., place]  # [seeds, steps]
        figures.band(ax, steps, values, index, label="")
    if not np.isfinite(exponents[-1]).any():
        lost = steps[~np.isfinite(exponents).any(axis=1)]
        ax.text(
            0.5,
            0.5,
            f"all zero or not\na number at step {lost[0]}",
            transform=ax.transAxes,
            ha="center",
            fontsize=8,
        )
    return mesh


PAGE = Page(
    "Image classifiers with BatchNorm and without",
    _TEXT,
    CELL,
    num_cells,
    _summary,
    {
        "accuracy": _accuracy_figure,
        "curves": _curves_figure,
        "gradients": _gradients_figure,
    },
    _accuracy_tables,
    _times_section,
    CLAIMS,
    _name,
)

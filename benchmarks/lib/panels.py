"""Figures of scores that the suites' pages share."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.lib import figures
from benchmarks.lib.arms import in_order
from benchmarks.lib.regret import regret
from benchmarks.lib.summary import Cell, Score, Scores

Column = Mapping[str, Score]


def regret_figure(table: Scores) -> Figure | None:
    """Each arm's ratio to the best arm, one dot a cell."""
    regrets = regret(table)
    if not regrets:
        return None
    figure, ((ax,),) = figures.grid(1, 1, (8, 1.6 + 0.3 * len(regrets)))
    for row, of_arm in enumerate(regrets):
        failed = np.array([cell in of_arm.failed for cell in of_arm.costs])
        ratios = np.array(list(of_arm.costs.values()))
        figures.dots(ax, row, ratios, failed, of_arm.median)
    ax.plot([], [], "o", color=figures.PALETTE[3], ms=4, label="solved by every run")
    ax.plot([], [], "x", color=figures.PALETTE[0], ms=5, label="failed in some run")
    ax.plot([], [], color="k", linewidth=1.5, label="median over cells")
    ax.axvline(1.25, **figures.DOTTED)
    ax.set(
        xscale="log",
        xlabel="median error over that of the cell's best arm (dotted: 1.25)",
    )
    figures.name_rows(ax, [f"{r.arm} ({len(r.failed)})" for r in regrets])
    ax.set_title(
        "One dot a cell; in brackets: cells failed though another arm did not",
        fontsize=10,
    )
    ax.grid(axis="x", alpha=0.3)
    ax.legend(fontsize=8)
    return figure


def curves_figure(table: Scores, name: Callable[[Cell], str]) -> Figure:
    """Error against step, a panel a cell, a line an arm."""
    places = {arm: index for index, arm in enumerate(in_order(table.values()))}
    figure, axes = figures.panels(len(table), 2.4)
    for ax, (cell, column) in zip(axes, table.items(), strict=True):
        curves(ax, column, places)
        ax.set(xscale="log", yscale="log", xlabel="step")
        ax.set_title(name(cell), fontsize=8)
    for ax in figures.first_column(axes):
        ax.set_ylabel("error")
    figures.legend(figure, places)
    figure.suptitle("Median over seeds; bands from lowest to highest", fontsize=10)
    return figure


def curves(
    ax: Axes,
    column: Column,
    places: Mapping[str, int],
    of_score: Callable[[Score], np.ndarray] = lambda score: score.curve("error"),
    x: Callable[[Score], np.ndarray] = lambda score: score.steps,
) -> None:
    """A band over seeds for each arm.

    Args:
        ax: where to draw.
        column: arm -> score.
        places: the arms that are drawn -> their place, as in `figures.line`.
        of_score: f[seeds, records] against
        x: f[records].
    """
    for arm, index in places.items():
        if arm in column:
            score = column[arm]
            figures.band(ax, x(score), of_score(score), index, label=arm)
    ax.grid(alpha=0.3)


def seeds(
    table: Mapping[Cell, Column],
    first: Sequence[str],
    name: Callable[[Cell], str],
    of_score: Callable[[Score], np.ndarray] = lambda score: score.errors,
    middle: Callable[[np.ndarray], float] = np.median,
    *,
    height: float = 0.19,
) -> tuple[Figure, dict[Cell, Axes], list[str]]:
    """A panel a cell, a row an arm, one dot a seed.

    Args:
        table: of scores.
        first: the arms that come first, as in `in_order`.
        name: a cell's.
        of_score: f[seeds].
        middle: of these, where the bar stands.
        height: of a row, in inches.

    Returns:
        The figure, its panels, the arms of the rows.
    """
    arms = in_order(table.values(), first)
    figure, axes = figures.panels(len(table), 0.9 + height * len(arms), sharey=True)
    panels = dict(zip(table, axes, strict=True))
    for cell, ax in panels.items():
        for arm, score in table[cell].items():
            values = of_score(score)
            figures.dots(ax, arms.index(arm), values, score.failed, middle(values))
        figures.name_rows(ax, arms)
        ax.set_title(name(cell), fontsize=8)
        ax.grid(axis="x", alpha=0.3)
    return figure, panels, arms

"""Tables and figures of the PINN grids, from the file of their runs alone."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.lib import claims, figures
from benchmarks.lib.arms import among, in_order, pairs
from benchmarks.lib.pages import Page
from benchmarks.lib.regret import regret, regret_table, versus_table
from benchmarks.lib.runs import Record
from benchmarks.lib.summary import Cell, Score, Scores, complete, level
from benchmarks.lib.tables import arms_table, floor_row, legend, ranged
from benchmarks.suites.pinn import ARMS
from benchmarks.suites.pinn_claims import CLAIMS
from benchmarks.tasks.pinn.task import FAILURE_ERROR

CELL = ("problem", "activation", "init", "depth", "width", "steps")
# The arms of the figures with lines; tables and the regret figure have all of them.
FOCUS = (
    "none | AdamW",
    "none | AdamW b2=0.9",
    "clip 1 | AdamW",
    "StableGrad | AdamW",
    "StableGrad | AdamW b2=0.9",
    "StableGrad residuals | AdamW",
    "GradientStabilizer | AdamW",
)
FOCUS_BEHIND = (
    "none | Muon",
    "clip 1 | Muon",
    "unit norm | Muon",
    "unit norm by leaf | Muon",
    "StableGrad | Muon",
    "GradientStabilizer | Muon",
    "StableGrad | AdamW b2=0.9",
)
PAIRS = (
    ("StableGrad | AdamW", "none | AdamW"),
    ("StableGrad | AdamW", "clip 1 | AdamW"),
    ("StableGrad | AdamW", "none | AdamW b2=0.9"),
    ("StableGrad | AdamW", "StableGrad, biases untouched | AdamW"),
    ("StableGrad | AdamW", "StableGrad field | AdamW"),
    ("StableGrad | AdamW", "StableGrad residuals | AdamW"),
    ("StableGrad | AdamW b2=0.9", "none | AdamW"),
    ("StableGrad | AdamW b2=0.9", "clip 1 | AdamW"),
    ("StableGrad | AdamW b2=0.9", "none | AdamW b2=0.9"),
    ("StableGrad | AdamW b2=0.9", "StableGrad, biases untouched | AdamW b2=0.9"),
    ("StableGrad | momentum", "clip 1 | momentum"),
    ("GradientStabilizer | AdamW", "none | AdamW"),
    ("GradientAutoscaled | AdamW", "none | AdamW"),
    ("clip 1 | AdamW", "none | AdamW"),
    ("none | AdamW b2=0.9", "none | AdamW"),
    *(
        ("StableGrad | Muon", other)
        for other in (
            "none | Muon",
            "clip 1 | Muon",
            "unit norm | Muon",
            "unit norm by leaf | Muon",
            "GradientStabilizer | Muon",
            "StableGrad | AdamW b2=0.9",
        )
    ),
    ("GradientStabilizer | Muon", "GradientStabilizer .7 .9 | Muon"),
    ("none | Muon", "none | AdamW b2=0.9"),
)
HEAT_MAPS = pairs(["none"], ["AdamW", "AdamW b2=0.9"])
HEAT_MAPS += pairs(["clip 1", "StableGrad"], ["AdamW"])
HEAT_MAPS_BEHIND = pairs(
    ["none", "clip 1", "unit norm by leaf", "StableGrad"], ["Muon"]
)
MAX_PANELS = 8  # of the figure of seeds
NUM_SHOWN = 3  # cells of the figures against step, the first of the preset


def _shown(table: Scores, *lists: Sequence[str]) -> list[str]:
    """The arms of the first of these lists that any arm of the table is in."""
    found = (among(table.values(), names) for names in lists)
    return next((arms for arms in found if arms), [])


def _focus(table: Scores) -> list[str]:
    muon = any("none | Muon" in arms for arms in table.values())
    return _shown(table, FOCUS_BEHIND if muon else FOCUS)


# Markdown

_HEAD = f"""\
# Physics-informed networks

Written by `python -m benchmarks report pinn` from `pinn.jsonl`; not edited by hand.

Relative L2 errors after the last step. A run fails if its error is above \
{FAILURE_ERROR} or not a number. Each arm's learning rate is that of its set \
with the lowest median error over the tuning seeds, failures last, unless the preset \
fixes it; medians are over the reported seeds, an error counting 1 at most. All arms \
have equal steps, initial weights and points; float32, products at the highest \
precision; rates fall to 0 along a half cosine.
"""


def _count(table: Scores) -> str:
    num_whole = len(complete(table))
    unfinished = f" ({len(table) - num_whole} unfinished, left out of the regret table)"
    return f"{num_whole} cells with every arm" + unfinished * (len(table) > num_whole)


def _summary(table: Scores) -> str:
    whole = complete(table)
    parts = (regret_table(whole, "cells"), versus_table(whole, PAIRS))
    return "\n".join(part for part in parts if part)


def _error_tables(table: Scores) -> str:
    """For each problem, activation and initializer: arms against depths."""
    blocks: dict[Cell, dict[int, Cell]] = {}
    for cell in table:
        problem, activation, init, depth, width, steps = cell
        key = (problem, activation, init, width, steps)
        blocks.setdefault(key, {})[depth] = cell
    parts = []
    for (problem, activation, init, width, steps), by_depth in blocks.items():
        depths = sorted(by_depth)
        columns = {f"depth {depth}": table[by_depth[depth]] for depth in depths}
        parts.append(
            f"### {problem}, {activation}, {init} (width {width}, {steps} steps)\n\n"
            f"Median error (failed runs) at the learning rate. {legend()}\n\n"
            + arms_table(columns, _entry, ARMS, floor_row(columns.values()))
        )
    return "\n".join(parts)


def _entry(column: dict[str, Score], arm: str) -> str:
    score = column[arm]
    median = ranged(score.median, score.interval, ".3g", bold=arm in level(column))
    return f"{median} {score.failures} at {score.rate}"


# Figures


def _regret_figure(table: Scores) -> Figure | None:
    """Each arm's ratio to the best arm, one dot a cell."""
    regrets = regret(complete(table))
    if not regrets:
        return None
    figure, ax = plt.subplots(
        figsize=(8, 1.6 + 0.3 * len(regrets)), layout="constrained"
    )
    for row, of_arm in enumerate(regrets):
        failed = np.array([cell in of_arm.failed for cell in of_arm.costs])
        ratios = np.array(list(of_arm.costs.values()))
        figures.dots(ax, row, ratios, failed, of_arm.median)
    ax.plot([], [], "o", color=figures.PALETTE[3], ms=4, label="solved by every run")
    ax.plot([], [], "x", color=figures.PALETTE[0], ms=5, label="failed in some run")
    ax.plot([], [], color="k", linewidth=1.5, label="median over cells")
    ax.axvline(1.25, color="0.5", linewidth=1, linestyle=":")
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


def _seeds_figure(table: Scores) -> Figure | None:
    """Errors of all seeds in each cell, where the cells are few."""
    if len(table) > MAX_PANELS:
        return None
    columns = {cell: (arms, level(arms)) for cell, arms in table.items()}
    arms = in_order(table.values(), ARMS)
    figure, axes = figures.panels(len(columns), 0.9 + 0.24 * len(arms), sharey=True)
    for ax, (cell, (column, of_level)) in zip(axes, columns.items(), strict=True):
        for arm, score in column.items():
            row = arms.index(arm)
            failed = np.array([run["failed"] for run in score.by_seed])
            figures.dots(ax, row, score.errors, failed, score.median)
            shade = figures.PALETTE[4] if arm in of_level else "0.6"
            low, high = score.interval
            ax.fill_betweenx(
                [row - 0.35, row + 0.35], low, high, color=shade, alpha=0.3
            )
        figures.name_rows(ax, arms)
        ax.axvline(FAILURE_ERROR, color="0.5", linewidth=1, linestyle=":")
        ax.set(xscale="log", xlabel="relative $L_2$ error")
        ax.set_title(_title(cell).replace(", ", "\n", 1), fontsize=8)
        ax.grid(axis="x", alpha=0.3)
    figure.suptitle(
        "One dot a seed, crosses: failed, bars: median, shaded: its interval (green: "
        "level with the best)",
        fontsize=10,
    )
    return figure


def _depth_figure(table: Scores) -> Figure:
    """Error against depth, one panel for each problem, activation and initializer.

    Panels of a single depth are drawn only where there are no others.
    """
    panels: dict[Cell, dict[int, dict[str, Score]]] = {}
    for cell in sorted(table, key=lambda cell: cell[3]):
        panels.setdefault(cell[:3], {})[cell[3]] = table[cell]
    names = list(dict.fromkeys(cell[:3] for cell in table))
    order = [name for name in names if len(panels[name]) > 1] or names
    num_columns = min(4, len(order))
    num_rows = -(-len(order) // num_columns)
    arms = _focus(table)
    figure, axes = plt.subplots(
        num_rows,
        num_columns,
        figsize=(3 + 2.7 * num_columns, 1.2 + 2.5 * num_rows),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for ax, name in zip(axes.flat, order, strict=False):
        _depth_panel(ax, panels[name], arms)
        ax.set_title(", ".join(name), fontsize=9)
        ax.set_xlabel("depth")
    for ax in axes.flat[len(order) :]:
        ax.set_axis_off()
    # Room for the counts where there are any; when all is drawn, for it fixes the rest.
    if any(not score.solved for arms in table.values() for score in arms.values()):
        axes[0, 0].set_ylim(top=60)
    for ax in axes[:, 0]:
        ax.set_ylabel("median relative $L_2$ error")
    figures.legend(figure, {arm: index for index, arm in enumerate(arms)})
    figure.suptitle(
        "Error against depth; crosses: some runs failed, above: how many", fontsize=11
    )
    return figure


def _depth_panel(
    ax: Axes, panel: dict[int, dict[str, Score]], arms: Sequence[str]
) -> None:
    """One line an arm; panel: depth -> arm -> score."""
    for index, arm in enumerate(arms):
        points = {d: column[arm] for d, column in panel.items() if arm in column}
        if not points:
            continue
        style = figures.line(index)
        medians = [score.median for score in points.values()]
        ax.plot(list(points), medians, **style, marker="o", markersize=3)
        for depth, score in points.items():
            if score.solved:
                continue
            ax.plot(depth, score.median, "x", color=style["color"], markersize=7)
            ax.annotate(
                f"{score.num_failed}/{score.num_runs}",
                (depth, 0.99 - 0.05 * index),
                xycoords=("data", "axes fraction"),
                color=style["color"],
                fontsize=6,
                ha="center",
                va="top",
            )
    figures.failure_line(ax, FAILURE_ERROR)
    ax.set(xscale="log", yscale="log")
    ax.set_xticks(list(panel), labels=[str(depth) for depth in panel])
    ax.minorticks_off()
    low, high = min(panel), max(panel)
    ax.set_xlim(low / 1.5, high * 1.5)
    ax.grid(alpha=0.3)


def _curves_figure(table: Scores) -> Figure:
    """Error against step and against wall-clock in the first cells."""
    cells, arms = list(table)[:NUM_SHOWN], _focus(table)
    figure, axes = plt.subplots(
        len(cells),
        2,
        figsize=(10, 1.2 + 2.7 * len(cells)),
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for (by_step, by_time), cell in zip(axes, cells, strict=True):
        for index, arm in enumerate(arms):
            if arm not in table[cell]:
                continue
            score = table[cell][arm]
            steps = np.array(score.records[0]["curve"]["step"])
            errors = np.array([r["curve"]["error"] for r in score.records], float)
            seconds = steps * score.ms_per_step / 1e3
            figures.band(by_step, steps, errors, index, label=arm)
            figures.band(by_time, seconds, errors, index, label=arm)
        for ax, label in ((by_step, "step"), (by_time, "wall-clock of a run (s)")):
            figures.failure_line(ax, FAILURE_ERROR)
            ax.set(xscale="log", yscale="log", xlabel=label)
            ax.set_ylim(top=max(2.0, min(10.0, ax.get_ylim()[1])))
            ax.grid(alpha=0.3)
        by_step.set_ylabel("relative $L_2$ error")
        by_step.set_title(_title(cell), fontsize=9)
        by_time.set_title(
            "each arm at its own rate and speed, runs side by side", fontsize=9
        )
    figures.legend(figure, {arm: index for index, arm in enumerate(arms)})
    figure.suptitle("Median over seeds; bands from lowest to highest", fontsize=11)
    return figure


def _layers_figure(table: Scores) -> Figure | None:
    """Layer x step maps of the gradient's scale in the first cells, one seed."""
    arms = _shown(table, HEAT_MAPS_BEHIND, HEAT_MAPS)
    cells = [
        cell
        for cell in list(table)[:NUM_SHOWN]
        if all(arm in table[cell] for arm in arms)
    ]
    if not cells or not arms:
        return None
    maps = {
        (cell, arm): _layer_stds(table[cell][arm].records)
        for cell in cells
        for arm in arms
    }
    limit = figures.log_limit([values for _, values in maps.values()])
    figure, axes = plt.subplots(
        len(cells),
        len(arms),
        figsize=(1.5 + 2.8 * len(arms), 1.2 + 2.4 * len(cells)),
        squeeze=False,
        layout="constrained",
    )
    for (row, cell), (column, arm) in (
        (r, c) for r in enumerate(cells) for c in enumerate(arms)
    ):
        steps, values = maps[cell, arm]
        mesh = figures.heat_map(axes[row, column], steps, values, limit=limit)
        axes[row, column].set_title(
            f"{_title(cell)}\n{arm}" if column == 0 else f"\n{arm}", fontsize=8
        )
    figure.colorbar(
        mesh, ax=axes, label=r"$\log_{10}$ std of $\partial L/\partial W$, unscaled"
    )
    figure.suptitle("Gradient scale by layer and step, first reported seed")
    return figure


def _layer_stds(
    records: Sequence[Record],
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    (record,) = (record for record in records if "layers" in record)
    exponents = np.array(record["layers"], float)  # [steps, layers]
    stds = {str(layer): 10**column for layer, column in enumerate(exponents.T)}
    return np.array(record["curve"]["step"]), stds


def _title(cell: Cell) -> str:
    problem, activation, init, depth, *_ = cell
    return f"{problem}, {activation}, {init}, depth {depth}"


def _claims(presets: Sequence[Scores]) -> str:
    table = claims.table(
        CLAIMS, presets, lambda cell: f"{_title(cell)}, {cell[5]} steps"
    )
    return f"## Claims about Muon\n\n{table}"


PAGE = Page(
    "pinn",
    _HEAD,
    CELL,
    _count,
    _summary,
    {
        "regret": _regret_figure,
        "seeds": _seeds_figure,
        "depth": _depth_figure,
        "curves": _curves_figure,
        "layers": _layers_figure,
    },
    _error_tables,
    claims=_claims,
)

"""Tables and figures of the PINN grids, from the file of their runs alone."""

from collections.abc import Mapping, Sequence
from itertools import product

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.lib import figures, panels
from benchmarks.lib.arms import among, in_order, pairs
from benchmarks.lib.pages import Page, num_cells
from benchmarks.lib.regret import regret_table, versus_table
from benchmarks.lib.summary import Cell, Score, Scores, level
from benchmarks.lib.tables import error_table
from benchmarks.suites.pinn import ARMS
from benchmarks.suites.pinn_claims import CELL, CLAIMS
from benchmarks.tasks.pinn.task import FAILURE_ERROR

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
    "unit norm by leaf | SOAP",
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
MAX_PANELS = 10  # of the figure of seeds
NUM_SHOWN = 3  # cells of the figures against step, the first of the preset


def _shown(table: Scores, *lists: Sequence[str]) -> list[str]:
    """The arms of the first of these lists that any arm of the table is in."""
    found = (among(table.values(), names) for names in lists)
    return next((arms for arms in found if arms), [])


def _focus(table: Scores) -> dict[str, int]:
    """The arms of a figure with lines, and their places; all arms, if they are few."""
    muon = any("none | Muon" in arms for arms in table.values())
    arms = in_order(table.values(), FOCUS)
    if len(arms) > len(FOCUS):
        arms = _shown(table, FOCUS_BEHIND if muon else FOCUS)
    return {arm: index for index, arm in enumerate(arms)}


# Markdown

_TEXT = f"""\
Relative L2 errors after the last step. A run fails if its error is above \
{FAILURE_ERROR} or not a number. Each arm's learning rate is that of its set \
with the lowest median error over the tuning seeds, failures last, unless a preset \
fixes it or names another rule; medians are over the reported seeds, an error \
counting 1 at most. All arms have equal steps, initial weights and points; float32, \
products at the highest precision; rates fall to 0 along a half cosine."""


def _summary(table: Scores) -> str:
    parts = (regret_table(table, "cells"), versus_table(table, PAIRS))
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
            error_table(
                f"{problem}, {activation}, {init} (width {width}, {steps} steps)",
                columns,
                first=ARMS,
            )
        )
    return "\n".join(parts)


# Figures


def _seeds_figure(table: Scores) -> Figure | None:
    """Errors of all seeds in each cell, where the cells are few."""
    if len(table) > MAX_PANELS:
        return None
    figure, axes, arms = panels.seeds(
        table,
        ARMS,
        lambda cell: _title(cell).replace(", ", "\n", 1) + f", {cell[-1]} steps",
        height=0.24,
    )
    for cell, ax in axes.items():
        of_level = level(table[cell])
        for arm, score in table[cell].items():
            row, (low, high) = arms.index(arm), score.interval
            shade = figures.PALETTE[4] if arm in of_level else "0.6"
            ax.fill_betweenx(
                [row - 0.35, row + 0.35], low, high, color=shade, alpha=0.3
            )
        ax.axvline(FAILURE_ERROR, **figures.DOTTED)
        ax.set(xscale="log", xlabel="relative $L_2$ error")
    figure.suptitle(
        "One dot a seed, crosses: failed, bars: median, shaded: its interval (green: "
        "level with the best)",
        fontsize=10,
    )
    return figure


def _depth_figure(table: Scores) -> Figure | None:
    """Error against depth, for each start at equal steps or equal steps x kernels.

    Where there is more than one depth.
    """
    panels_of: dict[Cell, dict[int, dict[str, Score]]] = {}
    for cell in sorted(table, key=lambda cell: cell[3]):
        for name in _alike(cell):
            panels_of.setdefault(name, {})[cell[3]] = table[cell]
    names = list(dict.fromkeys(name for cell in table for name in _alike(cell)))
    order = [name for name in names if len(panels_of[name]) > 1]
    if not order:
        return None
    num_columns = min(4, len(order))
    num_rows = -(-len(order) // num_columns)
    size, arms = (3 + 2.7 * num_columns, 1.2 + 2.5 * num_rows), _focus(table)
    figure, axes = figures.grid(num_rows, num_columns, size, sharey=True)
    for ax, name in zip(axes.flat, order, strict=False):
        _depth_panel(ax, panels_of[name], arms)
        ax.set_title("{}, {}, {}\n{}".format(*name), fontsize=9)
        ax.set_xlabel("depth")
    for ax in axes.flat[len(order) :]:
        ax.set_axis_off()
    # Room for the counts where there are any; when all is drawn, for it fixes the rest.
    if any(not score.solved for arms in table.values() for score in arms.values()):
        axes[0, 0].set_ylim(top=60)
    for ax in axes[:, 0]:
        ax.set_ylabel("median relative $L_2$ error")
    figures.legend(figure, arms)
    figure.suptitle(
        "Error against depth; crosses: some runs failed, above: how many", fontsize=11
    )
    return figure


def _alike(cell: Cell) -> tuple[Cell, Cell]:
    """The panels that a cell is in: of equal steps, and of equal steps x kernels."""
    *start, depth, _, steps = cell
    kernels = steps * (depth + 1)  # what the time of all steps grows with, or faster
    return (*start, f"{steps} steps"), (*start, f"steps x kernels = {kernels}")


def _depth_panel(
    ax: Axes, panel: dict[int, dict[str, Score]], arms: Mapping[str, int]
) -> None:
    """One line an arm; panel: depth -> arm -> score."""
    for arm, index in arms.items():
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
    size = 10, 1.2 + 2.7 * len(cells)
    figure, axes = figures.grid(len(cells), 2, size, sharey="row")
    for (by_step, by_time), cell in zip(axes, cells, strict=True):
        panels.curves(by_step, table[cell], arms)
        panels.curves(
            by_time, table[cell], arms, x=lambda s: s.steps * s.ms_per_step / 1e3
        )
        for ax, label in ((by_step, "step"), (by_time, "wall-clock of a run (s)")):
            figures.failure_line(ax, FAILURE_ERROR)
            ax.set(xscale="log", yscale="log", xlabel=label)
            ax.set_ylim(top=max(2.0, min(10.0, ax.get_ylim()[1])))
        by_step.set_ylabel("relative $L_2$ error")
        by_step.set_title(_title(cell), fontsize=9)
        by_time.set_title(
            "each arm at its own rate and speed, runs side by side", fontsize=9
        )
    figures.legend(figure, arms)
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
    scores = [table[cell][arm] for cell, arm in product(cells, arms)]
    stds = [
        {str(layer): 10**column for layer, column in enumerate(score.layers.T)}
        for score in scores
    ]
    limit = figures.log_limit(stds)
    size = 1.5 + 2.8 * len(arms), 1.2 + 2.4 * len(cells)
    figure, axes = figures.grid(len(cells), len(arms), size)
    for ax, score, values in zip(axes.flat, scores, stds, strict=True):
        mesh = figures.heat_map(ax, score.steps, values, limit=limit)
    for row, cell in zip(axes, cells, strict=True):
        for ax, arm in zip(row, arms, strict=True):
            head = _title(cell) if ax is row[0] else ""
            ax.set_title(f"{head}\n{arm}", fontsize=8)
    figure.colorbar(
        mesh, ax=axes, label=r"$\log_{10}$ std of $\partial L/\partial W$, unscaled"
    )
    figure.suptitle("Gradient scale by layer and step, first reported seed")
    return figure


def _title(cell: Cell) -> str:
    problem, activation, init, depth, *_ = cell
    return f"{problem}, {activation}, {init}, depth {depth}"


PAGE = Page(
    "Physics-informed networks",
    _TEXT,
    CELL,
    num_cells,
    _summary,
    {
        "regret": panels.regret_figure,
        "seeds": _seeds_figure,
        "depth": _depth_figure,
        "curves": _curves_figure,
        "layers": _layers_figure,
    },
    _error_tables,
    claims=CLAIMS,
    named=lambda cell: f"{_title(cell)}, {cell[5]} steps",
)

"""Figures that the benchmarks share; a footer says where numbers come from."""

import os
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.lib.optimizers import NONE, Optimizer, in_order
from benchmarks.report.scores import Problem, Score, Table
from benchmarks.report.statistics import Interval

# Okabe and Ito's palette: which colour-blind readers can distinguish.
PALETTE = ("#D55E00", "#E69F00", "#56B4E9", "#0072B2", "#009E73", "#CC79A7", "#000000")
LINE_STYLES = ("-", "--", "-.", "-", "--", "-.", ":")
# Bases that are another one with a constant changed -> that one and the change.
VARIANTS = {
    "AdamW (eps=1e-16)": ("AdamW", "smaller eps"),
    "AdamW (b2=0.9, eps=1e-16)": ("AdamW (b2=0.9)", "smaller eps"),
    "SOAP (eps=1e-16)": ("SOAP", "smaller eps"),
    "SOAP (relative eps)": ("SOAP", "relative eps"),
    "SOAP (normalize_updates)": ("SOAP", "normalize_updates"),
    "Muon (eps=1e-16)": ("Muon", "smaller eps"),
    "range-safe Muon": ("Muon", "range-safe norm"),
    **{name: ("layer-wise rates", name) for name in ("LAMB", "LARS", "NovoGrad")},
}
# The lines of a panel that shows one base; equal in all figures that have such panels.
STYLES = {
    "alone": {"color": "#000000", "linestyle": "-"},
    "clip": {"color": "#E69F00", "linestyle": "--"},
    "StableGrad": {"color": "#0072B2", "linestyle": "-"},
    "normalize per array": {"color": "#009E73", "linestyle": "-."},
    "smaller eps": {"color": "#D55E00", "linestyle": "--"},
    "range-safe norm": {"color": "#CC79A7", "linestyle": ":"},
    "relative eps": {"color": "#CC79A7", "linestyle": ":"},
    "normalize_updates": {"color": "#56B4E9", "linestyle": "-."},
    "LAMB": {"color": "#56B4E9", "linestyle": "-"},
    "LARS": {"color": "#CC79A7", "linestyle": "--"},
    "NovoGrad": {"color": "#E69F00", "linestyle": "-."},
    "GradientStabilizer": {"color": "#D55E00", "linestyle": "-"},
    "AGC": {"color": "#56B4E9", "linestyle": "--"},
    "ZClip": {"color": "#CC79A7", "linestyle": "-."},
}
DOTTED = {"color": "0.5", "linewidth": 1, "linestyle": ":"}  # a limit
FIGURE_SUFFIXES = (".pdf", ".png", ".svg")


def error_curves(
    ax: Axes,
    steps: np.ndarray,
    errors: Mapping[str, np.ndarray],
    *,
    failure: float,
) -> None:
    """Draws error against step, a line an optimizer; what is not finite leaves a gap.

    Args:
        ax: Where to draw.
        steps: i[records].
        errors: Optimizer -> f[records].
        failure: The error above which a run counts as failed.
    """
    for index, (optimizer, error) in enumerate(errors.items()):
        ax.plot(steps, error, **line(index), linewidth=2, label=optimizer)
    failure_line(ax, failure)
    ax.set(xscale="log", yscale="log", xlabel="step", ylabel="relative $L_2$ error")
    ax.grid(which="major", alpha=0.3)
    ax.legend(loc="best")


def line(index: int) -> dict[str, str]:
    """Returns colour and dashes of the optimizer at this place of a figure's list."""
    round_, place = divmod(index, len(PALETTE))  # other dashes in the next round
    return {
        "color": PALETTE[place],
        "linestyle": LINE_STYLES[(place + round_) % len(LINE_STYLES)],
    }


def base_and_line(name: str) -> tuple[str, str]:
    """Returns the base of an optimizer, whose panel it is in, and its line's name.

    A base with a changed constant is a line of the unchanged base's panel. With a
    method it has a panel of its own.
    """
    optimizer = Optimizer.named(name)
    if optimizer.method == NONE:
        return VARIANTS.get(optimizer.base, (optimizer.base, "alone"))
    return optimizer.base, optimizer.method


def legend_above(
    figure: Figure, line_names: Iterable[str], title: str | None = None
) -> None:
    """Names lines of `STYLES` above the panels."""
    names = sorted(set(line_names), key=list(STYLES).index)
    lines = [plt.Line2D([], [], **STYLES[name]) for name in names]
    figure.legend(
        lines,
        names,
        title=title,
        loc="outside upper center",
        ncols=min(len(names), 6),
        fontsize=8,
        title_fontsize=8,
    )


def legend(figure: Figure, places: Mapping[str, int]) -> None:
    """Names optimizers next to the panels: name -> its place, as in `line`."""
    lines = [plt.Line2D([], [], **line(index)) for index in places.values()]
    figure.legend(lines, list(places), loc="outside right center", fontsize=8)


def failure_line(ax: Axes, failure: float) -> None:
    """Draws the error above which a run has failed."""
    ax.axhline(failure, **DOTTED)
    ax.annotate(
        "failed",
        (0.02, failure),
        xycoords=("axes fraction", "data"),
        xytext=(0, 2),
        textcoords="offset points",
        color="0.4",
    )


def band(
    ax: Axes, x: np.ndarray, values: np.ndarray, index: int, *, label: str
) -> None:
    """Draws the median over seeds, f[seeds, len(x)], in a band from lowest to highest.

    Where some seeds are not finite the band is that of the other seeds. The median
    counts them as infinite and leaves a gap where they are the majority.
    """
    finite = np.isfinite(values)
    low = np.min(values, axis=0, initial=np.inf, where=finite)
    high = np.max(values, axis=0, initial=-np.inf, where=finite)
    ordered = np.sort(np.where(finite, values, np.inf), axis=0)
    middle = ordered[[(len(values) - 1) // 2, len(values) // 2]].mean(axis=0)
    style = line(index)
    ax.fill_between(
        x, low, high, where=low <= high, color=style["color"], alpha=0.12, linewidth=0
    )
    ax.plot(x, np.where(np.isfinite(middle), middle, np.nan), **style, label=label)


def grid(
    rows: int, columns: int, size: tuple[float, float], **options: object
) -> tuple[Figure, np.ndarray]:
    """Returns a figure of this size in inches, and its panels [rows, columns]."""
    return plt.subplots(
        rows, columns, figsize=size, squeeze=False, layout="constrained", **options
    )


def panels(num: int, height: float, **options: object) -> tuple[Figure, list[Axes]]:
    """Returns a figure and so many panels, up to five in one row, else four in a row.

    Args:
        num: The number of panels.
        height: Of each panel, in inches.
        **options: Of `grid`.
    """
    num_columns = num if num <= 5 else 4
    num_rows = -(-num // num_columns)
    size = max(9, 2.6 + 2.9 * num_columns), 1.2 + height * num_rows
    figure, axes = grid(num_rows, num_columns, size, **options)
    for ax in axes.flat[num:]:
        ax.set_axis_off()
    return figure, list(axes.flat[:num])


def first_column(axes: Sequence[Axes]) -> list[Axes]:
    """Returns the panels on the left."""
    return [ax for ax in axes if ax.get_subplotspec().is_first_col()]


def dots(
    ax: Axes, row: int, values: np.ndarray, failed: np.ndarray, middle: float
) -> None:
    """Draws one row: a dot for each value, a cross if it failed, a bar at `middle`."""
    # Spread over the row, so that equal values do not hide each other.
    height = row + np.linspace(-0.2, 0.2, len(values))
    ax.plot(values[~failed], height[~failed], "o", color=PALETTE[3], ms=4)
    ax.plot(values[failed], height[failed], "x", color=PALETTE[0], ms=5)
    ax.plot([middle] * 2, [row - 0.35, row + 0.35], color="k")


def name_rows(ax: Axes, names: Sequence[str]) -> None:
    """Names the rows of `dots`, the first at the top."""
    ax.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.4, -0.6))


def seeds_figure(
    table: Table, label: Callable[[Problem], str], limit: float | None = None
) -> Figure:
    """Draws one dot a seed, a panel a problem, a row an optimizer.

    Args:
        table: Of scores.
        label: Problem -> its name.
        limit: The value at which a run fails; None: none is drawn.
    """
    names = in_order(name for column in table.values() for name in column)
    figure, axes = panels(len(table), 0.9 + 0.21 * len(names), sharey=True)
    for ax, (problem, column) in zip(axes, table.items(), strict=True):
        for name, score in column.items():
            row = names.index(name)
            dots(ax, row, score.values, score.failed, score.middle)
            _shade(ax, row, score.interval)
        name_rows(ax, names)
        quantity = next(iter(column.values())).quantity
        spread = np.concatenate([score.values for score in column.values()])
        if spread.min() > 0 and spread.max() > 10 * spread.min():
            ax.set_xscale("log")
        if limit is not None:
            ax.axvline(limit, **DOTTED)
        ax.set_xlabel(quantity.label, fontsize=8)
        ax.set_title(textwrap.fill(label(problem), 38), fontsize=8)
        ax.grid(axis="x", alpha=0.3)
    statistic = quantity.statistic[0]
    figure.suptitle(
        f"One dot a seed; crosses: failed; bars: {statistic}; shaded: 95 % interval",
        fontsize=10,
    )
    return figure


def _shade(ax: Axes, row: int, interval: Interval) -> None:
    ax.fill_betweenx([row - 0.35, row + 0.35], *interval, color="0.6", alpha=0.3)


def curves_figure(
    table: Table, label: Callable[[Problem], str], key: str = "error"
) -> Figure:
    """Draws a quantity against the step, a panel a problem, a band an optimizer."""
    names = in_order(name for column in table.values() for name in column)
    figure, axes = panels(len(table), 2.8)
    for ax, (problem, column) in zip(axes, table.items(), strict=True):
        for name, score in column.items():
            band(ax, score.steps, score.curve(key), names.index(name), label=name)
        ax.set(xlabel="step")
        ax.set_title(label(problem), fontsize=8)
        ax.grid(alpha=0.3)
    for ax in first_column(axes):
        ax.set_ylabel(key)
    legend(figure, {name: place for place, name in enumerate(names)})
    figure.suptitle("Median over seeds; bands from lowest to highest", fontsize=10)
    return figure


def depth_figure(
    groups: Mapping[str, Mapping[int, Mapping[str, Score]]], failure: float
) -> Figure | None:
    """Draws error against depth, a panel a group, a line an optimizer.

    A cross marks a depth at which some runs failed.

    Args:
        groups: Name of the panel -> depth -> optimizer -> score.
        failure: The error above which a run fails.
    """
    groups = {name: group for name, group in groups.items() if len(group) > 1}
    if not groups:
        return None
    names = in_order(
        name
        for group in groups.values()
        for column in group.values()
        for name in column
    )
    figure, axes = panels(len(groups), 2.6, sharey=True)
    for ax, (title, group) in zip(axes, groups.items(), strict=True):
        for place, name in enumerate(names):
            points = {d: group[d][name] for d in sorted(group) if name in group[d]}
            style = line(place)
            middles = [score.middle for score in points.values()]
            ax.plot(list(points), middles, **style, marker="o", markersize=3)
            failing = {d: s.middle for d, s in points.items() if s.num_failed}
            ax.plot(list(failing), failing.values(), "x", color=style["color"], ms=7)
        failure_line(ax, failure)
        ax.set(xscale="log", yscale="log", xlabel="depth")
        ax.set_xticks(list(group), labels=[str(depth) for depth in group])
        ax.minorticks_off()
        ax.set_title(textwrap.fill(title, 38), fontsize=8)
        ax.grid(alpha=0.3)
    for ax in first_column(axes):
        ax.set_ylabel("median error")
    legend(figure, {name: place for place, name in enumerate(names)})
    figure.suptitle("Crosses: some runs failed at this depth", fontsize=10)
    return figure


def heat_map(
    ax: Axes,
    steps: np.ndarray,
    values: Mapping[str, np.ndarray],
    *,
    limit: float,
) -> QuadMesh:
    """Draws log10 of a quantity per layer and step: red above 1, blue below.

    Args:
        ax: Where to draw.
        steps: i[records], increasing, at least 1: the logarithmic abscissa.
        values: Layer -> f[records], from the input to the output, such as the entries
            of `stablegrad_optax.scale_factors`, one array over steps each.
        limit: The colours reach from 10^-limit to 10^limit. Values that are zero or not
            finite are grey.

    Returns:
        The mesh, for a colour bar.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        exponent = np.log10(np.stack(list(values.values())))
    ax.set_facecolor("0.8")
    mesh = ax.pcolormesh(
        10 ** _edges(np.log10(steps)),
        np.arange(len(values) + 1) - 0.5,
        np.ma.masked_invalid(exponent),
        cmap="RdBu_r",
        vmin=-limit,
        vmax=limit,
        rasterized=True,
    )
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xscale="log", xlabel="step", ylabel="layer (0: input)")
    ax.invert_yaxis()
    return mesh


def log_limit(values: Sequence[Mapping[str, np.ndarray]]) -> float:
    """Returns the smallest whole `limit` of `heat_map` that holds all of the values."""
    everything = np.concatenate(
        [np.ravel(v) for group in values for v in group.values()]
    )
    positive = everything[np.isfinite(everything) & (everything > 0)]
    if not positive.size:
        return 1.0
    return max(1.0, float(np.ceil(np.abs(np.log10(positive)).max())))


def field(
    ax: Axes,
    axes: tuple[np.ndarray, np.ndarray],
    values: np.ndarray,
    *,
    names: tuple[str, str],
    label: str,
    cmap: str,
    vmin: float | None = None,
) -> None:
    """Draws a function of two coordinates, f[n0, n1], with its colour bar.

    The first coordinate is the ordinate when the second is the time `t`, as is usual
    for x-t diagrams.
    """
    horizontal, vertical = (1, 0) if names[1] == "t" else (0, 1)
    mesh = ax.pcolormesh(
        axes[horizontal],
        axes[vertical],
        values if horizontal == 1 else values.T,
        cmap=cmap,
        vmin=vmin,
        shading="gouraud",
        rasterized=True,
    )
    ax.set(
        xlabel=f"{names[horizontal]} (dimensionless)",
        ylabel=f"{names[vertical]} (dimensionless)",
    )
    ax.figure.colorbar(mesh, ax=ax, label=label)


def save(figure: Figure, path: Path, *, dpi: int = 150) -> None:
    """Writes a figure so that `path` holds all of it or what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(unfinished, format=path.suffix[1:], dpi=dpi)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
        plt.close(figure)


def save_all(
    drawn: Iterable[tuple[str, Figure | None]], footer: str, folder: Path, stem: str
) -> list[Path]:
    """Writes each figure that there is as `<stem>_<name>.png`; returns their paths.

    Args:
        drawn: Names and figures. From an iterator a figure is freed before the next one
            is drawn.
        footer: Says below each figure where its numbers come from.
        folder: Where the files go.
        stem: The start of the files' names.
    """
    paths = []
    for name, figure in drawn:
        if figure is None:
            continue
        wrapped = textwrap.fill(footer, int(17 * figure.get_figwidth()))
        figure.supxlabel(wrapped, fontsize=7, color="0.3")
        paths.append(folder / f"{stem}_{name}.png")
        save(figure, paths[-1], dpi=110)
    return paths


def _edges(centres: np.ndarray) -> np.ndarray:
    """Returns borders midway between the centres; one centre has a cell of width 1."""
    if len(centres) == 1:
        return centres[0] + np.array([-0.5, 0.5])
    middle = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([centres[:1], middle, centres[-1:]])

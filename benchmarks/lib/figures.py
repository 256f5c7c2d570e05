"""Figures that the benchmarks share, and the words that say where they come from."""

import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's palette: told apart by colour-blind readers and in grey.
PALETTE = ("#D55E00", "#E69F00", "#56B4E9", "#0072B2", "#009E73", "#CC79A7", "#000000")
LINE_STYLES = ("-", "--", "-.", "-", "--", "-.", ":")
DOTTED = {"color": "0.5", "linewidth": 1, "linestyle": ":"}  # a limit
FIGURE_SUFFIXES = (".pdf", ".png", ".svg")


def error_curves(
    ax: Axes,
    steps: np.ndarray,
    errors: Mapping[str, np.ndarray],
    *,
    failure: float,
) -> None:
    """Error against step, log-log, one line an arm; not finite leaves a gap.

    Args:
        ax: where to draw.
        steps: i[records].
        errors: arm -> f[records].
        failure: the error above which a run counts as failed.
    """
    for index, (arm, error) in enumerate(errors.items()):
        ax.plot(steps, error, **line(index), linewidth=2, label=arm)
    failure_line(ax, failure)
    ax.set(xscale="log", yscale="log", xlabel="step", ylabel="relative $L_2$ error")
    ax.grid(which="major", alpha=0.3)
    ax.legend(loc="best")


def line(index: int) -> dict[str, str]:
    """Colour and dashes of the arm at this place of a figure's list."""
    round_, place = divmod(index, len(PALETTE))  # other dashes in the next round
    return {
        "color": PALETTE[place],
        "linestyle": LINE_STYLES[(place + round_) % len(LINE_STYLES)],
    }


def legend(figure: Figure, arms: Mapping[str, int]) -> None:
    """Names arms beside the panels: arm -> its place, as in `line`."""
    lines = [plt.Line2D([], [], **line(index)) for index in arms.values()]
    figure.legend(
        lines, list(arms), loc="outside right center", fontsize=8, title="median of"
    )


def failure_line(ax: Axes, failure: float) -> None:
    """The error above which a run has failed."""
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
    """The median over seeds, f[seeds, len(x)], in a band from lowest to highest.

    Where some seeds are not finite the band is that of the others; the median counts
    them as infinite and leaves a gap where they are the majority.
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
    """A figure of this size in inches, and its panels [rows, columns]."""
    return plt.subplots(
        rows, columns, figsize=size, squeeze=False, layout="constrained", **options
    )


def panels(num: int, height: float, **options: object) -> tuple[Figure, list[Axes]]:
    """So many panels: in one row up to five, else four in a row.

    Args:
        num: of panels.
        height: of each, in inches.
        **options: of `grid`.
    """
    num_columns = num if num <= 5 else 4
    num_rows = -(-num // num_columns)
    size = max(9, 2.6 + 2.9 * num_columns), 1.2 + height * num_rows
    figure, axes = grid(num_rows, num_columns, size, **options)
    for ax in axes.flat[num:]:
        ax.set_axis_off()
    return figure, list(axes.flat[:num])


def first_column(axes: Sequence[Axes]) -> list[Axes]:
    """Of the panels those that stand on the left."""
    return [ax for ax in axes if ax.get_subplotspec().is_first_col()]


def dots(
    ax: Axes, row: int, values: np.ndarray, failed: np.ndarray, middle: float
) -> None:
    """One row of a figure: a dot a value, a cross if it failed, a bar at `middle`."""
    # Spread over the row, so that equal values do not hide each other.
    height = row + np.linspace(-0.2, 0.2, len(values))
    ax.plot(values[~failed], height[~failed], "o", color=PALETTE[3], ms=4)
    ax.plot(values[failed], height[failed], "x", color=PALETTE[0], ms=5)
    ax.plot([middle] * 2, [row - 0.35, row + 0.35], color="k")


def name_rows(ax: Axes, names: Sequence[str]) -> None:
    """Names of the rows of `dots`, the first at the top."""
    ax.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.4, -0.6))


def heat_map(
    ax: Axes,
    steps: np.ndarray,
    values: Mapping[str, np.ndarray],
    *,
    limit: float,
) -> QuadMesh:
    """log10 of a positive quantity per layer and step; red above 1, blue below it.

    Args:
        ax: where to draw.
        steps: i[records], increasing, at least 1: the logarithmic abscissa.
        values: layer -> f[records], from the input to the output. The entries of
            `stablegrad_optax.scale_factors`, one array over steps each, will do.
        limit: the colours reach from 10^-limit to 10^limit; zero and not finite
            values are grey.

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
    """The smallest whole `limit` of `heat_map` that holds all of the values."""
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
    """A function of two coordinates, f[n0, n1], with its colour bar.

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


def save(figure: Figure, path: Path) -> None:
    """Write a figure so that `path` holds either all of it or what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(unfinished, format=path.suffix[1:], dpi=150)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
        plt.close(figure)


def save_all(
    drawn: Iterable[tuple[str, Figure | None]], footer: str, folder: Path, stem: str
) -> list[Path]:
    """Write each figure that there is as `<stem>_<name>.png`; returns their paths.

    Args:
        drawn: name, figure; one that is drawn when its turn comes is freed before the
            next one.
        footer: says below each where its numbers come from.
        folder: where to.
        stem: how the files' names begin.
    """
    paths = []
    for name, figure in drawn:
        if figure is None:
            continue
        wrapped = textwrap.fill(footer, int(17 * figure.get_figwidth()))
        figure.supxlabel(wrapped, fontsize=7, color="0.3")
        paths.append(folder / f"{stem}_{name}.png")
        save(figure, paths[-1])
    return paths


def _edges(centres: np.ndarray) -> np.ndarray:
    """Cell borders midway between the centres; one centre gets a cell of width 1."""
    if len(centres) == 1:
        return centres[0] + np.array([-0.5, 0.5])
    middle = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([centres[:1], middle, centres[-1:]])

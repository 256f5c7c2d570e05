"""The figures and the page of the three experiments."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from benchmarks.report import figures
from benchmarks.report.tables import markdown_table
from benchmarks.why.experiments import Layers, memory

MOVES = 0.1  # of the learning rate: a layer with a smaller update stands still


def scale_figure(scales: np.ndarray, sizes: Mapping[str, np.ndarray]) -> Figure:
    """Draws the size of the update against the gradient's, a panel a base."""
    panels = _by_base(sizes)
    figure, axes = figures.panels(len(panels), 2.6, sharey=True)
    for ax, (base, lines) in zip(axes, panels.items(), strict=True):
        for line, size in lines.items():
            positive = np.where(size > 0, size, np.nan)
            ax.plot(scales, positive, **figures.style(line), linewidth=1.8)
        ax.set(xscale="log", yscale="log", ylim=(1e-4, 3), title=base)
        ax.set(xlabel="size of the gradient", xlim=(scales[0], scales[-1]))
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("size of the update /\nlearning rate")
    figures.legend_below(figure, (line for lines in panels.values() for line in lines))
    return figure


def memory_figure(deviations: Mapping[str, np.ndarray]) -> Figure:
    """Draws how far a giant gradient moves the updates after it, a panel a base."""
    panels = _by_base(deviations)
    figure, axes = figures.panels(len(panels), 2.6, sharey=True)
    for ax, (base, lines) in zip(axes, panels.items(), strict=True):
        for line, deviation in lines.items():
            steps = np.unique(np.geomspace(1, len(deviation), 150).astype(int))
            ax.plot(steps, deviation[steps - 1], **figures.style(line), linewidth=1.8)
        ax.axhline(0.5, **figures.DOTTED)
        ax.set(xscale="log", title=base, xlabel="steps", ylim=(-0.05, 1.7))
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("relative change\nof the update")
    figures.legend_below(figure, (line for lines in panels.values() for line in lines))
    return figure


def layers_figure(rows: Mapping[str, Mapping[str, Sequence[Layers]]]) -> Figure:
    """Draws the update of each layer by step; a line where the gradient is eps."""
    num_columns = max(map(len, rows.values()))
    size = 2.4 * num_columns, 2.5 * len(rows) + 0.4
    figure, axes = figures.grid(len(rows), num_columns, size, sharex=True, sharey=True)
    for row, (base, columns) in zip(axes, rows.items(), strict=True):
        for ax, (column, seeds) in zip(row, columns.items(), strict=True):
            update = np.median([layers.update for layers in seeds], axis=0)
            steps = np.arange(1, len(update) + 1)
            names = {str(layer): sizes for layer, sizes in enumerate(update.T)}
            mesh = figures.heat_map(ax, steps, names, limit=4)
            gradient = np.median([layers.gradient for layers in seeds], axis=0)
            _eps_contour(ax, steps, gradient, column)
            ax.set_title(f"{base}\n{column}", fontsize=9)
            ax.set(xlabel="", ylabel="")
    for ax in axes[-1]:
        ax.set_xlabel("step")
    for ax in axes[:, 0]:
        ax.set_ylabel("layer (0: input)")
    figure.colorbar(
        mesh, ax=axes, label="log10 (size of the update / learning rate)", shrink=0.8
    )
    return figure


def _eps_contour(ax, steps, gradient, column: str) -> None:
    """Draws where the gradient that StableGrad has not scaled equals eps."""
    if "StableGrad" in column:
        return
    eps = float(column.removeprefix("eps="))
    below = np.where(gradient > 0, gradient, np.finfo(np.float32).tiny) / eps
    if below.min() < 1 < below.max():
        layers = np.arange(gradient.shape[1])
        ax.contour(steps, layers, np.log10(below.T), [0], colors="k", linewidths=1)


def _by_base(values: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    panels: dict[str, dict[str, np.ndarray]] = {}
    for name, value in values.items():
        base, line = figures.base_and_line(name)
        panels.setdefault(base, {})[line] = value
    return panels


def scale_table(scales: np.ndarray, sizes: Mapping[str, np.ndarray]) -> str:
    """Returns between which sizes of the gradient an optimizer makes its full step."""
    rows = []
    for name, size in sizes.items():
        usual = size[np.argmin(abs(np.log10(scales)))]
        with np.errstate(invalid="ignore"):
            good = scales[(size > usual / 2) & (size < 2 * usual)]
        lost = "not finite" if not np.isfinite(size[-1]) else f"{size[-1]:.2g}"
        rows.append([name, f"{good[0]:.0e}", f"{good[-1]:.0e}", f"{size[0]:.1e}", lost])
    head = [
        "optimizer",
        "smallest gradient with a full step",
        "largest",
        f"update at {scales[0]:.0e}",
        f"update at {scales[-1]:.0e}",
    ]
    return markdown_table(head, rows)


def memory_table(deviations: Mapping[str, np.ndarray]) -> str:
    """Returns how many steps each optimizer remembers the giant gradient."""
    rows = [
        [name, f"{steps}{'+' * (steps == len(deviation))}"]
        for name, deviation in deviations.items()
        for steps in [memory(deviation)]
    ]
    return markdown_table(["optimizer", "steps remembered"], rows)


def layers_table(rows: Mapping[str, Mapping[str, Sequence[Layers]]]) -> str:
    """Returns how many layers stand still at some steps, and the last error."""
    lines, at = [], (1, 2, 10, 100, 500)
    for base, columns in rows.items():
        for column, seeds in columns.items():
            update = np.median([layers.update for layers in seeds], axis=0)
            num_steps, num_layers = update.shape
            still = [
                f"{int(np.sum(~(update[min(s, num_steps) - 1] >= MOVES)))}/{num_layers}"
                for s in at
            ]
            errors = [float(layers.error) for layers in seeds]
            lines.append([f"{base}, {column}", *still, f"{np.median(errors):.2g}"])
    head = ["optimizer", *(f"step {s}" for s in at), "error at the end"]
    return markdown_table(head, lines)

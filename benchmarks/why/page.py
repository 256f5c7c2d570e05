"""The figures and the page of the three experiments."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.report import figures
from benchmarks.report.tables import markdown_table
from benchmarks.why.experiments import Layers, memory


class Results(NamedTuple):
    """Measurements of the three experiments.

    Attributes:
        scales: f[scales], sizes of the gradient.
        sizes: Optimizer -> f[scales], sizes of the update.
        deviations: Optimizer -> f[steps], after a giant gradient.
        rows: Base -> column of the figure -> what each layer got.
    """

    scales: np.ndarray
    sizes: Mapping[str, np.ndarray]
    deviations: Mapping[str, np.ndarray]
    rows: Mapping[str, Mapping[str, Layers]]


def draw(results: Results) -> dict[str, Figure]:
    """Returns one figure for each experiment."""
    return {
        "scale": scale_figure(results.scales, results.sizes),
        "memory": memory_figure(results.deviations),
        "layers": layers_figure(results.rows),
    }


MOVES = 0.01  # of the learning rate: a layer with a smaller update stands still


def scale_figure(scales: np.ndarray, sizes: Mapping[str, np.ndarray]) -> Figure:
    """Draws the size of the update against the gradient's, a panel a base."""
    panels = _by_base(sizes)
    figure, grid = figures.grid(1, len(panels), (9, 3.2), sharey=True)
    axes = grid[0]
    for ax, (base, lines) in zip(axes, panels.items(), strict=True):
        for line, size in lines.items():
            positive = np.where(size > 0, size, np.nan)
            # The wide line is seen below the ones that it coincides with.
            wide = {"linewidth": 5, "zorder": 1} if line == "StableGrad" else {}
            ax.plot(scales, positive, **figures.STYLES[line], **wide)
        ax.set(xscale="log", yscale="log", ylim=(1e-4, 3), title=base)
        ax.set(xlabel="size of the gradient", xlim=(scales[0], scales[-1]))
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("size of the update /\nlearning rate")
    figures.legend_above(figure, (line for lines in panels.values() for line in lines))
    return figure


def memory_figure(deviations: Mapping[str, np.ndarray]) -> Figure:
    """Draws how far a giant gradient moves the updates after it, a panel a base."""
    panels = _by_base(deviations)
    figure, grid = figures.grid(2, 2, (8.5, 5), sharex=True, sharey=True)
    axes = grid.flat
    for ax, (base, lines) in zip(axes, panels.items(), strict=True):
        for line, deviation in lines.items():
            steps = np.unique(np.geomspace(1, len(deviation), 150).astype(int))
            drawn = np.minimum(deviation[steps - 1], 2)
            ax.plot(steps, drawn, **figures.STYLES[line], linewidth=1.8)
        ax.axhline(0.5, **figures.DOTTED)
        ax.set(xscale="log", title=base, ylim=(-0.05, 2.05))
        ax.grid(alpha=0.3)
    for ax in grid[-1]:
        ax.set_xlabel("steps after the giant gradient")
    for ax in grid[:, 0]:
        ax.set_ylabel("relative change\nof the update")
    figures.legend_above(figure, (line for lines in panels.values() for line in lines))
    return figure


def layers_figure(rows: Mapping[str, Mapping[str, Layers]]) -> Figure:
    """Draws the update of each layer by step; a line where the gradient is eps."""
    num_columns = max(map(len, rows.values()))
    size = 2.4 * num_columns, 2.5 * len(rows) + 0.4
    figure, axes = figures.grid(len(rows), num_columns, size, sharex=True, sharey=True)
    for row, (base, columns) in zip(axes, rows.items(), strict=True):
        for ax, (column, layers) in zip(row, columns.items(), strict=True):
            update = layers.update
            steps = np.arange(1, len(update) + 1)
            names = {str(layer): sizes for layer, sizes in enumerate(update.T)}
            mesh = figures.heat_map(ax, steps, names, limit=4)
            _eps_contour(ax, steps, layers.gradient, column)
            ax.set_title(f"{base}\n{column}", fontsize=9)
            ax.set(xlabel="", ylabel="")
    axes[0, 0].set_ylim(update.shape[1] - 0.5, -0.5)  # the input is at the top
    for ax in axes[-1]:
        ax.set_xlabel("step")
    for ax in axes[:, 0]:
        ax.set_ylabel("layer (0: input)")
    figure.colorbar(
        mesh, ax=axes, label="log10 (size of the update / learning rate)", shrink=0.8
    )
    return figure


def _eps_contour(
    ax: Axes, steps: np.ndarray, gradient: np.ndarray, column: str
) -> None:
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


def layers_table(rows: Mapping[str, Mapping[str, Layers]]) -> str:
    """Returns how many layers stand still at some steps, and the last error."""
    lines, at = [], (1, 2, 10, 100, 500)
    for base, columns in rows.items():
        for column, layers in columns.items():
            update = layers.update
            num_steps, num_layers = update.shape
            still = [
                f"{int(np.sum(~(update[min(s, num_steps) - 1] >= MOVES)))}/{num_layers}"
                for s in at
            ]
            lines.append([f"{base}, {column}", *still, f"{layers.error:.2g}"])
    head = ["optimizer", *(f"step {s}" for s in at), "error at the end"]
    return markdown_table(head, lines)


PAGE = """# Why scale control changes what an optimizer does

`python -m benchmarks.why` runs these three experiments and writes this page. The
first shows a constant of the optimizer, the second a moving average, and the third a
network that suffers from the former.

## The scale of the gradient

![size of the update against the size of the gradient](why_scale.png)

A kernel of 16 by 16 gets 50 gradients, a fixed direction plus noise of the same size,
all multiplied by one number. The figure shows the root mean square of the last update
over the learning rate, against that of the gradient. The table says between which sizes
the update is within a factor of 2 of its size at 1, from 1e-30 to 1e30. A line that
ends stands for an update of zero.

{scale_table}
## One giant gradient

![change of the update after a giant gradient](why_memory.png)

After 200 ordinary gradients of norm 0.4, one is multiplied by 10,000. The figure shows
the norm of the change of each update that this causes, over the norm of the update
without it, and at most 2. The table counts the steps up to the last one that changes by
half of its size or more; a plus says that the experiment ended before.

{memory_table}
## A deep network whose gradients vanish

![size of the update of each layer by step](why_layers.png)

A tanh network of 50 hidden layers of width 32 learns Poisson's equation from Equinox's
default weights at the constant learning rate 0.003. Blue layers stand still; white ones
make updates of about the size of the learning rate; grey ones make no finite update
other than zero. The black line is where a layer's gradient equals `eps`: above it the
gradient is smaller. The table counts kernels whose update is below {moves:g} times the
learning rate (root mean square). SOAP makes no update in its first step. The error is
relative L2 after the last step; predicting zero has 1.

{layers_table}
The gradients of the first step, in root mean square:
{first_gradients}.

{findings}

{footer}.
"""


def markdown(results: Results, footer: str) -> str:
    """Returns the page."""
    scales, sizes, deviations, rows = results
    first = next(iter(next(iter(rows.values())).values())).gradient[0]
    return PAGE.format(
        scale_table=scale_table(scales, sizes),
        memory_table=memory_table(deviations),
        layers_table=layers_table(rows),
        moves=MOVES,
        first_gradients=f"{first.min():.1e} in the smallest layer, "
        f"{np.median(first):.1e} in the median one, {first.max():.1e} in the largest",
        findings=FINDINGS,
        footer=footer,
    )


FINDINGS = """\
### What the three experiments say

* An update is proportional to the gradient, instead of independent of its size, once
  the gradient is below `eps`. Muon adds its `eps` to the norm of a momentum of many
  entries and loses its step later than Adam and SOAP. At the other end, the squares of
  AdamW and the norm of Muon overflow, and the update is zero. After `stablegrad()` the
  update has one size over the whole range. So it has with a range-safe norm for Muon
  and with the relative `eps` of `stablegrad_optax.soap`: what is missing is a constant,
  and not a property of these optimizers.
* AdamW with `b2=0.999` remembers one giant gradient longest, because the square root of
  its second moment falls by half only every 1400 steps. Muon and SOAP remember it for
  as long as it dominates their momentum. A clip at a norm near the ordinary one and
  `stablegrad()` both prevent this. `stablegrad()` does so exactly, since the giant
  gradient has the direction of the ordinary one here.
* In the deep network, SOAP with `eps=1e-8` stands still in the layers whose gradient is
  below `eps`, and never recovers. A smaller `eps` moves them and the network trains, as
  it does after `stablegrad()`. For SOAP, `eps` is the cause.
* For AdamW `eps` is not the whole cause. With a smaller `eps` all layers move at first.
  Then the gradient falls, the second moment remembers what it was, and the layers stop:
  with `b2=0.999` for the rest of the experiment, with `b2=0.9` for a while and again.
  After `stablegrad()` no layer stops, because every step has the same size there. But
  these 500 steps at one constant rate train the network with none of the eight.
* The squares of the gradients of this network stay in the range of float32, so that
  `eps=1e-30` is not harmful here. One seed and one learning rate show a mechanism; they
  do not rank optimizers.
"""

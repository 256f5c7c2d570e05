"""Error and failures against the learning rate: two numbers a chain, and a figure."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.lib.optimizers import Optimizer, in_order
from benchmarks.report import figures
from benchmarks.report.scores import Problem, Score, Sweeps
from benchmarks.report.tables import markdown_table, ranged

SUCCESS = 0.9  # the share of the runs of a rate that must not fail
NEAR = 3.0  # times the lowest median error


class Window(NamedTuple):
    """The rates at which an optimizer trains about as well as it can.

    Attributes:
        best: The score with the lowest median among the rates at which runs succeed, or
            among all rates if there is no such rate.
        lowest: The lowest good rate, or None.
        highest: The highest good rate.
    """

    best: Score
    lowest: float | None
    highest: float | None


def window(by_rate: Mapping[float, Score]) -> Window:
    """Finds the good rates: enough runs succeed and the median is near the lowest."""
    enough = {
        rate: score
        for rate, score in by_rate.items()
        if score.num_failed <= (1 - SUCCESS) * score.num_runs + 1e-9
    }
    best = min((enough or by_rate).values(), key=lambda score: score.middle)
    good = [r for r, score in enough.items() if score.middle <= NEAR * best.middle]
    return Window(best, min(good, default=None), max(good, default=None))


def rates_table(column: Mapping[str, Mapping[float, Score]]) -> str:
    """Returns the lowest error and the window of each optimizer on one problem."""
    rows = []
    for name, by_rate in column.items():
        best, lowest, highest = window(by_rate)
        form = best.quantity.form
        is_open = lowest is not None and (
            lowest == min(by_rate) or highest == max(by_rate)
        )
        factor = "none" if lowest is None else f"{highest / lowest:.3g}{'+' * is_open}"
        rows.append(
            [
                name,
                format(best.middle, form),
                ranged(best.interval, form),
                best.failures,
                f"{best.learning_rate:.1e}",
                factor,
            ]
        )
    head = [
        "optimizer",
        "lowest median error",
        "95 % interval",
        "failed runs",
        "at the learning rate",
        "window",
    ]
    return markdown_table(head, rows)


RATES_CAPTION = (
    "Every optimizer at every learning rate of its set. Window: the factor between the "
    "lowest and the highest rate at which at least 90 % of the runs succeed and the "
    "median error is within 3 times the optimizer's lowest; a plus says that it "
    "reaches an end of the set.\n"
)


def rates_figure(sweeps: Sweeps, label: Callable[[Problem], str]) -> Figure | None:
    """Draws error against learning rate, a panel for each problem and base.

    Bands are 95 % intervals of the median. A cross marks a rate at which some runs
    failed. The panels of one problem, or of one base, fill several rows. Optimizers
    whose line has no style are not drawn.
    """
    if not sweeps:
        return None
    names = in_order(name for column in sweeps.values() for name in column)
    places = {
        name: _places(name, names)
        for name in names
        if figures.base_and_line(name)[1] in figures.STYLES
    }
    bases = list(dict.fromkeys(base for place in places.values() for base in place))
    num_panels, num_columns, sharey = len(sweeps) * len(bases), len(bases), "row"
    if len(sweeps) == 1:
        num_columns, sharey = min(num_columns, 4), True
    elif len(bases) == 1:
        num_columns, sharey = 2, False
    num_rows = -(-num_panels // num_columns)
    has_title_each = num_columns > len(bases)
    width = 10 if has_title_each else max(7, 2 + 1.9 * num_columns)
    size = width, 1.2 + 1.9 * num_rows
    figure, axes = figures.grid(num_rows, num_columns, size, sharey=sharey)
    rows = axes.flat[:num_panels].reshape(len(sweeps), len(bases))
    for ax in axes.flat[num_panels:]:
        ax.set_axis_off()
    for row, (problem, column) in zip(rows, sweeps.items(), strict=True):
        for name, by_rate in column.items():
            for base, line in places.get(name, {}).items():
                _draw_rates(row[bases.index(base)], by_rate, figures.STYLES[line])
        for ax, base in zip(row, bases, strict=True):
            if not ax.lines:
                ax.set_axis_off()
                continue
            ax.set(xscale="log", yscale="log")
            ax.text(0.03, 0.03, base, transform=ax.transAxes, fontsize=8)
            ax.grid(alpha=0.3)
        row[0].set_title(label(problem), fontsize=7, loc="left")
    for ax in (next(ax for ax in row if ax.lines) for row in axes):
        ax.set_ylabel("median error", fontsize=8)
        ax.tick_params(labelleft=True)
    figures.legend_above(
        figure,
        (line for place in places.values() for line in place.values()),
        "Abscissa: learning rate; crosses: some runs failed; bands: 95 % intervals",
    )
    return figure


def _places(name: str, names: Sequence[str]) -> dict[str, str]:
    """Returns the panels that an optimizer is in, and the name of its line in each.

    A base with a changed constant is compared with the unchanged one and, if methods
    precede it elsewhere, stands alone in the panel of these.
    """
    base, line = figures.base_and_line(name)
    shown = {figures.base_and_line(other)[0] for other in names if other != name}
    own = Optimizer.named(name).base
    if own == base or own not in shown:
        return {base: line}
    return {base: line, own: "alone"} if base in shown else {own: "alone"}


def _draw_rates(
    ax: Axes, by_rate: Mapping[float, Score], style: dict[str, str]
) -> None:
    """Draws the curve of one optimizer, its band and its crosses."""
    rates, middles = list(by_rate), [score.middle for score in by_rate.values()]
    ends = zip(*(score.interval for score in by_rate.values()), strict=True)
    ax.fill_between(rates, *ends, color=style["color"], alpha=0.12, linewidth=0)
    ax.plot(rates, middles, **style, linewidth=1.2)
    failing = {r: s.middle for r, s in by_rate.items() if s.num_failed}
    ax.plot(list(failing), failing.values(), "x", color=style["color"], ms=5)

"""Error and failures against the learning rate: two numbers a chain, and a figure."""

from collections import Counter
from collections.abc import Callable, Mapping
from itertools import chain
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.lib.optimizers import Optimizer
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
    panels = {problem: _panels(column) for problem, column in sweeps.items()}
    panels = {problem: by_base for problem, by_base in panels.items() if by_base}
    if not panels:
        return None
    # Those that most problems have come first.
    counts = Counter(base for by_base in panels.values() for base in by_base)
    bases = [base for base, _ in counts.most_common()]
    num_panels, num_columns, sharey = len(panels) * len(bases), len(bases), "row"
    if len(panels) == 1:
        num_columns, sharey = min(num_columns, 4), True
    elif len(bases) == 1:
        num_columns, sharey = 2, False
    num_rows = -(-num_panels // num_columns)
    has_title_each = num_columns > len(bases)
    width = 10 if has_title_each else max(7, 2 + 1.9 * num_columns)
    size = width, 1.2 + 1.9 * num_rows
    figure, axes = figures.grid(num_rows, num_columns, size, sharey=sharey)
    rows = axes.flat[:num_panels].reshape(len(panels), len(bases))
    for ax in axes.flat[num_panels:]:
        ax.set_axis_off()
    for row, (problem, by_base) in zip(rows, panels.items(), strict=True):
        for ax, base in zip(row, bases, strict=True):
            if base not in by_base:
                ax.set_axis_off()
                continue
            for line, by_rate in by_base[base].items():
                _draw_rates(ax, by_rate, figures.STYLES[line])
            ax.set(xscale="log", yscale="log")
            ax.text(0.03, 0.03, base, transform=ax.transAxes, fontsize=8)
            ax.grid(alpha=0.3)
        row[0].set_title(label(problem), fontsize=7, loc="left")
    for ax in (next(ax for ax in row if ax.lines) for row in axes):
        ax.set_ylabel("median error", fontsize=8)
        ax.tick_params(labelleft=True)
    figures.legend_above(
        figure,
        chain.from_iterable(chain(*by_base.values()) for by_base in panels.values()),
        "Abscissa: learning rate; crosses: some runs failed; bands: 95 % intervals",
    )
    return figure


def _panels(
    column: Mapping[str, Mapping[float, Score]],
) -> dict[str, dict[str, Mapping[float, Score]]]:
    """Returns base -> line -> scores by rate; a panel for each base of a problem.

    A base with a changed constant is a line of the unchanged base's panel where that
    was run. Otherwise, or if methods precede it too, it stands alone in its own panel.
    """
    panels: dict[str, dict[str, Mapping[float, Score]]] = {}
    for name, by_rate in column.items():
        base, line = figures.base_and_line(name)
        own = Optimizer.named(name).base
        shown = {figures.base_and_line(other)[0] for other in column if other != name}
        places = {base: line} if own == base or base in shown else {}
        if own != base and (own in shown or not places):
            places[own] = "alone"
        for panel, its_line in places.items():
            if its_line in figures.STYLES:
                panels.setdefault(panel, {})[its_line] = by_rate
    return panels


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

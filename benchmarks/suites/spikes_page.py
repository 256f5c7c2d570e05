"""Tables and figures of the grids with spikes, from the file of their runs alone."""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from benchmarks.lib import figures, panels
from benchmarks.lib.arms import in_order
from benchmarks.lib.claims import Claim
from benchmarks.lib.pages import Page
from benchmarks.lib.regret import regret_table
from benchmarks.lib.summary import Cell, Score, Scores
from benchmarks.lib.tables import arms_table, error_table, median_entry
from benchmarks.suites.spikes import AFTER, TREATMENTS
from benchmarks.tasks.disturbances import DISTURBANCES
from benchmarks.tasks.sequences.models import NUMBERS

CELL = (
    "task",
    "size",
    "numbers",
    "disturbance",
    "spike",
    "weight_decay",
    "optimizer",
    "batch",
    "steps",
    "rate",
)
SCORES = {
    "lm": "bits per byte over those of the bytes' frequencies",
    "forecast": "RMSE over that of the window's mean",
    "resnet20": "share of wrong images",
}


def _named(cell: Cell) -> dict[str, str | int]:
    return dict(zip(CELL, cell, strict=True))


def _times(cell: Cell) -> tuple[int, int, int]:
    """When a spike's cost is shown: updates from its own on, which is the first."""
    of_cell = _named(cell)
    left = int(of_cell["steps"]) - int(of_cell["spike"]) + 1
    return 1, 50, max(after for after in AFTER if after <= left)


def _sweeps(table: Scores) -> dict[Cell, dict[str, dict[str, Score]]]:
    """What was run at three fixed rates or more: cell but for it -> rate -> arms."""
    by_rate: dict[Cell, dict[str, dict[str, Score]]] = {}
    for cell, arms in table.items():
        *rest, rate = cell
        if rate != "tuned":
            by_rate.setdefault(tuple(rest), {})[str(rate)] = arms
    return {
        cell: dict(sorted(rates.items(), key=lambda item: float(item[0])))
        for cell, rates in by_rate.items()
        if len(rates) > 2
    }


def _compared(table: Scores) -> Scores:
    """The cells in which arms are ranked: those with tuned rates."""
    tuned = [item for item in table.items() if _named(item[0])["rate"] == "tuned"]
    return dict(sorted(tuned, key=_hardness))


def _trained(cell: Cell) -> tuple[str | int, str | int]:
    of_cell = _named(cell)
    return of_cell["task"], of_cell["optimizer"]


def _hardness(item: tuple[Cell, object]) -> tuple:
    """Groups cells by task, and orders them as `DISTURBANCES` and decays grow."""
    of_cell = _named(item[0])
    return (
        of_cell["task"],
        of_cell["optimizer"],
        tuple(NUMBERS).index(of_cell["numbers"]),
        tuple(DISTURBANCES).index(str(of_cell["disturbance"])),
        float(of_cell["weight_decay"]),
    )


def _excess(table: Scores) -> dict[Cell, dict[str, np.ndarray]]:
    """What a spike costs: cell -> arm -> clean loss less that of the run without it.

    f[seeds, times]: pairs of equal seeds, alike up to the spike's update; infinite
    where the loss is not a number, not a number where a run had ended. Cells whose run
    without a spike is missing are left out.
    """
    place = CELL.index("disturbance")
    excess: dict[Cell, dict[str, np.ndarray]] = {}
    for cell, arms in table.items():
        spike = int(cell[CELL.index("spike")])
        if not spike or cell[place] == "none":
            continue
        calm = table.get((*cell[:place], "none", *cell[place + 1 :]), {})
        for arm in (arm for arm in arms if arm in calm):
            with_spike, without = _of_equal_seeds(arms[arm], calm[arm])
            if with_spike.records:
                times = [spike - 1 + after for after in _times(cell)]
                later = _losses(with_spike, times) - _losses(without, times)
                excess.setdefault(cell, {})[arm] = later
    return dict(sorted(excess.items(), key=_hardness))


def _of_equal_seeds(one: Score, other: Score) -> tuple[Score, Score]:
    """Both without the seeds that the other has not: of a grid that is not finished."""

    def seeds(score: Score) -> set[int]:
        return {record["seed"] for record in score.records}

    shared = seeds(one) & seeds(other)
    first, second = (
        Score(tuple(r for r in score.records if r["seed"] in shared))
        for score in (one, other)
    )
    return first, second


def _losses(score: Score, times: Sequence[int]) -> np.ndarray:
    """Clean losses after these updates f[seeds, times], in the order of the seeds."""
    rows = []
    for losses in np.nan_to_num(score.curve("loss"), nan=np.inf):
        at = dict(zip(score.steps, losses, strict=True))
        rows.append([at.get(time, np.nan) for time in times])
    return np.array(rows)


def _title(cell: Cell) -> str:
    """What sets a cell apart; its rate may be missing."""
    of_cell = dict(zip(CELL, cell, strict=False))
    parts = [f"{of_cell['task']}, {of_cell['optimizer']}"]
    if of_cell["numbers"] != "float32":
        parts.append(str(of_cell["numbers"]))
    if of_cell["disturbance"] != "none":
        parts.append(str(of_cell["disturbance"]))
    if of_cell["weight_decay"] != "0":
        parts.append(f"decay {of_cell['weight_decay']} in the gradient")
    return ", ".join(parts)


# What a text may say of two arms, if the runs carry it.
CLAIMS = tuple(
    Claim(
        f"Where losses are giant, a clip errs less than {name}.",
        "errs less",
        "clip 1",
        other,
        tuple(
            ("lm", "cpu", "float32", disturbance, 200, "0", "Adam", 8, 700, "0.003")
            for disturbance in ("loss x1e4", "loss x1e4, 10 updates")
        ),
    )
    for name, other in (("nothing", "none"), ("skip_spikes", "skip spikes"))
)

# Markdown

_TEXT = """\
Tasks, all of data that is installed with Python, statsmodels and scikit-learn: \
`lm`, a decoder-only transformer, bytes of the standard library's source; \
`forecast`, a transformer on patches of sunspots, El Nino and CO2; `resnet20`, \
without BatchNorm, on digits. Errors: `lm` bits per byte over those of the bytes' \
frequencies in training; `forecast` root mean square error over that of the window's \
mean; `resnet20` the share of wrong images. A run fails if its last loss is not \
finite or its error is not below 1 (`resnet20`: 0.85, 1.5 times chance). Evaluation \
is always clean, on examples that were not trained on. Where a rate is tuned, it is \
each arm's best of its set over the tuning seeds on validation examples, failures \
last; else all arms have the same. All arms have equal steps, initial weights, \
batches and noise; 5 % warm-up, then a half cosine to 0. float16 has dynamic loss \
scaling; FP4 is E1M2 with one scale for each tensor, simulated for weights and \
inputs of the blocks' linear layers by straight-through estimation. Medians are over \
the reported seeds, an error counting 1 at most."""


def _count(table: Scores) -> str:
    pythons = {
        record["python"]
        for arms in table.values()
        for score in arms.values()
        for record in score.records
    }
    text = ", ".join(sorted(pythons))
    return f"{len(table)} cells; the text is that of Python {text}"


def _summary(table: Scores) -> str:
    compared = _compared(table)
    return regret_table(compared, "cells with tuned rates") if compared else ""


def _tables(table: Scores) -> str:
    parts = (
        _excess_tables(table),
        _alarm_tables(table),
        _sweep_tables(table),
        _compared_tables(table),
    )
    return "\n".join(part for part in parts if part)


def _excess_tables(table: Scores) -> str:
    """Arms against spikes and the updates since."""
    excess = _excess(table)
    parts = []
    for task, optimizer in dict.fromkeys(_trained(cell) for cell in excess):
        cells = {
            cell: arms
            for cell, arms in excess.items()
            if _trained(cell) == (task, optimizer)
        }
        columns = {
            str(_named(cell)["disturbance"]): {
                arm: (values, table[cell][arm]) for arm, values in arms.items()
            }
            for cell, arms in cells.items()
        }
        cell = next(iter(cells))
        of_cell = _named(cell)
        _, soon, late = _times(cell)
        parts.append(
            f"### {task}, {optimizer}, a spike: update {of_cell['spike']} of "
            f"{of_cell['steps']}, or that and nine more\n\nRate {of_cell['rate']}. "
            "Clean loss (nats) less that of the same run without the spike, right "
            "after its first update / "
            f"{soon - 1} / {late - 1} updates later, median over seeds (runs "
            "failed at the end):\n\n" + arms_table(columns, _excess_entry, TREATMENTS)
        )
    return "\n".join(parts)


def _excess_entry(column: Mapping[str, tuple[np.ndarray, Score]], arm: str) -> str:
    excess, score = column[arm]
    values = " / ".join(f"{value:.3f}" for value in np.median(excess, axis=0))
    return f"{values} {score.failures}"


_entry = partial(median_entry, form=".3f")


def _alarm_tables(table: Scores) -> str:
    """What arms do to runs without a spike, and how many updates they skip."""
    parts = []
    for cell, arms in sorted(table.items(), key=_hardness):
        of_cell = _named(cell)
        if of_cell["disturbance"] != "none" or not of_cell["spike"]:
            continue
        skips = [arm for arm, score in arms.items() if _skipped(score)]
        plain = next((score for arm, score in arms.items() if "none" in arm), None)
        if plain is None or not any(
            "num_skipped" in r for s in arms.values() for r in s.records
        ):
            continue
        columns = {
            "last loss less that of none": {
                arm: f"{np.median(_last(own) - _last(calm)):.3f}"
                for arm, score in arms.items()
                for own, calm in [_of_equal_seeds(score, plain)]
                if own.records
            },
            "updates skipped": {
                arm: ", ".join(map(str, _skipped(arms[arm]))) for arm in skips
            },
        }
        parts.append(
            f"### {_title(cell)}, false alarms: no spike at all\n\nMedian over seeds "
            "of the clean loss (nats) at the end; of each seed the updates skipped of "
            f"{of_cell['steps']}, where there are any:\n\n"
            + arms_table(columns, lambda column, arm: column[arm], TREATMENTS)
        )
    return "\n".join(parts)


def _last(score: Score) -> np.ndarray:
    """Clean losses at the end f[seeds], in the order of the seeds."""
    records = sorted(score.records, key=lambda record: record["seed"])
    losses = [record["curve"]["loss"][-1] for record in records]
    return np.array([np.inf if loss is None else loss for loss in losses])


def _skipped(score: Score) -> list[int]:
    """Of each seed; none where no seed has skipped an update."""
    records = sorted(score.records, key=lambda record: record["seed"])
    counts = [record.get("num_skipped", 0) for record in records]
    return counts if any(counts) else []


def _sweep_tables(table: Scores) -> str:
    """Arms against learning rates."""
    parts = []
    for cell, by_rate in _sweeps(table).items():
        columns = {f"rate {rate}": column for rate, column in by_rate.items()}
        entry, heading = partial(_entry, rate=False), f"{_title(cell)}, at each rate"
        parts.append(error_table(heading, columns, entry, TREATMENTS, rate=False))
    return "\n".join(parts)


def _compared_tables(table: Scores) -> str:
    """For each task: arms against what is made hard."""
    compared = _compared(table)
    parts = []
    for task in dict.fromkeys(str(cell[0]) for cell in compared):
        columns = {_condition(c): arms for c, arms in compared.items() if c[0] == task}
        parts.append(
            error_table(f"{task}, at tuned rates", columns, _entry, TREATMENTS)
        )
    return "\n".join(parts)


def _condition(cell: Cell) -> str:
    of_cell = _named(cell)
    return (
        f"{of_cell['optimizer']}, {of_cell['numbers']}, {of_cell['disturbance']}, "
        f"decay {of_cell['weight_decay']}"
    )


# Figures


def _rates_figure(table: Scores) -> Figure | None:
    """Arms against learning rates, one panel for each sweep: error, failures."""
    sweeps = _sweeps(table)
    if not sweeps:
        return None
    columns = (column for rates in sweeps.values() for column in rates.values())
    arms = in_order(columns, TREATMENTS)
    size = 3.2 + 3.4 * len(sweeps), 1.6 + 0.32 * len(arms)
    figure, axes = figures.grid(1, len(sweeps), size, sharey=True)
    shown = [
        score.median
        for rates in sweeps.values()
        for column in rates.values()
        for score in column.values()
        if score.solved
    ]
    colours = ScalarMappable(Normalize(min(shown, default=0.0), 1.0), "viridis_r")
    for ax, (cell, rates) in zip(axes.flat, sweeps.items(), strict=True):
        for rate, column in rates.items():
            for arm, score in column.items():
                _rate_mark(ax, float(rate), arms.index(arm), score, colours)
        ax.set(xscale="log", xlabel="learning rate")
        figures.name_rows(ax, arms)
        low, *_, high = sorted(map(float, rates))
        ax.set_xlim(low / 1.8, high * 1.8)
        ax.set_title(f"{_title(cell)}, {cell[CELL.index('steps')]} steps", fontsize=9)
    figure.colorbar(colours, ax=axes, label="median error")
    figure.suptitle(
        "Error at each rate; red: how many seeds diverged or learned nothing",
        fontsize=10,
    )
    return figure


def _rate_mark(
    ax: Axes, rate: float, row: int, score: Score, colours: ScalarMappable
) -> None:
    """A square of the error's colour; where runs failed, an empty one and how many."""
    face = colours.to_rgba(score.median) if score.solved else "none"
    edge = face if score.solved else figures.PALETTE[0]
    ax.plot(rate, row, "s", ms=14, markerfacecolor=face, markeredgecolor=edge)
    if not score.solved:
        count = f"{score.num_failed}/{score.num_runs}"
        ax.text(rate, row, count, color=edge, fontsize=7, ha="center", va="center")


def _recovery_figure(table: Scores) -> Figure | None:
    """What each spike costs an arm, right after it and later."""
    excess = _excess(table)
    if not excess:
        return None
    arms = in_order(excess.values(), TREATMENTS)
    figure, axes = figures.panels(len(excess), 0.9 + 0.24 * len(arms), sharey=True)
    ceiling = 30.0  # losses that are not a number are drawn there
    for ax, (cell, column) in zip(axes, excess.items(), strict=True):
        for arm, values in column.items():
            for index, after in enumerate(_times(cell)):
                height = arms.index(arm) + 0.22 * (index - 1)
                ax.plot(
                    np.minimum(values[:, index], ceiling),
                    [height] * len(values),
                    "os^"[index],
                    color=figures.PALETTE[(0, 2, 3)[index]],
                    ms=4,
                    alpha=0.8,
                    label=_later(after) if arm == arms[0] else None,
                )
        ax.set_xscale("symlog", linthresh=0.1, linscale=1.0)
        ax.set(xlim=(-0.2, 1.3 * ceiling), xlabel="excess of clean loss (nats)")
        figures.name_rows(ax, arms)
        ax.set_xticks([-0.1, 0, 0.1, 1, 10], ["-0.1", "0", "0.1", "1", "10"])
        ax.axvline(0, color="0.5", linewidth=1)
        of_cell = _named(cell)
        ax.set_title(f"{_title(cell)}\nrate {of_cell['rate']}", fontsize=8)
        ax.grid(axis="x", alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8)
    figure.suptitle(
        "Loss after one disturbed update, less that of the same run without it; a "
        "marker a seed",
        fontsize=10,
    )
    return figure


def _later(after: int) -> str:
    return "right after the update" if after == 1 else f"{after - 1} updates later"


def _errors_figure(table: Scores) -> Figure | None:
    """One dot a seed in the cells with tuned rates."""
    compared = _compared(table)
    if not compared:
        return None
    figure, axes, _ = panels.seeds(
        compared, TREATMENTS, lambda cell: _title(cell).replace(", ", "\n", 1)
    )
    for cell, ax in axes.items():
        ax.set_xlabel(SCORES[str(cell[0])], fontsize=7)
        ax.set_xlim(_limits(compared, cell[0]))
    figure.suptitle(
        "Test error at each arm's best rate: one dot a seed, crosses: failed, bars: "
        "median; rows without dots were not run",
        fontsize=10,
    )
    return figure


def _limits(table: Scores, task: str | int) -> tuple[float, float]:
    """Of the abscissa of all panels of a task, so that they can be compared."""
    columns = [arms.values() for cell, arms in table.items() if cell[0] == task]
    errors = np.concatenate([score.errors for arms in columns for score in arms])
    margin = 0.05 * np.ptp(errors) + 1e-3
    return errors.min() - margin, errors.max() + margin


PAGE = Page(
    "Spikes, low precision, corrupted inputs and decay in the gradient",
    _TEXT,
    CELL,
    _count,
    _summary,
    {
        "rates": _rates_figure,
        "recovery": _recovery_figure,
        "errors": _errors_figure,
    },
    _tables,
    claims=CLAIMS,
    named=_title,
)

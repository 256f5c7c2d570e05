"""The page of the spikes: errors, and the cost of a spike for each optimizer."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from benchmarks.lib.optimizers import in_order
from benchmarks.report import figures
from benchmarks.report.pages import Page
from benchmarks.report.rates import RATES_CAPTION, rates_figure, rates_table
from benchmarks.report.scores import ERROR, Problem, Score, Sweeps, Table
from benchmarks.report.tables import markdown_table
from benchmarks.suites.spikes import AFTER

PROBLEM = (
    "task",
    "size",
    "numbers",
    "disturbance",
    "spike",
    "weight_decay",
    "batch",
    "steps",
    "rate",
)
_PLACE = {name: place for place, name in enumerate(PROBLEM)}
LARGEST_EXCESS = 30.0  # losses that are not a number are drawn there
Excess = dict[Problem, dict[str, np.ndarray]]


def _label(
    task: str,
    size: str,
    numbers: str,
    disturbance: str,
    spike: int,
    weight_decay: str,
    batch: int,
    steps: int,
    rate: str = "",
) -> str:
    parts = [f"{task} ({size})"]
    parts += [numbers] * (numbers != "float32")
    parts += [disturbance] * (disturbance != "none")
    parts += [f"weight decay {weight_decay} in the gradient"] * (weight_decay != "0")
    if rate:
        parts.append(rate if rate == "tuned" else f"learning rate {rate}")
    return ", ".join([*parts, f"{steps} steps of {batch}"])


def _name(problem: Problem) -> str:
    return _label(*problem)


def _times(problem: Problem) -> tuple[int, int, int]:
    """Returns the updates, from that of the spike on, after which its cost is shown."""
    left = int(problem[_PLACE["steps"]]) - int(problem[_PLACE["spike"]]) + 1
    return 1, 50, max(after for after in AFTER if after <= left)


def _excess(table: Table) -> Excess:
    """Returns what a spike costs: clean loss less that of the same run without it.

    f[seeds, times] for each optimizer. Runs of equal seeds are alike up to the spike.
    The cost is infinite where the loss is not a number.
    """
    place, excess = _PLACE["disturbance"], {}
    for problem, column in table.items():
        spike = int(problem[_PLACE["spike"]])
        if not spike or problem[place] == "none":
            continue
        calm = table.get((*problem[:place], "none", *problem[place + 1 :]), {})
        times = [spike - 1 + after for after in _times(problem)]
        for name in (name for name in column if name in calm):
            pairs = list(_pairs(column[name], calm[name], times))
            if pairs:
                excess.setdefault(problem, {})[name] = np.array(pairs)
    return excess


def _pairs(
    spiked: Score, calm: Score, times: Sequence[int]
) -> Iterator[list[float | None]]:
    """Returns the difference at these updates of each seed that both scores have."""
    without = {record["seed"]: record for record in calm.records}
    for record in spiked.records:
        if record["seed"] in without:
            one, other = _losses(record), _losses(without[record["seed"]])
            # A short run ends before the last of these updates.
            yield [one.get(t, np.nan) - other.get(t, np.nan) for t in times]


def _losses(record: Mapping) -> dict[int, float]:
    curve = record["curve"]
    values = (np.inf if loss is None else loss for loss in curve["loss"])
    return dict(zip(curve["step"], values, strict=True))


def _excess_tables(table: Table) -> str:
    parts = []
    for problem, column in _excess(table).items():
        _, soon, late = _times(problem)
        rows = [
            [
                name,
                table[problem][name].failures,
                *(f"{value:.3f}" for value in np.median(column[name], axis=0)),
            ]
            for name in in_order(column)
        ]
        head = ["optimizer", "failed runs", "right after", f"{soon - 1} updates later"]
        head.append(f"{late - 1} updates later")
        parts.append(
            f"### Cost of a spike: {_name(problem)}\n\nThe spike begins with update "
            f"{problem[_PLACE['spike']]}. Clean loss (nats) less that of the same run "
            "without the spike, median over seeds; lower is better.\n\n"
            + markdown_table(head, rows)
        )
    return "\n".join(parts)


def _alarm_tables(table: Table) -> str:
    """Returns the updates that optimizers skip in runs without a spike."""
    parts = []
    for problem, column in table.items():
        is_calm = problem[_PLACE["disturbance"]] == "none" and problem[_PLACE["spike"]]
        rows = [
            [name, ", ".join(str(r["num_skipped"]) for r in score.records)]
            for name, score in column.items()
            if is_calm and any(r.get("num_skipped") for r in score.records)
        ]
        if rows:
            parts.append(
                f"### False alarms: {_name(problem)}\n\nUpdates skipped in runs "
                "without a spike, by seed.\n\n"
                + markdown_table(["optimizer", "updates skipped"], rows)
            )
    return "\n".join(parts)


def _sweeps(table: Table) -> Sweeps:
    """Returns the problems that were run at three fixed learning rates or more."""
    sweeps: Sweeps = {}
    for problem, column in table.items():
        for name, score in column.items():
            if problem[-1] != "tuned":
                by_name = sweeps.setdefault(problem[:-1], {}).setdefault(name, {})
                by_name[score.learning_rate] = score
    wide = {
        problem: {name: s for name, s in by_name.items() if len(s) > 2}
        for problem, by_name in sweeps.items()
    }
    return {
        problem: {
            name: dict(sorted(by_name[name].items())) for name in in_order(by_name)
        }
        for problem, by_name in wide.items()
        if by_name
    }


def _rates_tables(table: Table) -> str:
    sweeps = _sweeps(table)
    parts = [RATES_CAPTION] if sweeps else []
    parts += [
        f"### At every learning rate: {_name(problem)}\n\n{rates_table(by_name)}"
        for problem, by_name in sweeps.items()
    ]
    return "\n".join(parts)


def _recovery(table: Table) -> Figure | None:
    """Draws what each spike costs, right after it and later; a marker a seed."""
    excess = _excess(table)
    if not excess:
        return None
    names = in_order(name for column in excess.values() for name in column)
    figure, axes = figures.panels(len(excess), 0.9 + 0.2 * len(names), sharey=True)
    for ax, (problem, column) in zip(axes, excess.items(), strict=True):
        for name, values in column.items():
            for index, after in enumerate(_times(problem)):
                when = "right after" if after == 1 else f"{after - 1} updates later"
                ax.plot(
                    np.minimum(values[:, index], LARGEST_EXCESS),
                    [names.index(name) + 0.22 * (index - 1)] * len(values),
                    "os^"[index],
                    color=figures.PALETTE[(0, 2, 3)[index]],
                    ms=4,
                    label=when if name == next(iter(column)) else None,
                )
        ax.set_xscale("symlog", linthresh=0.1, linscale=1.0)
        ax.set(xlim=(-0.2, 1.3 * LARGEST_EXCESS), xlabel="excess of clean loss (nats)")
        figures.name_rows(ax, names)
        ax.set_xticks([-0.1, 0, 0.1, 1, 10], ["-0.1", "0", "0.1", "1", "10"])
        ax.axvline(0, color="0.5", linewidth=1)
        ax.set_title(_name(problem).replace(", ", "\n", 2), fontsize=7)
        ax.grid(axis="x", alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    return figure


PAGE = Page(
    "Spikes, low precision, corrupted inputs and decay in the gradient",
    """\
Tasks, all on data that is installed with Python, statsmodels and scikit-learn: `lm`, a
decoder-only transformer, bytes of the standard library's source; `forecast`, a
transformer on patches of sunspots, El Nino and CO2; `resnet20`, without BatchNorm, on
digits. Errors: `lm` bits per byte over those of the bytes' frequencies in training;
`forecast` root mean square error over that of the window's mean; `resnet20` the share
of wrong images. A run fails if its last loss is not finite or its error is not below 1
(`resnet20`: 0.85, 1.5 times chance). Evaluation is always clean, on examples that were
not trained on. A tuned learning rate is the best one of the optimizer's set over the
tuning seeds on validation examples. All optimizers have equal steps, initial weights,
batches and noise; 5 % warm-up, then a half cosine to 0. float16 has dynamic loss
scaling; FP4 is E1M2 with one scale for each tensor, simulated for weights and inputs of
the blocks' linear layers by straight-through estimation.""",
    PROBLEM,
    _label,
    ERROR,
    notes={
        "cpu": "Models of 8 to 43 thousand parameters. Around a spike all optimizers "
        "have one learning rate, and a run is compared with itself without the spike. "
        "Variants of a method have lines in the tables only.",
        "million": "One spike in a decoder thirty times as large.",
        "remedies": "Spikes that last, and batches with wrong labels, which have no "
        "larger norm and are therefore not skipped.",
        "remedies-million": "Wrong labels in a decoder thirty times as large.",
    },
    shown={
        "cpu": ("rates", "recovery"),
        **dict.fromkeys(
            ("million", "remedies", "remedies-million", "smoke"), ("recovery",)
        ),
    },
    drawings={
        "rates": lambda table: rates_figure(_sweeps(table), _name),
        "recovery": _recovery,
    },
    sections=(_excess_tables, _alarm_tables, _rates_tables),
)

"""The page of the calibration: verdicts, and what training does."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.lib.runs import Record
from benchmarks.report.pages import Page
from benchmarks.report.scores import Score, Table
from benchmarks.report.statistics import rank_test
from benchmarks.report.tables import markdown_table
from benchmarks.suites.calibration import BASELINE, FAILURE, GLOROT, OWN, REMEDIES

_P_VALUE, _RATIO = 0.05, 1.5
# Verdicts that see no trouble of scale.
_QUIET = ("no trouble seen", "dead weights")
# What the report names for its verdicts of trouble.
_NAMED = {
    **dict.fromkeys(
        ("vanishing", "mostly below Adam's eps", "unbalanced between layers"),
        ("Glorot weights", "eps=1e-16", "b2=0.9", "StableGrad, b2=0.9"),
    ),
    **dict.fromkeys(
        ("exploding at initialization", "large"),
        ("Glorot weights", "clip, b2=0.9", "StableGrad, b2=0.9"),
    ),
}
_VERDICTS = {
    "verdict": "the first gradient",
    "verdict_with_history": "the first hundred steps",
}

Arms = Mapping[tuple[str, str], Score]  # weights and optimizer -> score


class Row(NamedTuple):
    """A network: its reports, its runs, and the remedies that help it."""

    measured: Record
    arms: Arms
    helped: list[str]


Rows = Sequence[Row]


def _label(network: str, steps: int, weights: str) -> str:
    return f"{network}, {weights} weights, {steps} steps"


def _errors(score: Score) -> np.ndarray:
    """Returns f[seeds]; a failed run is infinite."""
    return np.array([math.inf if r["failed"] else r["error"] for r in score.records])


def _median(errors: np.ndarray) -> float:
    """Is `np.median`, but of two infinities infinite."""
    low, high = np.sort(errors)[[(len(errors) - 1) // 2, len(errors) // 2]]
    return float(low if low == high else (low + high) / 2)


def helps(arms: Arms) -> list[str]:
    """Returns the remedies that help a network."""
    plain = _errors(arms[BASELINE])
    errors = {name: _errors(arms[arm]) for name, arm in REMEDIES.items() if arm in arms}
    return [
        name
        for name, remedied in errors.items()
        if rank_test(plain, remedied) < _P_VALUE / len(errors)
        and _RATIO * _median(remedied) <= _median(plain)
    ]


def named(verdict: str) -> tuple[str, ...]:
    """Returns the remedies that a verdict names; all of them if it sees no trouble."""
    return tuple(REMEDIES) if verdict in _QUIET else _NAMED.get(verdict, ())


def _rates(rows: Rows, key: str) -> list[str]:
    counts = Counter(
        (
            row.measured[key] not in _QUIET,
            not set(named(row.measured[key])).isdisjoint(row.helped),
        )
        for row in rows
    )
    fine, helped = (counts[True, h] + counts[False, h] for h in (False, True))
    return [
        _VERDICTS[key],
        f"{counts[True, False]}/{fine}",
        f"{counts[False, True]}/{helped}",
    ]


def _number(value: float | None) -> str:
    return "inf" if value is None else f"{value:.0e}"


def _verdicts(measured: Record, after: Record | None) -> list[str]:
    return [
        measured["network"],
        _number(measured["max_std"]),
        _number(measured["std_ratio"]),
        f"{measured['below_adam_eps']:.0%}",
        measured["verdict"],
        measured["verdict_with_history"],
        "-" if after is None else after["verdict"],
    ]


def _remedies(row: Row) -> list[str]:
    errors = [
        f"{_median(_errors(row.arms[arm])):.3g}" if arm in row.arms else "-"
        for arm in (BASELINE, *REMEDIES.values())
    ]
    return [row.measured["network"], *errors, ", ".join(row.helped) or "none"]


def _by_verdict(rows: Rows) -> list[list[str]]:
    """Returns for each verdict how many networks each remedy helps, of those tried."""
    lines = []
    for verdict in dict.fromkeys((*_NAMED, *_QUIET)):
        same = [row for row in rows if row.measured["verdict"] == verdict]
        counts = []
        for name, arm in REMEDIES.items():
            helped = sum(name in row.helped for row in same)
            tried = sum(arm in row.arms for row in same)
            counts.append(f"{helped}/{tried}" if tried else "-")
        if same:
            lines.append([verdict, str(len(same)), *counts])
    return lines


def _joined(tables: Mapping[str, Table]) -> dict[tuple[str, int], Arms]:
    """Returns all presets as one; of an arm that two have, the later one's runs."""
    joined: dict[tuple[str, int], dict[tuple[str, str], Score]] = {}
    for table in tables.values():
        for (network, steps, weights), column in table.items():
            arms = joined.setdefault((network, steps), {})
            arms |= {(weights, optimizer): s for optimizer, s in column.items()}
    return joined


def ending(measured: Sequence[Record], tables: Mapping[str, Table]) -> str:
    """Returns the tables of verdicts and of remedies, over all presets."""
    joined = _joined(tables)
    reports = {(r["network"], r["steps"], r["weights"]): r for r in measured}
    rows = [
        Row(reports[*key, OWN], joined[key], helps(joined[key]))
        for key in joined
        if BASELINE in joined[key] and (*key, OWN) in reports
    ]
    num_initialized = sum(REMEDIES["Glorot weights"] in arms for _, arms, _ in rows)
    verdicts = [
        _verdicts(report, reports.get((report["network"], report["steps"], GLOROT)))
        for report, *_ in rows
    ]
    rates = [_rates(rows, key) for key in _VERDICTS]
    head = ["network", "largest std", "ratio of std", "below Adam's eps"]
    head += ["verdict", "verdict with history", "verdict from Glorot weights"]
    return "\n".join(
        [
            "## False alarms and misses\n\n"
            f"{len(rows)} networks; Glorot weights were tried on {num_initialized} of "
            "them. False alarms of the networks that no remedy of their verdict helps, "
            "misses of those that one helps.\n",
            markdown_table(["verdicts of", "false alarms", "misses"], rates),
            "## Which remedies help\n\nNetworks that a remedy helps, of those on which "
            "it was tried, by the verdict of the first gradient.\n",
            markdown_table(["verdict", "networks", *REMEDIES], _by_verdict(rows)),
            "## Remedies\n\nMedian relative error over the seeds, lower is better, "
            "infinite where half of them failed; a dash: not tried.\n",
            markdown_table(
                ["network", BASELINE[1], *REMEDIES, "helps"],
                [_remedies(row) for row in rows],
            ),
            "## Reports\n\nThe first gradient at each network's own weights, and the "
            "verdict that remains with Glorot weights.\n",
            markdown_table(head, verdicts),
        ]
    )


PAGE = Page(
    "Calibration of `gradient_report`",
    f"""\
Each network is trained with AdamW and with the remedies that the report names, and two
verdicts stand next to it: one of the first gradient, and one with the factors of the
first hundred steps as `history`. A remedy *helps* if a rank test (Mann and Whitney, 5 %
over the remedies together) tells its runs from those of AdamW and its median error is
1.5 times lower. A verdict of trouble is right if any remedy that it names helps. A
*false alarm* is a verdict of trouble where none does, a *miss* a verdict of no trouble
where a remedy helps. Each remedy's learning rate is tuned, which is why the learning
rate is not a column.

"Glorot weights" are AdamW after one call of `initialize_weights`, for kernels but not
for those of attention; the other remedies start from the network's own weights.
Verdicts of small gradients name `eps=1e-16` and `b2=0.9`, which are tried where layers
are unbalanced or gradients are near Adam's eps. A clip is not named for those.

Errors are relative, 1 is a guess, and a run fails above {FAILURE}. The networks are
small, and many were chosen because they might be hard: the rates are those of this set,
not of networks at large.""",
    ("network", "steps", "weights"),
    _label,
    notes={
        "version-0.2": "These runs are of version 0.2; their tuning runs were not kept."
    },
    shown={"cpu": (), "version-0.2": (), "further": (), "initializer": ()},
    ending=ending,
    has_score_tables=False,
)

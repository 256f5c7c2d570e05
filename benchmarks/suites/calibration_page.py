"""The page of the calibration: verdicts, and what training does."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.lib.runs import Record
from benchmarks.report.pages import Page
from benchmarks.report.scores import Column, Score, Table
from benchmarks.report.statistics import rank_test
from benchmarks.report.tables import markdown_table
from benchmarks.suites.calibration import BASELINE, FAILURE, REMEDIES

_P_VALUE, _RATIO = 0.05, 1.5
# Verdicts that see no trouble of scale.
_QUIET = ("no trouble seen", "dead weights")
_VERDICTS = {
    "verdict": "the first gradient",
    "verdict_with_history": "the first hundred steps",
}


def _label(network: str, steps: int) -> str:
    return f"{network}, {steps} steps"


def _errors(score: Score) -> np.ndarray:
    """Returns f[seeds]; a failed run is infinite."""
    return np.array([math.inf if r["failed"] else r["error"] for r in score.records])


def _median(errors: np.ndarray) -> float:
    """Is `np.median`, but of two infinities infinite."""
    low, high = np.sort(errors)[[(len(errors) - 1) // 2, len(errors) // 2]]
    return float(low if low == high else (low + high) / 2)


def helps(column: Column) -> list[str]:
    """Returns the remedies that help a network."""
    plain = _errors(column[BASELINE])
    remedies = [name for name in REMEDIES if name in column]
    errors = {name: _errors(column[name]) for name in remedies}
    return [
        name
        for name in remedies
        if rank_test(plain, errors[name]) < _P_VALUE / len(remedies)
        and _RATIO * _median(errors[name]) <= _median(plain)
    ]


def _rates(rows: Sequence[tuple[Record, Column]], key: str) -> list[str]:
    counts = Counter(
        (measured[key] not in _QUIET, bool(helps(column))) for measured, column in rows
    )
    fine, helped = (counts[True, h] + counts[False, h] for h in (False, True))
    return [
        _VERDICTS[key],
        f"{counts[True, False]}/{fine}",
        f"{counts[False, True]}/{helped}",
    ]


def _number(value: float | None) -> str:
    return "inf" if value is None else f"{value:.0e}"


def _row(measured: Record, column: Column) -> list[str]:
    return [
        str(measured["network"]),
        _number(measured["max_std"]),
        _number(measured["std_ratio"]),
        f"{measured['below_adam_eps']:.0%}",
        measured["verdict"],
        measured["verdict_with_history"],
        *(f"{_median(_errors(column[name])):.3g}" for name in (BASELINE, *REMEDIES)),
        ", ".join(helps(column)) or "none",
    ]


def ending(measured: Sequence[Record], tables: Mapping[str, Table]) -> str:
    """Returns the tables of verdicts, of each preset."""
    parts = []
    for preset, table in tables.items():
        rows = [
            (record, table[record["network"], record["steps"]])
            for record in measured
            if BASELINE in table.get((record["network"], record["steps"]), {})
        ]
        rates = [_rates(rows, key) for key in _VERDICTS]
        head = ["network", "largest std", "ratio of std", "below Adam's eps"]
        head += ["verdict", "verdict with history", BASELINE, *REMEDIES, "helps"]
        parts.append(
            f"## Verdicts of preset {preset}\n\nFalse alarms of the networks that "
            "nothing helps, misses of those that something helps.\n\n"
            + markdown_table(["verdicts of", "false alarms", "misses"], rates)
            + "\nMedian relative error over the seeds, infinite where half of them "
            "failed.\n\n" + markdown_table(head, [_row(*row) for row in rows])
        )
    return "\n".join(parts)


PAGE = Page(
    "Calibration of `gradient_report`",
    f"""\
Each network is trained with AdamW and with remedies for a bad scale of the gradients,
and two verdicts stand next to it: one of the first gradient, and one with the factors
of the first hundred steps as `history`. A remedy *helps* if a rank test (Mann and
Whitney, 5 % over the remedies together) tells its runs from those of AdamW and its
median error is 1.5 times lower. A *false alarm* is a verdict of trouble where nothing
helps, a *miss* a verdict of no trouble where something does. Errors are relative, 1 is
a guess, and a run fails above {FAILURE}. The networks are small, and many were chosen
because they might be hard: the rates are those of this set, not of networks at
large.""",
    ("network", "steps"),
    _label,
    notes={
        "version-0.2": "These runs are of version 0.2; their tuning runs were not kept."
    },
    shown={"cpu": (), "version-0.2": ()},
    ending=ending,
    has_score_tables=False,
)

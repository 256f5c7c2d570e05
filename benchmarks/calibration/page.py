"""The page of the calibration: what the verdicts said and what training did."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from stablegrad_optax._comparison import rank_test
from stablegrad_optax._report_verdict import judge

Record = dict[str, Any]

BASELINE = "AdamW"
_P_VALUE, _RATIO = 0.05, 1.5
# Verdicts that see no trouble of scale.
_QUIET = ("no trouble seen", "dead weights")

HEAD = """# Calibration of `gradient_report`

`python -m benchmarks.calibration` makes this page. Each network is trained with AdamW
and with remedies for a bad scale of the gradients, and two verdicts are set beside it:
of the first gradient, and with the factors of the first hundred steps as `history`.

Something *helps* if its fresh runs are told apart from AdamW's by Mann and Whitney's
rank test (5 %, over the remedies together) and its median score is 1.5 times lower. A
*false alarm* is a verdict of trouble where nothing helps, a *miss* one of no trouble
where something does. The networks are small, and many were chosen because they might be
hard: the rates are of this set, not of networks at large.
"""


def page(records: Sequence[Record]) -> str:
    """Markdown."""
    if not records:
        return HEAD
    remedies = [name for name in records[0]["optimizers"] if name != BASELINE]
    return "\n".join(
        [
            HEAD,
            _provenance(records),
            "",
            "| verdicts of | false alarms | misses |",
            "|---|---|---|",
            _rates("the first gradient", records, first_verdict),
            _rates("the first hundred steps", records, late_verdict),
            "",
            "Scores are relative errors, 1 is a guess: median of the fresh seeds, "
            "infinite where half of them failed (not finite, or above 0.9).",
            "",
            "| network | max std | ratio | below eps | fell by | late ratio | verdict "
            f"| with history | {' | '.join([BASELINE, *remedies])} | helps |",
            "|---|---|---|---|---|---|---|---|" + "---|" * (len(remedies) + 2),
            *(_row(record, remedies) for record in records),
            "",
        ]
    )


def first_verdict(record: Record) -> str:
    """Of the first gradient."""
    return _verdict(record, "std_ratio")


def late_verdict(record: Record) -> str:
    """With the first steps."""
    return _verdict(record, "late_ratio", drift=_number(record["drift"]))


def _verdict(record: Record, ratio: str, **late: float) -> str:
    alike = ("max_std", "below_adam_eps", "zero", "num_dead")
    return judge(
        std_ratio=_number(record[ratio]), **{key: record[key] for key in alike}, **late
    )


def helps(record: Record) -> list[str]:
    """The remedies that do."""
    baseline = _scores(record, BASELINE)
    remedies = [name for name in record["optimizers"] if name != BASELINE]
    return [
        name
        for name in remedies
        if rank_test(baseline, _scores(record, name)) < _P_VALUE / len(remedies)
        and _median(_scores(record, name)) * _RATIO <= _median(baseline)
    ]


def _rates(title: str, records: Sequence[Record], verdict: Callable[..., str]) -> str:
    counts = Counter(
        (verdict(record) not in _QUIET, bool(helps(record))) for record in records
    )
    fine, helped = (counts[True, h] + counts[False, h] for h in (False, True))
    return (
        f"| {title} | {counts[True, False]} of {fine} that nothing helps "
        f"| {counts[False, True]} of {helped} that something helps |"
    )


def _row(record: Record, remedies: Sequence[str]) -> str:
    cells = [
        record["network"],
        f"{record['max_std']:.0e}",
        f"{_number(record['std_ratio']):.0e}",
        f"{record['below_adam_eps']:.0%}",
        f"{_number(record['drift']):.0e}",
        f"{_number(record['late_ratio']):.0e}",
        first_verdict(record),
        late_verdict(record),
        *(f"{_median(_scores(record, name)):.3g}" for name in [BASELINE, *remedies]),
        ", ".join(helps(record)) or "none",
    ]
    return f"| {' | '.join(cells)} |"


def _provenance(records: Sequence[Record]) -> str:
    def all_of(field: str) -> str:
        return ", ".join(sorted({str(record[field]) for record in records}))

    seeds = len(records[0]["optimizers"][BASELINE]["scores"])
    dates = sorted(record["date"][:10] for record in records)
    return (
        f"{len(records)} networks, {all_of('steps')} steps, {seeds} fresh seeds; "
        f"{all_of('device')}; jax {all_of('jax')}, stablegrad_optax "
        f"{all_of('stablegrad_optax')}; {dates[0]} to {dates[-1]}."
    )


def _scores(record: Record, name: str) -> np.ndarray:
    return np.array([_number(x) for x in record["optimizers"][name]["scores"]])


def _median(scores: np.ndarray) -> float:
    ordered = np.sort(scores)
    low, high = ordered[(len(scores) - 1) // 2], ordered[len(scores) // 2]
    return float(low if low == high else (low + high) / 2)


def _number(value: float | None) -> float:
    return math.inf if value is None else value

"""How a gradient report is printed: the verdict, its evidence, a remedy, a table."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stablegrad_optax._report import GradientReport
    from stablegrad_optax._report_measure import LeafReport

_CHEAP = "optax.clip_by_global_norm(1.0), Adam with b2=0.9"
REMEDIES = {
    "no trouble seen": (
        "This gradient asks for none. That is no promise: compare_optimizers tries the "
        "remedies on the network itself."
    ),
    "large": (
        "A loss of large scale alone would explain it, and Adam does not mind that. An "
        "exploding start looks the same: hand over the first steps as history. Cheap "
        f"to try: {_CHEAP}; then stablegrad() before it. compare_optimizers tries all."
    ),
    "exploding start": (
        f"Cheap, try first: {_CHEAP}. Where these fail: stablegrad() before Adam with "
        "b2=0.9 or before optax.contrib.muon. compare_optimizers tries all."
    ),
    "vanishing": (
        "Initialize at a larger scale: activation_aware_normal, or Glorot. Clipping "
        "cannot help, it only shrinks; stablegrad() before the optimizer can, or "
        "gradient_stabilizer(0, 0, eps=0), before optax.contrib.muon most. "
        "compare_optimizers tries them."
    ),
    "unbalanced between layers": (
        "Cheap, try first: a Glorot initializer or activation_aware_normal, Adam with "
        "b2=0.9. Where these fail: stablegrad() before the optimizer, with b2=0.9. "
        "Clipping shrinks all layers alike. compare_optimizers tries all."
    ),
    "mostly below Adam's eps": (
        "Cheap, try first: Adam with eps=1e-16, or b2=0.9. Where these fail: "
        "stablegrad() before the optimizer. Clipping cannot help, it only shrinks."
    ),
    "dead weights": (
        "Weights without any gradient: no scaling moves them. Find out whether that is "
        "meant, a frozen part say, or whether rectifiers are never active."
    ),
    "non-finite": (
        "Find its cause in the loss or the model, or lower the learning rate; no "
        "transformation repairs such a gradient. optax.apply_if_finite skips the step."
    ),
}

_WIDTH = 80
_TABLE_ROWS = 20  # a longer table shows its two ends alone
_ALIKE = 100  # the ratio between layers up to which one scale explains all of them


def render(report: "GradientReport") -> str:
    """The report as text of at most 80 columns."""
    lines = [f"Gradients: {report.verdict} ({len(report.leaves)} leaves)."]
    parts = {"Evidence": _evidence(report), **_notes(report), "Remedy": report.remedy}
    for title, text in parts.items():
        lines += textwrap.wrap(f"{title}: {text}", _WIDTH, subsequent_indent="  ")
    return "\n".join([*lines, "", *_table(report.leaves)])


def _evidence(report: "GradientReport") -> str:
    shares = (
        f"{_percent(report.below_adam_eps)} of entries below Adam's eps, "
        f"{_percent(report.zero)} zero, {_percent(report.nonfinite)} non-finite."
    )
    smallest, largest = report.smallest, report.largest
    if smallest is None or largest is None:
        return f"no weight has a gradient; {shares}"
    text = (
        f"std of weight gradients {smallest.spread:.1e} ({smallest.name}) to "
        f"{largest.spread:.1e} ({largest.name}), max/min {report.std_ratio:.1e}; "
        f"{shares}"
    )
    if (
        report.verdict in ("vanishing", "mostly below Adam's eps")
        and report.std_ratio < _ALIKE
    ):
        text += " All layers are alike: the scale of the loss alone would explain it."
    return text


def _notes(report: "GradientReport") -> dict[str, str]:
    """What does not decide on the verdict, and what the first steps say."""
    notes = {}
    if history := report.history:
        notes[f"First {history.steps} steps"] = (
            f"{history.drifted or 'no weight'} fell by {history.drift:.1e} from its "
            f"largest to the last; max/min between layers {history.std_ratio:.1e} then."
        )
    rounding = [leaf.name for leaf in report.leaves if leaf.is_rounding]
    sparse = [leaf.name for leaf in report.leaves if leaf.is_row_sparse]
    dead = [leaf.name for leaf in report.leaves if leaf.is_dead]
    if rounding:
        notes["Rounding alone, left out"] = _some(rounding)
    if dead:
        notes["No gradient"] = _some(dead)
    if sparse:
        notes["Most rows zero"] = (
            f"{_some(sparse)} An embedding? stablegrad would make the touched rows too "
            "large: leave it out with mask."
        )
    if report.looks_stacked:
        notes["Looks stacked"] = (
            f"{_some(report.looks_stacked)} If the first axis counts layers or "
            "members, give num_stacked_axes: a row for each."
        )
    return notes


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}."


def _table(leaves: Sequence["LeafReport"]) -> list[str]:
    shown, left_out = list(leaves), 0
    if len(leaves) > _TABLE_ROWS:
        shown.sort(key=lambda leaf: (leaf.nonfinite, leaf.std), reverse=True)
        half = _TABLE_ROWS // 2
        shown, left_out = shown[:half] + shown[-half:], len(leaves) - 2 * half
    header = ("leaf", "shape", "std", "|mean|/std", "<eps", "zero", "non-finite")
    rows = [header, *map(_row, shown)]
    if not any(leaf.nonfinite for leaf in shown):
        rows = [row[:-1] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    room = max(_WIDTH - sum(2 + width for width in widths[1:]), 16)
    lines = [
        "  ".join(
            [_shorten(row[0], room).ljust(min(widths[0], room))]
            + [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
        )
        for row in rows
    ]
    if left_out:
        lines.insert(
            1 + _TABLE_ROWS // 2, f"... {left_out:,} leaves between, by std ..."
        )
    return lines


def _row(leaf: "LeafReport") -> tuple[str, ...]:
    return (
        leaf.name,
        _shorten(", ".join(map(str, leaf.shape)), 18),
        f"{leaf.std:.1e}",
        f"{leaf.mean_to_std:.2g}",
        *map(_percent, (leaf.below_adam_eps, leaf.zero, leaf.nonfinite)),
    )


def _shorten(text: str, width: int) -> str:
    """Its two ends, of which the last says most."""
    if len(text) <= width:
        return text
    head = (width - 3) // 3
    return f"{text[:head]}...{text[head + 3 - width :]}"


def _percent(share: float) -> str:
    """Whole percents; what is not nothing never reads 0%, nor what is not all 100%."""
    if 0 < share < 0.01:
        return "<1%"
    return ">99%" if 0.99 < share < 1 else f"{share:.0%}"

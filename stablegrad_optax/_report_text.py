"""The form in which a report is printed: paragraphs and a table of 80 columns."""

import math
import textwrap
from collections.abc import Mapping, Sequence

from stablegrad_optax._report_history import History
from stablegrad_optax._report_measure import LeafReport

_WIDTH = 80
_TABLE_ROWS = 20  # a longer table shows only its two ends


def paragraphs(parts: Mapping[str, str]) -> list[str]:
    """Wraps texts with a title each."""
    return [
        line
        for title, text in parts.items()
        for line in textwrap.wrap(f"{title}: {text}", _WIDTH, subsequent_indent="  ")
    ]


def evidence(
    smallest: LeafReport | None,
    largest: LeafReport | None,
    *,
    below_adam_eps: float,
    zero: float,
    nonfinite: float,
) -> str:
    """Names the numbers that the verdict rests on."""
    shares = (
        f"{percent(below_adam_eps)} of entries below Adam's eps, "
        f"{percent(zero)} zero, {percent(nonfinite)} non-finite."
    )
    if smallest is None or largest is None:
        return f"no weight has a gradient; {shares}"
    return (
        f"std of weight gradients {smallest.spread:.1e} ({smallest.name}) to "
        f"{largest.spread:.1e} ({largest.name}), max/min "
        f"{largest.spread / smallest.spread:.1e}; {shares}"
    )


def first_steps(history: History) -> str:
    """Says what the first steps show, and where trouble began."""
    said = []
    if history.nonfinite_step is not None:
        said.append(
            f"the gradient was not finite at {history.nonfinite_steps} of them, first "
            f"at step {history.nonfinite_step} in {history.nonfinite}."
        )
    if history.drifted:
        said.append(
            f"{history.drifted} fell by {history.drift:.1e} from its largest (step "
            f"{history.drift_step}) to the last; max/min between layers "
            f"{history.std_ratio:.1e} then."
        )
    else:
        said.append("they say nothing of the scale of the weights.")
    if history.unbalanced_step is not None:
        said.append(
            f"The ratio stayed above 1e+03 from step {history.unbalanced_step} on, "
            f"with {history.unbalanced} the smallest."
        )
    if not history.is_complete:
        said.append("Some weights have no factors, so the gradient itself counts too.")
    return " ".join(said)


def notes(
    leaves: Sequence[LeafReport], looks_stacked: Sequence[str], muon_eps: float
) -> dict[str, str]:
    """Lists what a reader should know although it does not decide on the verdict."""
    parts = {}
    matrices = [leaf for leaf in leaves if leaf.is_matrix and not leaf.is_rounding]
    below = [leaf.name for leaf in matrices if leaf.below_muon_eps]
    rounding = [leaf.name for leaf in leaves if leaf.is_rounding]
    sparse = [leaf.name for leaf in leaves if leaf.is_row_sparse]
    dead = [leaf.name for leaf in leaves if leaf.is_dead]
    if below:
        parts["Below Muon's eps"] = (
            f"the norm of {len(below)} of {len(matrices)} matrices is below "
            f"{muon_eps:.0e}, or its squares underflow: {some(below)} The smaller it "
            "is, the less Muon moves the matrix."
        )
    if rounding:
        parts["Rounding alone, left out"] = some(rounding)
    if dead:
        parts["No gradient"] = some(dead)
    if sparse:
        parts["Most rows zero"] = (
            f"{some(sparse)} An embedding? stablegrad would make the touched rows too "
            "large: leave it out with mask."
        )
    if looks_stacked:
        parts["Looks stacked"] = (
            f"{some(looks_stacked)} If the first axis counts layers or members, give "
            "num_stacked_axes: a row for each."
        )
    return parts


def some(names: Sequence[str]) -> str:
    """Lists the first names and counts the others."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}."


def table(leaves: Sequence[LeafReport]) -> list[str]:
    """Returns the lines of the table; a long one shows its two ends, by std."""
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


def _row(leaf: LeafReport) -> tuple[str, ...]:
    return (
        leaf.name,
        _shorten(", ".join(map(str, leaf.shape)), 18),
        f"{leaf.std:.1e}",
        # The std of a single element is zero by definition.
        f"{leaf.mean_to_std:.2g}" if math.prod(leaf.shape) > 1 else "-",
        *map(percent, (leaf.below_adam_eps, leaf.zero, leaf.nonfinite)),
    )


def _shorten(text: str, width: int) -> str:
    """Cuts a text in the middle, because its last part says most."""
    if len(text) <= width:
        return text
    head = (width - 3) // 3
    return f"{text[:head]}...{text[head + 3 - width :]}"


def percent(share: float) -> str:
    """Formats a share; only an exact 0 reads 0%, and only an exact 1 reads 100%."""
    if 0 < share < 0.01:
        return "<1%"
    return ">99%" if 0.99 < share < 1 else f"{share:.0%}"

"""Tables of Markdown, and the marks in them that say what is noise."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks.lib.arms import in_order
from benchmarks.lib.summary import Score, floor, level

# (arm -> what was found, arm) -> what a table has of it
Wording = Callable[[Mapping[str, Any], str], str]


def floor_row(
    columns: Iterable[Mapping[str, Score]], form: str = ".2f", **how: Any
) -> list[str]:
    """The noise floor of each column, the last row of a table of errors.

    Args:
        columns: arm -> score.
        form: of a number.
        **how: as for `floor`.
    """
    row = ["*noise floor*"]
    for column in columns:
        found = floor(column, **how)
        if found is None:
            row.append("-")
            continue
        num, middle, high = found
        row.append(f"{middle:{form}}, 95 % {high:{form}} (of {num})")
    return row


def error_table(
    title: str,
    columns: Mapping[str, Mapping[str, Score]],
    entry: Wording | None = None,
    first: Iterable[str] = (),
    *,
    what: str = "Median error",
    rate: bool = True,
    lost: str = "the median error of the middle one over the best's",
    **how: Any,
) -> str:
    """Markdown: a heading, what the marks of the table mean, and arms against columns.

    Args:
        title: the heading.
        columns: head -> arm -> score.
        entry: as for `arms_table`; by default `median_entry`.
        first: likewise.
        what: stands in it.
        rate: whether the entries name the learning rate.
        lost: what the floor is of.
        **how: as for `floor_row`.
    """
    entry = partial(median_entry, rate=rate) if entry is None else entry
    return (
        f"### {title}\n\n{what} (failed runs){' at the learning rate' * rate}. "
        "In brackets: the 95 % bootstrap interval over seeds. Bold: level with the "
        "column's best; the intervals meet, and failures are not more by chance "
        f"(Fisher's p above 0.05). Noise floor: {lost}, if the bold ones (of so many) "
        "were equal: its median, and what it stays under with 95 %.\n\n"
        + arms_table(columns, entry, first, floor_row(columns.values(), **how))
    )


def median_entry(
    column: Mapping[str, Score], arm: str, *, form: str = ".3g", rate: bool = True
) -> str:
    """The median error over seeds, the failed runs and the learning rate."""
    score = column[arm]
    median = ranged(score.median, score.interval, form, bold=arm in level(column))
    return f"{median} {score.failures}" + f" at {score.rate}" * rate


def ranged(
    value: float, interval: tuple[float, float], form: str, *, bold: bool
) -> str:
    """A number and its interval, the number marked if its arm is level."""
    low, high = (format(end, form) for end in interval)
    number = format(value, form)
    return f"{f'**{number}**' if bold else number} [{low}, {high}]"


def arms_table(
    columns: Mapping[str, Mapping[str, Any]],
    entry: Wording,
    first: Iterable[str],
    last: Sequence[str] | None = None,
) -> str:
    """Markdown: a line an arm, "-" where a column lacks it.

    Args:
        columns: head -> arm -> what was found.
        entry: (column, arm) -> what is written.
        first: the arms that come first; the others follow as in the vocabulary.
        last: a line below them.
    """
    rows = [
        [arm, *(entry(c, arm) if arm in c else "-" for c in columns.values())]
        for arm in in_order(columns.values(), first)
    ]
    rows += [] if last is None else [last]
    return markdown_table(["arm", *columns], rows)


def markdown_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, num_names: int = 1
) -> str:
    """Its first columns are names and left-aligned, the others numbers."""
    num_numbers = len(head) - num_names
    lines = [head, ["---"] * num_names + ["---:"] * num_numbers, *rows]
    escaped = [[entry.replace("|", "\\|") for entry in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)

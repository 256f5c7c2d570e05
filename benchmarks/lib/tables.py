"""Tables of Markdown, and the marks in them that say what is noise."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.lib.arms import in_order
from benchmarks.lib.summary import Score, floor


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


def legend(lost: str = "the median error of the middle one over the best's") -> str:
    """What the marks of a table of errors mean, and its `floor_row`.

    Args:
        lost: what the floor is of.
    """
    return (
        "In brackets: the 95 % bootstrap interval over seeds. Bold: level with the "
        "column's best; the intervals meet, and failures are not more by chance "
        f"(Fisher's p above 0.05). Noise floor: {lost}, if the bold ones (of so many) "
        "were equal: its median, and what it stays under with 95 %."
    )


def ranged(
    value: float, interval: tuple[float, float], form: str, *, bold: bool
) -> str:
    """A number and its interval, the number marked if its arm is level."""
    low, high = (format(end, form) for end in interval)
    number = format(value, form)
    return f"{f'**{number}**' if bold else number} [{low}, {high}]"


def arms_table(
    columns: Mapping[str, Mapping[str, Any]],
    entry: Callable[[Mapping[str, Any], str], str],
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

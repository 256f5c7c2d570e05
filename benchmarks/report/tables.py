"""Tables of Markdown."""

from collections.abc import Sequence

from benchmarks.lib.optimizers import in_order
from benchmarks.report.scores import Column, Score, Table, solvable, tied
from benchmarks.report.statistics import Interval, failure_interval


def markdown_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, num_names: int = 1
) -> str:
    """Returns a table whose first columns are names, and the others numbers."""
    num_numbers = len(head) - num_names
    lines = [head, ["---"] * num_names + ["---:"] * num_numbers, *rows]
    escaped = [[entry.replace("|", "\\|") for entry in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)


def ranged(interval: Interval, form: str) -> str:
    return " to ".join(format(end, form) for end in interval)


def score_table(column: Column) -> str:
    """Returns a line for each optimizer on one problem; see `SCORE_CAPTION`."""
    quantity = next(iter(column.values())).quantity
    best = tied(column)

    def middle(name: str, score: Score) -> str:
        text = format(score.middle, quantity.form)
        return f"**{text}**" if name in best else text

    rows = [
        [
            name,
            score.failures,
            middle(name, score),
            ranged(score.interval, quantity.form),
            f"{score.learning_rate:.0e}" + "*" * score.is_at_an_end,
        ]
        for name, score in column.items()
    ]
    statistic, _ = quantity.statistic
    shown = f"{statistic} {quantity.label}"
    head = ["optimizer", "failed runs", shown, "95 % interval", "learning rate"]
    return markdown_table(head, rows)


SCORE_CAPTION = (
    "The interval is the percentile interval of a bootstrap over seeds. Bold: the best "
    "of the table, and every optimizer whose interval, and Wilson's interval of the "
    "failed runs, overlaps with that of the best. A star marks a learning rate at an "
    "end of the set that it was chosen from.\n"
)


def overview_table(table: Table) -> str:
    """Returns failures of each optimizer over all problems that some optimizer solves.

    It is empty for a single problem, whose own table says the same.
    """
    table = solvable(table)
    if len(table) < 2:
        return ""
    best = {problem: tied(column) for problem, column in table.items()}
    rows = []
    for name in in_order(name for column in table.values() for name in column):
        cells = [problem for problem in table if name in table[problem]]
        failed = sum(table[problem][name].num_failed for problem in cells)
        runs = sum(table[problem][name].num_runs for problem in cells)
        rows.append(
            [
                name,
                f"{failed}/{runs}",
                ranged(failure_interval(failed, runs), ".0%"),
                f"{sum(name in best[problem] for problem in cells)}/{len(cells)}",
            ]
        )
    head = ["optimizer", "failed runs", "95 % interval", "best or tied"]
    return (
        f"All {len(table)} problems on which at least one optimizer never failed. "
        "Failed runs with Wilson's interval of their share; then on how many of the "
        "problems that it was run on the optimizer is the best or tied with it.\n\n"
        + markdown_table(head, rows)
    )

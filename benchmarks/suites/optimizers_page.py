"""The page of Optax's optimizers."""

from benchmarks.lib.optimizers import Optimizer
from benchmarks.report.pages import Page
from benchmarks.report.scores import Column, Table
from benchmarks.report.tables import markdown_table
from benchmarks.suites.optimizers import METHODS, NAMES

_WORSE = 2.0  # times the error of the optimizer alone: printed in bold


def _label(network: str, steps: int) -> str:
    return f"{network}, {steps} steps"


def _entry(column: Column, method: str, base: str) -> str:
    score, alone = column.get(Optimizer(method, base).name), column.get(base)
    if score is None:
        return "-"
    has_failed = 2 * score.num_failed >= score.num_runs
    text = "failed" if has_failed else f"{score.middle:.3g}"
    is_worse = alone is not None and score.middle > _WORSE * alone.middle
    return f"**{text}**" if is_worse else text


def _table(table: Table) -> str:
    (column,) = table.values()
    rows = [
        [base.removeprefix("optax."), *(_entry(column, m, base) for m in METHODS)]
        for base in NAMES
        if any(Optimizer(method, base).name in column for method in METHODS)
    ]
    return (
        "Median error of the seeds; lower is better. Bold: more than twice the error "
        'of the optimizer alone. "failed": at least half of the seeds are not finite '
        'or no better than predicting zero. "-": not run, or it raised.\n\n'
        + markdown_table(["optimizer", "alone", *METHODS[1:]], rows)
    )


PAGE = Page(
    "Every optimizer of Optax behind each method",
    """\
The error on fresh points over that of predicting zero, at the best of four learning
rates that one further seed chose, with a cosine. It is one small problem, a perceptron
of one hidden layer: it says which combinations break, not which are best. Optimizers
that ask `update` for the loss function (`lbfgs`, `sophia`, line searches) are left
out.""",
    ("network", "steps"),
    _label,
    shown={"cpu": ()},
    sections=(_table,),
    has_score_tables=False,
)

"""The page of the initializers."""

from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.lib.runs import Record
from benchmarks.report.pages import Page
from benchmarks.report.scores import Problem, Score, Table
from benchmarks.report.tables import markdown_table
from benchmarks.suites.initializers import (
    EQUATIONS,
    RATE,
    SHALLOW,
    SUITE,
    WIDTH,
    gain,
)
from benchmarks.tasks.pinn.task import FAILURE_ERROR

_HEALTHY, _LARGEST_RATIO = "no trouble seen", 100
_NAMES = {"poisson": "Poisson"}
_HEAD = [
    "initializer",
    "gain",
    "depth",
    f"reports '{_HEALTHY}'",
    "largest first loss, relative",
    "failed runs",
    "median error",
    "good",
]


def _label(
    activation: str, depth: int, equation: str, initializer: str, steps: int
) -> str:
    equation = _NAMES.get(equation, equation)
    return f"{equation}, {depth} layers of {activation}, {initializer}, {steps} steps"


# Of the equations; a network that is not trained has no score.
Rows = Sequence[tuple[Record, Score | None]]


def _is_good(rows: Rows) -> bool | None:
    """Returns None if the criteria hold as far as the networks are trained."""
    if not all(
        measured["verdict"] == _HEALTHY
        and (measured["loss_ratio"] or np.inf) <= _LARGEST_RATIO
        and not (score and score.num_failed)
        for measured, score in rows
    ):
        return False
    return True if all(score for _, score in rows) else None


def _row(activation: str, initializer: str, depth: int, rows: Rows) -> list[str]:
    ratios = [measured["loss_ratio"] or np.inf for measured, _ in rows]
    num_healthy = sum(measured["verdict"] == _HEALTHY for measured, _ in rows)
    scores = [score for _, score in rows if score]
    num_failed = sum(score.num_failed for score in scores)
    num_runs = sum(score.num_runs for score in scores)
    errors = [error for score in scores for error in score.values]
    return [
        initializer,
        f"{gain(activation, initializer):.3g}",
        f"{depth}",
        f"{num_healthy}/{len(rows)}",
        f"{max(ratios):.2g}",
        f"{num_failed}/{num_runs}" if scores else "-",
        f"{np.median(errors):.2g}" if scores else "-",
        {True: "yes", False: "no", None: "not trained"}[_is_good(rows)],
    ]


def ending(measured: Sequence[Record], tables: Mapping[str, Table]) -> str:
    """Returns the tables of all presets as one, for each activation."""
    scores: dict[Problem, Score] = {}
    for table in tables.values():
        scores |= {problem: column["Adam"] for problem, column in table.items()}
    groups: dict[str, dict[tuple[str, int], list[tuple[Record, Score | None]]]] = {}
    for record in measured:
        rows = groups.setdefault(record["activation"], {})
        problem = tuple(record[name] for name in PAGE.problem)
        key = record["initializer"], record["depth"]
        rows.setdefault(key, []).append((record, scores.get(problem)))
    summary, details = [], []
    for activation, rows in groups.items():
        names = list(dict.fromkeys(name for name, _ in rows))
        depths = sorted({depth for _, depth in rows})
        good = {
            name: [_is_good(rows[name, d]) for d in depths if (name, d) in rows]
            for name in names
        }
        met = [name for name in names if all(good[name])]
        candidates = [n for n in names if None in good[n] and False not in good[n]]
        summary.append(
            [
                activation,
                ", ".join(map(str, depths)),
                ", ".join(met) or "none",
                ", ".join(candidates) or "none",
            ]
        )
        lines = [
            _row(activation, name, depth, rows[name, depth])
            for name in names
            for depth in depths
            if (name, depth) in rows
        ]
        details.append(f"## {activation}\n\n{markdown_table(_HEAD, lines)}")
    head = ["activation", "depths", "good initializers", "not trained at every depth"]
    return "\n".join(
        [
            "## Which initializer meets all three criteria\n\nAt every depth and for "
            f"every equation that is measured, of {len(EQUATIONS)}.\n",
            markdown_table(head, summary, num_names=4),
            "The last column has what meets the first two criteria everywhere, and "
            "the third as far as it was trained.\n\n"
            "The gain is the standard deviation of the hidden weights times the root "
            "of the fan-in. The first loss is the largest over the equations. Errors "
            "are the medians over equations and seeds; lower is better.\n",
            *details,
        ]
    )


PAGE = Page(
    "Initializers of deep physics-informed networks",
    f"""\
Plain networks of width {WIDTH} learn Poisson's equation, a wave equation and a
reaction-diffusion equation with Adam at one learning rate, {RATE:g}, and no gradient
transformation. All weights come from one call of `initialize_weights`, but those of
Equinox's default.

An initializer is *good* if three things hold for every equation:

1. `gradient_report` of the first gradient reads "{_HEALTHY}".
2. The first loss is at most {_LARGEST_RATIO} times that of a network of {SHALLOW}
   layers with Glorot weights.
3. Adam trains the network from every seed: the relative L2 error is at most
   {FAILURE_ERROR}.

gelu and silu have no line of `preserve='gradient'`: at no stable fixed point of the
variance do they preserve the gradient.""",
    SUITE.problem,
    _label,
    notes={
        "one-seed": "Each run is the better of two learning rates, 0.001 and 0.003; "
        "which one it was is not kept. A network of another preset takes their place."
    },
    shown={name: () for name in (*SUITE.presets, "one-seed") if name != "smoke"},
    ending=ending,
    has_score_tables=False,
)

"""Tables and figures of the PPO grids, from the file of their runs alone."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from benchmarks.lib import figures, noise, panels
from benchmarks.lib.arms import SEPARATOR, Arm, among
from benchmarks.lib.claims import Claim
from benchmarks.lib.pages import Page, num_cells
from benchmarks.lib.regret import regret_table
from benchmarks.lib.summary import Cell, Score, Scores, cell_of, level
from benchmarks.lib.tables import error_table, ranged
from benchmarks.suites.rl import EPISODES, SUITE, TREATMENTS, env_steps
from benchmarks.tasks.control.environments import ENVIRONMENTS

ARMS = tuple(f"{treatment} | Adam" for treatment in TREATMENTS)
# The arms of the figures with lines; tables and the dots have all of them.
FOCUS = ARMS[:4]

_SCALES = "; ".join(
    f"{e.name} from {e.chance:g} to {e.solved:g}, failed below {e.failure_return:.3g}"
    for e in ENVIRONMENTS.values()
)
_TEXT = f"""\
Returns are means over {
    EPISODES
} episodes of the policy after the last update, sampled \
as in training. The error is the share of the way from chance to solved that is \
missing, between 0 and 1: {
    _SCALES
}. PPO has the constants of CleanRL and PureJaxRL, which clip the gradient's norm at \
0.5, here an arm; Adam's epsilon is Optax's, and rates fall to 0 along a half cosine. \
All arms have equal updates, initial weights and rates to choose from; the experience \
is each policy's own."""


# What a text may say, if the runs carry it: that a treatment is better than none.
CLAIMS = tuple(
    Claim(
        f"{arm.treatment} before Adam errs less than nothing.",
        "errs less",
        arm.name,
        f"none{SEPARATOR}{arm.optimizer}",
        tuple(
            cell_of(group[0].settings, SUITE.cell)
            for group in SUITE.presets["cpu"].groups
            if group[0].settings["arm"] == arm.name
        ),
    )
    for arm in map(Arm.of, ARMS)
    if arm.treatment != "none"
)


def _summary(table: Scores) -> str:
    return regret_table(
        table,
        "environments",
        compare=_points,
        cost="in per cent of the way from chance to solved, behind the best arm",
        digits=1,
    )


def _points(error: float, best: float) -> float:
    return 100 * (error - best)


def _returns(score: Score) -> np.ndarray:
    return np.array([record["return"] for record in score.by_seed])


def _entry(column: Mapping[str, Score], arm: str) -> str:
    score = column[arm]
    returns = _returns(score)
    interval = noise.interval(noise.resampled(returns))
    bold = arm in level(column)
    middle = ranged(float(np.median(returns)), interval, ".4g", bold=bold)
    return f"{middle} {score.failures} at {score.rate}"


def _tables(table: Scores) -> str:
    return error_table(
        "Returns",
        {_name(cell): column for cell, column in table.items()},
        _entry,
        ARMS,
        what="Median return",
        lost="per cent of the way from chance to solved, from the middle arm to the "
        "best",
        form=".1f",
        compare=_points,
    )


def _name(cell: Cell) -> str:
    return f"{cell[0]}, {_env_steps(cell):,} steps"


def _env_steps(cell: Cell) -> int:
    return env_steps(dict(zip(SUITE.cell, cell, strict=True)))


def _seeds_figure(table: Scores) -> Figure:
    """One dot a seed; every arm, every environment."""
    figure, axes, _ = panels.seeds(table, ARMS, _name, _returns, height=0.28)
    for cell, ax in axes.items():
        ax.axvline(_failure_return(cell), **figures.DOTTED)
        ax.set(xlabel="return after training")
    figure.suptitle(
        "One dot a seed, crosses: failed (left of the dotted line), bars: median",
        fontsize=10,
    )
    return figure


def _curves_figure(table: Scores) -> Figure:
    """Return against steps of the environment, a panel an environment."""
    # An arm has one colour in every figure.
    drawn = {arm: FOCUS.index(arm) for arm in among(table.values(), FOCUS)}
    figure, axes = figures.panels(len(table), 2.8)
    for ax, (cell, column) in zip(axes, table.items(), strict=True):
        thousands = _env_steps(cell) / cell[-1] / 1e3  # in an update

        def x(score: Score, thousands: float = thousands) -> np.ndarray:
            return thousands * score.steps

        panels.curves(ax, column, drawn, lambda score: score.curve("return"), x)
        ax.axhline(_failure_return(cell), **figures.DOTTED)
        ax.set(xlabel="steps of the environment (thousands)")
        ax.set_title(cell[0], fontsize=10)
    for ax in figures.first_column(axes):
        ax.set_ylabel("mean return of an episode")
    figures.legend(figure, drawn)
    figure.suptitle(
        "Median over seeds; bands from lowest to highest; dotted: failed below",
        fontsize=10,
    )
    return figure


def _failure_return(cell: Cell) -> float:
    return ENVIRONMENTS[str(cell[0])].failure_return


PAGE = Page(
    "Reinforcement learning: PPO",
    _TEXT,
    SUITE.cell,
    num_cells,
    _summary,
    {"seeds": _seeds_figure, "curves": _curves_figure},
    _tables,
    claims=CLAIMS,
    named=_name,
)

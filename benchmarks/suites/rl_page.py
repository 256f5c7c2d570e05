"""The page of PPO."""

from functools import partial

from benchmarks.report.figures import curves_figure
from benchmarks.report.pages import Page
from benchmarks.report.scores import Quantity
from benchmarks.suites.rl import EPISODES
from benchmarks.tasks.control.environments import ENVIRONMENTS

BREAKOUT = ENVIRONMENTS["Breakout-MinAtar"]
PROBLEM = ("environment", "copies", "horizon", "minibatches", "epochs", "steps")


def _label(
    environment: str,
    copies: int,
    horizon: int,
    minibatches: int,
    epochs: int,
    steps: int,
) -> str:
    env_steps = steps // (epochs * minibatches) * copies * horizon
    return f"{environment}, {env_steps:,} steps"


PAGE = Page(
    "Reinforcement learning: PPO",
    f"""\
Mean returns over {EPISODES} episodes of the policy after the last update, which samples
actions as in training. Uniformly random actions have a return of {BREAKOUT.chance:g},
{BREAKOUT.solved:g} counts as solved, and a run fails below
{BREAKOUT.failure_return:.3g}. PPO has the constants of CleanRL and PureJaxRL, which
clip the gradient's norm at 0.5, here one of the methods; Adam's epsilon is Optax's, and
learning rates fall to 0 along a half cosine. All optimizers have equal updates, initial
weights and rates to choose from; the experience is each policy's own. **No method is
better than none beyond the seeds.**""",
    PROBLEM,
    _label,
    Quantity("return", "return", form=".3g", missing=0.0, higher_is_better=True),
    BREAKOUT.failure_return,
    shown={"cpu": ("seeds", "curves")},
    drawings={
        "curves": partial(curves_figure, label=lambda p: _label(*p), key="return")
    },
)

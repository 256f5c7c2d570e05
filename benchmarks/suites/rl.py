"""PPO on Breakout, with the methods that matter to it.

The recipe is the one of CleanRL and PureJaxRL (`benchmarks/tasks/control/ppo.py`):
rollouts of 128 steps, 4 epochs of 4 minibatches. The preset "cpu" cuts what would take
more than an hour of one core: 16 copies and 400 thousand steps instead of 64 copies and
ten million steps.
"""

import jax

from benchmarks.lib.curves import Curves
from benchmarks.lib.optimizers import BASES, chains
from benchmarks.lib.runs import Phase, Record, Run, Settings, finite
from benchmarks.lib.suite import (
    SMOKE,
    Preset,
    Protocol,
    Suite,
    curve,
    entries,
    keep_error,
    lowest_worst,
)
from benchmarks.lib.train import Rule, Training, record_steps
from benchmarks.tasks.control.environments import ENVIRONMENTS
from benchmarks.tasks.control.task import Ppo

OPTIMIZERS = chains(
    (
        "clip at 0.5",
        "none",
        "StableGrad",
        "GradientStabilizer (0.7, 0.9)",
        "GradientStabilizer",
        "clip by history",
        "skip spikes",
        "normalize per array",
    ),
    ["Adam"],
)
# Wider than the set of the base, at whose ends some optimizers had their best rate.
RATES = (1e-4, *BASES["Adam"].rates, 1e-1)
EPISODES = 64  # of every score
_PHASES: tuple[Phase, ...] = ("tuning", "reported")


def _problem(
    environment: str,
    *,
    copies: int = 16,
    horizon: int = 128,
    minibatches: int = 4,
    epochs: int = 4,
    rollouts: int,
) -> Settings:
    """Returns the settings of a problem; arguments as of `Ppo`."""
    return {
        "environment": environment,
        "copies": copies,
        "horizon": horizon,
        "minibatches": minibatches,
        "epochs": epochs,
        "steps": rollouts * epochs * minibatches,
    }


PRESETS = {
    "smoke": Preset(
        entries(
            "smoke",
            [
                _problem(
                    "CartPole-v1",
                    copies=2,
                    horizon=8,
                    minibatches=2,
                    epochs=2,
                    rollouts=5,
                )
            ],
            OPTIMIZERS[:3],
            lambda _: RATES[:3],  # as many as reported seeds: one program for both
        ),
        SMOKE,
        "seconds",
        "every part of the machinery; its returns mean nothing",
    ),
    "cpu": Preset(
        entries(
            "cpu",
            [_problem("Breakout-MinAtar", rollouts=195)],
            OPTIMIZERS,
            lambda _: RATES,
        ),
        # Without a margin: seeds fail here at any rate, and not beyond an edge.
        Protocol((0, 1, 2), tuple(range(400, 410)), lowest_worst),
        "an hour on 1 idle core",
        "Breakout, 400 thousand steps",
    ),
}


def training(settings: Settings, phase: Phase) -> Training:
    """Scores a tuning run on other episodes than a reported one."""
    return Training(
        Ppo(
            ENVIRONMENTS[settings["environment"]],
            settings["copies"],
            settings["horizon"],
            settings["minibatches"],
            settings["epochs"],
        ),
        Rule.from_settings(settings),
        record_steps(settings["steps"], early=1, even=12),
        jax.random.split(jax.random.key(_PHASES.index(phase)), EPISODES),
        in_one_program=True,
    )


def keep(run: Run, curves: Curves) -> Record:
    """Keeps the mean return and the error that follows from it."""
    environment = ENVIRONMENTS[run.settings["environment"]]
    record = keep_error(run, curves, environment.failure_error)
    returns, errors = (curves.scores[name] for name in ("return", "error"))
    record["return"] = finite(returns[-1], 5)
    if "curve" in record:
        record["curve"] = curve(curves, 4, **{"return": returns, "error": errors})
    return record


SUITE = Suite(
    "rl",
    "PPO; errors are the share of the way from chance to solved that is missing",
    PRESETS,
    training,
    keep,
)

"""PPO on environments of gymnax, under the treatments that matter to it.

The recipe is CleanRL's and PureJaxRL's (`benchmarks/tasks/control/ppo.py`): rollouts of
128 steps, 4 epochs of 4 minibatches, 4 copies of a classic environment. Of it the
preset "cpu" cuts what would take more than an hour of one core: CartPole and Acrobot
have 125 thousand steps in place of half a million, Breakout has 16 copies and 400
thousand steps in place of 64 and ten million.
"""

from collections.abc import Iterable

import jax

from benchmarks.lib.arms import OPTIMIZERS, pairs
from benchmarks.lib.runs import Phase, Record, Run, Settings, finite
from benchmarks.lib.suite import (
    SMOKE,
    Entry,
    Preset,
    Protocol,
    Suite,
    curve,
    entries,
    keep_error,
    lowest_worst,
)
from benchmarks.lib.train import Curves, Rule, Training, record_steps
from benchmarks.tasks.control.environments import ENVIRONMENTS
from benchmarks.tasks.control.task import Ppo

# What tells most comes first.
TREATMENTS = (
    "clip 0.5",
    "none",
    "StableGrad",
    "GradientStabilizer .7 .9",
    "GradientStabilizer",
    "clip by history",
    "skip spikes",
    "unit norm by leaf",
)
# Wider than the optimizer's own set, at whose ends some arms had their best rate.
RATES = (1e-4, *OPTIMIZERS["Adam"].rates, 1e-1)
EPISODES = 64  # of every score
_PHASES: tuple[Phase, ...] = ("tuning", "reported")


def _groups(
    preset: str,
    environment: str,
    *,
    copies: int = 4,
    horizon: int = 128,
    minibatches: int = 4,
    epochs: int = 4,
    rollouts: int,
    treatments: Iterable[str] = TREATMENTS,
    rates: tuple[float, ...] = RATES,
) -> list[list[Entry]]:
    """The entries of a cell, each a group; arguments as of `Ppo`."""
    cell = {
        "environment": environment,
        "copies": copies,
        "horizon": horizon,
        "minibatches": minibatches,
        "epochs": epochs,
        "steps": rollouts * epochs * minibatches,
    }
    return entries(preset, [cell], pairs(treatments, ["Adam"]), lambda arm: rates)


def env_steps(settings: Settings) -> int:
    """How many times the environment is stepped in all."""
    rollouts = settings["steps"] // (settings["epochs"] * settings["minibatches"])
    return rollouts * settings["copies"] * settings["horizon"]


# Without a margin: seeds fail here at any rate, and not beyond an edge.
_PROTOCOL = Protocol((0, 1, 2), tuple(range(400, 410)), lowest_worst)

PRESETS = {
    "smoke": Preset(
        _groups(
            "smoke",
            "CartPole-v1",
            copies=2,
            horizon=8,
            minibatches=2,
            epochs=2,
            rollouts=5,
            treatments=("clip 0.5", "none", "StableGrad"),
            rates=RATES[:3],  # as many as reported seeds: one program for both
        ),
        SMOKE,
        "seconds",
        "every part of the machinery; its returns mean nothing",
    ),
    "cpu": Preset(
        [
            *_groups("cpu", "CartPole-v1", rollouts=244),
            *_groups("cpu", "Acrobot-v1", rollouts=244),
            *_groups("cpu", "Breakout-MinAtar", copies=16, rollouts=195),
        ],
        _PROTOCOL,
        "an hour and a half on 1 idle core",
        "three environments, 125 to 400 thousand steps",
    ),
    # As PureJaxRL has it, 64 copies and 8 minibatches, but for 3 of ten million steps.
    "gpu": Preset(
        _groups(
            "gpu",
            "Breakout-MinAtar",
            copies=64,
            minibatches=8,
            rollouts=366,
            treatments=TREATMENTS[:4],
        ),
        _PROTOCOL,
        "7 minutes on an H100: estimated, never run",
        "Breakout, three million steps",
    ),
}


def training(settings: Settings, phase: Phase) -> Training:
    """The episodes that score a tuning run are others than those of a reported one."""
    return Training(
        Ppo(
            ENVIRONMENTS[settings["environment"]],
            settings["copies"],
            settings["horizon"],
            settings["minibatches"],
            settings["epochs"],
        ),
        Rule.of(settings),
        record_steps(settings["steps"], early=1, even=12),
        jax.random.split(jax.random.key(_PHASES.index(phase)), EPISODES),
        in_one_program=True,
    )


def keep(run: Run, curves: Curves) -> Record:
    """The mean `return` beside the error of it, by which arms are ranked."""
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

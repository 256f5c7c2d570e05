"""Every optimizer of Optax behind each method: which combinations break.

The problem is a perceptron of one hidden layer, with weights twice too large, that
learns a function of eight numbers.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.lib.optimizers import BASES, chains
from benchmarks.lib.runs import Phase, Settings
from benchmarks.lib.suite import SMOKE, Preset, Protocol, Suite, entries, keep_error
from benchmarks.lib.train import Rule, Training
from benchmarks.tasks.functions import FunctionTask

METHODS = ("none", "StableGrad", "GradientStabilizer", "autoscaled normalization")
NAMES = tuple(name for name in BASES if name.startswith("optax."))
STEPS = 200


def _draw(key: jax.Array) -> Any:
    hidden, out = jax.random.split(key)
    return {
        "hidden": {
            "kernel": 2 * jax.random.normal(hidden, (8, 16)) * 8**-0.5,
            "bias": jnp.zeros(16),
        },
        "out": {"kernel": 2 * jax.random.normal(out, (16, 1)) * 16**-0.5},
    }


def _sample(key: jax.Array, num: int = 64) -> tuple[jax.Array, jax.Array]:
    x = jax.random.normal(key, (num, 8))
    return x, jnp.sin(x[:, :1] + x[:, 1:2] * x[:, 2:3])


def _loss(params: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    x, y = batch
    x = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return jnp.mean((x @ params["out"]["kernel"] - y) ** 2)


def _error(params: Any) -> jax.Array:
    """Returns the error on fresh points over that of predicting zero."""
    x, y = _sample(jax.random.key(1), num=1024)
    return _loss(params, (x, y)) / jnp.mean(y**2)


_TASK = FunctionTask(_draw, _loss, _sample, _error)


def _problem(steps: int) -> Settings:
    return {"network": "one hidden layer of 16", "steps": steps}


PRESETS = {
    "smoke": Preset(
        entries("smoke", [_problem(3)], chains(METHODS[:2], NAMES[:1])),
        SMOKE,
        "seconds",
        "every part of the machinery; its errors mean nothing",
    ),
    "cpu": Preset(
        entries("cpu", [_problem(STEPS)], chains(METHODS, NAMES)),
        Protocol((0,), (100, 101, 102, 103)),
        "20 minutes on 1 idle core",
        f"{len(NAMES)} optimizers of Optax alone and behind three methods",
    ),
}


def training(settings: Settings, phase: Phase) -> Training:
    """Makes the training; both phases are scored on the same points."""
    del phase
    steps = settings["steps"]
    return Training(_TASK, Rule.from_settings(settings), [1, steps])


SUITE = Suite(
    "optimizers",
    "all optimizers of Optax; errors are relative to predicting zero",
    PRESETS,
    training,
    partial(keep_error, failure=1.0),
)

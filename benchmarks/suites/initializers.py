"""Trains deep physics-informed networks from several initializers with plain Adam."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial

import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer

from benchmarks.lib.methods import stacked_by_name
from benchmarks.lib.runs import Phase, Record, Settings, finite
from benchmarks.lib.suite import (
    SMOKE,
    Entry,
    Preset,
    Protocol,
    Suite,
    entries,
    keep_error,
    problems,
)
from benchmarks.lib.task import Gradient, PyTree
from benchmarks.lib.train import Rule, Training
from benchmarks.tasks.pinn.network import ACTIVATIONS, Params
from benchmarks.tasks.pinn.problems import shared_problem
from benchmarks.tasks.pinn.scanned import Scanned
from benchmarks.tasks.pinn.task import FAILURE_ERROR, Pinn, evaluation
from stablegrad_optax import (
    activation_aware_normal,
    gradient_report,
    initialize_weights,
)

EQUATIONS = ("poisson", "wave", "reaction-diffusion")
WIDTH, SHALLOW, STEPS, RATE = 32, 3, 500, 1e-3
SEEDS = (100, 101, 102)


@cache
def initializers(activation: str) -> dict[str, Initializer | None]:
    """Returns name -> initializer of all weights; None keeps Equinox's default."""
    made = {
        "Equinox's default": None,
        "Glorot": jax.nn.initializers.glorot_uniform(),
        "He": jax.nn.initializers.he_normal(),
    }
    for preserve in ("gradient", "signal"):
        with suppress(ValueError):  # some activations have no gain of this kind
            made[f"preserve='{preserve}'"] = activation_aware_normal(
                lambda z: ACTIVATIONS[activation](z).value, preserve=preserve
            )
    return made


def gain(activation: str, initializer: str) -> float:
    """Returns the std of the weights of a wide layer times the root of its fan-in."""
    draw = initializers(activation)[initializer]
    if draw is None:
        draw = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    return float(draw(jax.random.key(0), (1024, 1024)).std() * 1024**0.5)


@dataclass(frozen=True)
class Initialized(Scanned):
    """A network whose weights an initializer draws; Equinox's default without one."""

    weights: Initializer | None = field(default=None, compare=False)

    def init(self, key: jax.Array) -> Params:
        key, new_key = jax.random.split(key)
        params = super().init(key)
        if self.weights is None:
            return params
        return initialize_weights(
            params, new_key, self.weights, num_stacked_axes=stacked_by_name
        )


def _groups(
    preset: str,
    activations: Iterable[str],
    depths: Iterable[int],
    equations: Iterable[str] = EQUATIONS,
    steps: int = STEPS,
) -> list[list[Entry]]:
    """Returns the initializers of each network side by side."""
    networks = problems(activation=activations, depth=depths, equation=equations)
    return [
        [
            entry
            for initializer in initializers(network["activation"])
            for (entry,) in entries(
                preset,
                [{**network, "initializer": initializer, "steps": steps}],
                ["Adam"],
                lambda _: (RATE,),
            )
        ]
        for network in networks
    ]


_PROTOCOL = Protocol((), SEEDS)
PRESETS = {
    "smoke": Preset(
        _groups("smoke", ("tanh",), (4,), ("poisson",), steps=3),
        SMOKE,
        "seconds",
        "every part of the machinery; its errors mean nothing",
    ),
    "cpu": Preset(
        _groups("cpu", ("tanh",), (8, 24)),
        _PROTOCOL,
        "5 minutes on 1 idle core",
        "tanh at depth 8 and 24, three equations, up to five initializers",
    ),
    "activations": Preset(
        [
            group
            for equation in EQUATIONS
            for depth in (8, 24)
            for group in _groups(
                "activations", ("gelu", "silu", "sin"), (depth,), (equation,)
            )
        ],
        _PROTOCOL,
        "15 minutes on 1 idle core",
        "sin, gelu and silu at depth 8 and 24",
    ),
    "depth-50": Preset(
        _groups("depth-50", ("tanh", "sin", "gelu", "silu"), (50,)),
        _PROTOCOL,
        "20 minutes on 1 idle core",
        "four activations at depth 50",
    ),
}


def _task(settings: Settings) -> Pinn:
    activation = settings["activation"]
    weights = initializers(activation)[settings["initializer"]]
    network = Initialized(
        settings["depth"], WIDTH, activation, "uniform", weights=weights
    )
    return Pinn(shared_problem(settings["equation"]), network)


def training(settings: Settings, phase: Phase) -> Training:
    """Makes the training; all runs are scored on the same grid."""
    del phase
    steps, task = settings["steps"], _task(settings)
    rule = Rule.from_settings(settings)
    return Training(task, rule, [1, steps], evaluation(task.problem))


@jax.jit
def _gradient(task: Pinn, params: PyTree, key: jax.Array) -> Gradient:
    return task.gradient(params, None, key, jnp.int32(0))


def measure(settings: Settings) -> Record:
    """Reports on the first gradient, and sets the first loss next to a shallow one."""
    task = _task(settings)
    network = replace(
        task.network,
        depth=SHALLOW,
        weights=initializers(settings["activation"])["Glorot"],
    )
    init_key, data_key = jax.random.split(jax.random.key(0))

    def first(task: Pinn) -> Gradient:
        params, _ = task.init(init_key)
        return _gradient(task, params, data_key)

    gradient, shallow = first(task), first(replace(task, network=network))
    report = gradient_report(gradient.grads, num_stacked_axes=stacked_by_name)
    return {
        "verdict": report.verdict,
        "loss_ratio": finite(float(gradient.loss / shallow.loss), 3),
    }


SUITE = Suite(
    "initializers",
    "deep physics-informed networks from several initializers; errors are relative L2",
    PRESETS,
    training,
    partial(keep_error, failure=FAILURE_ERROR),
    measure,
)

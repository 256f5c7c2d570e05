"""Sets verdicts of `gradient_report` next to what helps small networks.

Each network is trained by plain AdamW and with remedies for a bad scale of the
gradients, and its first gradient and its first steps are reported on.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

import stablegrad_optax
from benchmarks.lib.methods import stablegrad_by_name, stacked_by_name
from benchmarks.lib.runs import Phase, Record, Settings, finite
from benchmarks.lib.suite import (
    SMOKE,
    Entry,
    Preset,
    Protocol,
    Suite,
    entries,
    keep_error,
)
from benchmarks.lib.task import Gradient, PyTree, Task
from benchmarks.lib.train import Rule, Training
from benchmarks.tasks import networks
from benchmarks.tasks.pinn.problems import PROBLEMS
from benchmarks.tasks.pinn.scanned import Scanned
from benchmarks.tasks.pinn.task import Pinn, evaluation

OWN, GLOROT = "own", "Glorot"
BASELINE = (OWN, "AdamW")
# The weights and the optimizer of each remedy, in the order of the report.
REMEDIES = {
    "Glorot weights": (GLOROT, "AdamW"),
    "eps=1e-16": (OWN, "AdamW (eps=1e-16)"),
    "b2=0.9": (OWN, "AdamW (b2=0.9)"),
    "clip, b2=0.9": (OWN, "clip + AdamW (b2=0.9)"),
    "StableGrad, b2=0.9": (OWN, "StableGrad + AdamW (b2=0.9)"),
}
_EVERYWHERE = ("StableGrad, b2=0.9", "clip, b2=0.9", "Glorot weights")
_FOR_SMALL = ("eps=1e-16", "b2=0.9")
RATES = (1e-3, 3e-3, 1e-2)
FAILURE = 0.9  # a relative error
FIRST_STEPS = 100  # of the history

# name -> equation and network
PINNS = {
    f"{equation} {depth}, {name}": (equation, Scanned(depth, **weights))
    for equation in ("reaction-diffusion", "wave")
    for depth, name, weights in (
        (8, "Equinox", {"initializer": "uniform"}),
        (24, "Equinox", {"initializer": "uniform"}),
        (24, "gain 5/3", {"gain": 5 / 3}),
    )
}
PINN_STEPS = 300
# Their layers' gradients differ by orders of magnitude, or are near Adam's eps.
SMALL_GRADIENTS = (
    "MLP 24, Equinox",
    "MLP 20, tanh, Equinox",
    "MLP 12, Equinox",
    "Poisson 20, Equinox",
    "MLP 50, tanh, Equinox",
    "Poisson 32, Equinox",
    "reaction-diffusion 24, Equinox",
    "wave 24, Equinox",
    "Poisson 50, Equinox",
)
# The runs of version 0.2 have no others; what takes long comes last.
FURTHER = (
    "MLP 24, Equinox",
    "GRU, 8 steps",
    "MLP 24, gelu, LeCun",
    "reaction-diffusion 8, Equinox",
    "MLP 50, tanh, Equinox",
    "Poisson 32, Equinox",
    "reaction-diffusion 24, Equinox",
    "reaction-diffusion 24, gain 5/3",
    "transformer 2, Flax's example",
    "ResNet 8, Flax's example",
    "wave 24, Equinox",
    "wave 24, gain 5/3",
    "Poisson 50, Equinox",
    "wave 8, Equinox",
    "CNN 12, GroupNorm",
    "CNN 16, residual, GroupNorm",
)
NETWORKS = (*networks.NETWORKS, *PINNS)


def _entries(
    preset: str, network: str, arms: Iterable[tuple[str, str]], steps: int | None = None
) -> list[list[Entry]]:
    """Returns a network with pairs of weights and an optimizer."""
    known = PINN_STEPS if network in PINNS else networks.steps(network)
    problem = {"network": network, "steps": steps or known}
    return [
        group
        for weights, optimizer in arms
        for group in entries(
            preset, [{**problem, "weights": weights}], [optimizer], lambda _: RATES
        )
    ]


def _remedies(network: str, names: Iterable[str] = _EVERYWHERE) -> list[tuple]:
    small = _FOR_SMALL if network in SMALL_GRADIENTS else ()
    return [REMEDIES[name] for name in (*names, *small)]


def _is_slow(network: str) -> bool:
    return network.startswith(tuple(networks.STEPS))


# The networks of version 0.2 that its runs are of: what is telling and fast first.
_OLD = sorted(
    (name for name in NETWORKS if name not in FURTHER),
    key=lambda name: (_is_slow(name), name not in SMALL_GRADIENTS),
)
_FRESH = Protocol((0, 1), tuple(range(100, 106)))

PRESETS = {
    "smoke": Preset(
        _entries("smoke", "MLP 4", [BASELINE, *_remedies("MLP 4")], steps=3),
        SMOKE,
        "seconds",
        "every part of the machinery; its errors mean nothing",
    ),
    "cpu": Preset(
        [
            group
            for name in NETWORKS
            for group in _entries("cpu", name, [BASELINE, *_remedies(name)])
        ],
        _FRESH,
        "2 hours on 1 idle core",
        f"{len(NETWORKS)} networks of seven kinds, up to five remedies",
    ),
    "further": Preset(
        [
            group
            for name in FURTHER
            for group in _entries("further", name, [BASELINE, *_remedies(name)])
        ],
        _FRESH,
        "20 minutes on 1 idle core",
        f"{len(FURTHER)} networks that version 0.2 did not train",
    ),
    "initializer": Preset(
        [
            group
            for name in _OLD
            for group in _entries(
                "initializer", name, _remedies(name, ("Glorot weights",))
            )
        ],
        _FRESH,
        "20 minutes on 1 idle core",
        "Glorot weights for the networks of version 0.2, whose other runs are kept",
    ),
}


@jax.tree_util.register_static
@dataclass(frozen=True)
class Weighted:
    """A task that starts from its own weights or from Glorot's.

    Programs are compiled for the task alone, whatever the weights.
    """

    task: Task
    weights: str = field(compare=False)

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        params, state = self.task.init(key)
        if self.weights == OWN:
            return params, state
        new = stablegrad_optax.initialize_weights(
            params,
            jax.random.fold_in(key, 1),
            weights=_is_initialized,
            num_stacked_axes=stacked_by_name,
        )
        return new, state

    def gradient(
        self, params: PyTree, state: PyTree, key: jax.Array, step: jax.Array
    ) -> Gradient:
        return self.task.gradient(params, state, key, step)

    def score(
        self, params: PyTree, state: PyTree, held_out: PyTree
    ) -> dict[str, jax.Array]:
        return self.task.score(params, state, held_out)


def _is_initialized(params: PyTree) -> PyTree:
    """Selects kernels, but not those of attention, nor embeddings."""

    def is_kernel(path: jax.tree_util.KeyPath, _: jax.Array) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return name.endswith("kernel") and "Attention" not in name

    return jax.tree.map_with_path(is_kernel, params)


@cache
def _pinn(name: str) -> Pinn:
    equation, network = PINNS[name]
    return Pinn(PROBLEMS[equation](), network)


def _task(settings: Settings) -> Weighted:
    name = settings["network"]
    task = _pinn(name) if name in PINNS else networks.network(name)
    return Weighted(task, settings["weights"])


def training(settings: Settings, phase: Phase) -> Training:
    """Makes the training; both phases are scored on the same examples."""
    del phase
    steps, task = settings["steps"], _task(settings)
    held_out = evaluation(task.task.problem) if settings["network"] in PINNS else None
    return Training(task, Rule.from_settings(settings), [1, steps], held_out)


@jax.jit
def _first_steps(task: Weighted, params: PyTree, key: jax.Array) -> tuple[Any, Any]:
    """Returns the first gradient, and StableGrad's state after each step."""
    tx = optax.chain(stablegrad_by_name(), optax.adamw(RATES[0]))

    def step(carry: Any, count: jax.Array) -> tuple[Any, Any]:
        params, state, first = carry
        grads = task.gradient(params, None, key, count).grads
        first = jax.tree.map(partial(jnp.where, count == 0), grads, first)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state, first), state[0]

    start = params, tx.init(params), params
    (_, _, first), states = jax.lax.scan(step, start, jnp.arange(FIRST_STEPS))
    return first, states


def measure(settings: Settings) -> Record:
    """Reports on the first gradient of a network, and on its first steps."""
    task = _task(settings)
    init_key, data_key = jax.random.split(jax.random.key(0))
    params, _ = task.init(init_key)
    grads, states = _first_steps(task, params, data_key)
    report = partial(
        stablegrad_optax.gradient_report, grads, num_stacked_axes=stacked_by_name
    )
    first = report()
    late = report(history=stablegrad_optax.scale_factors(states, params))
    return {
        "max_std": finite(first.max_std, 3),
        "std_ratio": finite(first.std_ratio, 3),
        "below_adam_eps": finite(first.below_adam_eps, 3),
        "verdict": first.verdict,
        "verdict_with_history": late.verdict,
    }


SUITE = Suite(
    "calibration",
    "verdicts of gradient_report next to what training does",
    PRESETS,
    training,
    partial(keep_error, failure=FAILURE),
    measure,
)

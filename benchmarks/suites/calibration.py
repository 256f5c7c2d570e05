"""Sets verdicts of `gradient_report` next to what helps small networks.

Each network is trained by plain AdamW and by two remedies for a bad scale of the
gradients, and its first gradient and its first steps are reported on.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

import stablegrad_optax
from benchmarks.lib.methods import stablegrad_by_name, stacked_by_name
from benchmarks.lib.runs import Phase, Record, Settings, finite
from benchmarks.lib.suite import SMOKE, Preset, Protocol, Suite, entries, keep_error
from benchmarks.lib.train import Rule, Training
from benchmarks.tasks import networks

BASELINE = "AdamW"
REMEDIES = ("clip + AdamW (b2=0.9)", "StableGrad + AdamW (b2=0.9)")
RATES = (1e-3, 3e-3, 1e-2)
FAILURE = 0.9  # a relative error
FIRST_STEPS = 100  # of the history


def _problems(names: Iterable[str]) -> list[Settings]:
    return [{"network": name, "steps": networks.steps(name)} for name in names]


PRESETS = {
    "smoke": Preset(
        entries(
            "smoke",
            [{"network": "MLP 4", "steps": 3}],
            (BASELINE, *REMEDIES),
            lambda _: RATES,
        ),
        SMOKE,
        "seconds",
        "every part of the machinery; its errors mean nothing",
    ),
    "cpu": Preset(
        entries(
            "cpu",
            _problems(networks.NETWORKS),
            (BASELINE, *REMEDIES),
            lambda _: RATES,
        ),
        Protocol((0, 1), tuple(range(100, 106))),
        "an hour on 1 idle core",
        f"{len(networks.NETWORKS)} networks of six kinds, three optimizers",
    ),
}


def training(settings: Settings, phase: Phase) -> Training:
    """Makes the training; both phases are scored on the same examples."""
    del phase
    steps = settings["steps"]
    return Training(
        networks.network(settings["network"]), Rule.from_settings(settings), [1, steps]
    )


def measure(settings: Settings) -> Record:
    """Reports on the first gradient of a network, and on its first steps."""
    task = networks.network(settings["network"])
    init_key, data_key = jax.random.split(jax.random.key(0))
    params, _ = task.init(init_key)
    tx = optax.chain(stablegrad_by_name(), optax.adamw(RATES[0]))

    @jax.jit
    def first_steps(params: Any) -> tuple[Any, Any]:
        def step(carry: Any, count: jax.Array) -> tuple[Any, Any]:
            params, state, first = carry
            grads = task.gradient(params, None, data_key, count).grads
            first = jax.tree.map(partial(jnp.where, count == 0), grads, first)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state, first), state[0]

        start = params, tx.init(params), params
        (_, _, first), states = jax.lax.scan(step, start, jnp.arange(FIRST_STEPS))
        return first, states

    grads, states = first_steps(params)
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

"""Compares what `gradient_report` says of many networks with what training does.

Each network is trained by plain AdamW and by the remedies for a bad scale of the
gradients. One of them *helps* if its fresh runs are told apart from AdamW's by a rank
test (5 % over the remedies together) and its median score is at least 1.5 times lower.
A verdict that sees trouble where nothing helps is a false alarm, one that sees none
where something helps is a miss. Finished networks are kept and not trained again.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

import stablegrad_optax
from benchmarks.calibration.networks import FAILURE, NETWORKS, Network
from benchmarks.calibration.page import page
from benchmarks.lib import machine, runs
from benchmarks.lib.command_line import fail, parse
from benchmarks.lib.together import one_of, train_arms
from stablegrad_optax import stablegrad
from stablegrad_optax._trials import Problem

PROG = "python -m benchmarks.calibration"
RATES, TUNING, SEEDS = (1e-3, 3e-3, 1e-2), 2, 6
FIRST_STEPS = 100  # of the history
KEY = 0
ARMS = ("AdamW", "clip + AdamW b2=.9", "StableGrad + AdamW b2=.9")


@dataclass(frozen=True)
class Options:
    networks: str = ""
    """Only those whose name contains this."""

    only_page: bool = False
    """Write the page from the finished networks, train none."""

    results: Path = runs.RESULTS / "calibration.jsonl"
    """The finished networks; the page goes beside it."""


def measure(network: Network, key: jax.Array) -> dict[str, Any]:
    """What the reports of the first gradient and of the first steps hold."""
    init_key, data_key = jax.random.split(key)
    params = network.init(init_key)
    tx = optax.chain(
        stablegrad(num_stacked_axes=network.num_stacked_axes), optax.adamw(RATES[0])
    )

    @jax.jit
    def first_steps(params: Any) -> tuple[Any, Any]:
        def step(carry: Any, count: jax.Array) -> tuple[Any, Any]:
            params, state, first = carry
            batch = network.sample(jax.random.fold_in(data_key, count))
            grads = jax.grad(network.loss)(params, batch)
            first = jax.tree.map(partial(jnp.where, count == 0), grads, first)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state, first), state[0]

        start = params, tx.init(params), params
        (_, _, first), states = jax.lax.scan(step, start, jnp.arange(FIRST_STEPS))
        return first, states

    grads, states = first_steps(params)
    report = stablegrad_optax.gradient_report(
        grads,
        num_stacked_axes=network.num_stacked_axes,
        history=stablegrad_optax.scale_factors(states, params),
    )
    history = report.history
    assert history is not None
    return {
        "num_parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "max_std": report.max_std,
        "std_ratio": runs.finite(report.std_ratio),
        "below_adam_eps": report.below_adam_eps,
        "zero": report.zero,
        "num_dead": sum(leaf.is_dead for leaf in report.leaves),
        "drift": runs.finite(history.drift),
        "late_ratio": runs.finite(history.std_ratio),
    }


def train(network: Network, key: jax.Array) -> dict[str, Any]:
    """Each optimizer's rate and its fresh scores; None where a run failed."""

    def optimizer(arm: jax.Array, rate: jax.Array) -> optax.GradientTransformation:
        treatments = (
            optax.identity(),
            optax.clip_by_global_norm(1.0),
            stablegrad(num_stacked_axes=network.num_stacked_axes),
        )
        b2 = jnp.where(arm == 0, 0.999, 0.9)
        return optax.chain(one_of(arm, treatments), optax.adamw(rate, b2=b2))

    problem = Problem(
        network.loss,
        network.init,
        network.sample,
        network.score,
        FAILURE,
        network.steps,
    )
    trained = train_arms(
        problem,
        optimizer,
        num_arms=len(ARMS),
        rates=RATES,
        num_seeds=SEEDS,
        num_tuning_seeds=TUNING,
        key=key,
    )
    return {
        name: {
            "learning_rate": rate,
            "scores": [runs.finite(x, digits=4) for x in scores],
        }
        for name, (rate, scores) in zip(ARMS, trained, strict=True)
    }


def main(args: Sequence[str] | None = None) -> int:
    options = parse(Options, args, prog=PROG, description=__doc__ or "")
    chosen = [name for name in NETWORKS if options.networks in name]
    if not chosen:
        fail(PROG, f"--networks: no name contains {options.networks!r}")
    try:
        records = runs.read_lines(options.results)
    except ValueError as error:
        fail(PROG, str(error))
    # Programs that run for a second each: their compilation would take most of it.
    jax.config.update("jax_disable_most_optimizations", True)
    console, done = Console(), {record["network"] for record in records}
    key = jax.random.key(KEY)
    missing = [] if options.only_page else [name for name in chosen if name not in done]
    for number, name in enumerate(missing, start=1):
        network = NETWORKS[name]()
        record = {
            "network": name,
            "family": network.family,
            **measure(network, jax.random.fold_in(key, 1)),
            "optimizers": train(network, key),
            "steps": network.steps,
            **machine.origin(),
        }
        runs.append(options.results, [record])
        records.append(record)
        medians = [
            np.median([math.inf if x is None else x for x in of["scores"]])
            for of in record["optimizers"].values()
        ]
        scores = ", ".join(f"{median:.3g}" for median in medians)
        console.print(f"{number} of {len(missing)}  {name}: {scores}", highlight=False)
    path = options.results.with_suffix(".md")
    path.write_text(page(records))
    console.print(f"{len(records)} networks, page {path}.", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

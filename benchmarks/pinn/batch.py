"""Runs of one arm on one architecture, trained side by side.

Learning rates, seeds and initializers are values, not programs: a batch may mix them.
The gradient is compiled once for a problem and an architecture, whatever the arm; the
update once for an arm and a shape, whatever the problem. A loop in Python joins the
two: for deep networks a program that held both would cost the gradient's compilation,
5 to 10 s, once for every arm, and a batch's step outweighs two dispatches.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.pinn.arms import ARMS
from benchmarks.pinn.gradient import PredictionGrads, value_and_grads
from benchmarks.pinn.network import Network, Params
from benchmarks.pinn.problems import PROBLEMS, Problem, relative_l2
from benchmarks.pinn.train import failed, gradient_stds, record_steps
from benchmarks.runs import Record, Run, Settings, finite

# name in the results -> what it means for `Network`
INITS: dict[str, dict[str, str | float]] = {
    "normal 0.3": {"initializer": "normal", "gain": 0.3},
    "normal 1": {"initializer": "normal", "gain": 1.0},
    "normal 5/3": {"initializer": "normal", "gain": 5 / 3},
    "uniform": {"initializer": "uniform"},
    "glorot": {"initializer": "glorot"},
    "activation-aware": {"initializer": "activation_aware"},
}


def train_batch(runs: Sequence[Run], tick: Callable[[], None]) -> list[Record]:
    """Train runs that differ in initializer, learning rate and seed alone.

    Args:
        runs: with the settings "problem", "depth", "width", "activation", "init",
            "steps" and "arm"; equal seeds have equal weights and points in any arm.
        tick: called at every record; what it raises ends the training.

    Returns:
        For each run `error` (relative L2 after the last step), `failed` and
        `ms_per_step` (wall-clock of the batch over its number of runs, in the fastest
        stretch between records: compilation and other work on the machine only add);
        for those reported `curve`, the error at some steps; for those detailed
        `layers`, log10 of the standard deviation of each kernel's gradient at these
        steps [steps][layers].
    """
    settings = runs[0].settings
    problem, steps = _problem(settings["problem"]), settings["steps"]
    network = architecture(settings)
    params, keys = _start(runs)
    rates = jnp.array([run.learning_rate for run in runs], jnp.float32)
    arm = (settings["arm"], steps)
    opt_states = _init(*arm, rates, params)

    recorded = record_steps(steps, early=8, even=12)
    errors, layers, ms_per_step, done = [], [], [], 0
    for stop in recorded.tolist():
        begin = time.perf_counter()
        for index in range(done, stop):
            grads, prediction_grads = _gradient(
                problem, network, params, keys, np.int32(index)
            )
            params, opt_states = _update(
                *arm, rates, params, opt_states, grads, prediction_grads
            )
        jax.block_until_ready(params)
        ms_per_step.append(
            1e3 * (time.perf_counter() - begin) / (stop - done) / len(runs)
        )
        done = stop
        error, stds = jax.device_get(_measure(problem, network, params, grads))
        errors.append(error)
        layers.append(stds)
        tick()

    return [
        _record(
            run,
            recorded,
            np.stack(errors)[:, index],
            np.stack(layers)[:, index],
            min(ms_per_step),
        )
        for index, run in enumerate(runs)
    ]


def network_of(settings: Settings) -> Network:
    """The network of a cell, with its initializer."""
    return replace(architecture(settings), **INITS[settings["init"]])


def architecture(settings: Settings) -> Network:
    """What the programs depend on: the network without the law of its weights."""
    return Network(settings["depth"], settings["width"], settings["activation"])


@cache  # one object for each: programs are compiled for an object
def _problem(name: str) -> Problem:
    return PROBLEMS[name]()


@cache
def _solution(problem: Problem) -> np.ndarray:
    return problem.solution(*problem.axes()).astype(np.float32)


def _start(runs: Sequence[Run]) -> tuple[Params, jax.Array]:
    """Initial weights and the keys of the points, as `train` makes them of a seed."""
    params, keys = [], []
    for run in runs:
        key_weights, key_points = jax.random.split(jax.random.key(run.seed))
        params.append(network_of(run.settings).init(key_weights))
        keys.append(key_points)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *params), jnp.stack(keys)


@partial(jax.jit, static_argnums=(0, 1))
def _gradient(
    problem: Problem,
    network: Network,
    params: Params,
    keys: jax.Array,
    index: jax.Array,
) -> tuple[Params, PredictionGrads]:
    """The gradients of step `index`, each run at its own points."""

    def of_run(params: Params, key: jax.Array) -> tuple[Params, PredictionGrads]:
        points = problem.sample(jax.random.fold_in(key, index))
        return value_and_grads(problem, network, params, points)[1:]

    return jax.vmap(of_run)(params, keys)


def _optimizer(
    arm: str, steps: int, rate: jax.Array
) -> optax.GradientTransformationExtraArgs:
    return ARMS[arm](optax.cosine_decay_schedule(rate, steps))


@partial(jax.jit, static_argnums=(0, 1))
def _init(arm: str, steps: int, rates: jax.Array, params: Params) -> optax.OptState:
    return jax.vmap(lambda rate, p: _optimizer(arm, steps, rate).init(p))(rates, params)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3, 4))
def _update(
    arm: str,
    steps: int,
    rates: jax.Array,
    params: Params,
    opt_states: optax.OptState,
    grads: Params,
    prediction_grads: PredictionGrads,
) -> tuple[Params, optax.OptState]:
    def of_run(
        rate: jax.Array,
        params: Params,
        opt_state: optax.OptState,
        grads: Params,
        prediction_grads: PredictionGrads,
    ) -> tuple[Params, optax.OptState]:
        updates, opt_state = _optimizer(arm, steps, rate).update(
            grads, opt_state, params, prediction_grads=prediction_grads
        )
        return optax.apply_updates(params, updates), opt_state

    return jax.vmap(of_run)(rates, params, opt_states, grads, prediction_grads)


@partial(jax.jit, static_argnums=(0, 1))
def _measure(
    problem: Problem, network: Network, params: Params, grads: Params
) -> tuple[jax.Array, jax.Array]:
    """The error f[runs], and the std of each kernel's gradient f[runs, layers]."""
    points = jnp.stack(jnp.meshgrid(*problem.axes(), indexing="ij"), -1)
    points = points.astype(jnp.float32)
    prediction = jax.lax.map(lambda run: network.apply(run, points), params)
    stds = jnp.stack(list(gradient_stds(grads).values()), -1)
    return relative_l2(prediction, _solution(problem)), stds


def _record(
    run: Run,
    steps: np.ndarray,
    errors: np.ndarray,
    layers: np.ndarray,
    ms_per_step: float,
) -> Record:
    error = float(errors[-1])
    record: Record = {
        "error": finite(error),
        "failed": failed(error),
        "ms_per_step": finite(ms_per_step, digits=4),
    }
    if run.phase == "reported":
        record["curve"] = {
            "step": steps.tolist(),
            "error": [finite(float(e), digits=3) for e in errors],
        }
    if run.detailed:
        with np.errstate(divide="ignore", invalid="ignore"):
            exponents = np.round(np.log10(layers), 1)
        record["layers"] = [[finite(float(e)) for e in row] for row in exponents]
    return record

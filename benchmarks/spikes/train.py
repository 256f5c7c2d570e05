"""Trains one run and keeps its curve on clean held-out examples.

As in `benchmarks.vision.train` the gradient is compiled once for a task, whatever the
arm, and the update once for an arm, whatever the learning rate; a loop in Python calls
the two. Trained side by side by `jax.vmap` the runs took as much time of a CPU.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.dynamic_scale import DynamicScale

from benchmarks.pinn.train import record_steps
from benchmarks.spikes.arms import transformation
from benchmarks.spikes.data import Split
from benchmarks.spikes.disturbances import DISTURBANCES, Disturbance
from benchmarks.spikes.tasks import Task
from benchmarks.vision.train import schedule
from stablegrad_optax import prediction_grad_std

PyTree = Any
AFTER = (1, 2, 5, 10, 20, 50, 100, 200, 500)  # updates from a spike's on: recorded
# The first scale is the library's; a run of hundreds of steps should see it grow.
GROWTH_INTERVAL = 50


class Setup(NamedTuple):
    """What an update's program depends on."""

    arm: str
    optimizer: str
    weight_decay: float
    steps: int
    skips: bool  # updates whose gradient is not finite, as loss scaling needs


class Gradient(NamedTuple):
    """Of one batch."""

    grads: PyTree  # f32
    prediction_std: jax.Array  # f32[], of dL/dy per example
    loss_scale: DynamicScale | None  # for the next batch


@dataclass(frozen=True)
class Curves:
    """What became of a training, at some of its steps.

    Attributes:
        steps: i[records], updates done.
        loss: f[records], clean, of the chosen split.
        score: f[records], likewise.
        ms_per_step: wall-clock in the fastest stretch between records, without the
            scoring: compilation and other work on the machine only add.
        num_params: of the model.
    """

    steps: np.ndarray
    loss: np.ndarray
    score: np.ndarray
    ms_per_step: float
    num_params: int


def train(
    task: Task,
    arm: str,
    *,
    optimizer: str = "Adam",
    learning_rate: float = 1e-3,
    seed: int = 0,
    steps: int = 200,
    batch: int = 8,
    disturbance: str = "none",
    spike: int = 0,
    weight_decay: float = 0.0,
    loss_scaling: bool = False,
    split: Split = "test",
    on_record: Callable[[int], None] = lambda step: None,
) -> Curves:
    """Train a task's model, whose initial weights and batches `seed` sets.

    Args:
        task: what is trained.
        arm: a name of `ARMS`.
        optimizer: a name of `OPTIMIZERS`.
        learning_rate: the highest: 5 % warm-up, then a half cosine to 0.
        seed: equal seeds have equal weights, batches and noise in every arm.
        steps: number of updates.
        batch: examples in each.
        disturbance: a name of `DISTURBANCES`.
        spike: which update, from 1 on, is the disturbed one; 0: none.
        weight_decay: added to the gradient, see `transformation`.
        loss_scaling: dynamic, by flax: a step whose gradient is not finite is skipped
            and the scale halved; doubled after 50 good steps.
        split: which examples the records are of.
        on_record: called with the number of updates done; what it raises ends this.
    """
    key_weights, key_data = jax.random.split(jax.random.key(seed))
    setup = Setup(arm, optimizer, weight_decay, steps, loss_scaling)
    params = start(task, key_weights)
    opt_state = init_optimizer(setup, params)
    loss_scale = DynamicScale(growth_interval=GROWTH_INTERVAL) if loss_scaling else None
    values = DISTURBANCES[disturbance]
    num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    curves, ms_per_step, done = [], [], 0
    for stop in recorded_steps(steps, spike):
        begin = time.perf_counter()
        for step in range(done, stop):
            found = compute_gradient(
                task,
                batch,
                params,
                task.train,
                jax.random.fold_in(key_data, step),
                values,
                step + 1 == spike,
                loss_scale,
            )
            loss_scale = found.loss_scale
            params, opt_state = update(setup, learning_rate, params, opt_state, found)
        jax.block_until_ready(params)
        ms_per_step.append(1e3 * (time.perf_counter() - begin) / (stop - done))
        done = stop
        curves.append(
            (stop, *jax.device_get(measure(task, params, *task.held_out[split])))
        )
        on_record(stop)
    return Curves(
        *map(np.array, zip(*curves, strict=True)), min(ms_per_step), num_params
    )


def recorded_steps(steps: int, spike: int) -> list[int]:
    """Updates done: evenly spaced ones, and those just before and after a spike."""
    chosen = set(record_steps(steps, early=3, even=12 if spike else 6).tolist())
    if spike:
        around = {spike - 1, *(spike - 1 + after for after in AFTER)}
        chosen |= {step for step in around if 0 < step <= steps}
    return sorted(chosen)


@partial(jax.jit, static_argnums=0)
def start(task: Task, key: jax.Array) -> PyTree:
    """Initial weights, float32."""
    inputs, _ = task.sample(task.train, key, 1)
    return task.model.init(key, inputs)["params"]


@partial(jax.jit, static_argnums=(0, 1))
def compute_gradient(
    task: Task,
    batch: int,
    params: PyTree,
    data: PyTree,
    key: jax.Array,
    disturbance: Disturbance,
    is_spike: bool | jax.Array,
    loss_scale: DynamicScale | None,
) -> Gradient:
    """At a disturbed batch that `key` draws from `data`; not finite where it is so."""
    key_batch, key_noise = jax.random.split(key)
    inputs, targets = task.sample(data, key_batch, batch)
    inputs = disturbance.of_inputs(inputs, is_spike, key_noise)
    factor = disturbance.of_loss(is_spike)

    def predict(params: PyTree) -> jax.Array:
        return task.model.apply({"params": params}, inputs)

    # The loss's derivative by the probe is the prediction's gradient.
    def loss(params: PyTree, probe: jax.Array) -> jax.Array:
        return factor * task.loss(predict(params) + probe, targets)

    probe = jnp.zeros_like(jax.eval_shape(predict, params))
    grad = jax.grad(loss, (0, 1))
    if loss_scale is None:
        grads, prediction_grads = grad(params, probe)
    else:
        scaled = loss_scale.value_and_grad(loss, (0, 1))(params, probe)
        loss_scale, (grads, prediction_grads) = scaled.dynamic_scale, scaled.grad
    std = prediction_grad_std(prediction_grads, num_examples=batch)
    return Gradient(grads, std, loss_scale)


def _transformation(
    setup: Setup, rate: float | jax.Array
) -> optax.GradientTransformationExtraArgs:
    tx = transformation(
        setup.arm, setup.optimizer, schedule(setup.steps, rate), setup.weight_decay
    )
    if setup.skips:
        tx = optax.apply_if_finite(tx, max_consecutive_errors=setup.steps)
    return tx


@partial(jax.jit, static_argnums=0)
def init_optimizer(setup: Setup, params: PyTree) -> optax.OptState:
    return _transformation(setup, 0.0).init(params)


@partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def update(
    setup: Setup,
    rate: float | jax.Array,
    params: PyTree,
    opt_state: optax.OptState,
    gradient: Gradient,
) -> tuple[PyTree, optax.OptState]:
    """One step of the arm; the old parameters and state are given up."""
    updates, opt_state = _transformation(setup, rate).update(
        gradient.grads, opt_state, params, prediction_std=gradient.prediction_std
    )
    return optax.apply_updates(params, updates), opt_state


@partial(jax.jit, static_argnums=0)
def measure(
    task: Task, params: PyTree, inputs: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Loss and score f[] of these examples."""
    predictions = task.model.apply({"params": params}, inputs)
    return task.loss(predictions, targets), task.score(predictions, targets)

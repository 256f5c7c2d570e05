"""The training loop of every suite: runs of one optimizer on one task, side by side.

Learning rates, seeds and initial weights are values that a batch may mix. The gradient
is compiled once for a task, whatever the optimizer; the update once for a rule and a
shape, whatever the task. A loop in Python joins the two: for deep networks a program
with both would cost the gradient's compilation, 5 to 10 s, once for every optimizer,
and on a CPU a `lax.scan` over the steps of a convolutional net takes twice the time. A
task of short steps, such as PPO's, has all steps between two records in one program.
"""

import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.lib.methods import stacked_by_name
from benchmarks.lib.optimizers import BASES, Optimizer
from benchmarks.lib.runs import Settings
from benchmarks.lib.task import Gradient, PyTree, Task
from stablegrad_optax import prediction_grad_std

WARM_UP = 0.05  # of all steps


@dataclass(frozen=True)
class Rule:
    """The update: all that its program depends on.

    Attributes:
        optimizer: The chain.
        steps: The number of updates.
        warm_up: Whether the learning rate rises over the first 5 % of the steps. It
            then falls to 0 along a half cosine.
        weight_decay: Added to the gradient, see `Optimizer.__call__`.
        skip_nonfinite: Whether an update whose gradient is not finite is left out, as
            loss scaling needs.
    """

    optimizer: Optimizer
    steps: int
    warm_up: bool = False
    weight_decay: float = 0.0
    skip_nonfinite: bool = False

    @classmethod
    def from_settings(cls, settings: Settings, **options: Any) -> "Rule":
        """Reads the optimizer and the steps from the settings of a run."""
        optimizer = Optimizer.named(str(settings["optimizer"]))
        return cls(optimizer, int(settings["steps"]), **options)

    def __call__(
        self, rate: float | jax.Array
    ) -> optax.GradientTransformationExtraArgs:
        """Returns the transformation with this highest learning rate."""
        warm_up = self.warm_up or BASES[self.optimizer.base].warm_up
        tx = self.optimizer(
            schedule(self.steps, rate, warm_up=warm_up), self.weight_decay
        )
        if self.skip_nonfinite:
            tx = optax.apply_if_finite(tx, max_consecutive_errors=self.steps)
        return tx


def schedule(steps: int, rate: float | jax.Array, *, warm_up: bool) -> optax.Schedule:
    """Starts at the rate, or rises to it linearly, then falls to 0 as a half cosine."""
    if not warm_up:
        return optax.cosine_decay_schedule(rate, steps)
    num_rising = max(1, round(WARM_UP * steps))
    unit = optax.warmup_cosine_decay_schedule(0.0, 1.0, num_rising, max(steps, 2))
    # The first update, of count 0, would be none: count from 1.
    return lambda count: rate * unit(count + 1)


@dataclass(frozen=True, eq=False)
class Training:
    """A task and how it is trained.

    Attributes:
        task: The task.
        rule: The update.
        recorded: The numbers of updates after which there is a record, increasing; the
            last update is one of them.
        held_out: The examples for `Task.score`.
        side_by_side: How many runs of a batch are computed together, at least 1. On a
            CPU, 40 deep perceptrons took twice the time per run of 8.
        in_one_program: Whether the updates up to a record are one program; else each is
            two programs, in a loop in Python.
    """

    task: Task
    rule: Rule
    recorded: Sequence[int]
    held_out: PyTree = None
    side_by_side: int = 8
    in_one_program: bool = False


class Moment(NamedTuple):
    """A batch after some updates; gradients and loss are those of the last update.

    `params` and `opt_states`, leaves [runs, ...], are donated when training goes on.
    """

    step: int
    params: PyTree
    opt_states: optax.OptState
    scores: dict[str, np.ndarray]  # f[runs]
    loss: np.ndarray  # f[runs]
    stds: dict[str, np.ndarray]  # f[runs], of kernels' gradients before the optimizer
    ms_per_step: float  # of one run, since the record before, without the scoring


def moments(
    trainings: Sequence[Training], rates: Sequence[float], seeds: Sequence[int]
) -> Iterator[Moment]:
    """Trains runs side by side and stops at every record; arguments as of `Batch`."""
    batch = Batch(trainings, rates, seeds)
    for stop in trainings[0].recorded:
        begin, done = time.perf_counter(), batch.step
        batch.advance(stop)
        seconds = time.perf_counter() - begin
        yield batch.moment(1e3 * seconds / (stop - done) / len(seeds))


class _Carried(NamedTuple):
    """The state between two steps of the runs; leaves [runs, ...]."""

    params: PyTree
    opt_states: optax.OptState
    states: PyTree


class Batch:
    """Runs side by side.

    Args:
        trainings: One a run; all but `Task.init` is taken from the first.
        rates: The highest learning rate of each run.
        seeds: The seed of each run's weights and batches.
    """

    def __init__(
        self,
        trainings: Sequence[Training],
        rates: Sequence[float],
        seeds: Sequence[int],
    ):
        self.step = 0  # updates done
        self._training = trainings[0]
        roots = [jax.random.key(seed) for seed in seeds]
        params, states = _stack(
            t.task.init(key) for t, key in zip(trainings, roots, strict=True)
        )
        self._keys = jnp.stack([jax.random.split(key)[1] for key in roots])
        self._rates = jnp.array(rates, jnp.float32)
        opt_states = _init(self._training.rule, self._rates, params)
        self._carried = _Carried(params, opt_states, states)
        self._gradient: Gradient | None = None  # of the last step

    def advance(self, stop: int) -> None:
        """Trains until so many updates are done, and waits for them."""
        task, rule = self._training.task, self._training.rule
        runs = task, rule, self._rates, self._keys
        begin = self.step
        if self._training.in_one_program:
            # The last one leaves its gradient for `moment`.
            begin = max(self.step, stop - 1)
            bounds = np.int32(self.step), np.int32(begin)
            self._carried = _steps(*runs, self._carried, *bounds)
        for step in range(begin, stop):
            self._carried, self._gradient = _step(*runs, self._carried, np.int32(step))
        self.step = stop
        jax.block_until_ready(self._carried.params)

    def moment(self, ms_per_step: float) -> Moment:
        """Returns the state of the batch, which a record is made of."""
        task, held_out = self._training.task, self._training.held_out
        params, opt_states, states = self._carried
        measured = _measure(task, params, states, held_out, self._gradient.grads)
        scores, stds, loss = jax.device_get((*measured, self._gradient.loss))
        return Moment(
            self.step, params, opt_states, scores, loss, per_layer(stds), ms_per_step
        )


def _stack(trees: Iterable[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@jax.jit
def _gradient(
    task: Task, params: PyTree, states: PyTree, keys: jax.Array, step: jax.Array
) -> Gradient:
    """Returns the gradients of a step, each run at its own batch."""
    return jax.vmap(task.gradient, (0, 0, 0, None))(params, states, keys, step)


@partial(jax.jit, static_argnums=0)
def _init(rule: Rule, rates: jax.Array, params: PyTree) -> optax.OptState:
    return jax.vmap(lambda rate, p: rule(rate).init(p))(rates, params)


@partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def _update(
    rule: Rule,
    rates: jax.Array,
    params: PyTree,
    opt_states: optax.OptState,
    grads: PyTree,
    probes: Mapping[str, jax.Array],
    losses: jax.Array,
) -> tuple[PyTree, optax.OptState]:
    """Takes one step of every run; the old parameters and states are donated."""

    def update(
        rate: jax.Array,
        params: PyTree,
        opt_state: optax.OptState,
        grads: PyTree,
        probes: Mapping[str, jax.Array],
        loss: jax.Array,
    ) -> tuple[PyTree, optax.OptState]:
        updates, opt_state = rule(rate).update(
            grads, opt_state, params, probes=probes, value=loss
        )
        return optax.apply_updates(params, updates), opt_state

    return jax.vmap(update)(rates, params, opt_states, grads, probes, losses)


def _step(
    task: Task,
    rule: Rule,
    rates: jax.Array,
    keys: jax.Array,
    carried: _Carried,
    step: jax.Array,
) -> tuple[_Carried, Gradient]:
    """Takes one step of every run, in two programs."""
    params, opt_states, states = carried
    gradient = _gradient(task, params, states, keys, step)
    loss, grads, probes, states = gradient
    params, opt_states = _update(rule, rates, params, opt_states, grads, probes, loss)
    return _Carried(params, opt_states, states), gradient


@partial(jax.jit, static_argnums=1, donate_argnums=4)
def _steps(
    task: Task,
    rule: Rule,
    rates: jax.Array,
    keys: jax.Array,
    carried: _Carried,
    begin: jax.Array,
    stop: jax.Array,
) -> _Carried:
    """Takes the steps from `begin` up to `stop` in one program, which donates."""
    return jax.lax.fori_loop(
        begin,
        stop,
        lambda step, carried: _step(task, rule, rates, keys, carried, step)[0],
        carried,
    )


@jax.jit
def _measure(
    task: Task, params: PyTree, states: PyTree, held_out: PyTree, grads: PyTree
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Returns scores f[runs], and each kernel's std f[runs] or f[runs, layers]."""
    scores = jax.lax.map(  # one run at a time: scoring takes more memory than training
        lambda run: task.score(*run, held_out), (params, states)
    )
    # Pools one array alone: a std that no square takes out of single precision.
    std = jax.vmap(prediction_grad_std)
    weights = kernels(grads, batch_axes=1)
    stacked = stacked_by_name(weights)
    stds = {n: (jax.vmap(std) if stacked[n] else std)(g) for n, g in weights.items()}
    return scores, stds


def kernels(tree: PyTree, *, batch_axes: int = 0) -> dict[str, jax.Array]:
    """Returns the arrays of two axes or more, in the order of their layers.

    Args:
        tree: A pytree like the parameters.
        batch_axes: The number of axes that precede those of a parameter; the axis of
            stacked layers is not counted either.
    """
    arrays = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }
    own_axes = {
        name: arrays[name].ndim - batch_axes - is_stack
        for name, is_stack in stacked_by_name(arrays).items()
    }
    names = [name for name, axes in own_axes.items() if axes >= 2]
    return {name: arrays[name] for name in sorted(names, key=_natural)}


def per_layer(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns an entry f[runs] for each layer of entries f[runs, layers], in order."""
    layers: dict[str, np.ndarray] = {}
    for name in sorted(values, key=_natural):  # `jit` sorts dense_10 before dense_2
        value = values[name]
        if value.ndim == 1:
            layers[name] = value
        else:
            layers |= {f"{name}[{i}]": layer for i, layer in enumerate(value.T)}
    return layers


def _natural(name: str) -> list[str | int]:
    """Sorts dense_2 before dense_10."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if part.isdigit() else part for part in parts]


def record_steps(steps: int, *, early: int = 24, even: int = 60) -> list[int]:
    """Returns when to record: often at first, where scales change most."""
    at = np.concatenate(
        [np.geomspace(1, steps, early), np.linspace(0, steps, even + 1)[1:]]
    )
    return np.unique(np.ceil(at - 1e-6)).astype(int).tolist()

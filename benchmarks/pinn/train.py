"""Training of one cell: one problem and one network under several optimizers.

The arms start from the same weights and see the same points at every step. `start`,
`advance` and `measure` are pure functions of a key and a state, so seeds can be mapped
over with `jax.vmap`; they compile once for a cell object. `train` drives them for one
seed, and `time_arms` measures what a step of each arm costs.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

import stablegrad_optax
from benchmarks.pinn.arms import ARMS
from benchmarks.pinn.gradient import PredictionGrads, value_and_grads
from benchmarks.pinn.network import Network, Params
from benchmarks.pinn.problems import Problem, relative_l2

FAILURE_ERROR = 0.5  # relative L2; above it, or not finite, a run has failed


def failed(error: float) -> bool:
    return not error <= FAILURE_ERROR


class State(NamedTuple):
    """All arms side by side; leaves of `params` and `grads` are [arms, ...]."""

    params: Params
    opt_states: tuple[optax.OptState, ...]
    grads: Params  # of the last step, before the optimizer
    loss: jax.Array  # f[arms], of the last step, before its update


class Record(NamedTuple):
    """The arms after `step` steps; gradients and loss are the last step's."""

    step: int
    error: np.ndarray  # f[arms], relative L2 on the problem's evaluation grid
    loss: np.ndarray  # f[arms]
    grad_std: dict[str, np.ndarray]  # kernel -> f[arms]
    factors: dict[str, dict[str, float]]  # arm -> leaf -> factor, arms that scale


class History(NamedTuple):
    """The records of one run, stacked over steps."""

    steps: np.ndarray  # i[records]
    error: dict[str, np.ndarray]  # arm -> f[records]
    loss: dict[str, np.ndarray]  # arm -> f[records]
    grad_std: dict[str, dict[str, np.ndarray]]  # arm -> kernel -> f[records]
    scaled_std: dict[str, dict[str, np.ndarray]]  # the same times the arm's factors


@dataclass(frozen=True)
class Cell:
    """What is trained, and how.

    Attributes:
        problem: made by an entry of `PROBLEMS`.
        network: the perceptron.
        arms: names of `ARMS`.
        learning_rate: at the first step; it falls to 0 along a half cosine.
        steps: number of updates.
    """

    problem: Problem
    network: Network
    arms: tuple[str, ...]
    learning_rate: float
    steps: int

    @cached_property
    def optimizers(self) -> tuple[optax.GradientTransformationExtraArgs, ...]:
        rate = optax.cosine_decay_schedule(self.learning_rate, self.steps)
        return tuple(ARMS[arm](rate) for arm in self.arms)

    @cached_property
    def solution(self) -> np.ndarray:
        """What the error is taken against, f32[n0, n1]."""
        return self.problem.solution(*self.problem.axes()).astype(np.float32)


def start(cell: Cell, key: jax.Array) -> State:
    """Equal initial weights for every arm."""
    params = cell.network.init(key)
    arms = len(cell.arms)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * arms), params)
    return State(
        params=stacked,
        opt_states=tuple(tx.init(params) for tx in cell.optimizers),
        grads=jax.tree.map(jnp.zeros_like, stacked),
        loss=jnp.zeros(arms),
    )


@partial(jax.jit, static_argnums=0)
def advance(
    cell: Cell,
    state: State,
    key: jax.Array,
    steps: tuple[jax.Array, jax.Array],
    arms: tuple[jax.Array, jax.Array],
) -> State:
    """Take the steps [first, stop) with the arms [first, stop), one after another.

    Step i draws its points, the same for all arms, by (key, i). The gradient is
    compiled once for all arms; on a CPU the batched products of a vmap over arms are
    slower than the arms in turn. With traced bounds one program trains all arms, takes
    records at uneven steps, and times an arm alone.
    """

    def update(
        arm: int,
        params: Params,
        grads: Params,
        prediction_grads: PredictionGrads,
        opt_states: tuple[optax.OptState, ...],
    ) -> tuple[Params, tuple[optax.OptState, ...]]:
        updates, new = cell.optimizers[arm].update(
            grads, opt_states[arm], params, prediction_grads=prediction_grads
        )
        opt_states = (*opt_states[:arm], new, *opt_states[arm + 1 :])
        return optax.apply_updates(params, updates), opt_states

    updates = [partial(update, arm) for arm in range(len(cell.arms))]

    def step(index: jax.Array, state: State) -> State:
        points = cell.problem.sample(jax.random.fold_in(key, index))

        def step_of_arm(arm: jax.Array, state: State) -> State:
            params = _arm(state.params, arm)
            value, grads, prediction_grads = value_and_grads(
                cell.problem, cell.network, params, points
            )
            params, opt_states = jax.lax.switch(
                arm, updates, params, grads, prediction_grads, state.opt_states
            )
            return State(
                params=_with_arm(state.params, arm, params),
                opt_states=opt_states,
                grads=_with_arm(state.grads, arm, grads),
                loss=state.loss.at[arm].set(value),
            )

        return jax.lax.fori_loop(*arms, step_of_arm, state)

    return jax.lax.fori_loop(*steps, step, state)


@partial(jax.jit, static_argnums=0)
def predict(cell: Cell, params: Params, axes: Sequence[ArrayLike]) -> jax.Array:
    """Every arm's solution on the tensor grid of two axes, f[arms, n0, n1]."""
    points = jnp.stack(jnp.meshgrid(*axes, indexing="ij"), -1).astype(jnp.float32)
    return jax.lax.map(lambda arm: cell.network.apply(arm, points), params)


@partial(jax.jit, static_argnums=0)
def measure(
    cell: Cell, state: State
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Error f[arms], loss f[arms] and each kernel's gradient std f[arms]."""
    prediction = predict(cell, state.params, cell.problem.axes())
    error = relative_l2(prediction, cell.solution)
    return error, state.loss, gradient_stds(state.grads)


def gradient_stds(grads: Params) -> dict[str, jax.Array]:
    """Each kernel's std f[arms], from leaves [arms, ...].

    From the input on; a jitted function that returns it sorts it by name, "dense_10"
    before "dense_2".
    """
    return {
        kernel: jax.vmap(_std)(grads[kernel.removesuffix("/kernel")]["kernel"])
        for kernel in kernels(len(grads))
    }


def kernels(num_layers: int) -> list[str]:
    """The names of the kernels, from the input on."""
    return [f"dense_{layer}/kernel" for layer in range(num_layers)]


def train(
    cell: Cell, seed: int, on_record: Callable[[Record], None] = lambda record: None
) -> tuple[State, History]:
    """Train all arms of a cell from one seed.

    Args:
        cell: what to train.
        seed: of the initial weights and of the points.
        on_record: called with every record as soon as it is there.

    Returns:
        The state after the last step, and the records in between.
    """
    key_weights, key_points = jax.random.split(jax.random.key(seed))
    state = start(cell, key_weights)
    records, done = [], 0
    for stop in record_steps(cell.steps).tolist():
        state = advance(cell, state, key_points, (done, stop), (0, len(cell.arms)))
        done = stop
        record = Record(
            done, *jax.device_get(measure(cell, state)), _factors(cell, state)
        )
        records.append(record)
        on_record(record)
    return state, _history(cell, records)


def record_steps(steps: int, *, early: int = 24, even: int = 60) -> np.ndarray:
    """When to record: dense at the start, where scales move by orders of magnitude."""
    early = np.geomspace(1, steps, early)
    even = np.linspace(0, steps, even + 1)[1:]
    return np.unique(np.ceil(np.concatenate([early, even]) - 1e-6)).astype(int)


def time_arms(cell: Cell, *, steps: int = 20, repeats: int = 7) -> dict[str, float]:
    """Milliseconds that a training step of each arm takes: points, gradient, update.

    Runs the training's own program with one arm at a time. The arms take turns, so
    that a disturbance of the machine meets all of them; the median over `repeats`
    stretches of `steps` steps is returned.

    Args:
        cell: what is timed; one that was trained needs no compilation.
        steps: in one stretch.
        repeats: number of stretches of each arm.
    """
    key = jax.random.key(0)
    state = start(cell, key)
    times: dict[str, list[float]] = {arm: [] for arm in cell.arms}
    for _ in range(repeats):
        for index, arm in enumerate(cell.arms):
            begin = time.perf_counter()
            jax.block_until_ready(
                advance(cell, state, key, (0, steps), (index, index + 1))
            )
            times[arm].append(time.perf_counter() - begin)
    return {arm: 1e3 * float(np.median(t)) / steps for arm, t in times.items()}


def _factors(cell: Cell, state: State) -> dict[str, dict[str, float]]:
    factors = {}
    for index, (arm, opt_state) in enumerate(
        zip(cell.arms, state.opt_states, strict=True)
    ):
        # An arm without one of the package's methods has no factors.
        try:
            factors[arm] = stablegrad_optax.scale_factors(
                opt_state, _arm(state.params, index)
            )
        except ValueError:
            continue
    return factors


def _history(cell: Cell, records: list[Record]) -> History:
    def per_arm(values: list[np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(cell.arms, np.asarray(values).T, strict=True))

    of_kernel = {
        kernel: per_arm([record.grad_std[kernel] for record in records])
        for kernel in kernels(len(records[0].grad_std))
    }
    grad_std = {arm: {k: of_kernel[k][arm] for k in of_kernel} for arm in cell.arms}
    scaled_std = {
        arm: {
            kernel: std * [record.factors[arm][kernel] for record in records]
            for kernel, std in grad_std[arm].items()
        }
        for arm in records[0].factors
    }
    return History(
        steps=np.array([record.step for record in records]),
        error=per_arm([record.error for record in records]),
        loss=per_arm([record.loss for record in records]),
        grad_std=grad_std,
        scaled_std=scaled_std,
    )


def _std(x: jax.Array) -> jax.Array:
    """Standard deviation, also where the squares would leave float32's range."""
    peak = jnp.maximum(jnp.max(jnp.abs(x)), jnp.finfo(x.dtype).tiny)
    return peak * jnp.std(x / peak)


def _arm(tree: Params, arm: int) -> Params:
    return jax.tree.map(lambda leaf: leaf[arm], tree)


def _with_arm(tree: Params, arm: jax.Array, new: Params) -> Params:
    return jax.tree.map(lambda leaf, value: leaf.at[arm].set(value), tree, new)

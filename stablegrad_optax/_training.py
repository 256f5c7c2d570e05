"""Trains a network with one optimizer: many runs side by side."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

from stablegrad_optax._checks import with_extra_args
from stablegrad_optax._optimizers import Chain, Factory
from stablegrad_optax._trials import Programs, PyTree, pad

Scores = NDArray[np.float64]
Run = tuple[float, int]  # a learning rate and a seed

_RATE_NOTE = (
    "compare_optimizers calls the function with a learning rate that is a schedule, "
    "step -> rate, inside jit. Where a number is needed, rate(0) is the one that the "
    "schedule starts from, as a traced array."
)


class Stage:
    """Holds the programs of one transformation: its initial state and one update.

    The gradient is not a part of them, so that it is compiled once for all optimizers.
    The last stage of an optimizer also applies the updates.
    """

    def __init__(self, factory: Factory, programs: Programs, *, is_last: bool):
        problem = programs.problem

        def make(rate: jax.Array) -> optax.GradientTransformationExtraArgs:
            schedule = optax.cosine_decay_schedule(rate, problem.steps)
            made = "What a function of the learning rate that makes an optimizer"
            return with_extra_args(f"{made} returns", factory(schedule))

        def init(rate: jax.Array, params: PyTree) -> PyTree:
            # Without the copy, a state that holds the parameters shares their buffer,
            # which each step gives away for its results.
            return make(rate).init(jax.tree.map(jnp.copy, params))

        def update(
            rate: jax.Array,
            state: PyTree,
            params: PyTree,
            updates: PyTree,
            loss: jax.Array,
            grads: PyTree,
            key: jax.Array,
            step: jax.Array,
            data: PyTree,
        ) -> tuple[PyTree, PyTree]:
            def value_fn(params: PyTree) -> jax.Array:
                return problem.loss(params, problem.batch(key, step, data))

            updates, state = make(rate).update(
                updates, state, params, value=loss, grad=grads, value_fn=value_fn
            )
            return (optax.apply_updates(params, updates) if is_last else updates), state

        rates = jax.ShapeDtypeStruct((programs.width,), jnp.float32)
        params, keys, loss, grads = programs.shapes()
        self.init = jax.jit(jax.vmap(init))
        state = jax.eval_shape(self.init, rates, params)
        axes = (0,) * 7 + (None, None)
        self._lowered: Any = jax.jit(
            jax.vmap(update, axes), donate_argnums=(1, 2) if is_last else 1
        ).lower(
            *(rates, state, params, grads, loss, grads, keys),
            *(np.int32(0), problem.data),
        )
        self._compiled: Callable[..., tuple[PyTree, PyTree]] | None = None

    def update(self, *arguments: Any) -> tuple[PyTree, PyTree]:
        """Returns the updates, or the new parameters of the last stage, and states."""
        if self._compiled is None:
            self._compiled, self._lowered = self._lowered.compile(), None
        return self._compiled(*arguments)


class Trainer:
    """Trains with one optimizer.

    The constructor traces the optimizer, which finds its errors, and the first training
    compiles it. ``stages`` holds the programs that several optimizers share.
    """

    def __init__(
        self,
        name: str,
        factory: Factory,
        programs: Programs,
        stages: dict[tuple[Factory, bool], Stage] | None = None,
    ):
        self.name = name
        self._evaluate = jax.jit(jax.vmap(evaluation_params))
        self._programs = programs
        self._seconds, self._num_timed = 0.0, 0
        stages = {} if stages is None else stages
        parts = (
            (factory.transformation, factory.optimizer)
            if isinstance(factory, Chain)
            else (factory,)
        )
        self._stages = []
        with _named(name):
            for part in parts:
                key = part, part is parts[-1]
                if key not in stages:
                    stages[key] = Stage(part, programs, is_last=key[1])
                self._stages.append(stages[key])

    def __call__(
        self, runs: Sequence[Run], tick: Callable[[int], None] = lambda count: None
    ) -> tuple[Scores, NDArray[np.floating]]:
        """Trains each run and returns the scores, infinite for failures, and losses.

        ``tick`` receives the number of runs that were finished since the last call.
        """
        width, scores, curves = self._programs.width, [], []
        for begin in range(0, len(runs), width):
            part = list(runs[begin : begin + width])
            with _named(self.name):
                score, losses = self._train(pad(part, width))
            scores.append(score[: len(part)])
            curves.append(losses[: len(part)])
            tick(len(part))
        return np.concatenate(scores), np.concatenate(curves)

    @property
    def ms_per_step(self) -> float:
        """The wall time of a step divided by the runs that took it side by side."""
        return 1e3 * self._seconds / max(self._num_timed, 1)

    def _train(self, runs: Sequence[Run]) -> tuple[Scores, NDArray[np.floating]]:
        programs, problem = self._programs, self._programs.problem
        rates = jnp.asarray([rate for rate, _ in runs], jnp.float32)
        params, keys = programs.start([seed for _, seed in runs])
        limits = programs.limits(params)
        states = [stage.init(rates, params) for stage in self._stages]
        losses = []
        for step in range(problem.steps):
            loss, grads = programs.gradient(params, keys, step)
            output = grads
            for i, stage in enumerate(self._stages):
                output, states[i] = stage.update(
                    *(rates, states[i], params, output, loss, grads, keys),
                    *(np.int32(step), problem.data),
                )
            params = output
            losses.append(loss)
            if step == 0:  # the first step includes compilation
                jax.block_until_ready(params)
                clock = time.perf_counter()
        jax.block_until_ready(params)
        self._seconds += time.perf_counter() - clock
        self._num_timed += (problem.steps - 1) * len(runs)
        score, is_finite = programs.judge(self._evaluate(states, params))
        # The score of the initial parameters, if that is the limit, may be NaN.
        succeeded = is_finite & np.isfinite(score) & ~(score >= limits)
        curves = np.stack(jax.device_get(losses), axis=1)
        return np.where(succeeded, score.astype(np.float64), np.inf), curves


def evaluation_params(states: PyTree, params: PyTree) -> PyTree:
    """Returns the parameters to judge, for optimizers that train at other points.

    Schedule-free optimizers are judged at ``schedule_free_eval_params``, and SAM that
    stops between its two points at the one that it returns to.
    """
    for state in jax.tree.leaves(states, is_leaf=_trains_elsewhere):
        if _trains_elsewhere(state):
            params = _evaluation_params(state, params)
    return params


def _trains_elsewhere(node: Any) -> bool:
    return isinstance(node, optax.contrib.ScheduleFreeState | optax.contrib.SAMState)


def _evaluation_params(state: Any, params: PyTree) -> PyTree:
    is_sam = isinstance(state, optax.contrib.SAMState)
    points = state.cache if is_sam else state.z
    if is_sam and points is None:  # SAM takes both steps within one update
        return evaluation_params(state.opt_state, params)
    structure: Any = jax.tree.structure(points)
    if structure != jax.tree.structure(params):
        raise ValueError(
            f"compare_optimizers cannot judge {'SAM' if is_sam else 'schedule_free'} "
            "that trains a part of the parameters; got it in a mask or a partition."
        )
    if not is_sam:
        return optax.contrib.schedule_free_eval_params(state, params)
    is_outer = state.steps_since_sync == 0
    outer = jax.tree.map(lambda c, x: jnp.where(is_outer, x, c), points, params)
    return evaluation_params(state.opt_state, outer)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Adds the name of the optimizer to an error."""
    try:
        yield
    except Exception as error:
        error.add_note(f"The optimizer was {name!r}. {_RATE_NOTE}")
        raise

"""Trains a network with one optimizer: many runs side by side in one program."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

from stablegrad_optax._checks import with_extra_args
from stablegrad_optax._leaves import describe

PyTree = Any
Factory = Callable[[Any], optax.GradientTransformation]
Scores = NDArray[np.float64]
Outcome = tuple[jax.Array, jax.Array, jax.Array, jax.Array]

_SCORE_BATCHES = 8  # of the default score


@dataclass(frozen=True)
class Problem:
    """What is trained, as :func:`compare_optimizers` takes it; checked when traced."""

    loss_fn: Callable[[PyTree, Any], jax.Array]
    init: Callable[[jax.Array], PyTree]
    sample: Callable[[jax.Array], Any] | PyTree
    score: Callable[[PyTree], jax.Array] | None
    failure_score: float | None
    steps: int

    @property
    def data(self) -> PyTree:
        """What is handed to every step: an argument, lest the program hold it."""
        return None if callable(self.sample) else self.sample

    def batch(self, key: jax.Array, data: PyTree) -> Any:
        """The batch of one step."""
        return self.sample(key) if callable(self.sample) else data

    def loss(self, params: PyTree, batch: Any) -> jax.Array:
        """The loss, a real scalar."""
        return _real_scalar("loss_fn", self.loss_fn(params, batch))

    def params(self, key: jax.Array) -> PyTree:
        """Initial parameters."""
        params = self.init(key)
        if not jax.tree.leaves(params):
            raise ValueError("init must return a pytree with arrays; got no leaves.")
        for path, leaf in jax.tree.leaves_with_path(params):
            dtype = getattr(leaf, "dtype", type(leaf))
            try:
                is_floating = bool(jnp.issubdtype(dtype, jnp.inexact))
            except TypeError:  # a function, say
                is_floating = False
            if not is_floating:
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise ValueError(
                    f"init must return floating arrays alone; got {dtype} for leaf "
                    f"'{name}'. Let loss_fn close over all else."
                )
        return jax.tree.map(jnp.asarray, params)

    def final_score(self, params: PyTree, key: jax.Array, data: PyTree) -> jax.Array:
        """The score; ``key`` draws the fresh batches of the default one."""
        if self.score is not None:
            return _real_scalar("score", self.score(params))
        if not callable(self.sample):
            return self.loss(params, data)
        keys = jax.random.split(key, _SCORE_BATCHES)
        losses = jax.lax.map(lambda key: self.loss(params, self.sample(key)), keys)
        return jnp.mean(losses)

    def run(
        self,
        factory: Factory,
        rate: jax.Array,
        key: jax.Array,
        score_key: jax.Array,
        data: PyTree,
    ) -> Outcome:
        """One run: its score, what it must be below, if it is finite, its losses."""
        init_key, data_key = jax.random.split(key)
        start = self.params(init_key)
        tx = factory(rate)
        made = "What a function of the learning rate that makes an optimizer returns"
        tx = with_extra_args(made, tx)

        def step(carry: Any, count: jax.Array) -> tuple[Any, jax.Array]:
            params, state = carry
            batch = self.batch(jax.random.fold_in(data_key, count), data)

            def value_fn(params: PyTree) -> jax.Array:
                return self.loss(params, batch)

            value, grads = jax.value_and_grad(value_fn)(params)
            grads = jax.tree.map(jnp.conj, grads)  # of complex leaves: the descent
            updates, state = tx.update(
                grads, state, params, value=value, grad=grads, value_fn=value_fn
            )
            decay = (1 + jnp.cos(jnp.pi * count / self.steps)) / 2
            updates = jax.tree.map(lambda x: x * decay.astype(x.dtype), updates)
            return (optax.apply_updates(params, updates), state), value

        (params, _), losses = jax.lax.scan(
            step, (start, tx.init(start)), jnp.arange(self.steps)
        )
        is_finite = jnp.all(
            jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(params)])
        )
        score = self.final_score(params, score_key, data)
        if self.failure_score is None:
            limit = self.final_score(start, score_key, data)
        else:
            limit = jnp.full_like(score, self.failure_score)
        return score, limit, is_finite, losses

    def require_finite_start(self, keys: jax.Array) -> None:
        """Raises if no seed has a finite loss and gradient at its initial parameters.

        Then no optimizer and no rate can help.
        """

        def start(key: jax.Array, data: PyTree) -> tuple[jax.Array, PyTree]:
            init_key, data_key = jax.random.split(key)
            batch = self.batch(jax.random.fold_in(data_key, 0), data)
            loss, grads = jax.value_and_grad(self.loss)(self.params(init_key), batch)
            return loss, jax.tree.map(lambda x: jnp.all(jnp.isfinite(x)), grads)

        losses, finite = jax.jit(jax.vmap(start, (0, None)))(keys, self.data)
        if not jnp.any(jnp.isfinite(losses)):
            raise ValueError(
                "loss_fn must be finite at the parameters that init gives; got "
                f"{float(losses[0])} on each of {len(losses)} seeds."
            )
        of_leaf = [np.asarray(leaf) for leaf in jax.tree.leaves(finite)]
        if not np.any(np.all(np.stack(of_leaf), axis=0)):
            names = [leaf.name or "params" for leaf in describe(finite)]
            where = [
                name for name, f in zip(names, of_leaf, strict=True) if not f.all()
            ]
            more = f" and {len(where) - 3} more" if len(where) > 3 else ""
            raise ValueError(
                "The gradient of loss_fn must be finite at the parameters that init "
                f"gives; it is not on any of {len(losses)} seeds, in leaf "
                f"{', '.join(map(repr, where[:3]))}{more}."
            )


class Trainer:
    """The program of one optimizer, traced at once and compiled when first called."""

    def __init__(
        self,
        name: str,
        factory: Factory,
        problem: Problem,
        key: jax.Array,
        width: int,
    ):
        self.name = name
        self._problem = problem
        self._width = width
        self._keys, self._score_key = jax.random.split(key)
        self._compiled: Callable[..., Outcome] | None = None
        self._seconds, self._num_timed = 0.0, 0

        def run(
            rate: jax.Array, key: jax.Array, score_key: jax.Array, data: PyTree
        ) -> Outcome:
            return problem.run(factory, rate, key, score_key, data)

        with _named(name):
            self._lowered = jax.jit(jax.vmap(run, (0, 0, None, None))).lower(
                *self._arguments([(1e-3, 0)] * width)
            )

    def __call__(
        self, grid: Sequence[tuple[float, int]], tick: Callable[[int], None]
    ) -> tuple[Scores, NDArray[np.floating]]:
        """Runs of these rates and seeds: scores, infinite where one failed, and losses.

        ``tick`` is told how many runs were finished.
        """
        with _named(self.name):
            compiled = self._compiled = self._compiled or self._lowered.compile()
            parts = []
            for begin in range(0, len(grid), self._width):
                part = list(grid[begin : begin + self._width])
                padded = part + part[-1:] * (self._width - len(part))
                arguments = jax.block_until_ready(self._arguments(padded))
                clock = time.perf_counter()
                outcome = jax.block_until_ready(compiled(*arguments))
                self._seconds += time.perf_counter() - clock
                self._num_timed += len(padded)
                parts.append([np.asarray(field)[: len(part)] for field in outcome])
                tick(len(part))
        score, limit, is_finite, losses = map(np.concatenate, zip(*parts, strict=True))
        # The score of the start, if that is the limit, may be no number.
        fine = is_finite & np.isfinite(score) & ~(score >= limit)
        return np.where(fine, score.astype(np.float64), np.inf), losses

    @property
    def ms_per_step(self) -> float:
        """Wall time of a step divided by the runs that took it side by side."""
        return 1e3 * self._seconds / (self._problem.steps * self._num_timed)

    def _arguments(self, grid: Sequence[tuple[float, int]]) -> tuple[Any, ...]:
        rates, seeds = zip(*grid, strict=True)
        return (
            jnp.asarray(rates, jnp.float32),
            jax.vmap(jax.random.fold_in, (None, 0))(self._keys, jnp.asarray(seeds)),
            self._score_key,
            self._problem.data,
        )


@contextmanager
def _named(name: str) -> Iterator[None]:
    """An error says which optimizer it is about."""
    try:
        yield
    except Exception as error:
        error.add_note(f"While optimizer {name!r} was tried.")
        raise


def _real_scalar(name: str, value: Any) -> jax.Array:
    if value is None or isinstance(value, tuple | list | dict):
        kind = type(value).__name__
        raise ValueError(f"{name} must return a real scalar; got a {kind}.")
    array = jnp.asarray(value)
    if array.shape or not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(
            f"{name} must return a real scalar; got dtype {array.dtype}, shape "
            f"{array.shape}."
        )
    return array

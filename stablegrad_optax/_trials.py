"""A training problem, and the programs of it that all optimizers use."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stablegrad_optax._leaves import describe

PyTree = Any

_SCORE_BATCHES = 8  # the number of batches of the default score


@dataclass(frozen=True)
class Problem:
    """Holds what is trained, as ``compare_optimizers`` takes it, with its checks."""

    loss_fn: Callable[[PyTree, Any], jax.Array]
    init: Callable[[jax.Array], PyTree]
    sample: Callable[[jax.Array], Any] | PyTree
    score: Callable[[PyTree], jax.Array] | None
    failure_score: float | None
    steps: int

    @property
    def data(self) -> PyTree:
        """The whole data, which is an argument so that no program holds a copy."""
        return None if callable(self.sample) else self.sample

    def batch(self, key: jax.Array, step: jax.Array, data: PyTree) -> Any:
        """Returns the batch of one step."""
        if not callable(self.sample):
            return data
        return self.sample(jax.random.fold_in(key, step))

    def loss(self, params: PyTree, batch: Any) -> jax.Array:
        """Returns the loss, which must be a real scalar."""
        return _real_scalar("loss_fn", self.loss_fn(params, batch))

    def params(self, key: jax.Array) -> PyTree:
        """Returns initial parameters, which must be floating arrays."""
        params = self.init(key)
        _require_floating(params)
        return jax.tree.map(jnp.asarray, params)

    def final_score(self, params: PyTree, key: jax.Array, data: PyTree) -> jax.Array:
        """Returns the score; ``key`` draws the fresh batches of the default one."""
        if self.score is not None:
            return _real_scalar("score", self.score(params))
        if not callable(self.sample):
            return self.loss(params, data)
        keys = jax.random.split(key, _SCORE_BATCHES)
        losses = jax.lax.map(lambda key: self.loss(params, self.sample(key)), keys)
        return jnp.mean(losses)

    def require_randomness_of_keys(self, key: jax.Array, num_seeds: int) -> None:
        """Raises if ``init`` or ``sample`` draws random numbers without its key."""
        first, second = jax.random.split(key)
        varies = False
        for name, function in {"init": self.init, "sample": self.sample}.items():
            if not callable(function):
                continue
            # A compiled function repeats what its first call drew from NumPy.
            while isinstance(function, jax.stages.Wrapped):
                function = function.__wrapped__  # type: ignore[attr-defined]
            result = function(first)
            if name == "init":
                _require_floating(result)
            leaf = _first_difference(result, function(first))
            if leaf is not None:
                raise ValueError(
                    f"{name} must depend on its key alone, but two calls with one key "
                    f"returned different values for leaf '{leaf}'. Draw random numbers "
                    "with jax.random, not with NumPy."
                )
            varies |= _first_difference(result, function(second)) is not None
        if num_seeds > 1 and not varies:
            raise ValueError(
                "init or sample must depend on its key, but neither does, so that all "
                f"{num_seeds} seeds are the same run. Use num_seeds=1 and "
                "num_tuning_seeds=1 if nothing is random."
            )


class Programs:
    """Compiles the functions of a problem that every optimizer uses.

    ``width`` runs are side by side in each call. A program is freed with this object.
    """

    def __init__(self, problem: Problem, key: jax.Array, width: int):
        self.problem, self.width = problem, width
        self._keys, score_key = jax.random.split(key)
        self._params: dict[int, PyTree] = {}  # initial parameters by seed, on the host

        def gradient(
            params: PyTree, key: jax.Array, step: jax.Array, data: PyTree
        ) -> tuple[jax.Array, PyTree]:
            batch = problem.batch(key, step, data)
            loss, grads = jax.value_and_grad(problem.loss)(params, batch)
            # The conjugate of a complex gradient is the direction of ascent.
            return loss, jax.tree.map(jnp.conj, grads)

        def judge(params: PyTree, data: PyTree) -> tuple[jax.Array, jax.Array]:
            leaves = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(params)]
            score = problem.final_score(params, score_key, data)
            return score, jnp.all(jnp.stack(leaves))

        self._gradient = jax.jit(jax.vmap(gradient, (0, 0, None, None)))
        self._judge = jax.jit(jax.vmap(judge, (0, None)))

    def start(self, seeds: Sequence[int]) -> tuple[PyTree, jax.Array]:
        """Returns the initial parameters of these seeds and the keys of their data.

        ``init`` is called outside ``jit``, once per seed: compiled, the random numbers
        of a deep network take longer than its training step.
        """
        for seed in set(seeds) - set(self._params):
            params = self.problem.params(jax.random.split(self._key(seed))[0])
            self._params[seed] = jax.tree.map(np.asarray, params)
        stacked = jax.tree.map(
            lambda *leaves: jnp.array(np.stack(leaves)),
            *(self._params[seed] for seed in seeds),
        )
        keys = [jax.random.split(self._key(seed))[1] for seed in seeds]
        return stacked, jnp.stack(keys)

    def shapes(self) -> tuple[PyTree, ...]:
        """Returns shapes and dtypes of parameters, keys, losses and gradients."""
        params, keys = self.start([0] * self.width)
        arguments = params, keys, np.int32(0), self.problem.data
        return params, keys, *jax.eval_shape(self._gradient, *arguments)

    def gradient(
        self, params: PyTree, keys: jax.Array, step: int
    ) -> tuple[jax.Array, PyTree]:
        """Returns the losses and the gradients of one step of each run."""
        return self._gradient(params, keys, np.int32(step), self.problem.data)

    def judge(self, params: PyTree) -> tuple[np.ndarray, np.ndarray]:
        """Returns the score of each run, and whether all its parameters are finite."""
        score, is_finite = jax.device_get(self._judge(params, self.problem.data))
        return score, is_finite

    def limits(self, params: PyTree) -> np.ndarray:
        """Returns the score that each run must be below, given its initial params."""
        if self.problem.failure_score is not None:
            return np.full(self.width, self.problem.failure_score)
        return self.judge(params)[0]

    def require_finite_gradients(self, seeds: Sequence[int]) -> None:
        """Raises if the loss or the gradient is not finite initially for any seed.

        Then no optimizer and no learning rate can help.
        """
        all_losses, all_grads = [], []
        for begin in range(0, len(seeds), self.width):
            part = list(seeds[begin : begin + self.width])
            params, keys = self.start(pad(part, self.width))
            losses, grads = self.gradient(params, keys, 0)
            finite = jax.tree.map(lambda x: np.isfinite(np.asarray(x)), grads)
            all_losses.append(np.asarray(losses)[: len(part)])
            all_grads.append([_all(x)[: len(part)] for x in jax.tree.leaves(finite)])
        initial = np.concatenate(all_losses)
        if not np.any(np.isfinite(initial)):
            raise ValueError(
                "loss_fn must be finite at the parameters that init gives; got "
                f"{initial[0]} on each of {len(initial)} seeds."
            )
        by_leaf = [np.concatenate(x) for x in zip(*all_grads, strict=True)]
        if not np.any(np.all(np.stack(by_leaf), axis=0)):
            names = [leaf.name or "params" for leaf in describe(finite)]
            bad = [name for name, x in zip(names, by_leaf, strict=True) if not x.all()]
            more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
            raise ValueError(
                "The gradient of loss_fn must be finite at the parameters that init "
                f"gives; it is not on any of {len(initial)} seeds, in leaf "
                f"{', '.join(map(repr, bad[:3]))}{more}."
            )

    def _key(self, seed: int) -> jax.Array:
        return jax.random.fold_in(self._keys, seed)


def pad(values: list[Any], length: int) -> list[Any]:
    """Returns the list with its last value repeated up to this length."""
    return values + values[-1:] * (length - len(values))


def _require_floating(params: PyTree) -> None:
    if not jax.tree.leaves(params):
        raise ValueError("init must return a pytree with arrays; got no leaves.")
    for path, leaf in jax.tree.leaves_with_path(params):
        dtype = getattr(leaf, "dtype", type(leaf))
        try:
            is_floating = bool(jnp.issubdtype(dtype, jnp.inexact))
        except TypeError:  # the leaf is no array, but a function, for example
            is_floating = False
        if not is_floating:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"init must return floating arrays alone; got {dtype} for leaf "
                f"'{name}'. Let loss_fn close over everything else."
            )


def _all(array: np.ndarray) -> np.ndarray:
    return np.asarray(array.reshape(len(array), -1).all(axis=1))


def _first_difference(first: PyTree, second: PyTree) -> str | None:
    """Returns the name of the first leaf that differs by more than rounding."""
    pairs = zip(jax.tree.leaves_with_path(first), jax.tree.leaves(second), strict=True)
    for (path, a), b in pairs:
        if isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        a, b = (np.asarray(x).astype(np.complex128) for x in (a, b))
        if a.shape != b.shape or not np.allclose(a, b, rtol=1e-5, equal_nan=True):
            return jax.tree_util.keystr(path, simple=True, separator="/")
    return None


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

"""Several arms trained in one program: what is compiled does not grow with them."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from stablegrad_optax._comparison import choose_rate
from stablegrad_optax._trials import Problem, Trainer


def one_of(
    which: jax.Array, transformations: Sequence[optax.GradientTransformation]
) -> optax.GradientTransformation:
    """The transformation that a traced i32[] counts from 0; all have their states."""

    def init(params: optax.Params) -> tuple[optax.OptState, ...]:
        return tuple(tx.init(params) for tx in transformations)

    def update(
        updates: optax.Updates,
        state: tuple[optax.OptState, ...],
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, tuple[optax.OptState, ...]]:
        pairs = [
            tx.update(updates, inner, params)
            for tx, inner in zip(transformations, state, strict=True)
        ]
        news, states = zip(*pairs, strict=True)
        chosen = jax.tree.map(lambda *leaves: jnp.stack(leaves)[which], *news)
        return chosen, states

    return optax.GradientTransformation(init, update)


def train_arms(
    problem: Problem,
    optimizer: Callable[[jax.Array, jax.Array], optax.GradientTransformation],
    *,
    num_arms: int,
    rates: Sequence[float],
    num_seeds: int,
    num_tuning_seeds: int,
    key: jax.Array,
) -> list[tuple[float, np.ndarray]]:
    """Each arm's rate and its scores f[num_seeds], as `compare_optimizers` has them.

    Args:
        problem: what is trained.
        optimizer: (which arm, learning rate), both traced -> its optimizer.
        num_arms: counted from 0.
        rates: ascending, those that the tuning seeds choose from.
        num_seeds: fresh ones.
        num_tuning_seeds: others.
        key: gives a seed the same weights and batches in all arms.
    """

    def of_number(number: jax.Array) -> optax.GradientTransformation:
        arm, rate = jnp.divmod(number.astype(jnp.int32), len(rates))
        return optimizer(arm, jnp.asarray(rates, jnp.float32)[rate])

    def number(arm: int, rate: int) -> float:
        return float(arm * len(rates) + rate)

    arms = range(num_arms)
    grid = [
        (number(arm, rate), seed)
        for arm in arms
        for rate in range(len(rates))
        for seed in range(num_tuning_seeds)
    ]
    width = max(len(grid), num_arms * num_seeds)
    trainer = Trainer("of all arms", of_number, problem, key, width)
    tuning = trainer(grid, lambda _: None)[0]
    chosen = [choose_rate(x) for x in tuning.reshape(num_arms, len(rates), -1)]
    fresh = range(num_tuning_seeds, num_tuning_seeds + num_seeds)
    grid = [(number(arm, chosen[arm]), seed) for arm in arms for seed in fresh]
    scores = trainer(grid, lambda _: None)[0].reshape(num_arms, num_seeds)
    return [(rates[chosen[arm]], scores[arm]) for arm in arms]

"""Proximal policy optimization (arXiv 1707.06347): the advantages and the loss.

The constants are those of CleanRL's `ppo.py` and of PureJaxRL, alike for all
environments. Both also do what is not done here: they clip the gradient's norm at
0.5, which is an arm of the suite, and let the rate fall along a line, which is here the
half cosine of every suite; their Adam's epsilon is 1e-5, here Optax's 1e-8.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

DISCOUNT = 0.99
TRACE_DECAY = 0.95  # lambda of the generalized advantage estimate
CLIP_RANGE = 0.2  # of the ratio of probabilities, and of the change of a value
VALUE_WEIGHT = 0.5
ENTROPY_WEIGHT = 0.01


class Experience(NamedTuple):
    """Observations, actions and their worth; leaves [examples, ...]."""

    observations: jax.Array
    actions: jax.Array  # i
    log_probs: jax.Array  # f, of the actions when they were taken
    values: jax.Array  # f, of the observations, likewise
    advantages: jax.Array  # f
    targets: jax.Array  # f, of the values


def advantages(
    rewards: jax.Array, values: jax.Array, ended: jax.Array, last_values: jax.Array
) -> jax.Array:
    """The generalized estimates (arXiv 1506.02438), f[horizon, copies].

    Nothing is added from beyond the end of an episode, be it a terminal state or the
    time limit, as in both references.

    Args:
        rewards: f[horizon, copies].
        values: f[horizon, copies], of the observations before the rewards.
        ended: bool[horizon, copies], whether an episode ended with the reward.
        last_values: f[copies], of the observations after the last reward.
    """

    def before(
        later: tuple[jax.Array, jax.Array], now: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        next_advantage, next_value = later
        reward, value, ended = now
        discount = DISCOUNT * (1 - ended)
        advantage = reward + discount * next_value - value
        advantage += discount * TRACE_DECAY * next_advantage
        return (advantage, value), advantage

    start = jnp.zeros_like(last_values), last_values
    return jax.lax.scan(before, start, (rewards, values, ended), reverse=True)[1]


def log_prob(logits: jax.Array, actions: jax.Array) -> jax.Array:
    """Returns that of each action, f[...]; logits f[..., actions]."""
    every = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(every, actions[..., None], -1)[..., 0]


def loss(outputs: tuple[jax.Array, jax.Array], batch: Experience) -> jax.Array:
    """The clipped objective, negative, with the values' error and the entropy.

    Advantages are normalized over the batch. A value's error is the larger of its own
    and of that of the value clipped to its former one's neighbourhood.

    Args:
        outputs: logits f[examples, actions] and values f[examples].
        batch: the examples.
    """
    logits, values = outputs
    ratios = jnp.exp(log_prob(logits, batch.actions) - batch.log_probs)
    centred = batch.advantages - batch.advantages.mean()
    scores = centred / (batch.advantages.std() + 1e-8)
    gains = jnp.minimum(
        ratios * scores, jnp.clip(ratios, 1 - CLIP_RANGE, 1 + CLIP_RANGE) * scores
    )
    near = batch.values + jnp.clip(values - batch.values, -CLIP_RANGE, CLIP_RANGE)
    value_errors = jnp.maximum(
        (values - batch.targets) ** 2, (near - batch.targets) ** 2
    )
    every = jax.nn.log_softmax(logits)
    entropies = -(jnp.exp(every) * every).sum(-1)
    return (
        -gains.mean()
        + VALUE_WEIGHT * value_errors.mean() / 2
        - ENTROPY_WEIGHT * entropies.mean()
    )

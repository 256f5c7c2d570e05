"""An agent that collects experience and learns from it, one minibatch an update."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.lib.task import Gradient
from benchmarks.tasks.control import ppo
from benchmarks.tasks.control.environments import Environment
from benchmarks.tasks.control.models import ActorCritic
from stablegrad_optax import prediction_grad_std

PyTree = Any
STATIC = {"static": True}


class State(NamedTuple):
    """The states of a run's copies of the environment, and what it learns from."""

    environments: PyTree  # of each copy
    observations: jax.Array  # f[copies, features]
    experience: ppo.Experience  # of the last rollout


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ppo:
    """An environment and the agent that learns it by PPO.

    An update is one minibatch's. The first of every `epochs * minibatches` collects a
    rollout, which all of them learn from; each epoch goes through it once, shuffled.

    The probe, "prediction", is the standard deviation of dL/d(logits, value) per
    example.

    Attributes:
        environment: what is controlled.
        copies: of it, that are stepped side by side.
        horizon: steps of each in a rollout.
        minibatches: of a rollout.
        epochs: of each rollout.
    """

    environment: Environment = field(metadata=STATIC)
    copies: int = field(metadata=STATIC)
    horizon: int = field(metadata=STATIC)
    minibatches: int = field(metadata=STATIC)
    epochs: int = field(default=4, metadata=STATIC)

    @property
    def model(self) -> ActorCritic:
        return ActorCritic(self.environment.num_actions)

    def init(self, key: jax.Array) -> tuple[PyTree, State]:
        """Initial weights, and every copy at the start of an episode."""
        return _init(self, jax.random.split(key)[0])

    def gradient(
        self, params: PyTree, state: State, key: jax.Array, step: jax.Array
    ) -> Gradient:
        """Takes the next minibatch of the rollout; (key, step) draws what is random."""
        key_rollout, key_order = jax.random.split(jax.random.fold_in(key, step))

        def collected() -> State:
            return self.collect(params, *state[:2], key_rollout)

        def shuffled() -> State:
            is_first = step % (self.epochs * self.minibatches) == 0
            return self.shuffled(
                jax.lax.cond(is_first, collected, lambda: state), key_order
            )

        index = step % self.minibatches
        state = jax.lax.cond(index == 0, shuffled, lambda: state)
        batch = jax.tree.map(
            lambda leaf: leaf.reshape(self.minibatches, -1, *leaf.shape[1:])[index],
            state.experience,
        )
        outputs, to_params = jax.vjp(
            lambda params: self.model.apply({"params": params}, batch.observations),
            params,
        )
        value, output_grads = jax.value_and_grad(ppo.loss)(outputs, batch)
        (grads,) = to_params(output_grads)
        std = prediction_grad_std(output_grads, num_examples=len(batch.actions))
        return Gradient(value, grads, {"prediction": std}, state)

    def shuffled(self, state: State, key: jax.Array) -> State:
        """Returns its examples in another order."""
        order = jax.random.permutation(key, self.copies * self.horizon)
        experience = jax.tree.map(lambda leaf: leaf[order], state.experience)
        return state._replace(experience=experience)

    def collect(
        self,
        params: PyTree,
        environments: PyTree,
        observations: jax.Array,
        key: jax.Array,
    ) -> State:
        """The experience of a rollout, and where it leaves the copies."""

        def step(carry: tuple, key: jax.Array) -> tuple[tuple, tuple]:
            environments, observations = carry
            key_action, key_step = jax.random.split(key)
            logits, values = self.model.apply({"params": params}, observations)
            actions = jax.random.categorical(key_action, logits)
            *after, rewards, ended = self.environment.step(
                jax.random.split(key_step, self.copies), environments, actions
            )
            log_probs = ppo.log_prob(logits, actions)
            return tuple(after), (
                (observations, actions, log_probs, values),
                rewards,
                ended,
            )

        carry = environments, observations
        keys = jax.random.split(key, self.horizon)
        (environments, observations), (found, rewards, ended) = jax.lax.scan(
            step, carry, keys
        )
        values = found[-1]
        _, last_values = self.model.apply({"params": params}, observations)
        advantages = ppo.advantages(rewards, values, ended, last_values)
        experience = ppo.Experience(*found, advantages, advantages + values)
        experience = jax.tree.map(
            lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), experience
        )
        return State(environments, observations, experience)

    def score(
        self, params: PyTree, state: State, held_out: jax.Array
    ) -> dict[str, jax.Array]:
        """The `return`, a mean over one episode for each key, and its `error`.

        The policy is sampled from, as in training.
        """
        del state
        environment, num_episodes = self.environment, len(held_out)

        def is_going_on(carry: tuple) -> jax.Array:
            *_, is_first, _ = carry
            return is_first.any()

        def step(carry: tuple) -> tuple:
            keys, environments, observations, is_first, returns = carry
            keys, to_act, to_step = jax.vmap(partial(jax.random.split, num=3))(keys).T
            logits, _ = self.model.apply({"params": params}, observations)
            actions = jax.vmap(jax.random.categorical)(to_act, logits)
            environments, observations, rewards, ended = environment.step(
                to_step, environments, actions
            )
            returns += is_first * rewards
            return keys, environments, observations, is_first & ~ended, returns

        start = (
            held_out,
            *environment.reset(held_out),
            jnp.ones(num_episodes, bool),
            jnp.zeros(num_episodes),
        )
        *_, returns = jax.lax.while_loop(is_going_on, step, start)
        mean = returns.mean()
        return {"return": mean, "error": environment.error(mean)}


@partial(jax.jit, static_argnums=0)
def _init(task: Ppo, key: jax.Array) -> tuple[PyTree, State]:
    key_start = jax.random.fold_in(key, 1)
    environments, observations = task.environment.reset(
        jax.random.split(key_start, task.copies)
    )
    params = task.model.init(key, observations)["params"]
    state = jax.eval_shape(task.collect, params, environments, observations, key)
    experience = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state.experience
    )
    return params, State(environments, observations, experience)

"""Environments of gymnax, and how much of the way from chance to solved a return is."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


@dataclass(frozen=True)
class Environment:
    """One environment, stepped in several copies side by side.

    An episode that ends, at a terminal state or at its time limit, is followed by the
    next one at once. Observations are flat, [copies, features].

    Attributes:
        name: gymnax's.
        chance: the mean return of uniformly random actions.
        solved: the return that counts as error 0.
        failure_error: above it a run has failed: its agent has hardly learned.
        is_binary: whether observations are zeros and ones; they are then bool, which
            is a quarter of what every update moves.
    """

    name: str
    chance: float
    solved: float
    failure_error: float = 0.5
    is_binary: bool = False

    @cached_property
    def _made(self) -> tuple[Any, Any]:
        import gymnax  # takes seconds: not for those who only list the suites

        with jax.ensure_compile_time_eval():  # it may be made while a program is traced
            return gymnax.make(self.name)

    @property
    def num_actions(self) -> int:
        return self._made[0].num_actions

    def reset(self, keys: jax.Array) -> tuple[PyTree, jax.Array]:
        """States and observations at the start of an episode, one for each key."""
        env, params = self._made
        observations, states = jax.vmap(env.reset, (0, None))(keys, params)
        # Python's numbers, with which gymnax starts, are of weak types: the programs
        # of the first step and of the others would differ.
        states = jax.tree.map(lambda leaf: jnp.asarray(leaf, leaf.dtype), states)
        return states, self._flat(observations)

    def step(
        self, keys: jax.Array, states: PyTree, actions: jax.Array
    ) -> tuple[PyTree, jax.Array, jax.Array, jax.Array]:
        """The next states and observations, the rewards, and whether an episode ended.

        Args:
            keys: key[copies].
            states: of the copies.
            actions: i[copies].
        """
        env, params = self._made
        observations, states, rewards, terminated, truncated, _ = jax.vmap(
            env.step, (0, 0, 0, None)
        )(keys, states, actions, params)
        return states, self._flat(observations), rewards, terminated | truncated

    def _flat(self, observations: jax.Array) -> jax.Array:
        flat = observations.reshape(len(observations), -1)
        return flat.astype(bool) if self.is_binary else flat

    @property
    def failure_return(self) -> float:
        """The return of which `failure_error` is the error."""
        return self.solved - self.failure_error * (self.solved - self.chance)

    def error(self, mean_return: jax.Array) -> jax.Array:
        """The share of the way from chance to solved that is missing, in [0, 1]."""
        covered = (mean_return - self.chance) / (self.solved - self.chance)
        return 1 - jnp.clip(covered, 0, 1)


# Chance is measured (2000 episodes), and by a test again. Solved are all of CartPole's
# 500 steps, and the 30 bricks of Breakout's first wall: a tenth of that is more than
# chance, and what a short training of a long game can reach.
ENVIRONMENTS = {
    environment.name: environment
    for environment in (
        Environment("CartPole-v1", 22.3, 500.0),
        Environment("Breakout-MinAtar", 0.45, 30.0, 0.9, is_binary=True),
    )
}

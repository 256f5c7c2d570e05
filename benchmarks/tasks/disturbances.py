"""Disturbances of a batch of training; evaluation is always clean."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

SHARE = 0.05  # of the inputs that noise meets


class Disturbance(NamedTuple):
    """Values, not programs: all disturbances share one compilation."""

    loss_factor: float | jax.Array = 1.0  # in the spike's updates alone
    input_factor: float | jax.Array = 1.0  # likewise
    wrong_targets: float | jax.Array = 0.0  # likewise; 1: those of other examples
    updates: int | jax.Array = 1  # how many, one after another, are the spike
    noise: float | jax.Array = 0.0  # std where the inputs' range is 1; in every update

    def is_spike(self, update: jax.Array, first: jax.Array) -> jax.Array:
        """Says whether an update is one of those from `first` on; 0: no update is."""
        return (first > 0) & (update >= first) & (update < first + self.updates)

    def disturb_targets(
        self, targets: jax.Array, is_spike: jax.Array, key: jax.Array
    ) -> jax.Array:
        """Targets in another order where they are wrong: a share of them stays right.

        Entries of one leading axis: of text every byte has another position's.
        """
        flat = targets.reshape(-1, *targets.shape[2:]) if targets.ndim > 1 else targets
        mixed = jax.random.permutation(key, flat).reshape(targets.shape)
        return jnp.where(is_spike & (self.wrong_targets > 0), mixed, targets)

    def loss_multiplier(self, is_spike: jax.Array) -> jax.Array:
        """Returns the factor f[] of the loss."""
        return jnp.where(is_spike, self.loss_factor, 1.0)

    def disturb_inputs(
        self, inputs: jax.Array, is_spike: jax.Array, key: jax.Array
    ) -> jax.Array:
        """Disturbed inputs; text, which is integers, stays as it is."""
        if not jnp.issubdtype(inputs.dtype, jnp.floating):
            return inputs
        key_where, key_noise = jax.random.split(key)
        is_hit = jax.random.bernoulli(key_where, SHARE, inputs.shape)
        noise = self.noise * jax.random.normal(key_noise, inputs.shape)
        factor = jnp.where(is_spike, self.input_factor, 1.0)
        return factor * (inputs + is_hit * noise)


# name in the results -> what it is
DISTURBANCES: dict[str, Disturbance] = {
    "none": Disturbance(),
    "loss x10": Disturbance(loss_factor=10.0),
    "loss x100": Disturbance(loss_factor=100.0),
    "loss x1e4": Disturbance(loss_factor=1e4),
    "loss x1e4, 10 updates": Disturbance(loss_factor=1e4, updates=10),
    "wrong labels": Disturbance(wrong_targets=1.0),
    "wrong labels, 10 updates": Disturbance(wrong_targets=1.0, updates=10),
    "inputs x100": Disturbance(input_factor=100.0),
    "noise of 1 range": Disturbance(noise=1.0),
    "noise of 2 ranges": Disturbance(noise=2.0),
    "noise of 3 ranges": Disturbance(noise=3.0),
}

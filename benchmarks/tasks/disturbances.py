"""What goes wrong with a batch of training; evaluation is always clean."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

SHARE = 0.05  # of the inputs that noise meets


class Disturbance(NamedTuple):
    """Values, not programs: all disturbances share one compilation."""

    loss_factor: float | jax.Array = 1.0  # in the spike's update alone
    input_factor: float | jax.Array = 1.0  # likewise
    noise: float | jax.Array = 0.0  # std where the inputs' range is 1; in every update

    def of_loss(self, is_spike: jax.Array) -> jax.Array:
        """What the loss f[] is multiplied by."""
        return jnp.where(is_spike, self.loss_factor, 1.0)

    def of_inputs(
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
    "inputs x100": Disturbance(input_factor=100.0),
    "noise of 1 range": Disturbance(noise=1.0),
    "noise of 2 ranges": Disturbance(noise=2.0),
    "noise of 3 ranges": Disturbance(noise=3.0),
}

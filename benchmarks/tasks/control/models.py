"""The actor and its critic: two networks that share nothing."""

import flax.linen as nn
import jax
from flax.linen.initializers import orthogonal


class Perceptron(nn.Module):
    """Two hidden layers of tanh, with orthogonal initial weights.

    Attributes:
        outputs: their number.
        gain: of the last layer's initial weights; the hidden layers' is sqrt(2).
        width: of the hidden layers.
    """

    outputs: int
    gain: float
    width: int = 64

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(2):
            x = nn.tanh(nn.Dense(self.width, kernel_init=orthogonal(2**0.5))(x))
        return nn.Dense(self.outputs, kernel_init=orthogonal(self.gain))(x)


class ActorCritic(nn.Module):
    """Maps observations f[..., features] to logits f[..., actions] and values f[...].

    The policy's last layer starts small, so that all actions start nearly alike.
    """

    num_actions: int

    @nn.compact
    def __call__(self, observations: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = Perceptron(self.num_actions, 0.01, name="policy")(observations)
        values = Perceptron(1, 1.0, name="value")(observations)
        return logits, values[..., 0]

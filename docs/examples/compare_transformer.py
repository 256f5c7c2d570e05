"""Compares optimizers of a Flax transformer that predicts the next token."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from stablegrad_optax import Comparison, compare_optimizers

WIDTH, TOKENS, LENGTH = 32, 16, 16


class Transformer(nn.Module):
    """Two blocks, normalization before each layer."""

    @nn.compact
    def __call__(self, tokens):
        """Tokens i32[n, length] -> logits of the next, f[n, length, tokens]."""
        x = nn.Embed(TOKENS, WIDTH)(tokens)
        x = x + self.param("place", nn.initializers.normal(0.02), (LENGTH, WIDTH))
        mask = nn.make_causal_mask(tokens)
        for _ in range(2):
            x = x + nn.MultiHeadAttention(num_heads=2)(nn.LayerNorm()(x), mask=mask)
            y = nn.gelu(nn.Dense(2 * WIDTH)(nn.LayerNorm()(x)))
            x = x + nn.Dense(WIDTH)(y)
        return nn.Dense(TOKENS)(nn.LayerNorm()(x))


model = Transformer()


def sample(key):
    """Draws sequences in which nine of ten tokens are the sum of the last two."""
    first, noise, wrong = jax.random.split(key, 3)

    def token(before, draw):
        is_wrong, other = draw
        new = jnp.where(is_wrong, other, before.sum() % TOKENS)
        return jnp.stack([before[1], new]), new

    def sequence(start, is_wrong, other):
        return jax.lax.scan(token, start, (is_wrong, other))[1]

    shape = (16, LENGTH + 1)
    return jax.vmap(sequence)(
        jax.random.randint(first, (16, 2), 0, TOKENS),
        jax.random.bernoulli(noise, 0.1, shape),
        jax.random.randint(wrong, shape, 0, TOKENS),
    )


def init(key):
    """The parameters alone."""
    return model.init(key, jnp.zeros((1, LENGTH), int))["params"]


def loss_fn(params, tokens):
    """The mean cross-entropy of the next token."""
    logits = model.apply({"params": params}, tokens[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return losses.mean()


def run(**settings) -> Comparison:
    """Compares the default optimizers; ``settings`` replace the defaults."""
    defaults = {
        "steps": 150,
        "num_seeds": 7,
        "num_tuning_seeds": 2,
        "parallel": 8,
        "key": jax.random.key(0),
    }
    return compare_optimizers(loss_fn, init, sample, **(defaults | settings))


if __name__ == "__main__":
    print(run())

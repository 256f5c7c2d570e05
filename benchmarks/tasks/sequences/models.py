"""Transformers for text and for series, in float32, float16 or simulated FP4."""

from functools import partial
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

Numbers = Literal["float32", "float16", "fp4"]
NUMBERS: tuple[Numbers, ...] = get_args(Numbers)

# One sign bit, one of exponent with bias 1, two of mantissa: 0, 1/4, 1/2, 3/4 without
# the implicit one, then 1, 5/4, 3/2, 7/4. The fifteen values are evenly spaced.
E1M2_SPACING = 0.25
E1M2_LARGEST = 1.75


def to_e1m2(x: jax.Array) -> jax.Array:
    """The nearest values of the E1M2 grid, stretched so that max|x| is its largest.

    Halves are rounded to the even multiple of the spacing.
    """
    largest = jnp.max(jnp.abs(x))
    unit = jnp.where(largest > 0, largest, 1) * (E1M2_SPACING / E1M2_LARGEST)
    return jnp.round(x / unit) * unit


def straight_through(x: jax.Array) -> jax.Array:
    """The quantized values, with the derivative of the identity."""
    return x + jax.lax.stop_gradient(to_e1m2(x) - x)


def fp4_dot_general(
    lhs: jax.Array, rhs: jax.Array, *args: Any, **options: Any
) -> jax.Array:
    """`lax.dot_general` of both operands quantized, each with one scale for all."""
    lhs, rhs = straight_through(lhs), straight_through(rhs)
    return jax.lax.dot_general(lhs, rhs, *args, **options)


class Blocks(nn.Module):
    """Pre-norm transformer blocks, f[batch, t, width] to the same.

    Attributes:
        width: a multiple of heads.
        depth: number of blocks.
        heads: of the attention.
        numbers: what is computed in; parameters are float32. "fp4" quantizes weights
            and inputs of the linear layers of the blocks, by straight-through
            estimation; embeddings, softmax, LayerNorm and the head stay float32.
    """

    width: int
    depth: int
    heads: int
    numbers: Numbers

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        dtype = dtype_of(self.numbers)
        dot = fp4_dot_general if self.numbers == "fp4" else None
        dense = partial(nn.Dense, dtype=dtype, dot_general=dot)
        for _ in range(self.depth):
            y = nn.LayerNorm(dtype=dtype)(x)
            x += nn.MultiHeadDotProductAttention(
                self.heads, dtype=dtype, qkv_dot_general=dot, out_dot_general=dot
            )(y, mask=mask)
            y = nn.LayerNorm(dtype=dtype)(x)
            x += dense(self.width)(nn.gelu(dense(4 * self.width)(y)))
        return nn.LayerNorm(dtype=dtype)(x)


class Decoder(nn.Module):
    """A decoder-only language model of bytes: i[batch, t] to logits f32[batch, t, 256].

    Attributes:
        blocks: its inside.
        context: the largest t.
    """

    blocks: Blocks
    context: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        dtype, width = dtype_of(self.blocks.numbers), self.blocks.width
        place = self.param("place", nn.initializers.normal(0.02), (self.context, width))
        x = nn.Embed(256, width, dtype=dtype)(tokens)
        x += place[: tokens.shape[1]].astype(dtype)
        x = self.blocks(x, nn.make_causal_mask(tokens))
        return nn.Dense(256, dtype=dtype)(x).astype(jnp.float32)


class Forecaster(nn.Module):
    """Patches of one series as tokens, after PatchTST (Nie et al. 2023).

    f[batch, context] to f32[batch, horizon]. As there, the window's mean and standard
    deviation are taken out before and put back after; each series is predicted from
    its own past alone.

    Attributes:
        blocks: its inside.
        patch: length of a patch; patches do not overlap.
        horizon: values to predict.
    """

    blocks: Blocks
    patch: int
    horizon: int

    @nn.compact
    def __call__(self, values: jax.Array) -> jax.Array:
        dtype, width = dtype_of(self.blocks.numbers), self.blocks.width
        mean = values.mean(1, keepdims=True)
        std = values.std(1, keepdims=True) + 1e-5
        patches = ((values - mean) / std).reshape(len(values), -1, self.patch)
        x = nn.Dense(width, dtype=dtype)(patches)
        place = nn.initializers.normal(0.02)
        x += self.param("place", place, x.shape[1:]).astype(dtype)
        x = self.blocks(x).reshape(len(values), -1)
        x = nn.Dense(self.horizon, dtype=dtype)(x).astype(jnp.float32)
        return x * std + mean


def dtype_of(numbers: Numbers) -> Any:
    """Returns the dtype that a model computes in; FP4 is simulated in float32."""
    return jnp.float16 if numbers == "float16" else jnp.float32

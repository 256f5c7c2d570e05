"""Dtypes of statistics, and arithmetic that stays in their range."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def statistics_dtype(dtype: Any) -> np.dtype[Any]:
    """Returns float64 for double precision leaves and float32 for all others."""
    return np.dtype(np.float64 if jnp.finfo(dtype).bits == 64 else np.float32)


def sum_dtype(dtype: Any) -> np.dtype[Any]:
    """Returns the dtype that a leaf is summed in, which is complex if the leaf is."""
    return np.result_type(statistics_dtype(dtype), dtype)


def widest_statistics_dtype(dtypes: Iterable[Any]) -> np.dtype[Any]:
    """Returns the dtype of a vector of statistics for leaves of these dtypes."""
    floating = (dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.inexact))
    return np.result_type(np.float32, *map(statistics_dtype, floating))


@jax.jit
def scale(array: jax.Array, factor: jax.Array) -> jax.Array:
    """Multiplies each slice by its factor f[stack], in the array's dtype.

    The product is computed in the precision of the statistics. XLA fuses this one
    multiplication into the optimizer's loops and never writes out a scaled gradient.
    """
    wide = statistics_dtype(array.dtype)
    if factor.dtype != wide:  # a float64 factor saturates in float32
        factor = jnp.clip(factor, max=float(jnp.finfo(wide).max)).astype(wide)
    factor = factor.reshape(factor.shape + (1,) * (array.ndim - factor.ndim))
    if jnp.iscomplexobj(array):
        return jax.lax.complex(
            array.real.astype(wide) * factor, array.imag.astype(wide) * factor
        ).astype(array.dtype)
    return narrow(array.astype(wide) * factor, array.dtype)


def narrow(array: jax.Array, dtype: Any) -> jax.Array:
    """Casts an array to a leaf's dtype; a float8 without infinities saturates."""
    is_real = jnp.issubdtype(dtype, jnp.floating)
    if is_real and not np.isinf(np.float32(np.inf).astype(dtype)):
        largest = float(jnp.finfo(dtype).max)
        array = jnp.clip(array, -largest, largest)
    return array.astype(dtype)


def newest_share(decay: float | jax.Array, dtype: Any) -> jax.Array:
    """Returns ``1 - decay``, the newest value's share in a running mean.

    A decay in an array of a narrow dtype may have been rounded to 1. The largest
    float32 number below 1 then replaces it.
    """
    # 1 - decay is computed in Python's precision for a Python number, and in that of
    # the statistics for an array.
    decay = decay if isinstance(decay, float | int) else jnp.asarray(decay, dtype)
    return jnp.maximum(jnp.asarray(1 - decay, dtype), 2.0**-24)


def mean_weights(
    decay: float | jax.Array, count: jax.Array, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """Returns the sum of a running mean's weights, and the newest value's weight.

    The sum is ``1 - decay^count`` for ``count`` values. The weight of the newest value
    in the bias-corrected mean is ``1 - decay`` divided by that sum.
    """
    newest = newest_share(decay, dtype)
    total = -jnp.expm1(count.astype(dtype) * jnp.log1p(-newest))
    return total, jnp.minimum(newest / total, 1)


def weighted_mean(old: jax.Array, new: jax.Array, weight: jax.Array) -> jax.Array:
    """Computes ``(1 - weight) old + weight new``.

    ``old + weight (new - old)`` would cancel the digits of a small new value after a
    giant old one.
    """
    return (1 - weight) * old + weight * new


@jax.custom_jvp
def divide(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """Divides; the quotient saturates, and its derivatives do not overflow."""
    largest = float(jnp.finfo(denominator.dtype).max)
    return jnp.minimum(numerator / denominator, largest)


@divide.defjvp
def _divide_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    numerator, denominator = primals
    numerator_dot, denominator_dot = tangents
    quotient = divide(numerator, denominator)
    # The two divisions are separate, because the square of a small denominator would
    # underflow.
    change = numerator_dot / denominator - denominator_dot / denominator * quotient
    return quotient, change


@jax.jit
def safe_sqrt(x: jax.Array) -> jax.Array:
    """Returns the square root, whose derivative at 0 is defined as 0."""
    zero = x == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, x)))

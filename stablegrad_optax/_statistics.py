"""Standard deviations and norms of gradient leaves, accurate at every magnitude."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy.typing as npt
from jax import lax

from stablegrad_optax import _slices
from stablegrad_optax._leaves import Leaf
from stablegrad_optax._moments import moments, square
from stablegrad_optax._numerics import safe_sqrt

# The spread is at least this share of the root mean square, because a division by the
# small deviation of an almost constant leaf would enlarge it without bound.
SPREAD_FLOOR = 0.1


def spreads(arrays: Sequence[jax.Array], leaves: Sequence[Leaf]) -> jax.Array:
    """Computes the floored standard deviation of every slice.

    It is ``max(sigma, rms / 10)`` with the population standard deviation sigma. From
    1e-36 to 1e37 the relative error is at most 1e-5 if the mean is at most two sigma,
    and 1e-3 up to the floor. It is 0 for zeros and not finite for a slice that is not
    finite.

    Args:
      arrays: Floating arrays.
      leaves: The descriptions of the arrays.

    Returns:
      f[slices], in the widest statistics dtype of the leaves.
    """
    mean_square, mean, unit = moments(arrays, leaves)
    variance = mean_square - square(mean)
    return safe_sqrt(lax.max(variance, mean_square * SPREAD_FLOOR**2)) * unit


def means_and_deviations(
    arrays: Sequence[jax.Array], leaves: Sequence[Leaf]
) -> tuple[jax.Array, jax.Array]:
    """Computes the mean and the standard deviation of every slice.

    The deviation has no floor. It is as accurate as that of :func:`spreads`, but only
    rounding if it is below a thousandth of the mean.

    Args:
      arrays: Floating arrays.
      leaves: The descriptions of the arrays.

    Returns:
      The means, complex if a leaf is, and the deviations, each f[slices] in the widest
      statistics dtype of the leaves.
    """
    mean_square, mean, unit = moments(arrays, leaves)
    variance = mean_square - square(mean)
    deviation = safe_sqrt(lax.max(variance, jnp.zeros_like(variance)))
    return mean * unit.astype(mean.dtype), deviation * unit


def norms(arrays: Sequence[jax.Array], leaves: Sequence[Leaf]) -> jax.Array:
    """Computes the Euclidean norm of every slice.

    The relative error is at most 1e-5 between 1e-36 and the dtype's maximum, where the
    norm saturates. It is 0 for zeros and not finite for a slice that is not finite.

    Args:
      arrays: Floating arrays.
      leaves: The descriptions of the arrays.

    Returns:
      f[slices], in the widest statistics dtype of the leaves.
    """
    mean_square, _, unit = moments(arrays, leaves, with_mean=False)
    root_size = _slices.per_slice(leaves, lambda leaf: leaf.slice_size**0.5, unit.dtype)
    norm = safe_sqrt(mean_square) * root_size
    largest = float(jnp.finfo(norm.dtype).max)
    return jnp.where(jnp.isfinite(norm), jnp.minimum(norm * unit, largest), norm)


def pooled(values: jax.Array, shares: npt.ArrayLike) -> jax.Array:
    """Computes ``sqrt(sum s d^2)`` along the first axis.

    Args:
      values: The spreads d, f[k, ...].
      shares: The share s of each spread in the whole, [k, ...].

    Returns:
      f[...].
    """
    # Squares relative to that of the largest spread do not leave the range.
    largest = lax.stop_gradient(values.max(0, initial=0))
    invertible = float(jnp.finfo(values.dtype).max) / 16
    unit = jnp.where(largest == 0, 1, jnp.minimum(largest, invertible))
    mean_square = (jnp.asarray(shares, values.dtype) * (values / unit[None]) ** 2).sum(
        0
    )
    return safe_sqrt(mean_square) * unit


def global_norm(norms: jax.Array) -> jax.Array:
    """Computes the saturating norm f[] of all slices together from their own norms."""
    norm = pooled(norms, 1.0)
    largest = float(jnp.finfo(norm.dtype).max)
    return jnp.where(jnp.isfinite(norms).all(), jnp.minimum(norm, largest), norm)

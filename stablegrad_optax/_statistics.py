"""Standard deviations and norms of gradient leaves, safe at every magnitude.

All of them come from the means of g and g^2 over each slice. If squares leave the range
of float32 (float64), the same means in units of another power of two replace them. With
one unit for small and one for large gradients, nothing over- or underflows. On
accelerators all of these sums are taken in one read of the gradient, and scalars choose
among them. XLA for a CPU makes a loop of each sum, so that a conditional on one scalar
takes the sums again, in the units that the first sums show to be necessary.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import lax

from stablegrad_optax import _slices
from stablegrad_optax._leaves import Leaf
from stablegrad_optax._numerics import safe_sqrt, scale, statistics_dtype, sum_dtype

# The spread is at least this share of the root mean square, because a division by the
# small deviation of an almost constant leaf would enlarge it without bound.
SPREAD_FLOOR = 0.1


class Moments(NamedTuple):
    """Holds the moments of every slice, in units that keep all squares in range."""

    mean_square: jax.Array  # f[slices], the mean of abs(g / unit)^2
    mean: Any  # f[slices], the mean of g / unit, complex if a leaf is, or None
    unit: jax.Array  # f[slices], a power of two


class _Range(NamedTuple):
    """Holds the limit below which squares underflow, and the inverses of two units."""

    lowest: float  # a mean square below it has lost bits to underflow
    up: float
    down: float


_RANGES = {
    np.dtype(np.float32): _Range(2.0**-100, 2.0**70, 2.0**-80),
    np.dtype(np.float64): _Range(2.0**-960, 2.0**540, 2.0**-560),
}


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
    variance = mean_square - _square(mean)
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
    variance = mean_square - _square(mean)
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
    root_size = per_slice(leaves, lambda leaf: leaf.slice_size**0.5, unit.dtype)
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


def per_slice(
    leaves: Sequence[Leaf], value: Callable[[Leaf], npt.ArrayLike], dtype: Any
) -> npt.NDArray[Any]:
    """Repeats the values of each leaf for its slices, [slices, ...]."""
    counts = np.array([leaf.num_slices for leaf in leaves], int)
    return np.repeat([value(leaf) for leaf in leaves], counts, 0).astype(dtype)


def moments(
    arrays: Sequence[jax.Array], leaves: Sequence[Leaf], *, with_mean: bool = True
) -> Moments:
    """Computes the moments of every slice."""
    if not leaves:
        nothing = jnp.zeros(0)
        return Moments(nothing, nothing, nothing)
    return _compiled(list(arrays), tuple(leaves), with_mean)


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _moments(
    arrays: list[jax.Array], leaves: tuple[Leaf, ...], with_mean: bool
) -> Moments:
    plain = [_square, _itself][: 1 + with_mean]

    def side_by_side(arrays: list[jax.Array]) -> Moments:
        in_units = [_square_up, _square_down, _halfway_down][: 2 + with_mean]
        means = _slices.means([*plain, *in_units], arrays, leaves)
        return _choose(leaves, means[: len(plain)], means[len(plain) :])

    def in_turn(arrays: list[jax.Array]) -> Moments:
        means = _slices.means_in_loops(plain, arrays, leaves)
        unit = _unit(leaves, means[0])

        def again() -> list[jax.Array]:
            functions = [_square_in_units, _twice_in_units][: 1 + with_mean]
            scaled = _slices.means_in_loops(functions, arrays, leaves, 1 / unit)
            return [scaled[0], *(mean / 2 for mean in scaled[1:])]

        means = lax.cond((unit != 1).any(), again, lambda: means)
        return Moments(means[0], means[1] if with_mean else None, unit)

    return lax.platform_dependent(arrays, cpu=in_turn, default=side_by_side)


@_moments.defjvp
def _moments_jvp(
    leaves: tuple[Leaf, ...],
    with_mean: bool,
    primals: tuple[list[jax.Array]],
    tangents: tuple[list[jax.Array]],
) -> tuple[Moments, Moments]:
    """Differentiates in the chosen units, because the others may be out of range."""
    moments = _moments(*primals, leaves, with_mean)
    factors = _slices.read(1 / moments.unit, leaves)

    def in_units(arrays: list[jax.Array]) -> list[jax.Array]:
        wide = [array.astype(sum_dtype(array.dtype)) for array in arrays]
        return list(map(scale, wide, factors))

    changes = in_units(*tangents)
    products = [
        2 * (x.conj() * change).real
        for x, change in zip(in_units(*primals), changes, strict=True)
    ]
    (square_dot,) = _slices.means([_itself], products, leaves)
    mean_dot = _slices.means([_itself], changes, leaves)[0] if with_mean else None
    return moments, Moments(square_dot, mean_dot, jnp.zeros_like(moments.unit))


# `jit` hides the sums that are not chosen from jax_debug_nans, which would report them.
_compiled = jax.jit(_moments, static_argnums=(1, 2))


def _unit(leaves: Sequence[Leaf], mean_square: jax.Array) -> jax.Array:
    """Returns the power of two in whose units the squares of a slice are in range."""
    ranges = per_slice(leaves, lambda leaf: _range(leaf.dtype), mean_square.dtype)
    lowest, up, down = ranges.T
    too_large = ~jnp.isfinite(mean_square)
    return jnp.where(mean_square < lowest, 1 / up, jnp.where(too_large, 1 / down, 1.0))


def _choose(
    leaves: Sequence[Leaf], plain: list[jax.Array], in_units: list[jax.Array]
) -> Moments:
    """Chooses the means of each slice in the one of three units that is in range."""
    unit = _unit(leaves, plain[0])
    mean_square = jnp.where(unit < 1, in_units[0], plain[0])
    mean_square = jnp.where(unit > 1, in_units[1], mean_square)
    if len(plain) == 1:
        return Moments(mean_square, None, unit)
    factor = (1 / unit).astype(plain[1].dtype)
    mean = jnp.where(unit > 1, in_units[2] * factor**0.5, plain[1] * factor)
    return Moments(mean_square, mean, unit)


def _range(dtype: Any) -> _Range:
    return _RANGES[statistics_dtype(dtype)]


def _itself(x: jax.Array) -> jax.Array:
    return x


def _square(x: jax.Array) -> jax.Array:
    return x.real * x.real + x.imag * x.imag if jnp.iscomplexobj(x) else x * x


def _square_in_units(x: jax.Array, factor: jax.Array) -> jax.Array:
    return _square(scale(x, factor))


def _twice_in_units(x: jax.Array, factor: jax.Array) -> jax.Array:
    """Doubles the factor, because XLA:CPU writes out a product that two loops share."""
    return scale(x, 2 * factor)


def _halfway_down(x: jax.Array) -> jax.Array:
    """Scales down by the root of the factor, enough for a sum without squares."""
    return x * _range(x.dtype).down ** 0.5


def _square_down(x: jax.Array) -> jax.Array:
    """Squares x times a factor whose own square is outside the range of floats.

    If a leaf has one element, XLA would join the two factors to one. It does not do so
    across the maximum with the lowest number, which changes no value.
    """
    lowest = float(jnp.finfo(x.dtype).min)
    return _square_of_parts(x, lambda x: jnp.maximum(x * _range(x.dtype).down, lowest))


def _square_up(x: jax.Array) -> jax.Array:
    """Squares x times a large factor, which XLA does not square across the minimum."""
    largest = float(jnp.finfo(x.dtype).max)
    return _square_of_parts(x, lambda x: jnp.minimum(x * _range(x.dtype).up, largest))


def _square_of_parts(
    x: jax.Array, function: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    if jnp.iscomplexobj(x):
        return _square(function(x.real)) + _square(function(x.imag))
    return _square(function(x))

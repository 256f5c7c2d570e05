"""Moments of every slice of gradient leaves, which neither over- nor underflow.

The moments are the means of g and g^2 over each slice. If squares leave the range of
float32 (float64), the same means in units of another power of two replace them. With
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
from jax import lax

from stablegrad_optax import _slices
from stablegrad_optax._leaves import Leaf
from stablegrad_optax._numerics import scale, statistics_dtype, sum_dtype


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
    plain = [square, _itself][: 1 + with_mean]

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


# `jit` hides the sums that are not chosen from jax_debug_nans.
_compiled = jax.jit(_moments, static_argnums=(1, 2))


def _unit(leaves: Sequence[Leaf], mean_square: jax.Array) -> jax.Array:
    """Returns the power of two in whose units the squares of a slice are in range."""
    ranges = _slices.per_slice(
        leaves, lambda leaf: _range(leaf.dtype), mean_square.dtype
    )
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


def square(x: jax.Array) -> jax.Array:
    """Returns the square of the modulus."""
    return x.real * x.real + x.imag * x.imag if jnp.iscomplexobj(x) else x * x


def _square_in_units(x: jax.Array, factor: jax.Array) -> jax.Array:
    return square(scale(x, factor))


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
        return square(function(x.real)) + square(function(x.imag))
    return square(function(x))

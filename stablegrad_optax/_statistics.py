"""Standard deviations and norms of gradient leaves, safe at every magnitude.

All of them come from the means of g and g^2 over each slice. Where squares leave the
range of float32 (float64), the same means in units of two other powers of two take
their place: between the three nothing over- or underflows. On accelerators all of these
sums are taken in one read of the gradient, and scalars choose among them. XLA for a CPU
makes a loop of each sum: there a conditional on one scalar takes them again, of leaves
in the units that the first ones call for.
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

# A spread below this share of the root mean square is no scale to normalise by: it
# would blow up a leaf that is nearly constant. Real weight gradients are far from it:
# among those that were measured the mean stayed below 1.1 deviations.
SPREAD_FLOOR = 0.1


class Moments(NamedTuple):
    """The moments of every slice, in units in which no square leaves the range."""

    mean_square: jax.Array  # f[slices], of abs(g / unit)
    mean: Any  # f[slices], of g / unit, complex where a leaf is; None if not asked for
    unit: jax.Array  # f[slices], a power of two


class _Range(NamedTuple):
    """Which mean squares need another unit, and the inverses of the two others."""

    lowest: float  # below it, underflow has taken bits from the mean square
    up: float
    down: float


_RANGES = {
    np.dtype(np.float32): _Range(2.0**-100, 2.0**70, 2.0**-80),
    np.dtype(np.float64): _Range(2.0**-960, 2.0**540, 2.0**-560),
}


def spreads(arrays: Sequence[jax.Array], leaves: Sequence[Leaf]) -> jax.Array:
    """The floored standard deviation of every slice.

    ``max(sigma, rms / 10)`` with the population standard deviation sigma, from 1e-36 to
    1e37: right to 1e-5 relative where the mean is at most two sigma, to 1e-3 up to the
    floor; 0 for zeros, not finite for a slice that is not finite.

    Args:
      arrays: Floating arrays.
      leaves: What is static about them.

    Returns:
      f[slices], in the widest statistics dtype of the leaves.
    """
    mean_square, mean, unit = moments(arrays, leaves)
    variance = mean_square - _square(mean)
    return safe_sqrt(lax.max(variance, mean_square * SPREAD_FLOOR**2)) * unit


def means_and_deviations(
    arrays: Sequence[jax.Array], leaves: Sequence[Leaf]
) -> tuple[jax.Array, jax.Array]:
    """The mean and the standard deviation of every slice.

    The deviation has no floor: it is as right as that of :func:`spreads`, and nothing
    but rounding where it is below a thousandth of the mean.

    Args:
      arrays: Floating arrays.
      leaves: What is static about them.

    Returns:
      The means, complex where a leaf is, and the deviations, each f[slices] in the
      widest statistics dtype of the leaves.
    """
    mean_square, mean, unit = moments(arrays, leaves)
    variance = mean_square - _square(mean)
    deviation = safe_sqrt(lax.max(variance, jnp.zeros_like(variance)))
    return mean * unit.astype(mean.dtype), deviation * unit


def norms(arrays: Sequence[jax.Array], leaves: Sequence[Leaf]) -> jax.Array:
    """The Euclidean norm of every slice.

    Right to 1e-5 relative between 1e-36 and the dtype's maximum, where it saturates; 0
    for zeros, not finite for a slice that is not finite.

    Args:
      arrays: Floating arrays.
      leaves: What is static about them.

    Returns:
      f[slices], in the widest statistics dtype of the leaves.
    """
    mean_square, _, unit = moments(arrays, leaves, with_mean=False)
    root_size = per_slice(leaves, lambda leaf: leaf.slice_size**0.5, unit.dtype)
    norm = safe_sqrt(mean_square) * root_size
    largest = float(jnp.finfo(norm.dtype).max)
    return jnp.where(jnp.isfinite(norm), jnp.minimum(norm * unit, largest), norm)


def pooled(values: jax.Array, shares: npt.ArrayLike) -> jax.Array:
    """``sqrt(sum s d^2)`` along the first axis.

    Args:
      values: Spreads d, f[k, ...].
      shares: The share s of each of them in the whole, [k, ...].

    Returns:
      f[...].
    """
    # Relative to the largest of them, no square leaves the range.
    largest = lax.stop_gradient(values.max(0, initial=0))
    invertible = float(jnp.finfo(values.dtype).max) / 16
    unit = jnp.where(largest == 0, 1, jnp.minimum(largest, invertible))
    mean_square = (jnp.asarray(shares, values.dtype) * (values / unit[None]) ** 2).sum(
        0
    )
    return safe_sqrt(mean_square) * unit


def global_norm(norms: jax.Array) -> jax.Array:
    """The norm f[] of all slices together, from their own norms; it saturates."""
    norm = pooled(norms, 1.0)
    largest = float(jnp.finfo(norm.dtype).max)
    return jnp.where(jnp.isfinite(norms).all(), jnp.minimum(norm, largest), norm)


def per_slice(
    leaves: Sequence[Leaf], value: Callable[[Leaf], npt.ArrayLike], dtype: Any
) -> npt.NDArray[Any]:
    """Repeats a number of each leaf, or several, for its slices: [slices, ...]."""
    counts = np.array([leaf.num_slices for leaf in leaves], int)
    return np.repeat([value(leaf) for leaf in leaves], counts, 0).astype(dtype)


def moments(
    arrays: Sequence[jax.Array], leaves: Sequence[Leaf], *, with_mean: bool = True
) -> Moments:
    """The moments of every slice."""
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


# One jitted function: jax_debug_nans must not see the sums that are not chosen.
_compiled = jax.jit(_moments, static_argnums=(1, 2))


def _unit(leaves: Sequence[Leaf], mean_square: jax.Array) -> jax.Array:
    """The power of two in which the squares of each slice are in range: mostly 1."""
    ranges = per_slice(leaves, lambda leaf: _range(leaf.dtype), mean_square.dtype)
    lowest, up, down = ranges.T
    too_large = ~jnp.isfinite(mean_square)
    return jnp.where(mean_square < lowest, 1 / up, jnp.where(too_large, 1 / down, 1.0))


def _choose(
    leaves: Sequence[Leaf], plain: list[jax.Array], in_units: list[jax.Array]
) -> Moments:
    """Chooses among the means in three units those in which a slice is in range."""
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
    """A factor of its own: XLA:CPU would write out what two loops share."""
    return scale(x, 2 * factor)


def _halfway_down(x: jax.Array) -> jax.Array:
    """Far enough down for a sum."""
    return x * _range(x.dtype).down ** 0.5


def _square_down(x: jax.Array) -> jax.Array:
    """The square of x times a factor whose own square no float can hold.

    XLA joins the two factors to one where a leaf has one element; not across this
    maximum, which changes nothing.
    """
    lowest = float(jnp.finfo(x.dtype).min)
    return _square_of_parts(x, lambda x: jnp.maximum(x * _range(x.dtype).down, lowest))


def _square_up(x: jax.Array) -> jax.Array:
    """The same, with a minimum."""
    largest = float(jnp.finfo(x.dtype).max)
    return _square_of_parts(x, lambda x: jnp.minimum(x * _range(x.dtype).up, largest))


def _square_of_parts(
    x: jax.Array, function: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    if jnp.iscomplexobj(x):
        return _square(function(x.real)) + _square(function(x.imag))
    return _square(function(x))

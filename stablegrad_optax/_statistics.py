"""Standard deviations and norms of gradient leaves, safe at every magnitude.

Each statistic comes from plain float32 (float64) sums of g and g^2: one pass over the
gradient, nothing of its size written, one all-reduce for all leaves when they are
sharded. Where that would lose digits, one ``lax.cond`` on one scalar takes a careful
path for the whole tree: the same sums, each slice times its own exact power of two,
and the squares about the mean.

Statistics are lists with an array per weight, of the shape of its stack: () for a leaf
that is one layer. The leaves of a network often share their shapes, and operations on
one leaf alone then compile to one kernel for all of them, which slices of a common
vector do not.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from stablegrad_optax._leaves import (
    Layout,
    statistics_dtype,
    widest_statistics_dtype,
)

# A spread below this share of the root mean square is no scale to normalise by
# (METHODS.md, section 1, item 6).
SPREAD_FLOOR = 0.1

# Variance over mean square. Above, E[g^2] - E[g]^2 in float32 is right to 1e-5; below
# the interval it is lost in rounding, and so far below the floor that it plays no part.
CANCELLATION = (0.5 * SPREAD_FLOOR**2, 0.2)


class _Range(NamedTuple):
    """Binary exponents: which mean squares need a scaling, and which one."""

    lowest: int  # below it, underflow has taken bits from the mean square
    up: int
    down: int


_RANGES = {4: _Range(-100, 70, -80), 8: _Range(-960, 540, -560)}  # by bytes


def spreads(arrays: Sequence[jax.Array], layout: Layout) -> list[jax.Array]:
    """The floored standard deviation of every slice of every weight.

    ``max(sigma, rms / 10)`` with the population standard deviation sigma: right to
    1e-5 relative between 1e-36 and 1e37 whatever the mean; 0 for zeros, not finite
    for a slice that is not finite.

    Args:
      arrays: The leaves of the tree.
      layout: Which of them are weights, and how they are stacked.

    Returns:
      One f[stack] per weight, in the leaf's statistics dtype.
    """
    weights = [(arrays[i], layout.leaves[i]) for i in layout.weights]
    if not weights:
        return []
    moments = [_moments(array, leaf.num_stacked) for array, leaf in weights]
    dtype = widest_statistics_dtype([leaf for _, leaf in weights])
    mean_square = vector([square for _, square in moments], dtype)
    variance = mean_square - vector([_abs_squared(mean) for mean, _ in moments], dtype)
    low, high = CANCELLATION
    cancelled = (variance > low * mean_square) & (variance < high * mean_square)

    def careful() -> list[jax.Array]:
        return [
            _careful_spread(array, mean_square, leaf.num_stacked)
            for (array, leaf), (_, mean_square) in zip(weights, moments, strict=True)
        ]

    def fast() -> list[jax.Array]:
        return [
            _spread(square - _abs_squared(mean), square) for mean, square in moments
        ]

    lost = _out_of_range(mean_square, layout) | cancelled
    return lax.cond(lost.any(), careful, fast)


@partial(jax.jit, static_argnames="num_stacked")
def _careful_spread(
    array: jax.Array, mean_square: jax.Array, num_stacked: int
) -> jax.Array:
    scale, undo = _scaling(mean_square)
    # Without the barrier XLA shares the product between the sums and writes it out.
    one, another = lax.optimization_barrier((array, array))
    mean = _mean(one, num_stacked, lambda x: x * _per_slice(scale, x))
    variance = _mean(
        another,
        num_stacked,
        lambda x: _abs_squared(x * _per_slice(scale, x) - _per_slice(mean, x)),
    )
    # XLA would pull the division by the size out of the square, which then overflows.
    mean = lax.optimization_barrier(mean)
    return _spread(variance, variance + _abs_squared(mean)) * undo


@jax.jit
def _fast_spread(mean: jax.Array, mean_square: jax.Array) -> jax.Array:
    return _spread(mean_square - _abs_squared(mean), mean_square)


def _spread(variance: jax.Array, mean_square: jax.Array) -> jax.Array:
    return safe_sqrt(lax.max(variance, mean_square * SPREAD_FLOOR**2))


def norms(arrays: Sequence[jax.Array], layout: Layout) -> list[jax.Array]:
    """The Euclidean norm of every slice of every weight.

    Right to 1e-5 relative between 1e-36 and the dtype's maximum, where it saturates; 0
    for zeros, not finite for a slice that is not finite.

    Args:
      arrays: The leaves of the tree.
      layout: Which of them are weights, and how they are stacked.

    Returns:
      One f[stack] per weight, in the leaf's statistics dtype.
    """
    weights = [(arrays[i], layout.leaves[i]) for i in layout.weights]
    if not weights:
        return []
    mean_squares = [_mean_square(array, leaf.num_stacked) for array, leaf in weights]
    roots = [math.sqrt(leaf.slice_size) for _, leaf in weights]

    def careful() -> list[jax.Array]:
        return [
            _careful_root(array, mean_square, leaf.num_stacked, root)
            for (array, leaf), mean_square, root in zip(
                weights, mean_squares, roots, strict=True
            )
        ]

    def fast() -> list[jax.Array]:
        return [
            safe_sqrt(mean_square) * root
            for mean_square, root in zip(mean_squares, roots, strict=True)
        ]

    dtype = widest_statistics_dtype([leaf for _, leaf in weights])
    lost = _out_of_range(vector(mean_squares, dtype), layout)
    return lax.cond(lost.any(), careful, fast)


@partial(jax.jit, static_argnames="num_stacked")
def _careful_root(
    array: jax.Array, mean_square: jax.Array, num_stacked: int, root_size: float
) -> jax.Array:
    scale, undo = _scaling(mean_square)
    mean_square = _mean(
        array, num_stacked, lambda x: _abs_squared(x * _per_slice(scale, x))
    )
    norm = safe_sqrt(mean_square) * root_size
    largest = float(jnp.finfo(norm.dtype).max)
    return jnp.where(jnp.isfinite(norm), jnp.minimum(norm * undo, largest), norm)


def means_and_deviations(
    arrays: Sequence[jax.Array], layout: Layout
) -> tuple[list[jax.Array], jax.Array]:
    """The mean and the standard deviation of every slice of every weight.

    The deviation, not floored, is right to 1e-5 relative between 1e-36 and 1e37 as far
    as the entries themselves resolve it beside their mean; 0 for zeros, not finite for
    a slice that is not finite.

    Args:
      arrays: The leaves of the tree.
      layout: Which of them are weights, at least one, and how they are stacked.

    Returns:
      One mean f[stack] per weight in the leaf's statistics dtype, complex for complex
      leaves, and the vector f[slices] of all deviations in the widest of them.
    """
    weights = [(arrays[i], layout.leaves[i]) for i in layout.weights]
    moments = [_moments(array, leaf.num_stacked) for array, leaf in weights]
    dtype = widest_statistics_dtype([leaf for _, leaf in weights])
    mean_square = vector([square for _, square in moments], dtype)
    variance = mean_square - vector([_abs_squared(mean) for mean, _ in moments], dtype)

    def careful() -> tuple[list[jax.Array], jax.Array]:
        pairs = [
            _careful_deviation(array, mean_square, leaf.num_stacked)
            for (array, leaf), (_, mean_square) in zip(weights, moments, strict=True)
        ]
        return [mean for mean, _ in pairs], vector([std for _, std in pairs], dtype)

    def fast() -> tuple[list[jax.Array], jax.Array]:
        return [mean for mean, _ in moments], safe_sqrt(variance)

    lost = _out_of_range(mean_square, layout) | (
        variance < CANCELLATION[1] * mean_square
    )
    return lax.cond(lost.any(), careful, fast)


@partial(jax.jit, static_argnames="num_stacked")
def _careful_deviation(
    array: jax.Array, mean_square: jax.Array, num_stacked: int
) -> tuple[jax.Array, jax.Array]:
    scale, undo = _scaling(mean_square)

    # Products that are equal XLA shares between the sums and writes out; hence the
    # further powers of two.
    def centred(x: jax.Array, unit: float) -> jax.Array:
        return x * _per_slice(unit * scale, x) - _per_slice(unit * mean, x)

    mean = _mean(array, num_stacked, lambda x: x * _per_slice(scale, x))
    # What a sum in float32 leaves of a mean that dominates, and squares about it.
    rest = _mean(array, num_stacked, lambda x: centred(x, 2.0)) * 0.5
    square = _mean(array, num_stacked, lambda x: _abs_squared(centred(x, 0.5))) * 4
    rest = lax.optimization_barrier(rest)  # see _careful_spread
    variance = lax.max(square - _abs_squared(rest), jnp.zeros_like(square))
    return (mean + rest) * undo.astype(mean.dtype), safe_sqrt(variance) * undo


def pooled(values: Sequence[jax.Array], sizes: Sequence[int]) -> jax.Array:
    """``sqrt(sum n d^2 / sum n)`` along a new first axis of equally shaped arrays.

    Args:
      values: Spreads d, each f[slices, *stack].
      sizes: For each of them n, the number of elements of one slice.

    Returns:
      f[*stack].
    """
    stacked = jnp.concatenate(values)
    weights = np.repeat(sizes, [len(value) for value in values])
    shares = (weights / weights.sum()).astype(stacked.dtype)
    # Relative to the largest of them, no square leaves the range.
    largest = lax.stop_gradient(stacked.max(0))
    invertible = float(jnp.finfo(stacked.dtype).max) / 16
    unit = jnp.where(largest == 0, 1, jnp.minimum(largest, invertible))
    mean_square = jnp.tensordot(shares, (stacked / unit) ** 2, 1)
    return safe_sqrt(mean_square) * unit


def vector(values: Iterable[jax.Array], dtype: Any) -> jax.Array:
    """One vector of all entries, f[0] where there are none."""
    flat = [value.astype(dtype).reshape(-1) for value in values]
    return lax.concatenate(flat, 0) if flat else jnp.zeros(0, dtype)


def entries(values: jax.Array) -> list[jax.Array]:
    """The entries of a vector, an f[] each, for operations on one leaf alone.

    XLA would fuse a constant slice into whatever uses it, and the kernels of every leaf
    would be their own: 20 ms of compilation each. The positions that come out of a
    conditional are no constants, and one kernel serves all leaves of a shape.
    """

    def positions() -> list[jax.Array]:
        return [jnp.asarray(i, jnp.int32) for i in range(values.size)]

    if values.size < 2:
        return [values.reshape(()) for _ in range(values.size)]
    return [
        lax.dynamic_index_in_dim(values, i, keepdims=False)
        for i in lax.cond(values[0] == 0, positions, positions)
    ]


@jax.custom_jvp
def divide(scale: jax.Array, statistic: jax.Array) -> jax.Array:
    """``scale / statistic``, saturating, with derivatives that do not overflow."""
    largest = float(jnp.finfo(statistic.dtype).max)
    return jnp.minimum(scale / statistic, largest)


@divide.defjvp
def _divide_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    scale, statistic = primals
    scale_dot, statistic_dot = tangents
    factor = divide(scale, statistic)
    # Two divisions in a row: the square of a small statistic would underflow.
    return factor, scale_dot / statistic - statistic_dot / statistic * factor


@jax.jit
def safe_sqrt(x: jax.Array) -> jax.Array:
    """The square root, with derivative 0 at 0."""
    zero = x == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, x)))


@partial(jax.jit, static_argnames="num_stacked")
def _moments(array: jax.Array, num_stacked: int) -> tuple[jax.Array, jax.Array]:
    """Mean and mean squared modulus of each slice."""
    one, another = array, array
    if array.dtype != statistics_dtype(array.dtype):
        # Without the barrier XLA shares the conversion and writes it out.
        one, another = lax.optimization_barrier((array, array))
    return _mean(one, num_stacked, lambda x: x), _mean_square(another, num_stacked)


@partial(jax.jit, static_argnames="num_stacked")
def _mean_square(array: jax.Array, num_stacked: int) -> jax.Array:
    return _mean(array, num_stacked, _abs_squared)


def _mean(
    array: jax.Array, num_stacked: int, function: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """The mean of a function of the entries over each slice, in wide precision."""
    dtype = statistics_dtype(array.dtype)
    if jnp.iscomplexobj(array):
        dtype = np.result_type(dtype, np.complex64)
    axes = tuple(range(num_stacked, array.ndim))
    size = math.prod(array.shape[num_stacked:])
    total = jnp.sum(function(array.astype(dtype)), axes)
    return _replicated(total / max(size, 1))


def _per_slice(value: jax.Array, x: jax.Array) -> jax.Array:
    """Values of the slices, shaped to be combined with the entries."""
    return value.reshape(value.shape + (1,) * (x.ndim - value.ndim)).astype(x.dtype)


def _abs_squared(x: jax.Array) -> jax.Array:
    return x.real * x.real + x.imag * x.imag if jnp.iscomplexobj(x) else x * x


def _out_of_range(mean_square: jax.Array, layout: Layout) -> jax.Array:
    lowest = [
        np.full(leaf.num_slices, 2.0 ** _range(statistics_dtype(leaf.dtype)).lowest)
        for leaf in (layout.leaves[i] for i in layout.weights)
    ]
    small = mean_square < np.concatenate(lowest).astype(mean_square.dtype)
    return small | ~jnp.isfinite(mean_square)


def _scaling(mean_square: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The power of two that brings squares into range, and its inverse."""
    lowest, up, down = _range(mean_square.dtype)
    small, finite = mean_square < 2.0**lowest, jnp.isfinite(mean_square)

    def choose(up: int, down: int) -> jax.Array:
        unscaled = jnp.ones_like(mean_square)
        return jnp.where(small, 2.0**up, jnp.where(finite, unscaled, 2.0**down))

    return choose(up, down), choose(-up, -down)


def _range(dtype: Any) -> _Range:
    return _RANGES[np.dtype(dtype).itemsize]


def _replicated(x: jax.Array) -> jax.Array:
    """Gathers a stack that is sharded over an explicit mesh."""
    sharding = jax.typeof(x).sharding
    if any(axis is not None for axis in sharding.spec):
        x = jax.sharding.reshard(x, sharding.update(spec=(None,) * x.ndim))
    return x

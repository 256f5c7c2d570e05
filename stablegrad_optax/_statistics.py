"""Standard deviations and norms of gradient leaves, safe at every magnitude.

Each statistic comes from plain float32 (float64) sums of g and g^2: one pass over the
gradient, nothing of its size written, one all-reduce for all leaves when they are
sharded. Where that would lose digits, one ``lax.cond`` on one scalar takes a careful
path for the whole tree: the same sums, each slice times its own exact power of two,
and the squares about the mean.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from stablegrad_optax._leaves import Layout, statistics_dtype

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


def spreads(arrays: list[jax.Array], layout: Layout) -> jax.Array:
    """The floored standard deviation of every slice of every weight.

    ``max(sigma, rms / 10)`` with the population standard deviation sigma: right to
    1e-5 relative between 1e-36 and 1e37 whatever the mean; 0 for zeros, not finite
    for a slice that is not finite.

    Args:
      arrays: The leaves of the tree.
      layout: Which of them are weights, and how they are stacked.

    Returns:
      f[weight slices], in the widest statistics dtype of the weights.
    """
    if not layout.weights:
        return jnp.zeros(0, jnp.float32)
    mean = _mean(lambda x: x, arrays, layout)
    mean_square = _mean(_abs_squared, arrays, layout)
    variance = mean_square - _abs_squared(mean)
    scaling = _scaling(mean_square, layout)
    low, high = CANCELLATION
    cancelled = (variance > low * mean_square) & (variance < high * mean_square)

    def careful() -> jax.Array:
        scale = scaling.scale
        mean = _mean(lambda x, s: x * s, arrays, layout, scale)
        mean_square = _mean(lambda x, s: _abs_squared(x * s), arrays, layout, scale)
        variance = _mean(
            lambda x, s, m: _abs_squared(x * s - m), arrays, layout, scale, mean
        )
        return _spread(variance, mean_square) * scaling.undo

    def fast() -> jax.Array:
        return _spread(variance, mean_square)

    return _cond(jnp.any(scaling.needed | cancelled), careful, fast)


def _spread(variance: jax.Array, mean_square: jax.Array) -> jax.Array:
    return safe_sqrt(jnp.maximum(variance, mean_square * SPREAD_FLOOR**2))


def norms(arrays: list[jax.Array], layout: Layout) -> jax.Array:
    """The Euclidean norm of every slice of every weight.

    Right to 1e-5 relative between 1e-36 and the dtype's maximum, beyond which it is
    infinite; 0 for zeros, not finite for a slice that is not finite.

    Args:
      arrays: The leaves of the tree.
      layout: Which of them are weights, and how they are stacked.

    Returns:
      f[weight slices], in the widest statistics dtype of the weights.
    """
    if not layout.weights:
        return jnp.zeros(0, jnp.float32)
    mean_square = _mean(_abs_squared, arrays, layout)
    scaling = _scaling(mean_square, layout)
    root_sizes = np.sqrt(layout.weight_sizes).astype(mean_square.dtype)

    def careful() -> jax.Array:
        mean_square = _mean(
            lambda x, s: _abs_squared(x * s), arrays, layout, scaling.scale
        )
        return safe_sqrt(mean_square) * root_sizes * scaling.undo

    def fast() -> jax.Array:
        return safe_sqrt(mean_square) * root_sizes

    return _cond(jnp.any(scaling.needed), careful, fast)


def pool(values: jax.Array, layout: Layout) -> jax.Array:
    """Gives every slice that is scaled the spread that its factor divides by.

    A weight's slice keeps its own; a follower takes ``sqrt(sum n d^2 / sum n)`` over
    the slices it follows, d their spreads and n their numbers of elements.

    Args:
      values: f[weight slices].
      layout: Who follows whom.

    Returns:
      f[scaled slices].
    """
    if layout.num_pools:
        members = values[layout.members]
        sizes = layout.weight_sizes[layout.members]
        totals = np.bincount(layout.pools, sizes, layout.num_pools)
        shares = (sizes / totals[layout.pools]).astype(values.dtype)
        # Relative to the largest of its pool, no square leaves the range.
        largest = jax.lax.stop_gradient(
            jax.ops.segment_max(members, layout.pools, layout.num_pools)
        )
        unit = jnp.where(largest == 0, 1, largest)
        squares = shares * (members / unit[layout.pools]) ** 2
        mean_square = jax.ops.segment_sum(squares, layout.pools, layout.num_pools)
        values = jnp.concatenate([values, safe_sqrt(mean_square) * unit])
    return values[layout.sources]


def safe_sqrt(x: jax.Array) -> jax.Array:
    """The square root, with derivative 0 at 0."""
    zero = x == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, x)))


def _mean(
    function: Callable[..., jax.Array],
    arrays: list[jax.Array],
    layout: Layout,
    *per_slice: jax.Array,
) -> jax.Array:
    """The mean of a function over each slice of each weight, as one vector.

    ``function`` is given the leaf in its statistics' precision and, for each vector in
    ``per_slice``, the entries of the leaf's slices.
    """
    means = []
    start = 0
    for i in layout.weights:
        array, leaf = arrays[i], layout.leaves[i]
        dtype = statistics_dtype(array.dtype)
        if jnp.iscomplexobj(array):
            dtype = np.result_type(dtype, np.complex64)
        stop = start + leaf.num_slices
        ones = (1,) * (array.ndim - leaf.num_stacked)
        entries = []
        for vector in per_slice:
            entry = jax.lax.slice(vector, (start,), (stop,))
            entry = entry if jnp.iscomplexobj(array) else entry.real
            entries.append(entry.reshape(leaf.stack + ones).astype(dtype))
        start = stop
        axes = tuple(range(leaf.num_stacked, array.ndim))
        total = jnp.sum(function(array.astype(dtype), *entries), axes)
        means.append(_replicated(total / max(leaf.slice_size, 1)).reshape(-1))
    widest = np.result_type(*{mean.dtype for mean in means})
    return jnp.concatenate([mean.astype(widest) for mean in means])


def _abs_squared(x: jax.Array) -> jax.Array:
    return x.real * x.real + x.imag * x.imag if jnp.iscomplexobj(x) else x * x


class _Scaling(NamedTuple):
    needed: jax.Array  # bool[slices]
    scale: jax.Array  # f[slices], an exact power of two
    undo: jax.Array  # f[slices], its inverse


def _scaling(mean_square: jax.Array, layout: Layout) -> _Scaling:
    """Brings squares back into the range of the dtype, by the sums that left it."""
    lowest, up, down = np.concatenate(
        [
            [_RANGES[statistics_dtype(leaf.dtype).itemsize]] * leaf.num_slices
            for leaf in (layout.leaves[i] for i in layout.weights)
        ]
    ).T
    small = mean_square < _two_to(lowest, mean_square.dtype)
    large = ~jnp.isfinite(mean_square)

    def choose(up: npt.NDArray[np.int64], down: npt.NDArray[np.int64]) -> jax.Array:
        powers = jnp.where(large, _two_to(down, mean_square.dtype), 1)
        return jnp.where(small, _two_to(up, mean_square.dtype), powers)

    return _Scaling(small | large, choose(up, down), choose(-up, -down))


def _two_to(exponent: npt.NDArray[np.int64], dtype: Any) -> npt.NDArray[Any]:
    return np.ldexp(1.0, exponent).astype(dtype)


def _replicated(x: jax.Array) -> jax.Array:
    """Gathers a stack that is sharded over an explicit mesh."""
    sharding = jax.typeof(x).sharding
    if any(axis is not None for axis in sharding.spec):
        x = jax.sharding.reshard(x, sharding.update(spec=(None,) * x.ndim))
    return x


def _cond(
    predicate: jax.Array,
    if_true: Callable[[], jax.Array],
    if_false: Callable[[], jax.Array],
) -> jax.Array:
    chosen: jax.Array = jax.lax.cond(predicate, if_true, if_false)
    return chosen

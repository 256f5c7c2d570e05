"""Standard deviations and norms of gradient leaves, safe at every magnitude.

Each statistic comes from plain float32 (float64) sums of g and g^2: nothing of the
gradient's size is written but a copy of its small leaves, which are summed together;
one all-reduce for all leaves when they are sharded. Where that would lose digits, one
``lax.cond`` on one scalar takes a careful path for the whole tree: the same sums, each
slice times its own exact power of two, and the squares about the mean.

A statistic is one vector with an entry per slice of each weight, in the order of the
tree. All arithmetic but the sums themselves is on such vectors: what a program does
for every leaf is what it costs to compile.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import lax

from stablegrad_optax._leaves import (
    Layout,
    Leaf,
    statistics_dtype,
    widest_statistics_dtype,
)

# A spread below this share of the root mean square is no scale to normalise by
# (METHODS.md, section 1, item 6).
SPREAD_FLOOR = 0.1

# Variance over mean square. Above, E[g^2] - E[g]^2 in float32 is right to 1e-5; below
# the interval it is lost in rounding, and so far below the floor that it plays no part.
CANCELLATION = (0.5 * SPREAD_FLOOR**2, 0.2)

# Leaves of at most so many elements are stacked for their sums, so many at a time.
STACKED_SIZE, STACKED_LEAVES = 4096, 32

Indices = npt.NDArray[np.int64]

# Where each leaf's slices begin in a vector of slices, u32[] each.
Starts = Sequence[jax.Array]


class _Range(NamedTuple):
    """Binary exponents: which mean squares need a scaling, and which one."""

    lowest: int  # below it, underflow has taken bits from the mean square
    up: int
    down: int


_RANGES = {4: _Range(-100, 70, -80), 8: _Range(-960, 540, -560)}  # by bytes


def spreads(arrays: Sequence[jax.Array], layout: Layout, starts: Starts) -> jax.Array:
    """The floored standard deviation of every slice of every weight.

    ``max(sigma, rms / 10)`` with the population standard deviation sigma: right to
    1e-5 relative between 1e-36 and 1e37 whatever the mean; 0 for zeros, not finite
    for a slice that is not finite.

    Args:
      arrays: The leaves of the tree.
      layout: Which of them are weights, and how they are stacked.
      starts: The :func:`positions` of the weights.

    Returns:
      f[slices], in the widest statistics dtype of the weights.
    """
    weights = _weights(arrays, layout, starts)
    if not weights.leaves:
        return weights.sizes
    mean, mean_square = weights.means([_itself, _square])
    variance = mean_square - _square(mean)
    low, high = CANCELLATION
    cancelled = (variance > low * mean_square) & (variance < high * mean_square)
    scale, undo, out_of_range = _scaling(mean_square, weights.leaves)

    def careful() -> jax.Array:
        (mean,) = weights.means([_times], scale)
        (variance,) = weights.means([_square_about], scale, mean)
        return _spread(variance, variance + _square(mean)) * undo

    def fast() -> jax.Array:
        return _spread(mean_square - _square(mean), mean_square)

    return lax.cond((out_of_range | cancelled).any(), careful, fast)


def _spread(variance: jax.Array, mean_square: jax.Array) -> jax.Array:
    return safe_sqrt(lax.max(variance, mean_square * SPREAD_FLOOR**2))


def means_and_deviations(
    arrays: Sequence[jax.Array], layout: Layout, starts: Starts
) -> tuple[jax.Array, jax.Array]:
    """The mean and the standard deviation of every slice of every weight.

    The deviation, not floored, is right to 1e-5 relative between 1e-36 and 1e37 as far
    as the entries themselves resolve it beside their mean; 0 for zeros, not finite for
    a slice that is not finite.

    Args:
      arrays: The leaves of the tree.
      layout: Which of them are weights, and how they are stacked.
      starts: The :func:`positions` of the weights.

    Returns:
      The means, complex where a leaf is, and the deviations, each f[slices] in the
      widest statistics dtype of the weights.
    """
    weights = _weights(arrays, layout, starts)
    if not weights.leaves:
        return weights.sizes, weights.sizes
    mean, mean_square = weights.means([_itself, _square])
    cancelled = mean_square - _square(mean) < CANCELLATION[1] * mean_square
    scale, undo, out_of_range = _scaling(mean_square, weights.leaves)

    def careful() -> tuple[jax.Array, jax.Array]:
        (mean,) = weights.means([_times], scale)
        # What a sum in float32 leaves of a mean that dominates, and squares about it.
        rest, square = weights.means([_about, _square_about], scale, mean)
        variance = lax.max(square - _square(rest), jnp.zeros_like(square))
        return (mean + rest) * undo.astype(mean.dtype), safe_sqrt(variance) * undo

    def fast() -> tuple[jax.Array, jax.Array]:
        return mean, safe_sqrt(mean_square - _square(mean))

    return lax.cond((out_of_range | cancelled).any(), careful, fast)


def norms(arrays: Sequence[jax.Array], layout: Layout, starts: Starts) -> jax.Array:
    """The Euclidean norm of every slice of every weight.

    Right to 1e-5 relative between 1e-36 and the dtype's maximum, where it saturates; 0
    for zeros, not finite for a slice that is not finite.

    Args:
      arrays: The leaves of the tree.
      layout: Which of them are weights, and how they are stacked.
      starts: The :func:`positions` of the weights.

    Returns:
      f[slices], in the widest statistics dtype of the weights.
    """
    weights = _weights(arrays, layout, starts)
    if not weights.leaves:
        return weights.sizes
    (mean_square,) = weights.means([_square])
    root_size = jnp.sqrt(weights.sizes)
    scale, undo, out_of_range = _scaling(mean_square, weights.leaves)

    def careful() -> jax.Array:
        (mean_square,) = weights.means([_square_times], scale)
        norm = safe_sqrt(mean_square) * root_size
        largest = float(jnp.finfo(norm.dtype).max)
        return jnp.where(jnp.isfinite(norm), jnp.minimum(norm * undo, largest), norm)

    def fast() -> jax.Array:
        return safe_sqrt(mean_square) * root_size

    return lax.cond(out_of_range.any(), careful, fast)


def pooled(values: jax.Array, sizes: npt.ArrayLike) -> jax.Array:
    """``sqrt(sum n d^2 / sum n)`` along the first axis.

    Args:
      values: Spreads d, f[k, ...].
      sizes: For each of them n, the number of elements of one slice, [k].

    Returns:
      f[...].
    """
    shares = (np.asarray(sizes) / np.sum(sizes)).astype(values.dtype)
    # Relative to the largest of them, no square leaves the range.
    largest = lax.stop_gradient(values.max(0))
    invertible = float(jnp.finfo(values.dtype).max) / 16
    unit = jnp.where(largest == 0, 1, jnp.minimum(largest, invertible))
    mean_square = jnp.tensordot(shares, (values / unit) ** 2, 1)
    return safe_sqrt(mean_square) * unit


def concatenate(vectors: Sequence[jax.Array], block: int = 32) -> jax.Array:
    """One vector; in blocks, for one operation takes quadratic time to compile."""
    while len(vectors) > 1:
        vectors = [
            lax.concatenate(vectors[i : i + block], 0)
            for i in range(0, len(vectors), block)
        ]
    return vectors[0]


def places(leaves: Sequence[Leaf]) -> list[Indices]:
    """The places of each leaf's slices in a vector of all."""
    ends = np.cumsum([0, *(leaf.num_slices for leaf in leaves)])
    return [np.arange(*ends[i : i + 2]) for i in range(len(leaves))]


def positions(values: jax.Array, leaves: Sequence[Leaf]) -> Starts:
    """Where each leaf's slices begin in a vector of slices, u32[] each.

    XLA would fuse a slice at a constant into whatever uses it, and the kernels of every
    leaf would be their own: 20 ms of compilation each. The results of a conditional are
    no constants, and one kernel serves all leaves of a shape.

    Args:
      values: Any vector that is not a constant of the program.
      leaves: Those whose slices the vector holds, one after another.
    """
    first = np.cumsum([0, *(leaf.num_slices for leaf in leaves)])[:-1]

    def starts() -> list[jax.Array]:
        return [jnp.asarray(start, jnp.uint32) for start in first]

    return lax.cond(values[0] == 0, starts, starts) if leaves else []


def entries(
    values: jax.Array, leaves: Sequence[Leaf], starts: Starts
) -> list[jax.Array]:
    """The entries of a vector of slices that belong to each leaf, f[stack]."""
    return [
        lax.dynamic_slice(values, (start,), (leaf.num_slices,)).reshape(leaf.stack)
        for start, leaf in zip(starts, leaves, strict=True)
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


class _Part(NamedTuple):
    """What one kernel sums: a leaf, or small leaves that are stacked for it."""

    array: jax.Array
    num_stacked: int
    places: Indices  # of its slices among all
    start: jax.Array | None  # where those of a leaf begin

    def of(self, vector: jax.Array) -> jax.Array:
        """The entries of a vector of slices that belong to it, f[stack]."""
        if self.start is None:
            return vector[self.places]
        values = lax.dynamic_slice(vector, (self.start,), (len(self.places),))
        return values.reshape(self.array.shape[: self.num_stacked])


class _Weights(NamedTuple):
    """The leaves that are measured."""

    parts: list[_Part]
    leaves: list[Leaf]
    sizes: jax.Array  # f[slices], elements of each slice

    def means(
        self, functions: Sequence[Callable[..., jax.Array]], *vectors: jax.Array
    ) -> list[jax.Array]:
        """The mean over each slice of functions of its entries, f[slices] each.

        A function is given an array and its leaf's entries of the vectors.
        """
        arrays = [part.array for part in self.parts]
        # XLA would share conversions and products between the sums, and write them out.
        copies = lax.optimization_barrier([(arrays, vectors)] * len(functions))
        return [
            self._mean(function, *copy)
            for function, copy in zip(functions, copies, strict=True)
        ]

    def _mean(
        self,
        function: Callable[..., jax.Array],
        arrays: list[jax.Array],
        vectors: Sequence[jax.Array],
    ) -> jax.Array:
        sums = [
            _sum(function, part.num_stacked, array, *(part.of(v) for v in vectors))
            for part, array in zip(self.parts, arrays, strict=True)
        ]
        dtype = np.result_type(self.sizes.dtype, *{each.dtype for each in sums})
        total = concatenate([each.astype(dtype) for each in sums])
        order = np.concatenate([part.places for part in self.parts])
        if (order[1:] < order[:-1]).any():
            total = total[np.argsort(order)]
        # XLA would pull the division out of the mean's square, and let it overflow.
        return lax.optimization_barrier(total / self.sizes.astype(dtype))


def _weights(arrays: Sequence[jax.Array], layout: Layout, starts: Starts) -> _Weights:
    leaves = [layout.leaves[i] for i in layout.weights]
    sizes = [np.full(leaf.num_slices, max(leaf.slice_size, 1)) for leaf in leaves]
    of_leaves = places(leaves)
    parts = []
    for block in _blocks([arrays[i] for i in layout.weights], leaves):
        first, *others = (arrays[layout.weights[n]] for n in block)
        if others:
            of_block = np.concatenate([of_leaves[n] for n in block])
            parts.append(_Part(jnp.stack([first, *others]), 1, of_block, None))
        else:
            (n,) = block
            parts.append(_Part(first, leaves[n].num_stacked, of_leaves[n], starts[n]))
    size = np.concatenate([np.zeros(0), *sizes])
    return _Weights(parts, leaves, jnp.asarray(size, widest_statistics_dtype(leaves)))


def _blocks(arrays: Sequence[jax.Array], leaves: Sequence[Leaf]) -> list[list[int]]:
    """Which leaves are stacked for one kernel: small ones that are alike.

    Starting a kernel takes longer than copying some kilobytes.
    """
    alike: dict[Any, list[int]] = {}
    for n, (array, leaf) in enumerate(zip(arrays, leaves, strict=True)):
        is_small = not leaf.num_stacked and leaf.slice_size <= STACKED_SIZE
        alike.setdefault(jax.typeof(array) if is_small else n, []).append(n)
    return [
        group[i : i + STACKED_LEAVES]
        for group in alike.values()
        for i in range(0, len(group), STACKED_LEAVES)
    ]


@partial(jax.jit, static_argnums=(0, 1))
def _sum(
    function: Callable[..., jax.Array],
    num_stacked: int,
    array: jax.Array,
    *values: jax.Array,
) -> jax.Array:
    """The sum over each slice in wide precision, f[slices of the leaf]."""
    dtype = np.result_type(statistics_dtype(array.dtype), array.dtype)
    if not jnp.iscomplexobj(array):
        values = tuple(value.real for value in values)
    per_slice = [
        value.astype(dtype).reshape(value.shape + (1,) * (array.ndim - num_stacked))
        for value in values
    ]
    axes = tuple(range(num_stacked, array.ndim))
    total = jnp.sum(function(array.astype(dtype), *per_slice), axes)
    return _replicated(total).reshape(-1)


def _itself(x: jax.Array) -> jax.Array:
    return x


def _times(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * scale


def _about(x: jax.Array, scale: jax.Array, mean: jax.Array) -> jax.Array:
    return x * scale - mean


def _square(x: jax.Array) -> jax.Array:
    return x.real * x.real + x.imag * x.imag if jnp.iscomplexobj(x) else x * x


def _square_times(x: jax.Array, scale: jax.Array) -> jax.Array:
    return _square(x * scale)


def _square_about(x: jax.Array, scale: jax.Array, mean: jax.Array) -> jax.Array:
    return _square(x * scale - mean)


def _scaling(
    mean_square: jax.Array, leaves: Sequence[Leaf]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The power of two that brings squares into range, its inverse, where it is not 1.

    It is computed before the conditional: XLA would fuse it into each leaf's sums.
    """
    ranges = [_RANGES[statistics_dtype(leaf.dtype).itemsize] for leaf in leaves]
    exponents = np.repeat(ranges, [leaf.num_slices for leaf in leaves], axis=0)
    lowest, up, down = np.exp2(exponents.T).astype(mean_square.dtype)
    small, finite = mean_square < lowest, jnp.isfinite(mean_square)

    def choose(up: Any, down: Any) -> jax.Array:
        return jnp.where(small, up, jnp.where(finite, 1, down))

    return choose(up, down), choose(1 / up, 1 / down), small | ~finite


def _replicated(x: jax.Array) -> jax.Array:
    """Gathers a stack that is sharded over an explicit mesh."""
    sharding = jax.typeof(x).sharding
    if any(axis is not None for axis in sharding.spec):
        x = jax.sharding.reshard(x, sharding.update(spec=(None,) * x.ndim))
    return x

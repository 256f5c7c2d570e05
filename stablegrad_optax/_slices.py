"""Conversions of arrays to a vector with one entry per slice, and back.

A statistic is such a vector, in the order of the tree, and so are the factors. The code
fits how XLA compiles both conversions:

* Small arrays of one type are stacked and summed by one kernel, because the start of a
  kernel takes longer than the copy of some kilobytes.
* On a TPU or a GPU, `means` takes all sums of an array in one read by one reduction.
  On a CPU, XLA makes one loop per sum and would write out what the loops share, so that
  `means_in_loops` gives each sum operands of its own.
* A GPU fuses the kernels of all arrays that read their factors from one vector, and
  the optimizer's kernels after them. A CPU compiles one kernel for all arrays of a
  shape, as long as no array has a constant place in the vector.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import lax

from stablegrad_optax._leaves import Leaf
from stablegrad_optax._numerics import scale, sum_dtype

# Leaves of at most STACKED_SIZE elements are stacked, STACKED_LEAVES at a time.
STACKED_SIZE, STACKED_LEAVES = 4096, 32

Indices = npt.NDArray[np.int64]
Function = Callable[..., jax.Array]


def places(leaves: Sequence[Leaf]) -> list[Indices]:
    """Returns the places of each leaf's slices in a vector of all slices."""
    ends = np.cumsum([0, *(leaf.num_slices for leaf in leaves)])
    return [np.arange(*ends[i : i + 2]) for i in range(len(leaves))]


def per_slice(
    leaves: Sequence[Leaf], value: Callable[[Leaf], npt.ArrayLike], dtype: Any
) -> npt.NDArray[Any]:
    """Repeats the values of each leaf for its slices, [slices, ...]."""
    counts = np.array([leaf.num_slices for leaf in leaves], int)
    return np.repeat([value(leaf) for leaf in leaves], counts, 0).astype(dtype)


def means(
    functions: Sequence[Function], arrays: Sequence[jax.Array], leaves: Sequence[Leaf]
) -> list[jax.Array]:
    """Takes the means of functions over each slice, in one read of the arrays.

    Args:
      functions: Elementwise functions of an array in the precision of the statistics.
      arrays: The arrays, at least one.
      leaves: The descriptions of the arrays.

    Returns:
      f[slices] for each function.
    """
    blocks = _block(arrays, leaves)
    sums = [
        _sums(functions, stack, [], axes)
        for stack, axes in zip(blocks.stacks, blocks.num_stacked, strict=True)
    ]
    return [blocks.mean(function_sums) for function_sums in zip(*sums, strict=True)]


def means_in_loops(
    functions: Sequence[Function],
    arrays: Sequence[jax.Array],
    leaves: Sequence[Leaf],
    factors: jax.Array | None = None,
) -> list[jax.Array]:
    """Takes the means of functions over each slice, in one read for each function.

    With ``factors`` f[slices], the second argument of a function is the slice's factor.
    """
    blocks = _block(arrays, leaves)
    arguments: list[list[jax.Array]] = [[] for _ in blocks.stacks]
    if factors is not None:
        arguments = [
            [factors[places].reshape(stack.shape[:axes])]
            for places, stack, axes in zip(
                blocks.places, blocks.stacks, blocks.num_stacked, strict=True
            )
        ]
    copies = lax.optimization_barrier([blocks.stacks] * len(functions))
    results = []
    for function, stacks in zip(functions, copies, strict=True):
        each = zip(stacks, arguments, blocks.num_stacked, strict=True)
        results.append(blocks.mean([_sums([function], *block)[0] for block in each]))
    # Without a barrier XLA pulls the division out of the square of the mean, and the
    # square of the sum overflows.
    return lax.optimization_barrier(results)


@partial(jax.jit, static_argnums=1)
def read(vector: jax.Array, leaves: tuple[Leaf, ...]) -> list[jax.Array]:
    """Splits a vector f[slices] into f[stack] for each leaf."""
    if not leaves:
        return []
    (entries,) = split([vector], [[leaf.num_slices for leaf in leaves]], vector.any())
    return [
        entry.reshape(leaf.stack) for entry, leaf in zip(entries, leaves, strict=True)
    ]


def split(
    arrays: Sequence[jax.Array], sizes: Sequence[Sequence[int]], flag: jax.Array
) -> list[list[jax.Array]]:
    """Splits each array along its first axis into parts of these sizes.

    XLA for a CPU fuses a slice at a constant position into what computes the array or
    uses the slice, and then compiles a kernel for every slice. It does not treat the
    result of a conditional as a constant, so that one kernel serves all slices of a
    shape.

    Args:
      arrays: The arrays.
      sizes: For each array the lengths of its parts.
      flag: Any bool of the program that is not a constant. Under ``vmap`` it should be
        the same for all runs.
    """
    arrays = list(arrays)
    starts = [np.cumsum([0, *each[:-1]]).tolist() for each in sizes]

    def at_constants(arrays: list[jax.Array]) -> list[list[jax.Array]]:
        return [
            [lax.slice_in_dim(array, i, i + n) for i, n in zip(*each, strict=True)]
            for array, *each in zip(arrays, starts, sizes, strict=True)
        ]

    def at_variables(arrays: list[jax.Array]) -> list[list[jax.Array]]:
        def constants() -> list[list[jax.Array]]:
            return [[jnp.asarray(i, jnp.uint32) for i in each] for each in starts]

        return [
            [lax.dynamic_slice_in_dim(array, i, n) for i, n in zip(*each, strict=True)]
            for array, *each in zip(
                arrays, lax.cond(flag, constants, constants), sizes, strict=True
            )
        ]

    return lax.platform_dependent(arrays, cpu=at_variables, default=at_constants)


def take(tree: Any, leaves: Sequence[Leaf]) -> list[jax.Array]:
    """Takes these leaves, and converts NumPy arrays and numbers to JAX arrays."""
    arrays = jax.tree.leaves(tree)
    return [jnp.asarray(arrays[leaf.position]) for leaf in leaves]


def multiply(tree: Any, leaves: tuple[Leaf, ...], factors: jax.Array) -> Any:
    """Multiplies every slice of these leaves by its factor f[slices]."""
    scaled = map(scale, take(tree, leaves), read(factors, leaves))
    return replace(tree, leaves, scaled)


def replace(tree: Any, leaves: Sequence[Leaf], arrays: Iterable[jax.Array]) -> Any:
    """Replaces these leaves by other arrays."""
    flat, treedef = jax.tree.flatten(tree)
    for leaf, array in zip(leaves, arrays, strict=True):
        flat[leaf.position] = array
    return jax.tree.unflatten(treedef, flat)


def concatenate(vectors: Sequence[jax.Array], block: int = 32) -> jax.Array:
    """Joins vectors in blocks, because XLA compiles one operation in quadratic time."""
    while len(vectors) > 1:
        vectors = [
            lax.concatenate(vectors[i : i + block], 0)
            for i in range(0, len(vectors), block)
        ]
    return vectors[0]


class _Blocks(NamedTuple):
    """Holds the arrays to sum over slices, with small ones of one type stacked."""

    stacks: list[jax.Array]
    num_stacked: list[int]  # how many leading axes of a stack index slices
    places: list[Indices]  # the places of a stack's slices in a vector of all slices
    sizes: npt.NDArray[np.int64]  # the number of elements of each slice

    def mean(self, sums: Sequence[jax.Array]) -> jax.Array:
        """Divides the sums of slices by their sizes, in the order of the tree."""
        dtype = np.result_type(*{each.dtype for each in sums})
        total = concatenate([each.astype(dtype) for each in sums])
        places = np.concatenate(self.places)
        if (places[1:] < places[:-1]).any():
            total = total[np.argsort(places)]
        return total / self.sizes.astype(dtype)


def _block(arrays: Sequence[jax.Array], leaves: Sequence[Leaf]) -> _Blocks:
    alike: dict[Any, list[int]] = {}
    for n, (array, leaf) in enumerate(zip(arrays, leaves, strict=True)):
        is_small = not leaf.num_stacked and leaf.slice_size <= STACKED_SIZE
        alike.setdefault(jax.typeof(array) if is_small else n, []).append(n)
    groups = [
        group[i : i + STACKED_LEAVES]
        for group in alike.values()
        for i in range(0, len(group), STACKED_LEAVES)
    ]
    leaf_places = places(leaves)
    return _Blocks(
        stacks=[
            jnp.stack([arrays[n] for n in group])
            if len(group) > 1
            else arrays[group[0]]
            for group in groups
        ],
        num_stacked=[
            leaves[group[0]].num_stacked or int(len(group) > 1) for group in groups
        ],
        places=[np.concatenate([leaf_places[n] for n in group]) for group in groups],
        sizes=np.concatenate(
            [np.full(leaf.num_slices, max(leaf.slice_size, 1)) for leaf in leaves]
        ),
    )


def _sums(
    functions: Sequence[Function],
    array: jax.Array,
    arguments: Sequence[jax.Array],
    num_stacked: int,
) -> list[jax.Array]:
    """Sums functions over each slice in wide precision; each sum is f[slices].

    One reduction has several operands, so that a GPU also adds up the results of its
    blocks in one kernel.
    """
    wide = array.astype(sum_dtype(array.dtype))
    values = [function(wide, *arguments) for function in functions]
    axes = tuple(range(num_stacked, array.ndim))
    if len(values) == 1:
        totals = [jnp.sum(values[0], axes)]
    else:
        zeros = [jnp.zeros((), value.dtype) for value in values]
        totals = lax.reduce(values, zeros, _add, axes)
    return [replicated(total).reshape(-1) for total in totals]


def _add(xs: Sequence[jax.Array], ys: Sequence[jax.Array]) -> list[jax.Array]:
    return [x + y for x, y in zip(xs, ys, strict=True)]


def replicated(array: jax.Array) -> jax.Array:
    """Gathers an array that is sharded over an explicit mesh."""
    sharding = jax.typeof(array).sharding
    if any(axis is not None for axis in sharding.spec):
        spec = (None,) * array.ndim
        array = jax.sharding.reshard(array, sharding.update(spec=spec))
    return array

"""The one door to XLA: from leaves to a vector with an entry a slice, and back.

A statistic is such a vector, in the order of the tree, and so are the factors. Both
directions are written for what the compilers make of them:

* Small leaves that are alike are stacked and summed by one kernel: to start one takes
  longer than to copy some kilobytes.
* The sums of a leaf stand side by side: XLA for TPU and GPU reads the leaf once for all
  of them. For a CPU it makes a loop of each, and would write out what they share: there
  they are kept ``apart``.
* A GPU joins the kernels of all leaves that read their factors from one vector, and the
  optimizer's behind them. A CPU compiles one kernel for all leaves of a shape, as
  long as none knows its place in the vector.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import lax

from stablegrad_optax._leaves import Leaf
from stablegrad_optax._numerics import scale, sum_dtype

# Leaves of at most so many elements are stacked for their sums, so many at a time.
STACKED_SIZE, STACKED_LEAVES = 4096, 32

Indices = npt.NDArray[np.int64]
Function = Callable[..., jax.Array]


def places(leaves: Sequence[Leaf]) -> list[Indices]:
    """The places of each leaf's slices in a vector of all."""
    ends = np.cumsum([0, *(leaf.num_slices for leaf in leaves)])
    return [np.arange(*ends[i : i + 2]) for i in range(len(leaves))]


def means(
    functions: Sequence[Function],
    arrays: Sequence[jax.Array],
    leaves: Sequence[Leaf],
    *,
    factors: jax.Array | None = None,
    apart: bool = False,
) -> list[jax.Array]:
    """The mean over each slice of functions of its entries, f[slices] for each.

    Args:
      functions: Elementwise, of an array in the precision of the statistics and, where
        there are ``factors``, of its own, f[stack].
      arrays: The leaves, at least one.
      leaves: What is static about them.
      factors: f[slices].
      apart: Whether every sum reads the leaves by itself.
    """
    blocks = _blocks(arrays, leaves)
    stacks = [_stack([arrays[n] for n in block]) for block in blocks]
    axes = [leaves[block[0]].num_stacked or int(len(block) > 1) for block in blocks]
    of_leaves = places(leaves)
    of_blocks = [np.concatenate([of_leaves[n] for n in block]) for block in blocks]
    found = np.concatenate(of_blocks)
    in_order = (found[1:] > found[:-1]).all()
    others: list[Any] = [()] * len(blocks)
    if factors is not None:
        others = [
            (factors[of_block].reshape(stack.shape[:axis]),)
            for of_block, stack, axis in zip(of_blocks, stacks, axes, strict=True)
        ]
    sizes = np.concatenate(
        [np.full(leaf.num_slices, max(leaf.slice_size, 1)) for leaf in leaves]
    )

    def mean(sums: Sequence[jax.Array]) -> jax.Array:
        dtype = np.result_type(*{each.dtype for each in sums})
        total = concatenate([each.astype(dtype) for each in sums])
        return (total if in_order else total[np.argsort(found)]) / sizes.astype(dtype)

    def of(functions: Sequence[Function], stacks: list[jax.Array]) -> list[jax.Array]:
        sums = [
            _sums(functions, *each) for each in zip(stacks, others, axes, strict=True)
        ]
        return [mean(of_function) for of_function in zip(*sums, strict=True)]

    if not apart:
        return of(functions, stacks)
    copies = lax.optimization_barrier([stacks] * len(functions))
    of_each = [of([f], copy)[0] for f, copy in zip(functions, copies, strict=True)]
    # It would pull the division out of the mean's square, and let that overflow.
    return lax.optimization_barrier(of_each)


def read(vector: jax.Array, leaves: Sequence[Leaf]) -> list[jax.Array]:
    """The entries of a vector of slices that belong to each leaf, f[stack] each.

    XLA for a CPU fuses a slice at a constant into whatever uses it, and then compiles a
    kernel for every leaf. What comes out of a conditional is no constant to it, and one
    kernel serves all leaves of a shape.
    """
    if not leaves:
        return []
    sizes = [leaf.num_slices for leaf in leaves]
    first = np.cumsum([0, *sizes[:-1]])

    def at_constants(vector: jax.Array) -> list[jax.Array]:
        return [
            lax.slice(vector, (i,), (i + n,)) for i, n in zip(first, sizes, strict=True)
        ]

    def at_variables(vector: jax.Array) -> list[jax.Array]:
        def starts() -> list[jax.Array]:
            return [jnp.asarray(start, jnp.uint32) for start in first]

        found = lax.cond(vector.any(), starts, starts)
        return [
            lax.dynamic_slice(vector, (i,), (n,))
            for i, n in zip(found, sizes, strict=True)
        ]

    entries = lax.platform_dependent(vector, cpu=at_variables, default=at_constants)
    return [
        entry.reshape(leaf.stack) for entry, leaf in zip(entries, leaves, strict=True)
    ]


def take(tree: Any, leaves: Sequence[Leaf]) -> list[jax.Array]:
    """The arrays of these leaves; NumPy arrays and Python numbers become arrays."""
    arrays = jax.tree.leaves(tree)
    return [jnp.asarray(arrays[leaf.position]) for leaf in leaves]


def multiply(tree: Any, leaves: Sequence[Leaf], factors: jax.Array) -> Any:
    """The tree, every slice of these leaves times its factor f[slices]."""
    scaled = map(scale, take(tree, leaves), read(factors, leaves))
    return replace(tree, leaves, scaled)


def replace(tree: Any, leaves: Sequence[Leaf], arrays: Iterable[jax.Array]) -> Any:
    """The tree with other arrays in the place of these leaves."""
    flat, treedef = jax.tree.flatten(tree)
    for leaf, array in zip(leaves, arrays, strict=True):
        flat[leaf.position] = array
    return jax.tree.unflatten(treedef, flat)


def concatenate(vectors: Sequence[jax.Array], block: int = 32) -> jax.Array:
    """One vector; in blocks, for one operation takes quadratic time to compile."""
    while len(vectors) > 1:
        vectors = [
            lax.concatenate(vectors[i : i + block], 0)
            for i in range(0, len(vectors), block)
        ]
    return vectors[0]


def _blocks(arrays: Sequence[jax.Array], leaves: Sequence[Leaf]) -> list[list[int]]:
    """Which leaves are summed together: small ones that are alike."""
    alike: dict[Any, list[int]] = {}
    for n, (array, leaf) in enumerate(zip(arrays, leaves, strict=True)):
        is_small = not leaf.num_stacked and leaf.slice_size <= STACKED_SIZE
        alike.setdefault(jax.typeof(array) if is_small else n, []).append(n)
    return [
        group[i : i + STACKED_LEAVES]
        for group in alike.values()
        for i in range(0, len(group), STACKED_LEAVES)
    ]


def _stack(arrays: Sequence[jax.Array]) -> jax.Array:
    return jnp.stack(arrays) if len(arrays) > 1 else arrays[0]


def _sums(
    functions: Sequence[Function],
    array: jax.Array,
    others: Sequence[jax.Array],
    num_stacked: int,
) -> list[jax.Array]:
    """Sums over each slice in wide precision, f[slices of the leaf] each.

    One reduction of several operands: a GPU then adds up what its blocks found in one
    kernel too.
    """
    wide = array.astype(sum_dtype(array.dtype))
    values = [function(wide, *others) for function in functions]
    axes = tuple(range(num_stacked, array.ndim))
    if len(values) == 1:
        totals = [jnp.sum(values[0], axes)]
    else:
        zeros = [jnp.zeros((), value.dtype) for value in values]
        totals = lax.reduce(values, zeros, _add, axes)
    return [_replicated(total).reshape(-1) for total in totals]


def _add(xs: Sequence[jax.Array], ys: Sequence[jax.Array]) -> list[jax.Array]:
    return [x + y for x, y in zip(xs, ys, strict=True)]


def _replicated(x: jax.Array) -> jax.Array:
    """Gathers a stack that is sharded over an explicit mesh."""
    sharding = jax.typeof(x).sharding
    if any(axis is not None for axis in sharding.spec):
        x = jax.sharding.reshard(x, sharding.update(spec=(None,) * x.ndim))
    return x

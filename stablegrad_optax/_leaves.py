"""Which leaves of a gradient tree are scaled, and by whose statistics.

A *weight* is a leaf whose own statistic is measured, a *follower* a leaf that takes
the factor of the weights under its own parent node, a *slice* one layer of a leaf
that stacks several along its leading axes. All of it is static: it depends on the
structure, shapes and dtypes of the tree alone and costs nothing after tracing.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

PyTree = Any
Mask = PyTree | Callable[[PyTree], PyTree]
StackedAxes = int | PyTree | Callable[[PyTree], PyTree]


class Leaf(NamedTuple):
    """What is static about one leaf of a tree."""

    name: str  # "path/to/kernel"
    parent: tuple[Any, ...]  # the path of the node that holds it
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    num_stacked: int = 0  # leading axes that index separate layers

    @property
    def stack(self) -> tuple[int, ...]:
        """The shape of the leading axes that index separate layers."""
        return self.shape[: self.num_stacked]

    @property
    def num_slices(self) -> int:
        """How many separate layers the leaf holds."""
        return math.prod(self.stack)

    @property
    def slice_size(self) -> int:
        """How many elements each of them has."""
        return math.prod(self.shape[self.num_stacked :])

    @property
    def is_floating(self) -> bool:
        """Whether the leaf is real or complex floating point."""
        return bool(jnp.issubdtype(self.dtype, jnp.inexact))


def describe(tree: PyTree, stacked_axes: StackedAxes | None = None) -> list[Leaf]:
    """Describes every leaf of a tree of arrays or ``jax.ShapeDtypeStruct``.

    A trailing attribute ``value`` is the box of a parameter (``nnx.Variable``,
    linen's ``Partitioned``): it is neither part of the name nor a parent.
    """
    leaves = []
    for path, leaf in jax.tree.leaves_with_path(tree):
        if path and getattr(path[-1], "name", None) == "value":
            path = path[:-1]
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        shape = tuple(getattr(leaf, "shape", ()))
        dtype = getattr(leaf, "dtype", None)
        dtype = jnp.result_type(leaf) if dtype is None else dtype
        leaves.append(Leaf(name, path[:-1], shape, dtype))
    if stacked_axes is None:
        return leaves
    stacked = _per_leaf("stacked_axes", stacked_axes, tree)
    for leaf, num_stacked in zip(leaves, stacked, strict=True):
        valid = isinstance(num_stacked, int | np.integer) and not isinstance(
            num_stacked, bool
        )
        if not valid or not 0 <= num_stacked <= len(leaf.shape):
            raise ValueError(
                f"stacked_axes of leaf '{leaf.name}' must be an int from 0 to its "
                f"number of axes, {len(leaf.shape)}; got {num_stacked!r}."
            )
    return [
        leaf._replace(num_stacked=int(num_stacked))
        for leaf, num_stacked in zip(leaves, stacked, strict=True)
    ]


def is_weight_by_default(leaf: Leaf) -> bool:
    """Whether each slice is floating, has at least two axes and two elements."""
    num_axes = len(leaf.shape) - leaf.num_stacked
    return leaf.is_floating and num_axes >= 2 and leaf.slice_size > 1


def choose(
    tree: PyTree,
    leaves: Sequence[Leaf],
    mask: Mask | None,
    default: Callable[[Leaf], bool],
) -> tuple[int, ...]:
    """Positions of the leaves that ``mask``, or else ``default``, chooses."""
    if mask is None:
        return tuple(i for i, leaf in enumerate(leaves) if default(leaf))
    chosen = []
    for i, flag in enumerate(_per_leaf("mask", mask, tree)):
        if not isinstance(flag, bool | np.bool_):
            raise ValueError(
                f"mask must hold bools; got {flag!r} for leaf '{leaves[i].name}'."
            )
        if flag and not leaves[i].is_floating:
            raise ValueError(
                f"mask chooses leaf '{leaves[i].name}' of dtype {leaves[i].dtype}; "
                "only floating leaves have a gradient to scale."
            )
        if flag:
            chosen.append(i)
    return tuple(chosen)


def _per_leaf(argument: str, value: Any, tree: PyTree) -> list[Any]:
    """One value a leaf, from a pytree prefix or a callable that makes one."""
    if callable(value):
        value = value(tree)
    try:
        return jax.tree.leaves(jax.tree.broadcast(value, tree))
    except ValueError as error:
        raise ValueError(
            f"{argument} must be a pytree prefix of the gradient tree, or a callable "
            f"that returns one; got {jax.tree.structure(value)} for a tree of "
            f"{jax.tree.structure(tree)}."
        ) from error


class Layout(NamedTuple):
    """Where the slices of the scaled leaves stand in the vectors of statistics.

    Vectors over *weights* hold the slices of each weight, vectors over *scaled* leaves
    those of weights and followers; both in the order of the tree.
    """

    leaves: list[Leaf]
    weights: tuple[int, ...]
    scaled: tuple[int, ...]
    sources: npt.NDArray[np.int32]  # per scaled slice: a weight's slice, then a pool
    members: npt.NDArray[np.int32]  # weight slices that enter a pool ...
    pools: npt.NDArray[np.int32]  # ... and which pool each of them enters
    num_pools: int

    @property
    def leaf_ids(self) -> npt.NDArray[np.uint32]:
        """For each scaled slice, the checksum of its leaf's name."""
        ids = [
            np.full(leaf.num_slices, zlib.crc32(leaf.name.encode()), np.uint32)
            for leaf in (self.leaves[i] for i in self.scaled)
        ]
        return np.concatenate(ids) if ids else np.zeros(0, np.uint32)

    @property
    def weight_sizes(self) -> npt.NDArray[np.int64]:
        """For each slice of a weight, how many elements it has."""
        return np.repeat(
            [self.leaves[i].slice_size for i in self.weights],
            [self.leaves[i].num_slices for i in self.weights],
        ).astype(np.int64)


def lay_out(
    tree: PyTree,
    *,
    mask: Mask | None,
    stacked_axes: StackedAxes | None = None,
    followers: bool = False,
    default: Callable[[Leaf], bool] = is_weight_by_default,
) -> Layout:
    """Finds the weights and, if asked for, the leaves that follow them.

    A stacked follower follows slice by slice the weights that are stacked like it, and
    the whole of any other weight under its parent.
    """
    leaves = describe(tree, stacked_axes)
    weights = choose(tree, leaves, mask, default)
    slices: dict[int, range] = {}  # of each weight, in a vector over weights
    start = 0
    for i in weights:
        slices[i] = range(start, start + leaves[i].num_slices)
        start += leaves[i].num_slices
    siblings: dict[tuple[Any, ...], list[int]] = {}
    for i in weights:
        siblings.setdefault(leaves[i].parent, []).append(i)

    scaled: list[int] = []
    sources: list[int] = []
    pools: list[list[int]] = []
    followed: dict[tuple[Any, ...], list[int]] = {}  # by parent and stack: sources
    for i, leaf in enumerate(leaves):
        if i in slices:
            scaled.append(i)
            sources.extend(slices[i])
        elif followers and leaf.is_floating and leaf.parent in siblings:
            scaled.append(i)
            key = (leaf.parent, leaf.stack)
            if key not in followed:
                followed[key] = []
                for j in range(leaf.num_slices):
                    group: list[int] = []
                    for w in siblings[leaf.parent]:
                        alike = leaves[w].stack == leaf.stack
                        group.extend([slices[w][j]] if alike else slices[w])
                    if len(group) == 1:
                        followed[key].append(group[0])
                    else:
                        followed[key].append(start + len(pools))
                        pools.append(group)
            sources.extend(followed[key])
    return Layout(
        leaves,
        weights,
        tuple(scaled),
        np.asarray(sources, np.int32),
        np.asarray([k for pool in pools for k in pool], np.int32),
        np.repeat(np.arange(len(pools), dtype=np.int32), [len(p) for p in pools]),
        len(pools),
    )


def require_gradients(layout: Layout, statistic: jax.Array) -> None:
    """Raises for gradients that are integers, or whose slices are not the state's."""
    for leaf in layout.leaves:
        if jnp.issubdtype(leaf.dtype, jnp.integer) or leaf.dtype == bool:
            raise ValueError(
                f"Gradients must be floating point; leaf '{leaf.name}' is "
                f"{leaf.dtype}. Exclude it with optax.masked or optax.partition."
            )
    if statistic.shape != layout.sources.shape:
        raise ValueError(
            f"The gradients have {len(layout.sources)} slices to scale, the state was "
            f"initialized for {statistic.size}: call init on a tree of the same "
            "structure and shapes."
        )


def scale(
    arrays: Sequence[jax.Array], layout: Layout, factors: jax.Array
) -> list[jax.Array]:
    """Multiplies each scaled leaf, slice by slice, with its factor.

    One scalar and one multiplication a leaf: XLA fuses it into the optimizer's own
    loops, so that a scaled gradient is never written to memory.
    """
    out = list(arrays)
    start = 0
    for i in layout.scaled:
        leaf = layout.leaves[i]
        stop = start + leaf.num_slices
        factor = jax.lax.slice(factors, (start,), (stop,))
        start = stop
        ones = (1,) * (len(leaf.shape) - leaf.num_stacked)
        shape = leaf.stack + ones if leaf.num_stacked else ()
        out[i] = multiply(arrays[i], factor.reshape(shape))
    return out


def multiply(array: jax.Array, factor: jax.Array) -> jax.Array:
    """The product in the array's dtype, computed in its statistics' precision."""
    wide = statistics_dtype(array.dtype)
    if factor.dtype != wide:  # a float64 factor saturates in float32
        factor = jnp.clip(factor, max=float(jnp.finfo(wide).max)).astype(wide)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        return jax.lax.complex(
            array.real.astype(wide) * factor, array.imag.astype(wide) * factor
        ).astype(array.dtype)
    return (array.astype(wide) * factor).astype(array.dtype)


def statistics_dtype(dtype: Any) -> np.dtype[Any]:
    """float64 for double precision leaves, float32 for all others."""
    return np.dtype(np.float64 if jnp.finfo(dtype).bits == 64 else np.float32)


def widest_statistics_dtype(leaves: Sequence[Leaf]) -> np.dtype[Any]:
    """The dtype of a vector that holds a statistic of every leaf."""
    return max(
        (statistics_dtype(leaf.dtype) for leaf in leaves if leaf.is_floating),
        key=lambda dtype: dtype.itemsize,
        default=np.dtype(np.float32),
    )

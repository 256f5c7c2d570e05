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
    dtype: Any
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
        dtype = jax.dtypes.canonicalize_dtype(dtype, allow_extended_dtype=True)
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
    is_bias = leaf.name.rpartition("/")[2] == "bias"
    return leaf.is_floating and num_axes >= 2 and leaf.slice_size > 1 and not is_bias


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
    """Which leaves are weights, and which weights each scaled leaf is scaled by."""

    leaves: list[Leaf]
    weights: tuple[int, ...]  # positions in the flattened tree
    # For each scaled leaf the weights it is scaled by: itself, or those it follows.
    sources: dict[int, tuple[int, ...]]

    @property
    def num_slices(self) -> int:
        """The length of a vector with an entry per slice of each scaled leaf."""
        return sum(self.leaves[i].num_slices for i in self.sources)

    @property
    def leaf_ids(self) -> npt.NDArray[np.uint32]:
        """For each of these entries, the checksum of its leaf's name."""
        ids = [
            np.full(leaf.num_slices, zlib.crc32(leaf.name.encode()), np.uint32)
            for leaf in (self.leaves[i] for i in self.sources)
        ]
        return np.concatenate(ids) if ids else np.zeros(0, np.uint32)


def lay_out(
    tree: PyTree,
    *,
    mask: Mask | None,
    stacked_axes: StackedAxes | None = None,
    followers: bool = False,
    default: Callable[[Leaf], bool] = is_weight_by_default,
) -> Layout:
    """Finds the weights and, if asked for, the leaves that follow them."""
    leaves = describe(tree, stacked_axes)
    weights = choose(tree, leaves, mask, default)
    siblings: dict[tuple[Any, ...], tuple[int, ...]] = {}
    for i in weights:
        siblings[leaves[i].parent] = (*siblings.get(leaves[i].parent, ()), i)
    is_weight = set(weights)
    sources: dict[int, tuple[int, ...]] = {}
    for i, leaf in enumerate(leaves):
        if i in is_weight:
            sources[i] = (i,)
        elif followers and leaf.is_floating and leaf.parent in siblings:
            sources[i] = siblings[leaf.parent]
    return Layout(leaves, weights, sources)


def require_gradients(layout: Layout, statistic: jax.Array) -> None:
    """Raises for gradients that are integers, or whose slices are not the state's."""
    for leaf in layout.leaves:
        if jnp.issubdtype(leaf.dtype, jnp.integer) or leaf.dtype == bool:
            raise ValueError(
                f"Gradients must be floating point; leaf '{leaf.name}' is "
                f"{leaf.dtype}. Exclude it with optax.masked or optax.partition."
            )
    if statistic.shape != (layout.num_slices,):
        raise ValueError(
            f"The gradients have {layout.num_slices} slices to scale, the state was "
            f"initialized for {statistic.size}: call init on a tree of the same "
            "structure and shapes."
        )


@jax.jit
def scale(array: jax.Array, factor: jax.Array) -> jax.Array:
    """Each slice times its factor f[stack], in the array's dtype.

    One scalar and one multiplication, computed in the precision of the statistics: XLA
    fuses it into the optimizer's loops, and a scaled gradient is never written out.
    """
    wide = statistics_dtype(array.dtype)
    if factor.dtype != wide:  # a float64 factor saturates in float32
        factor = jnp.clip(factor, max=float(jnp.finfo(wide).max)).astype(wide)
    factor = factor.reshape(factor.shape + (1,) * (array.ndim - factor.ndim))
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

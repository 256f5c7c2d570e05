"""Which leaves of a gradient tree are scaled, and by whose statistics.

A *weight* is a leaf whose own statistic is measured, a *follower* a leaf that takes
the factor of the weights under its own parent node, a *slice* one layer of a leaf
that stacks several along its leading axes. All of it is static: it depends on the
structure, shapes and dtypes of the tree alone and costs nothing after tracing.
"""

import functools
import math
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from stablegrad_optax._numerics import widest_statistics_dtype

PyTree = Any
Mask = PyTree | Callable[[PyTree], PyTree]
NumStackedAxes = int | PyTree | Callable[[PyTree], PyTree]


class Leaf(NamedTuple):
    """What is static about one leaf of a tree."""

    name: str  # "path/to/kernel", unique in its tree
    position: int  # in the flattened tree
    path: tuple[str, ...]  # the keys on the way to it
    shape: tuple[int, ...]
    dtype: Any
    num_stacked: int = 0  # leading axes that index separate layers

    @property
    def parent(self) -> tuple[str, ...]:
        """The path of the node that holds it."""
        return self.path[:-1]

    @property
    def id(self) -> int:
        """A checksum of its path: what a state knows it by."""
        keys = (key.replace("/", "\0") for key in self.path)
        return zlib.crc32("/".join(keys).encode())

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


def describe(
    tree: PyTree, num_stacked_axes: NumStackedAxes | None = None
) -> list[Leaf]:
    """Describes every leaf of a tree of arrays or ``jax.ShapeDtypeStruct``.

    A trailing attribute ``value``, if its node holds nothing else, is the box of a
    parameter (``nnx.Variable``, linen's ``Partitioned``): neither part of the name nor
    a parent. Leaves that would share a name have their full path, ``['a']['b']``.
    """
    leaves, full_names = [], []
    with_paths = jax.tree.leaves_with_path(tree)
    boxes = _boxes([path for path, _ in with_paths])
    for position, (path, leaf) in enumerate(with_paths):
        if path[:-1] in boxes:
            path = path[:-1]
        keys = [jax.tree_util.keystr((key,), simple=True) for key in path]
        shape = tuple(getattr(leaf, "shape", ()))
        leaves.append(Leaf("/".join(keys), position, tuple(keys), shape, _dtype(leaf)))
        full_names.append(jax.tree_util.keystr(path))
    counts = Counter(leaf.name for leaf in leaves)
    leaves = [
        leaf if counts[leaf.name] == 1 else leaf._replace(name=full_name)
        for leaf, full_name in zip(leaves, full_names, strict=True)
    ]
    if num_stacked_axes is None:
        return leaves
    stacked = _per_leaf("num_stacked_axes", num_stacked_axes, tree)
    return list(map(_stacked, leaves, stacked))


def _boxes(paths: Sequence[tuple[Any, ...]]) -> set[tuple[Any, ...]]:
    """The nodes that hold a leaf ``value`` and nothing else."""
    boxes: set[tuple[Any, ...]] = set()
    others: set[tuple[Any, ...]] = set()
    for path in paths:
        is_value = bool(path) and getattr(path[-1], "name", None) == "value"
        if is_value:
            boxes.add(path[:-1])
        others.update(path[:i] for i in range(len(path) - is_value))
    return boxes - others


def _dtype(leaf: Any) -> Any:
    """Of an array or a number; ``object`` of what else a tree of parameters holds."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None:
        is_number = isinstance(leaf, bool | int | float | complex)
        dtype = jnp.result_type(leaf) if is_number else np.dtype(object)
    if dtype == np.dtype(object):
        return dtype
    return jax.dtypes.canonicalize_dtype(dtype, allow_extended_dtype=True)


def _stacked(leaf: Leaf, num_stacked: Any) -> Leaf:
    is_int = isinstance(num_stacked, int | np.integer)
    valid = is_int and not isinstance(num_stacked, bool)
    if not valid or not 0 <= num_stacked <= len(leaf.shape):
        raise ValueError(
            f"num_stacked_axes of leaf '{leaf.name}' must be an int from 0 to its number "
            f"of axes, {len(leaf.shape)}; got {num_stacked!r}."
        )
    return leaf._replace(num_stacked=int(num_stacked))


def has_gradient(leaf: Leaf) -> bool:
    """Whether the leaf is floating and has elements."""
    return leaf.is_floating and leaf.slice_size > 0


def is_weight_by_default(leaf: Leaf) -> bool:
    """Whether each slice is floating, has two axes and two elements, and is no bias.

    Flax's attention biases have the shape (heads, features), Equinox's convolutions'
    (channels, 1, 1), an ensemble's (members, features): their name tells them apart.
    """
    num_axes = len(leaf.shape) - leaf.num_stacked
    is_bias = bool(leaf.path) and leaf.path[-1] == "bias"
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
    # A pytree that happens to be callable, such as an Equinox module, is a pytree.
    is_leaf = jax.tree_util.treedef_is_leaf(jax.tree.structure(value))
    if callable(value) and (is_leaf or isinstance(value, functools.partial)):
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

    leaves: tuple[Leaf, ...]
    weights: tuple[Leaf, ...]
    # For each scaled leaf the weights it is scaled by: itself, or those it follows.
    sources: dict[Leaf, tuple[Leaf, ...]]

    @property
    def scaled(self) -> tuple[Leaf, ...]:
        """The leaves that are scaled, in the order of the tree."""
        return tuple(self.sources)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of a vector that holds a statistic of every leaf."""
        return widest_statistics_dtype(leaf.dtype for leaf in self.leaves)

    @property
    def num_slices(self) -> int:
        """The length of a vector with an entry per slice of each scaled leaf."""
        return sum(leaf.num_slices for leaf in self.scaled)

    @property
    def leaf_ids(self) -> npt.NDArray[np.uint32]:
        """For each of these entries, the id of its leaf."""
        ids = [np.full(leaf.num_slices, leaf.id, np.uint32) for leaf in self.scaled]
        return np.concatenate([np.zeros(0, np.uint32), *ids])


def lay_out(
    tree: PyTree,
    *,
    mask: Mask | None,
    num_stacked_axes: NumStackedAxes | None = None,
    followers: bool = False,
    default: Callable[[Leaf], bool] = is_weight_by_default,
) -> Layout:
    """Finds the weights and, if asked for, the leaves that follow them."""
    leaves = tuple(describe(tree, num_stacked_axes))
    weights = tuple(leaves[i] for i in choose(tree, leaves, mask, default))
    siblings: dict[tuple[str, ...], tuple[Leaf, ...]] = {}
    for leaf in weights:
        siblings[leaf.parent] = (*siblings.get(leaf.parent, ()), leaf)
    is_weight = set(weights)
    sources: dict[Leaf, tuple[Leaf, ...]] = {}
    for leaf in leaves:
        if leaf in is_weight:
            sources[leaf] = (leaf,)
        elif followers and leaf.is_floating and leaf.parent in siblings:
            sources[leaf] = siblings[leaf.parent]
    return Layout(leaves, weights, sources)


def require_gradients(
    layout: Layout, leaf_ids: jax.Array, params: PyTree | None
) -> None:
    """Raises for gradients that are integers, or other leaves than those of ``init``.

    Args:
      layout: Of the gradients.
      leaf_ids: Of the state.
      params: What ``update`` was given, if anything: their shapes are compared.
    """
    for leaf in layout.leaves:
        if jnp.issubdtype(leaf.dtype, jnp.integer) or leaf.dtype == bool:
            raise ValueError(
                f"Gradients must be floating point; leaf '{leaf.name}' is "
                f"{leaf.dtype}. Exclude it with optax.masked or optax.partition."
            )
    parameters = layout.leaves if params is None else describe(params)
    shapes = {parameter.path: parameter.shape for parameter in parameters}
    for leaf in layout.leaves:
        shape = shapes.get(leaf.path)
        if shape is None:
            _raise_other(f"'{leaf.name}' is no parameter")
        if shape != leaf.shape:
            _raise_other(f"'{leaf.name}' has shape {leaf.shape}, the parameter {shape}")
    expected, given = leaf_ids.size, layout.leaf_ids
    if given.size == expected:
        return
    first = ""
    if not isinstance(leaf_ids, jax.core.Tracer):
        differ = given[:expected] != np.asarray(leaf_ids)[: given.size]
        place = int(differ.argmax()) if differ.any() else min(given.size, expected)
        names = {leaf.id: leaf.name for leaf in layout.scaled}
        first = f", from '{names[given[place]]}' on" if place < given.size else ""
    _raise_other(f"{given.size} slices to scale instead of {expected}{first}")


def _raise_other(difference: str) -> None:
    raise ValueError(
        f"The gradients are not those that init was given: {difference}. Please call "
        "init on a tree of the same structure and shapes, and place the transformation "
        "after the aggregation where each example has a gradient of its own."
    )


def split(
    params: PyTree, chosen: Sequence[bool]
) -> tuple[list[jax.Array], Callable[[Sequence[jax.Array]], PyTree]]:
    """The chosen leaves as arrays, and what puts values in their places."""
    leaves, treedef = jax.tree.flatten(params)

    def join(values: Sequence[jax.Array]) -> PyTree:
        remaining = iter(values)
        merged = [
            next(remaining) if is_chosen else leaf
            for leaf, is_chosen in zip(leaves, chosen, strict=True)
        ]
        return jax.tree.unflatten(treedef, merged)

    arrays = [
        jnp.asarray(leaf)
        for leaf, is_chosen in zip(leaves, chosen, strict=True)
        if is_chosen
    ]
    return arrays, join

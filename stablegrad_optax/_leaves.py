"""Descriptions of the leaves of a tree, and the selections that a user makes.

A *slice* is one layer of a leaf that stacks several along its leading axes. All of this
depends on the structure, shapes and dtypes of the tree alone, so it costs nothing after
tracing.
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

PyTree = Any
Selection = PyTree | Callable[[PyTree], PyTree]  # the leaves are bools
NumStackedAxes = int | PyTree | Callable[[PyTree], PyTree]


class Leaf(NamedTuple):
    """Describes one leaf of a tree by what is known while a program is traced."""

    name: str  # "path/to/kernel", unique in its tree
    position: int  # the index in the flattened tree
    path: tuple[str, ...]  # the keys of the nodes above the leaf, and its own
    shape: tuple[int, ...]
    dtype: Any
    num_stacked: int = 0  # leading axes that index separate layers

    @property
    def parent(self) -> tuple[str, ...]:
        """The path of the node that holds the leaf."""
        return self.path[:-1]

    @property
    def id(self) -> int:
        """The checksum of the path by which a state identifies the leaf."""
        keys = (key.replace("/", "\0") for key in self.path)
        return zlib.crc32("/".join(keys).encode())

    @property
    def stack(self) -> tuple[int, ...]:
        """The shape of the leading axes that index separate layers."""
        return self.shape[: self.num_stacked]

    @property
    def num_slices(self) -> int:
        """The number of separate layers that the leaf holds."""
        return math.prod(self.stack)

    @property
    def slice_size(self) -> int:
        """The number of elements of each layer."""
        return math.prod(self.shape[self.num_stacked :])

    @property
    def is_floating(self) -> bool:
        """True if the leaf is real or complex floating point."""
        return bool(jnp.issubdtype(self.dtype, jnp.inexact))


def describe(
    tree: PyTree, num_stacked_axes: NumStackedAxes | None = None
) -> list[Leaf]:
    """Describes every leaf of a tree of arrays or ``jax.ShapeDtypeStruct``.

    A node that holds an attribute ``value`` and nothing else is the box of a parameter,
    such as ``nnx.Variable`` or linen's ``Partitioned``. ``value`` is then not a part of
    the path. Leaves that would share a name have their full path, ``['a']['b']``.
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
    """Finds the nodes that hold a leaf ``value`` and nothing else."""
    boxes: set[tuple[Any, ...]] = set()
    parents: set[tuple[Any, ...]] = set()  # nodes that hold something else
    for path in paths:
        is_value = bool(path) and getattr(path[-1], "name", None) == "value"
        if is_value:
            boxes.add(path[:-1])
        parents.update(path[:i] for i in range(len(path) - is_value))
    return boxes - parents


def _dtype(leaf: Any) -> Any:
    """Returns the dtype of an array or a number, and ``object`` for anything else."""
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
            f"num_stacked_axes of leaf '{leaf.name}' must be an int from 0 to its "
            f"number of axes, {len(leaf.shape)}; got {num_stacked!r}."
        )
    return leaf._replace(num_stacked=int(num_stacked))


def has_gradient(leaf: Leaf) -> bool:
    """Tells whether the leaf is floating and has elements."""
    return leaf.is_floating and leaf.slice_size > 0


def is_weight_by_default(leaf: Leaf) -> bool:
    """Tells whether slices are floating, with two axes and elements, and not a bias.

    The name decides which array is a bias, because biases may have several axes: those
    of Flax's attention have the shape (heads, features), those of Equinox's
    convolutions (channels, 1, 1), and those of an ensemble (members, features).
    """
    num_axes = len(leaf.shape) - leaf.num_stacked
    is_bias = bool(leaf.path) and leaf.path[-1] == "bias"
    return leaf.is_floating and num_axes >= 2 and leaf.slice_size > 1 and not is_bias


def select(
    argument: str, selection: Selection, tree: PyTree, leaves: Sequence[Leaf]
) -> tuple[Leaf, ...]:
    """Returns the leaves that an argument such as ``mask`` says True for."""
    flags = _per_leaf(argument, selection, tree)
    for leaf, flag in zip(leaves, flags, strict=True):
        if not isinstance(flag, bool | np.bool_):
            raise ValueError(
                f"{argument} must hold bools; got {flag!r} for leaf '{leaf.name}'."
            )
    return tuple(leaf for leaf, flag in zip(leaves, flags, strict=True) if flag)


def select_weights(
    selection: Selection | None, tree: PyTree, leaves: Sequence[Leaf]
) -> tuple[Leaf, ...]:
    """Returns the weights that ``weights`` or else the default rule selects."""
    if selection is None:
        return tuple(filter(is_weight_by_default, leaves))
    weights = select("weights", selection, tree, leaves)
    for leaf in weights:
        if not leaf.is_floating:
            raise ValueError(
                f"weights selects leaf '{leaf.name}' of dtype {leaf.dtype}; only "
                "floating leaves have a gradient to scale."
            )
    return weights


def _per_leaf(argument: str, value: Any, tree: PyTree) -> list[Any]:
    """Returns one value per leaf, from a pytree prefix or a callable."""
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


def split(
    params: PyTree, chosen: Sequence[bool]
) -> tuple[list[jax.Array], Callable[[Sequence[jax.Array]], PyTree]]:
    """Returns the chosen leaves as arrays, and a function that replaces them."""
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

"""Groups the arrays that SOAP rotates in one stack, and names their axes."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from optax.contrib import MuonDimensionNumbers

from stablegrad_optax import _slices
from stablegrad_optax._leaves import Leaf
from stablegrad_optax._numerics import sum_dtype

PyTree = Any
DimensionNumbers = PyTree | Callable[[PyTree], PyTree]

# Arrays of at most so many elements per slice are stacked with others of their shape.
GROUPED_SIZE = 2**16


class View(NamedTuple):
    """An array as a stack of separate tensors, f[num_slices, *axes]."""

    leaf: Leaf
    permutation: tuple[int, ...]
    num_slices: int
    axes: tuple[int, ...]

    def apply(self, array: jax.Array) -> jax.Array:
        """The array as the stack."""
        return array.transpose(self.permutation).reshape(self.num_slices, *self.axes)

    def invert(self, stack: jax.Array) -> jax.Array:
        """The stack as the array."""
        shape = [self.leaf.shape[axis] for axis in self.permutation]
        inverse = np.argsort(self.permutation).tolist()
        return stack.reshape(shape).transpose(inverse)


class Group(NamedTuple):
    """Arrays whose slices are alike: one stack holds the slices of all of them."""

    views: tuple[View, ...]
    sides: tuple[int, ...]  # the axes of a slice that have a basis
    places: tuple[int, ...]  # of its slices in a vector of all, in the tree's order

    @property
    def axes(self) -> tuple[int, ...]:
        """The shape of one slice."""
        return self.views[0].axes

    @property
    def sum_dtype(self) -> np.dtype[Any]:
        """The dtype that it is computed in."""
        return sum_dtype(self.views[0].leaf.dtype)

    def stack(self, arrays: Sequence[jax.Array]) -> jax.Array:
        """The slices of its arrays, from the arrays of the whole tree."""
        views = [
            view.apply(_slices.replicated(arrays[view.leaf.position]))
            for view in self.views
        ]
        return jnp.concatenate(views) if len(views) > 1 else views[0]


def group(
    leaves: Sequence[Leaf],
    numbers: Sequence[MuonDimensionNumbers | None],
    has_side: Callable[[int], bool],
) -> tuple[Group, ...]:
    """Groups small arrays of one shape; each large array is a group by itself.

    Args:
      leaves: The arrays to group.
      numbers: For each leaf of the whole tree, how its axes make a matrix, if they do.
      has_side: Whether an axis of this length has a basis.
    """
    alike: dict[Any, list[tuple[View, npt.NDArray[np.int64]]]] = {}
    start = 0
    for leaf in leaves:
        view = _view(leaf, numbers[leaf.position])
        is_small = leaf.slice_size <= GROUPED_SIZE
        key = (view.axes, np.dtype(leaf.dtype), None if is_small else leaf.position)
        places = np.arange(start, start + view.num_slices)
        alike.setdefault(key, []).append((view, places))
        start += view.num_slices
    return tuple(
        Group(
            views=tuple(view for view, _ in members),
            sides=_sides(axes, has_side),
            places=tuple(np.concatenate([at for _, at in members]).tolist()),
        )
        for (axes, *_), members in alike.items()
    )


def _sides(axes: tuple[int, ...], has_side: Callable[[int], bool]) -> tuple[int, ...]:
    """An axis of one element needs no basis, nor do vectors and scalars."""
    if len(axes) < 2:
        return ()
    return tuple(i for i, size in enumerate(axes) if size > 1 and has_side(size))


def _view(leaf: Leaf, numbers: MuonDimensionNumbers | None) -> View:
    num_axes = len(leaf.shape)
    if numbers is None or num_axes - leaf.num_stacked < 2:
        identity = tuple(range(num_axes))
        axes = leaf.shape[leaf.num_stacked :]
        return View(leaf, identity, leaf.num_slices, axes)
    rows, columns = (
        tuple(axis % num_axes for axis in np.atleast_1d(axes).tolist())
        for axes in (numbers.reduction_axis, numbers.output_axis)
    )
    named = (*rows, *columns)
    batch = tuple(axis for axis in range(num_axes) if axis not in named)
    if len(set(named)) < len(named) or min(named) < leaf.num_stacked:
        raise ValueError(
            f"weight_dimension_numbers of leaf '{leaf.name}' of shape {leaf.shape} "
            f"must name each axis once and none of the {leaf.num_stacked} stacked "
            f"axes; got {numbers}."
        )
    sizes = [math.prod(leaf.shape[i] for i in part) for part in (batch, rows, columns)]
    return View(leaf, batch + named, sizes[0], tuple(sizes[1:]))


def per_leaf_numbers(
    numbers: DimensionNumbers | None, tree: PyTree
) -> list[MuonDimensionNumbers | None]:
    """One entry for each leaf, from a pytree prefix or a function of the tree."""

    def is_leaf(node: Any) -> bool:
        return node is None or isinstance(node, MuonDimensionNumbers)

    if callable(numbers):
        numbers = numbers(tree)
    try:
        whole = jax.tree.broadcast(numbers, tree, is_leaf=is_leaf)
    except ValueError as error:
        raise ValueError(
            "weight_dimension_numbers must be a pytree prefix of the parameters with "
            "optax.contrib.MuonDimensionNumbers or None at its leaves, or a function "
            f"that returns one; got {numbers}."
        ) from error
    return jax.tree.leaves(whole, is_leaf=is_leaf)


def shard_as(array: jax.Array, example: jax.Array) -> jax.Array:
    """The array with the sharding of an example, on an explicit mesh."""
    sharding = jax.typeof(example).sharding
    if any(axis is not None for axis in sharding.spec):
        array = jax.sharding.reshard(array, sharding)
    return array


def unstack(
    stacks: Iterable[jax.Array], groups: Sequence[Group], flag: jax.Array
) -> dict[int, jax.Array]:
    """The arrays of each group by their position in the tree.

    Args:
      stacks: One of each group.
      groups: Of the stacks.
      flag: A bool as `_slices.split` takes it.
    """
    sizes = [[view.num_slices for view in group.views] for group in groups]
    parts = _slices.split(list(stacks), sizes, flag)
    return {
        view.leaf.position: view.invert(part)
        for group, each in zip(groups, parts, strict=True)
        for view, part in zip(group.views, each, strict=True)
    }

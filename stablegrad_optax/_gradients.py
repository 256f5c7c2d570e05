"""The gradients of one update: their selection, their statistics and their scaling.

A *weight* is a leaf whose own statistic is measured. A *follower* is a leaf that takes
the factor of the weights under its own parent node.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from stablegrad_optax import _slices, _statistics
from stablegrad_optax._leaves import (
    Leaf,
    NumStackedAxes,
    PyTree,
    Selection,
    describe,
    has_gradient,
    select,
    select_weights,
)
from stablegrad_optax._numerics import widest_statistics_dtype


class Layout(NamedTuple):
    """Holds the leaves that are scaled, and the weights whose statistics scale them."""

    leaves: tuple[Leaf, ...]  # all leaves that the mask selects
    weights: tuple[Leaf, ...]
    # The weights whose spread scales a leaf: the leaf itself, or those that it follows.
    sources: dict[Leaf, tuple[Leaf, ...]]

    @property
    def scaled(self) -> tuple[Leaf, ...]:
        """The leaves that are scaled, in the order of the tree."""
        return tuple(self.sources)

    @property
    def leaf_ids(self) -> npt.NDArray[np.uint32]:
        """The id of the leaf that each scaled slice belongs to."""
        return _slices.per_slice(self.scaled, lambda leaf: leaf.id, np.uint32)

    def zeros(self) -> jax.Array:
        """Returns the statistic f[slices] of every scaled slice before any update."""
        return jnp.zeros(len(self.leaf_ids), self.dtype)

    def ones(self) -> jax.Array:
        """Returns the factor f[slices] of every scaled slice before any update."""
        return jnp.ones(len(self.leaf_ids), self.dtype)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of a vector that holds a statistic of every leaf."""
        return widest_statistics_dtype(leaf.dtype for leaf in self.leaves)


def lay_out(
    tree: PyTree,
    *,
    mask: Selection | None = None,
    num_stacked_axes: NumStackedAxes | None = None,
    default: Callable[[Leaf], bool] = has_gradient,
) -> Layout:
    """Lays out a tree in which all leaves that satisfy ``default`` are weights."""
    leaves = _visible(tree, mask, num_stacked_axes)
    weights = tuple(filter(default, leaves))
    return Layout(leaves, weights, {leaf: (leaf,) for leaf in weights})


def lay_out_with_followers(
    tree: PyTree,
    *,
    mask: Selection | None,
    num_stacked_axes: NumStackedAxes | None,
    weights: Selection | None,
    scale_biases: bool,
) -> Layout:
    """Lays out a tree in which other leaves follow the weights of their parent node."""
    leaves = _visible(tree, mask, num_stacked_axes)
    selected = set(select_weights(weights, tree, describe(tree, num_stacked_axes)))
    siblings: dict[tuple[str, ...], tuple[Leaf, ...]] = {}
    for leaf in leaves:
        if leaf in selected:
            siblings[leaf.parent] = (*siblings.get(leaf.parent, ()), leaf)
    sources: dict[Leaf, tuple[Leaf, ...]] = {}
    for leaf in leaves:
        if leaf in selected:
            sources[leaf] = (leaf,)
        elif scale_biases and leaf.is_floating and leaf.parent in siblings:
            sources[leaf] = siblings[leaf.parent]
    return Layout(leaves, tuple(leaf for leaf in leaves if leaf in selected), sources)


def _visible(
    tree: PyTree, mask: Selection | None, num_stacked_axes: NumStackedAxes | None
) -> tuple[Leaf, ...]:
    leaves = tuple(describe(tree, num_stacked_axes))
    return leaves if mask is None else select("mask", mask, tree, leaves)


class Gradients(NamedTuple):
    """Holds the gradients that ``update`` was given.

    A statistic is a vector f[slices] in the dtype of the state.
    """

    tree: PyTree
    layout: Layout
    dtype: Any

    def arrays(self) -> list[jax.Array]:
        """Returns the gradients of the weights."""
        return _slices.take(self.tree, self.layout.weights)

    def norms(self) -> jax.Array:
        """Computes the Euclidean norm of every slice of the weights."""
        norms = _statistics.norms(self.arrays(), self.layout.weights)
        return norms.astype(self.dtype)

    def spreads(self) -> jax.Array:
        """Computes the spread of every scaled slice; followers take their weights'."""
        spreads = _statistics.spreads(self.arrays(), self.layout.weights)
        return _share(spreads.astype(self.dtype), self.layout)

    def multiply(self, factors: jax.Array) -> PyTree:
        """Multiplies every scaled slice of the tree by its factor."""
        return _slices.multiply(self.tree, self.layout.scaled, factors)


def receive(
    updates: PyTree,
    lay_out: Callable[[PyTree], Layout],
    state: Any,
    params: PyTree | None,
) -> Gradients:
    """Returns the gradients, or raises if they are not those of the state.

    Args:
      updates: The gradients.
      lay_out: The function with which ``init`` laid out the parameters.
      state: The state of the transformation, with ``scale_factors`` and ``leaf_ids``.
      params: The parameters, if ``update`` was given them.
    """
    layout = lay_out(updates)
    require_gradients(layout, state.leaf_ids, params)
    return Gradients(updates, layout, state.scale_factors.dtype)


def require_gradients(
    layout: Layout, leaf_ids: jax.Array, params: PyTree | None
) -> None:
    """Raises for gradients that are integers, or of other leaves than the state's.

    Args:
      layout: The layout of the gradients.
      leaf_ids: The ids that the state has kept since ``init``.
      params: The parameters, if ``update`` was given them: shapes are compared.
    """
    for leaf in layout.leaves:
        if jnp.issubdtype(leaf.dtype, jnp.integer) or leaf.dtype == bool:
            raise ValueError(
                f"Gradients must be floating point; leaf '{leaf.name}' is "
                f"{leaf.dtype}. Exclude it with optax.masked or optax.partition."
            )
    if params is not None:
        _require_shapes(layout, params)
    _require_ids(layout, leaf_ids)


def _require_shapes(layout: Layout, params: PyTree) -> None:
    shapes = {parameter.path: parameter.shape for parameter in describe(params)}
    for leaf in layout.leaves:
        shape = shapes.get(leaf.path)
        if shape is None:
            _refuse(f"'{leaf.name}' is not a parameter")
        if shape != leaf.shape:
            _refuse(f"'{leaf.name}' has shape {leaf.shape}, the parameter {shape}")


def _require_ids(layout: Layout, leaf_ids: jax.Array) -> None:
    """Compares the number of slices and, outside ``jit``, the leaves of the slices."""
    given, expected = layout.leaf_ids, leaf_ids.size
    differ = np.zeros(0, bool)
    is_traced = isinstance(leaf_ids, jax.core.Tracer)
    if not is_traced and getattr(leaf_ids, "is_fully_addressable", True):
        differ = given[:expected] != np.asarray(leaf_ids).reshape(-1)[: given.size]
    if given.size == expected and not differ.any():
        return
    place = int(differ.argmax()) if differ.any() else min(given.size, expected)
    names = {leaf.id: leaf.name for leaf in layout.scaled}
    first = f" from '{names[given[place]]}' on" if place < given.size else ""
    if given.size == expected:
        _refuse(f"the state belongs to other leaves{first}")
    first = "" if is_traced else first and f",{first}"
    _refuse(f"{given.size} slices to scale instead of {expected}{first}")


def _refuse(difference: str) -> NoReturn:
    raise ValueError(
        f"The gradients are not those that init was given: {difference}. Please call "
        "init on a tree of the same structure and shapes, and place the transformation "
        "after the aggregation where each example has a gradient of its own."
    )


def _share(spreads: jax.Array, layout: Layout) -> jax.Array:
    """Maps the spreads f[slices] of the weights to those of all scaled leaves.

    A follower of several weights has their pooled spread. From a weight with the same
    stacked axes each slice takes the spread of one slice, and from any other weight it
    takes the spreads of all slices.
    """
    places = dict(zip(layout.weights, _slices.places(layout.weights), strict=True))
    vectors, num_values = [spreads], spreads.size
    indices: dict[tuple[Any, ...], _slices.Indices] = {}  # into the joined vectors
    for leaf, sources in layout.sources.items():
        if (sources, leaf.stack) in indices:
            continue
        rows = [
            places[source].reshape((1, -1) if source.stack == leaf.stack else (-1, 1))
            for source in sources
        ]
        sizes = np.repeat([s.slice_size for s in sources], [len(row) for row in rows])
        pool = np.concatenate(
            [np.broadcast_to(row, (len(row), leaf.num_slices)) for row in rows]
        )
        if len(pool) == 1:
            indices[sources, leaf.stack] = pool[0]
            continue
        shares = (sizes / sizes.sum())[:, None]
        vectors.append(_statistics.pooled(spreads[pool], shares))
        indices[sources, leaf.stack] = num_values + np.arange(leaf.num_slices)
        num_values += leaf.num_slices
    chosen = [indices[sources, leaf.stack] for leaf, sources in layout.sources.items()]
    return _slices.concatenate(vectors)[
        np.concatenate([np.zeros(0, np.int64), *chosen])
    ]

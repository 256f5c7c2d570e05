"""layer_norms: norms, ratios and histograms of a tree, for any logger."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from stablegrad_optax import _leaves, _slices, _statistics

# A histogram has a bin for each four powers of two, from 2^-128 to 2^128.
BIN_WIDTH, NUM_BINS, LOWEST_EXPONENT = 4, 64, -128

PyTree = Any


def layer_norms(
    tree: PyTree,
    *,
    params: PyTree | None = None,
    num_stacked_axes: _leaves.NumStackedAxes | None = None,
    histograms: bool = False,
) -> dict[str, jax.Array]:
    r"""Computes the Euclidean norm of each array of a tree, for any logger.

    With u an array of ``tree`` and p the array of ``params`` that has its name, the
    entries are :math:`\|u\|_2`, the norm of the whole tree and, with ``params``,
    :math:`\|u\|_2 / \|p\|_2`. Norms are right from 1e-36 to 1e37, where
    ``optax.tree.norm`` over- or underflows. Call it inside ``jit``, in the training
    step: small arrays are reduced together, and only a few numbers leave the device.

    Args:
      tree: Gradients, updates or parameters: any pytree. Arrays that are not floating,
        and empty ones, have no entry.
      params: The parameters, if ``tree`` holds their updates or gradients.
      num_stacked_axes: How many leading axes of each array index separate layers, as
        for :func:`stablegrad`. Each layer has a norm of its own. Default: none.
      histograms: Whether to count the magnitudes of each array. Counting takes several
        times as long as the norms.

    Returns:
      A dict of arrays:

      ======================  =====================================================
      key                     value
      ======================  =====================================================
      norm/<array>            f[stack], f[] unless the array is stacked
      global_norm             f[], of all arrays together
      relative_norm/<array>   f[stack], its norm over that of the parameter; infinite
                              where the parameter is zero, 0 where both are
      histogram/<array>       i32[stack, 64]: entry i counts the magnitudes from
                              2^(4i - 128) up to 2^(4i - 124), the end bins all beyond.
                              Zero, infinity and NaN do not count
      ======================  =====================================================

    Raises:
      ValueError: If ``num_stacked_axes`` does not fit the tree, or if ``params`` lacks
        an array of ``tree`` or has another shape.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from stablegrad_optax import layer_norms
      >>> params = {"kernel": jnp.full((2, 2), 10.0), "bias": jnp.zeros(2)}
      >>> updates = {"kernel": jnp.full((2, 2), 1e-30), "bias": jnp.array([3.0, 4.0])}
      >>> norms = jax.jit(layer_norms)(updates, params=params)
      >>> {name: float(f"{norm:.3g}") for name, norm in norms.items()}
      ... # doctest: +NORMALIZE_WHITESPACE
      {'global_norm': 5.0, 'norm/bias': 5.0, 'norm/kernel': 2e-30,
       'relative_norm/bias': inf, 'relative_norm/kernel': 1e-31}

      Weights & Biases draws a histogram with ``edges = np.arange(-128, 129, 4)`` and
      ``wandb.Histogram(np_histogram=(counts, edges))``.
    """
    leaves = _floating(tree, num_stacked_axes)
    norms = _statistics.norms(_slices.take(tree, leaves), leaves)
    values = {"global_norm": _statistics.global_norm(norms)}
    values |= _entries("norm", leaves, norms)
    if params is not None:
        matching = _matching(params, leaves)
        param_norms = _statistics.norms(_slices.take(params, matching), matching)
        ratios = jnp.where(norms == 0, 0, norms / param_norms)
        values |= _entries("relative_norm", leaves, ratios)
    if histograms:
        arrays = _slices.take(tree, leaves)
        for leaf, array in zip(leaves, arrays, strict=True):
            values[_key("histogram", leaf)] = _histogram(array, leaf.num_stacked)
    return values


def _floating(
    tree: PyTree, num_stacked_axes: _leaves.NumStackedAxes | None
) -> tuple[_leaves.Leaf, ...]:
    leaves = _leaves.describe(tree, num_stacked_axes)
    return tuple(filter(_leaves.has_gradient, leaves))


def _matching(
    params: PyTree, leaves: Sequence[_leaves.Leaf]
) -> tuple[_leaves.Leaf, ...]:
    """Finds the parameters that have the paths of these leaves."""
    by_path = {leaf.path: leaf for leaf in _leaves.describe(params)}
    for leaf in leaves:
        shape = by_path[leaf.path].shape if leaf.path in by_path else None
        if shape != leaf.shape:
            raise ValueError(
                f"params must hold the arrays of tree; '{leaf.name}' has shape "
                f"{leaf.shape} in tree, and in params "
                f"{'is missing' if shape is None else f'shape {shape}'}."
            )
    return tuple(
        by_path[leaf.path]._replace(num_stacked=leaf.num_stacked) for leaf in leaves
    )


def _entries(
    kind: str, leaves: Sequence[_leaves.Leaf], vector: jax.Array
) -> dict[str, jax.Array]:
    places = _slices.places(leaves)
    return {
        _key(kind, leaf): vector[place[0] : place[0] + place.size].reshape(leaf.stack)
        for leaf, place in zip(leaves, places, strict=True)
        if place.size
    }


def _key(kind: str, leaf: _leaves.Leaf) -> str:
    return f"{kind}/{leaf.name}" if leaf.name else kind


@partial(jax.jit, static_argnums=1)
def _histogram(array: jax.Array, num_stacked: int) -> jax.Array:
    """Counts the magnitudes in each bin.

    A GPU and a TPU compare each magnitude with all bins within one reduction, because a
    scatter is slow there. A CPU would write the comparisons out.
    """
    magnitude = jnp.abs(array)
    if magnitude.dtype.itemsize < 4:
        magnitude = magnitude.astype(jnp.float32)
    _, exponent = jnp.frexp(magnitude)  # the magnitude is in [2^(e - 1), 2^e)
    bins = jnp.clip((exponent - 1 - LOWEST_EXPONENT) // BIN_WIDTH, 0, NUM_BINS - 1)
    bins = jnp.where(jnp.isfinite(magnitude) & (magnitude > 0), bins, NUM_BINS)
    bins = bins.reshape(math.prod(array.shape[:num_stacked]), -1)

    def scatter(bins: jax.Array) -> jax.Array:
        count = partial(jnp.bincount, length=NUM_BINS + 1)
        return jax.vmap(count)(bins)[:, :NUM_BINS].astype(jnp.int32)

    def compare(bins: jax.Array) -> jax.Array:
        is_in_bin = bins[..., None] == jnp.arange(NUM_BINS)
        return is_in_bin.sum(-2, dtype=jnp.int32)

    counts = lax.platform_dependent(bins, cpu=scatter, default=compare)
    return counts.reshape(*array.shape[:num_stacked], NUM_BINS)

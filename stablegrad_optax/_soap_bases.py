"""The eigenbases of SOAP: rotation into them, and their refresh."""

import functools
import string
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from stablegrad_optax._orthogonal import (
    Precision,
    eigenvectors,
    orthonormal_columns,
)

# For one group: a stack of matrices f[k, n, n] for each axis that has a basis.
Sides = tuple[jax.Array, ...]
Moment = tuple[jax.Array, jax.Array]  # mean and mean square of one group


def rotate(
    stack: jax.Array,
    axes: Sequence[int],
    bases: Sides,
    precision: Precision,
    *,
    back: bool = False,
) -> jax.Array:
    """Slices f[k, ...] in the bases of these axes, or from the bases back."""
    letters = string.ascii_lowercase[: stack.ndim - 1]
    for axis, basis in zip(axes, bases, strict=True):
        old = letters[axis]
        pair = f"Z{old}" if back else f"{old}Z"
        rule = f"K{letters},K{pair}->K{letters.replace(old, 'Z')}"
        basis = basis if back else basis.conj()
        stack = jnp.einsum(rule, stack, basis, precision=precision)
    return stack


def outer_products(
    stack: jax.Array, axes: Sequence[int], precision: Precision
) -> Sides:
    """Returns each axis's sum of outer products, G G^T and G^T G for a matrix."""
    letters = string.ascii_lowercase[: stack.ndim - 1]
    return tuple(
        jnp.einsum(
            f"K{letters},K{letters.replace(letters[axis], 'Z')}->K{letters[axis]}Z",
            stack,
            stack.conj(),
            precision=precision,
        )
        for axis in axes
    )


@custom_vmap
def any_run(flag: jax.Array) -> jax.Array:
    """The flag, or under ``vmap`` whether it is set in any run.

    A conditional on it stays a conditional in a batch of runs. ``vmap`` would turn a
    conditional on each run's own flag into a computation of both branches.
    """
    return flag


@any_run.def_vmap
def _any_run_vmap(
    axis_size: int, in_batched: list[bool], flag: jax.Array
) -> tuple[jax.Array, bool]:
    del axis_size
    return any_run(flag.any(0) if in_batched[0] else flag), False


def refresh(
    count: jax.Array,
    frequency: jax.Array,
    axes: Sequence[Sequence[int]],
    covariances: tuple[Sides, ...],
    bases: tuple[Sides, ...],
    moments: tuple[Moment, ...],
    precision: Precision,
) -> tuple[tuple[Sides, ...], tuple[Moment, ...]]:
    """The bases and moments after an update, where a refresh is due.

    The first gradient sets the bases to eigenvectors. Each later refresh is one step of
    orthogonal iteration, and the moments follow: the mean is expressed in the new
    basis, the squares keep their eigenvector.

    Args:
      count: Updates before this one.
      frequency: Updates between two refreshes.
      axes: For each group the axes that have a basis.
      covariances: Of each group.
      bases: Of each group.
      moments: Mean and mean square of each group, in the bases.
      precision: Of the matrix products.
    """
    # No derivative passes through the choice of a basis: that of degenerate
    # eigenvectors is not finite.
    covariances = lax.stop_gradient(covariances)
    is_first = count == 0
    is_due = (count > 0) & (count % frequency == 0)

    def start() -> tuple[Sides, ...]:
        new = map_by_size(eigenvectors, covariances)
        return choose(is_first, new, bases)

    def iterate() -> Any:
        new = _iterate(axes, covariances, bases, moments, precision)
        return choose(is_due, new, (bases, moments))

    bases = lax.cond(any_run(is_first), start, lambda: choose(is_first, bases, bases))
    unchanged = bases, moments
    return lax.cond(
        any_run(is_due), iterate, lambda: choose(is_due, unchanged, unchanged)
    )


def choose(flag: jax.Array, new: Any, old: Any) -> Any:
    """One of two trees.

    The branches of a conditional both come through here, so that in ``shard_map`` both
    vary over the axes that the flag varies over.
    """
    return jax.tree.map(functools.partial(jnp.where, flag), new, old)


def _iterate(
    axes: Sequence[Sequence[int]],
    covariances: tuple[Sides, ...],
    bases: tuple[Sides, ...],
    moments: tuple[Moment, ...],
    precision: Precision,
) -> Any:
    """One step of orthogonal iteration from columns in the order of their variance."""
    products: list[Sides] = []
    new_moments = []
    for dims, covariance, basis, (mean, square) in zip(
        axes, covariances, bases, moments, strict=True
    ):
        sides = []
        for axis, matrix, columns in zip(dims, covariance, basis, strict=True):
            columns = lax.stop_gradient(columns)
            product = jnp.einsum("kij,kja->kia", matrix, columns, precision=precision)
            variances = jnp.sum(columns.conj() * product, axis=1).real
            order = jnp.argsort(variances, axis=1, descending=True)
            square = _take(square, order, axis + 1)
            # If the gradient has a low rank, all columns of the product are nearly
            # parallel, and their differences are rounding, about eps * sqrt(n) of the
            # largest variance. The shift keeps them independent, or Gram-Schmidt would
            # lose directions for good. No eigenvector depends on it.
            rounding = jnp.finfo(variances.dtype).eps * columns.shape[-1] ** 0.5
            shift = 8 * rounding * variances.max(1)[:, None, None]
            shift = jnp.where(shift > 0, shift, 1)
            shift = shift.astype(columns.dtype)
            sides.append(_take(product + shift * columns, order, 2))
        products.append(tuple(sides))
        new_moments.append((mean, square))
    orthonormal = functools.partial(orthonormal_columns, precision=precision)
    new_bases = map_by_size(orthonormal, tuple(products))
    for i, (dims, old, new) in enumerate(zip(axes, bases, new_bases, strict=True)):
        mean, square = new_moments[i]
        mean = rotate(mean, dims, old, precision, back=True)
        new_moments[i] = rotate(mean, dims, new, precision), square
    return new_bases, tuple(new_moments)


def _take(stack: jax.Array, order: jax.Array, axis: int) -> jax.Array:
    """Each slice with its entries along one axis in the order i[k, n]."""
    shape = [1] * stack.ndim
    shape[0], shape[axis] = order.shape
    return jnp.take_along_axis(stack, order.reshape(shape), axis=axis)


def map_by_size(
    function: Callable[[jax.Array], jax.Array], groups: tuple[Sides, ...]
) -> tuple[Sides, ...]:
    """Calls the function once for all square matrices of one size and dtype."""
    flat, treedef = jax.tree.flatten(groups)
    alike: dict[Any, list[int]] = {}
    for i, stack in enumerate(flat):
        alike.setdefault((stack.shape[-1], stack.dtype), []).append(i)
    results = list(flat)
    for members in alike.values():
        result = function(jnp.concatenate([flat[i] for i in members]))
        start = 0
        for i in members:
            results[i] = lax.slice_in_dim(result, start, start + len(flat[i]))
            start += len(flat[i])
    return jax.tree.unflatten(treedef, results)

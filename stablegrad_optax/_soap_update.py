"""SOAP's state and one update of it."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from stablegrad_optax import _gradients
from stablegrad_optax._numerics import (
    narrow,
    safe_sqrt,
    statistics_dtype,
    sum_dtype,
)
from stablegrad_optax._orthogonal import Precision
from stablegrad_optax._soap_bases import (
    Moment,
    Sides,
    any_run,
    choose,
    outer_products,
    refresh,
    rotate,
)
from stablegrad_optax._soap_layout import Group, shard_as, unstack


class SoapState(NamedTuple):
    """State of :func:`scale_by_soap`.

    Moments and covariances are kept in units of ``size``, rounded to a power of two.
    Arrays of one shape form a group, which stacks their slices.
    """

    num_updates: jax.Array  # i32[], gradients seen
    size: jax.Array  # f[slices], running maximum of |G|
    mu: optax.Updates  # M, in the eigenbases
    nu: optax.Updates  # V
    covariances: tuple[Sides, ...]  # L and R of each group, f[slices, n, n]
    bases: tuple[Sides, ...]  # Q_L and Q_R of each group, f[slices, n, n]
    leaf_ids: jax.Array  # u32[slices], which leaf the slice belongs to


class Hyperparams(NamedTuple):
    """The numeric arguments, as arrays."""

    share1: jax.Array  # 1 - b1
    share2: jax.Array  # 1 - b2
    eps: jax.Array
    frequency: jax.Array


class Options(NamedTuple):
    """The arguments that decide which program is compiled."""

    relative_eps: bool
    normalize_updates: bool
    precision: Precision


def initial_state(
    params: optax.Params, layout: _gradients.Layout, groups: Sequence[Group]
) -> SoapState:
    """Zero moments and the coordinate axes as bases."""
    covariances = _square_matrices(groups, jnp.zeros_like)
    bases = _square_matrices(groups, _identities)
    if not layout.leaves:
        # optax.tree.map_params calls init on a tree without arrays, and needs a leaf
        # where the state of other trees has a tuple.
        covariances, bases = jnp.zeros(0), jnp.ones(0)
    return SoapState(
        num_updates=jnp.zeros((), jnp.int32),
        size=jnp.zeros(sum(len(group.places) for group in groups), layout.dtype),
        mu=jax.tree.map(functools.partial(_zeros_like, sum_dtype), params),
        nu=jax.tree.map(functools.partial(_zeros_like, statistics_dtype), params),
        covariances=covariances,
        bases=bases,
        leaf_ids=jnp.array(layout.leaf_ids),
    )


def _zeros_like(dtype: Callable[[Any], Any], param: Any) -> jax.Array:
    own = jnp.result_type(param)
    is_floating = jnp.issubdtype(own, jnp.inexact)
    return jnp.zeros_like(param, dtype(own) if is_floating else own)


def _square_matrices(
    groups: Sequence[Group], make: Callable[[jax.Array], jax.Array]
) -> Any:
    def matrix(group: Group, axis: int) -> jax.Array:
        size = group.axes[axis]
        return make(jnp.zeros((len(group.places), size, size), group.sum_dtype))

    return tuple(tuple(matrix(group, axis) for axis in group.sides) for group in groups)


def _identities(zeros: jax.Array) -> jax.Array:
    return zeros + jnp.eye(zeros.shape[-1], dtype=zeros.dtype)[None]


@functools.partial(jax.jit, static_argnames=("groups", "options"))
def updated(
    updates: optax.Updates,
    state: SoapState,
    hyperparams: Hyperparams,
    *,
    groups: tuple[Group, ...],
    options: Options,
) -> tuple[optax.Updates, SoapState]:
    """The updates and the new state, as one program also without ``jax.jit``."""
    grads, mus, nus = (
        [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]
        for tree in (updates, state.mu, state.nu)
    )
    gradients = [group.stack(grads).astype(group.sum_dtype) for group in groups]
    size = _running_size(gradients, groups, state.size, hyperparams)
    steps, covariances, new_moments = [], [], []
    for i, group in enumerate(groups):
        step, covariance, moment = _step(
            gradients[i],
            (group.stack(mus), group.stack(nus)),
            state.covariances[i],
            state.bases[i],
            state.num_updates,
            tuple(each[np.array(group.places)] for each in (state.size, size)),
            hyperparams,
            group.sides,
            options,
        )
        steps.append(step)
        covariances.append(covariance)
        new_moments.append(moment)
    moments = tuple(new_moments)
    if groups:
        bases, moments = refresh(
            state.num_updates,
            jnp.asarray(hyperparams.frequency).astype(jnp.int32),
            [group.sides for group in groups],
            tuple(covariances),
            state.bases,
            moments,
            options.precision,
        )
        state = state._replace(covariances=tuple(covariances), bases=bases)
    flag = any_run(state.num_updates == 0)
    means, squares = ([moment[i] for moment in moments] for i in range(2))
    return _replace(updates, unstack(steps, groups, flag)), state._replace(
        num_updates=optax.safe_increment(state.num_updates),
        size=size,
        mu=_replace(state.mu, unstack(means, groups, flag)),
        nu=_replace(state.nu, unstack(squares, groups, flag)),
    )


def _running_size(
    gradients: Sequence[jax.Array],
    groups: Sequence[Group],
    old: jax.Array,
    hyperparams: Hyperparams,
) -> jax.Array:
    """The running maximum of each slice's absolute gradient, f[slices]."""
    if not groups:
        return old
    largest = [
        jnp.max(jnp.abs(gradient), range(1, gradient.ndim)).astype(old.dtype)
        for gradient in gradients
    ]
    order = np.argsort(np.concatenate([group.places for group in groups]))
    # It decays no faster than the square roots of V, L and R, or than M: in its unit
    # they stay in the range of their dtype. Half is the most that one step may take.
    b1, b2 = (1 - share for share in (hyperparams.share1, hyperparams.share2))
    decay = jnp.maximum(jnp.maximum(b1, jnp.sqrt(b2)), 0.5).astype(old.dtype)
    newest = jnp.concatenate(largest)[order]
    return lax.stop_gradient(jnp.maximum(newest, decay * old))


def _step(
    gradient: jax.Array,
    moment: Moment,
    covariance: Sides,
    basis: Sides,
    count: jax.Array,
    sizes: tuple[jax.Array, ...],
    hyperparams: Hyperparams,
    sides: Sequence[int],
    options: Options,
) -> tuple[jax.Array, Sides, Moment]:
    """The step of one group, its covariances and its moments."""
    dtype, precision = jnp.finfo(gradient.dtype).dtype, options.precision
    sizes = tuple(size.astype(dtype) for size in sizes)
    old_unit, unit = map(_unit, sizes)
    ratio = old_unit / unit
    share1, share2, eps = (
        each.astype(dtype)
        for each in (hyperparams.share1, hyperparams.share2, hyperparams.eps)
    )

    def over(values: jax.Array, stack: jax.Array) -> jax.Array:
        """One value per slice, to multiply the slices by."""
        return values.reshape(-1, *[1] * (stack.ndim - 1))

    old_mean, old_square = moment
    gradient = gradient / over(unit, gradient)
    rotated = rotate(gradient, sides, basis, precision)
    power = (rotated * rotated.conj()).real
    mean = over((1 - share1) * ratio, old_mean) * old_mean + share1 * rotated
    keep = (1 - share2) * ratio**2
    square = over(keep, old_square) * old_square + share2 * power

    floor = eps * sizes[1] / unit if options.relative_eps else eps / unit
    root = safe_sqrt(square) + over(floor, square)
    is_zero = root == 0
    step = jnp.where(is_zero, 0, mean / jnp.where(is_zero, 1, root))
    step = rotate(step, sides, basis, precision, back=True)
    if options.normalize_updates:
        axes = tuple(range(1, step.ndim))
        mean_square = jnp.mean((step * step.conj()).real, axes, keepdims=True)
        step = step / jnp.where(mean_square > 0, safe_sqrt(mean_square), 1)

    # The first gradient sets the bases only. A product with zero keeps NaN visible.
    is_first = count == 0
    number = jnp.maximum(count, 1).astype(dtype)
    totals = [-jnp.expm1(number * jnp.log1p(-share)) for share in (share1, share2)]
    step = step * jnp.where(is_first, 0, jnp.sqrt(totals[1]) / totals[0])
    moment = choose(is_first, moment, (mean, square))
    products = outer_products(gradient, sides, precision)
    covariance = tuple(
        over(keep, old) * old + share2 * product
        for old, product in zip(covariance, products, strict=True)
    )
    return step, covariance, moment


def _unit(size: jax.Array) -> jax.Array:
    """A power of two near the size, of which the inverse is in range too."""
    limits = jnp.finfo(size.dtype)
    inside = jnp.clip(size, float(limits.tiny), 0.25 / float(limits.tiny))
    return lax.reduce_precision(inside, limits.nexp, 0)


def _replace(tree: Any, arrays: dict[int, jax.Array]) -> Any:
    """The tree with these arrays at their positions, in its dtypes and shardings."""
    leaves, treedef = jax.tree.flatten(tree)
    for position, array in arrays.items():
        old = jnp.asarray(leaves[position])
        leaves[position] = shard_as(narrow(array, old.dtype), old)
    return jax.tree.unflatten(treedef, leaves)

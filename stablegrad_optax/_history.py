"""AdaGC: clips each array at a multiple of the running mean of its norms."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from stablegrad_optax import _gradients, _leaves, _statistics
from stablegrad_optax._checks import renamed, require_number
from stablegrad_optax._numerics import divide, newest_share, weighted_mean


class ClipByHistoryState(NamedTuple):
    """State of :func:`clip_by_history`.

    A vector has one entry per slice of each chosen leaf, in the order of the tree;
    floats are float32, or float64 where the tree holds double precision leaves. Read
    the factors with :func:`scale_factors`.
    """

    norm_mean: jax.Array  # f[slices], mean of the clipped norms, 0 before the first
    num_steps: jax.Array  # i32[], the number of updates with a finite non-zero norm
    scale_factors: jax.Array  # f[slices], 1 before the first update
    leaf_ids: jax.Array  # u32[slices], the id of each slice's leaf


@renamed(stacked_axes="num_stacked_axes")
def clip_by_history(
    max_ratio: float | jax.Array = 1.05,
    *,
    decay: float | jax.Array = 0.98,
    warmup_steps: int | jax.Array = 100,
    warmup_norm: float | jax.Array = 1.0,
    mask: _leaves.Selection | None = None,
    num_stacked_axes: _leaves.NumStackedAxes | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips each array's norm at a multiple of the mean of its own clipped norms.

    .. math::

        g &\leftarrow \min\bigl(1,\ \lambda\, m / \|g\|_2\bigr)\, g \\
        m &\leftarrow \beta\, m + (1 - \beta)\, \|g\|_2

    where :math:`\lambda` is ``max_ratio`` and :math:`\beta` is ``decay``. The second
    line takes the norm of the clipped array, so that a spike enters the mean as what
    was let through. During the first ``warmup_steps`` updates all arrays together are
    clipped at the norm ``warmup_norm``, and m is the smallest clipped norm so far.

    The rule, its warm-up and the defaults are those of AdaGC's Algorithm 1; the edges
    are choices of this package. An array that is zero or not finite passes unchanged:
    its mean stands still, and the norm of all arrays does without it. An array that the
    warm-up never saw takes its first norm as it comes. Norms are right from 1e-36 to
    1e37.

    You can bound updates instead of gradients: place it after ``optax.scale_by_adam``,
    before the weight decay and the learning rate.

    Args:
      max_ratio: How many times its mean a norm may be, at least 1. The mean grows by at
        most ``(1 - decay) * (max_ratio - 1)`` a step: use 2 if norms rise lastingly.
      decay: The decay of the mean, in [0, 1).
      warmup_steps: How many updates are clipped together, at least 0. With 0 each
        array starts from its first norm.
      warmup_norm: The norm of these updates, above 0. Use 0 for ``warmup_steps`` after
        ``scale_by_adam``, whose updates have larger norms.
      mask: Which arrays to transform: a pytree of bools, a prefix of one, or a function
        of the tree that returns one. ``False`` leaves an array exactly as it is.
        Default: all floating arrays.
      num_stacked_axes: How many leading axes of an array index separate layers (see
        :func:`stablegrad`). Each slice then has a mean of its own. Default: none.

    Returns:
      A ``GradientTransformationExtraArgs`` with state :class:`ClipByHistoryState`. An
      array was clipped where its factor in :func:`scale_factors` is below 1.

    Raises:
      ValueError: At construction if an argument is outside its range; in ``init`` or
        ``update`` if ``mask`` or ``num_stacked_axes`` does not fit the tree; in
        ``update`` if a gradient is an integer, or if the gradients are not those of the
        parameters.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from stablegrad_optax import clip_by_history
      >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(4)}
      >>> tx = clip_by_history(warmup_steps=0)
      >>> state = tx.init(params)
      >>> for size in 1.0, 1000.0, 1.0:
      ...     grads = {"kernel": size * jnp.ones((2, 2)), "bias": jnp.ones(4)}
      ...     updates, state = tx.update(grads, state)
      ...     print({name: f"{jnp.linalg.norm(u):.3f}" for name, u in updates.items()})
      {'bias': '2.000', 'kernel': '2.000'}
      {'bias': '2.000', 'kernel': '2.100'}
      {'bias': '2.000', 'kernel': '2.000'}

    References:
      Wang et al., `AdaGC: Enhancing LLM Pretraining Stability via Adaptive Gradient
      Clipping <https://arxiv.org/abs/2502.11034>`_, 2025
    """
    require_number("max_ratio", max_ratio, at_least=1)
    require_number("decay", decay, at_least=0, below=1)
    require_number("warmup_steps", warmup_steps, at_least=0)
    require_number("warmup_norm", warmup_norm, above=0)
    lay_out = functools.partial(
        _gradients.lay_out, mask=mask, num_stacked_axes=num_stacked_axes
    )

    def init_fn(params: optax.Params) -> ClipByHistoryState:
        layout = lay_out(params)
        return ClipByHistoryState(
            norm_mean=layout.zeros(),
            num_steps=jnp.zeros((), jnp.int32),
            scale_factors=layout.ones(),
            leaf_ids=jnp.array(layout.leaf_ids),
        )

    def update_fn(
        updates: optax.Updates,
        state: ClipByHistoryState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ClipByHistoryState]:
        del extra_args
        grads = _gradients.receive(updates, lay_out, state, params)
        mean = state.norm_mean  # m
        norm = grads.norms()
        accepted = jnp.isfinite(norm) & (norm > 0)
        norm = jnp.where(accepted, norm, 0)
        # The limit is lambda m, and the first norm has no limit.
        limit = jnp.asarray(max_ratio, norm.dtype) * mean
        limit = jnp.where(mean == 0, norm, limit)
        warmup = _shrink(_statistics.global_norm(norm), warmup_norm)
        is_warmup = state.num_steps < warmup_steps
        factors = jnp.where(is_warmup, warmup, _shrink(norm, limit))
        factors = jnp.where(accepted, factors, 1)
        # min(norm, limit) keeps its digits, but a product with a tiny factor would not.
        clipped = jnp.where(is_warmup, norm * warmup, jnp.minimum(norm, limit))
        new_mean = weighted_mean(mean, clipped, newest_share(decay, norm.dtype))
        new_mean = jnp.where(is_warmup, jnp.minimum(mean, clipped), new_mean)
        new_mean = jnp.where(mean == 0, clipped, new_mean)
        num_steps = optax.safe_increment(state.num_steps)
        return grads.multiply(factors), ClipByHistoryState(
            norm_mean=jnp.where(accepted, new_mean, mean),
            num_steps=jnp.where(accepted.any(), num_steps, state.num_steps),
            scale_factors=factors,
            leaf_ids=state.leaf_ids,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _shrink(norm: jax.Array, limit: jax.Array | float) -> jax.Array:
    """Returns the factor, at most 1, that brings a norm down to its limit."""
    limit = jnp.asarray(limit, norm.dtype)
    return jnp.minimum(divide(limit, jnp.where(norm > 0, norm, 1)), 1)

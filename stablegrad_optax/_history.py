"""clip_by_history: each leaf's norm at most a little above its own running mean."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from stablegrad_optax import _leaves, _slices, _statistics
from stablegrad_optax._checks import require_number
from stablegrad_optax._numerics import divide, newest_share


class ClipByHistoryState(NamedTuple):
    """State of :func:`clip_by_history`: one vector per statistic.

    A vector has one entry per slice of each chosen leaf, in the order of the tree;
    floats are float32, or float64 where the tree holds double precision leaves. Read
    the factors with :func:`scale_factors`.
    """

    norm_mean: jax.Array  # f[slices] or f[1], of clipped norms, 0 before the first
    num_steps: jax.Array  # i32[], how many updates had a norm
    is_limited: jax.Array  # bool[slices], whether the last update was clipped
    scale_factors: jax.Array  # f[slices], 1 before the first update
    leaf_ids: jax.Array  # u32[slices], which leaf the slice belongs to


def clip_by_history(
    max_ratio: float | jax.Array = 1.05,
    *,
    decay: float | jax.Array = 0.98,
    warmup_steps: int | jax.Array = 100,
    warmup_norm: float | jax.Array = 1.0,
    per_leaf: bool = True,
    mask: _leaves.Mask | None = None,
    num_stacked_axes: _leaves.NumStackedAxes | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips each leaf's norm at a multiple of the mean of its own clipped norms.

    .. math::

        g &\leftarrow \min\bigl(1,\ \lambda\, m / \|g\|_2\bigr)\, g \\
        m &\leftarrow \beta\, m + (1 - \beta)\, \|g\|_2

    with :math:`\lambda` = ``max_ratio``, :math:`\beta` = ``decay`` and the second line
    taken of the clipped leaf, so that a spike enters the mean as what was let through.
    During the first ``warmup_steps`` updates all leaves together are clipped to the
    norm ``warmup_norm``, and m is the smallest norm that a leaf came out with. It only
    ever shrinks.

    **The paper's** (AdaGC, Algorithm 1): the rule, its warm-up, and the defaults, a
    tensor's own statistics (``per_leaf=True``). **Ours**: ``per_leaf=False`` (one norm
    and one mean for all leaves together), ``mask``, ``num_stacked_axes``, and the edges. A
    slice whose gradient is zero or not finite passes unchanged, its mean stands still
    and the global norm does without it; a slice that the warm-up never saw takes its
    first norm as it comes. Norms are in range from 1e-36 to 1e37, as in
    :func:`gradient_stabilizer`.

    **When to use it**: gradients that spike, where a clip at one fixed norm is too high
    for most leaves or too low for some. It also bounds *updates*: place it after
    ``optax.scale_by_adam``, before the weight decay and the learning rate. **When
    not**: where norms rise lastingly. The mean grows by at most ``(1 - decay) *
    (max_ratio - 1)``, a thousandth, a step: a tenfold rise is followed after 2260
    steps, and a leaf whose norm was tiny once during the warm-up stays small as long
    (``warmup_steps=0`` starts from the first norm instead, ``max_ratio=2`` follows
    within 82). It also cuts a share of the steps of any noisy gradient.

    Args:
      max_ratio: How many times its mean a norm may be, at least 1.
      decay: Of the mean, in [0, 1).
      warmup_steps: During how many updates the clip is global; at least 0.
      warmup_norm: To which norm; above 0. After ``scale_by_adam`` the norm of all
        updates together is about the square root of the number of parameters: there a
        norm of 1 would make the first steps small.
      per_leaf: ``False`` takes one norm over all chosen leaves and scales them alike.
      mask: Which leaves to clip: a pytree of bools that is the gradient's tree or a
        prefix of it, or a function that makes one from the tree. Default: all floating
        leaves.
      num_stacked_axes: How many leading axes of a leaf index separate layers: each slice
        has a mean of its own. As in :func:`stablegrad`.

    Returns:
      A ``GradientTransformationExtraArgs`` with state :class:`ClipByHistoryState`.
      :func:`scale_factors` reads from it what each leaf was multiplied by, at most 1.

    Raises:
      ValueError: At construction for an argument outside its range; in ``init`` or
        ``update`` for a ``mask`` or ``num_stacked_axes`` that does not fit the tree; in
        ``update`` if a gradient is an integer, or if the gradients are not those of the
        parameters.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from stablegrad_optax import clip_by_history, scale_factors
      >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(4)}
      >>> tx = clip_by_history(warmup_steps=0)
      >>> state = tx.init(params)
      >>> for size in 1.0, 1.0, 1000.0, 1.0:
      ...     grads = jax.tree.map(lambda p: p * size, params) | {"bias": jnp.ones(4)}
      ...     updates, state = tx.update(grads, state)
      ...     print({name: f"{jnp.linalg.norm(u):.3f}" for name, u in updates.items()})
      {'bias': '2.000', 'kernel': '2.000'}
      {'bias': '2.000', 'kernel': '2.000'}
      {'bias': '2.000', 'kernel': '2.100'}
      {'bias': '2.000', 'kernel': '2.000'}
      >>> scale_factors(state, params)
      {'bias': 1.0, 'kernel': 1.0}

      On Adam's updates:

      >>> tx = optax.chain(
      ...     optax.scale_by_adam(),
      ...     clip_by_history(warmup_steps=0),
      ...     optax.add_decayed_weights(1e-4),
      ...     optax.scale_by_learning_rate(1e-3),
      ... )

    References:
      Wang et al., `AdaGC: Enhancing LLM Pretraining Stability via Adaptive Gradient
      Clipping <https://arxiv.org/abs/2502.11034>`_, 2025
    """
    require_number("max_ratio", max_ratio, at_least=1)
    require_number("decay", decay, at_least=0, below=1)
    require_number("warmup_steps", warmup_steps, at_least=0)
    require_number("warmup_norm", warmup_norm, above=0)
    if not isinstance(per_leaf, bool):
        raise ValueError(f"per_leaf must be True or False; got {per_leaf!r}.")

    def lay_out(tree: optax.Updates) -> _leaves.Layout:
        return _leaves.lay_out(
            tree,
            mask=mask,
            num_stacked_axes=num_stacked_axes,
            default=_leaves.has_gradient,
        )

    def init_fn(params: optax.Params) -> ClipByHistoryState:
        layout = lay_out(params)
        dtype, num_slices = layout.dtype, layout.num_slices
        return ClipByHistoryState(
            norm_mean=jnp.zeros(num_slices if per_leaf else 1, dtype),
            num_steps=jnp.zeros((), jnp.int32),
            is_limited=jnp.zeros(num_slices, bool),
            scale_factors=jnp.ones(num_slices, dtype),
            leaf_ids=jnp.array(layout.leaf_ids),
        )

    def update_fn(
        updates: optax.Updates,
        state: ClipByHistoryState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ClipByHistoryState]:
        del extra_args
        layout = lay_out(updates)
        _leaves.require_gradients(layout, state.leaf_ids, params)
        dtype, mean = state.norm_mean.dtype, state.norm_mean

        arrays = _slices.take(updates, layout.weights)
        norm = _statistics.norms(arrays, layout.weights).astype(dtype)
        accepted = jnp.isfinite(norm) & (norm > 0)
        norm = jnp.where(accepted, norm, 0)
        of_all = _statistics.together(norm)
        if not per_leaf:
            norm = of_all[None]

        is_warm = state.num_steps.astype(dtype) >= jnp.asarray(warmup_steps, dtype)
        is_first, has_norm = mean == 0, norm > 0
        to_warmup_norm = divide(
            jnp.asarray(warmup_norm, dtype), jnp.where(of_all > 0, of_all, 1)
        )
        limit = jnp.where(is_first, norm, jnp.asarray(max_ratio, dtype) * mean)
        to_limit = divide(limit, jnp.where(has_norm, norm, 1))
        factors = jnp.minimum(jnp.where(is_warm, to_limit, to_warmup_norm), 1)

        clipped = jnp.where(is_warm, jnp.minimum(norm, limit), norm * factors)
        change = newest_share(decay, dtype) * (clipped - mean)
        seen = jnp.where(is_warm, mean + change, jnp.minimum(mean, clipped))
        seen = jnp.where(is_first, clipped, seen)
        factors = jnp.where(accepted, factors, 1)
        return (
            _slices.multiply(updates, layout.weights, factors),
            ClipByHistoryState(
                norm_mean=jnp.where(has_norm, seen, mean),
                num_steps=jnp.where(
                    accepted.any(),
                    optax.safe_increment(state.num_steps),
                    state.num_steps,
                ),
                is_limited=factors < 1,
                scale_factors=factors,
                leaf_ids=state.leaf_ids,
            ),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)

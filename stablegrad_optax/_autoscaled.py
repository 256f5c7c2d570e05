"""Gradient Autoscaled Normalization: centred gradients times one global scalar."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from stablegrad_optax import _leaves, _slices, _statistics
from stablegrad_optax._checks import require_number, require_scalar
from stablegrad_optax._numerics import narrow, scale, sum_dtype

AUTOSCALES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "tanh": jnp.tanh,
    "none": jnp.ones_like,
}


class GradientAutoscaledNormalizationState(NamedTuple):
    """State of :func:`gradient_autoscaled_normalization`.

    Floats are float32, or float64 where the tree holds double precision leaves. Read
    the factors with :func:`scale_factors`.
    """

    grad_std: jax.Array  # f[], the global standard deviation of the last update
    exponent: jax.Array  # f[], 0 until it is fixed
    scale_factors: jax.Array  # f[slices], alpha for each, 1 before the first update
    leaf_ids: jax.Array  # u32[slices], which leaf the slice belongs to


def gradient_autoscaled_normalization(
    autoscale: str | Callable[[jax.Array], jax.Array] = "tanh",
    *,
    exponent: float | jax.Array | None = None,
    mask: _leaves.Mask | None = None,
    num_stacked_axes: _leaves.NumStackedAxes | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Removes each weight's mean gradient and damps all weights by one scalar.

    .. math::

        g_l \leftarrow \alpha_t\, (g_l - \bar g_l), \qquad
        \alpha_t = f(\sigma_t)^p, \qquad
        p = \min\bigl(1,\ 1 / |\ln f(\sigma_1)|\bigr)

    with :math:`\bar g_l` the mean of weight ``l``'s gradient over all its elements,
    :math:`\sigma_t` the standard deviation of all centred gradients together and f the
    hyperbolic tangent. So :math:`0 < \alpha_t \le 1`, and at the first step
    :math:`\alpha_1 = \max(f(\sigma_1), 1/e)`. Leaves that are not weights, biases say,
    stay as they are.

    **The paper's**, second hand, for its text was not available to us: the mean of each
    eligible layer's gradient is subtracted, then all of them are multiplied by one
    smooth, hyperparameter-free function of the global standard deviation, with an
    exponent that the first step sets lest the gradients shrink too far. Nothing is
    divided by a standard deviation, and steps only ever get shorter.
    **Our reading**, since its formulas are unknown to us: f, p, which leaves are
    eligible, and what happens at the edges. A weight is a floating leaf with at least
    two axes and two elements whose own name is not ``bias``. The exponent is fixed at
    the first update whose :math:`\sigma` is finite and not zero. A leaf that is not
    finite harms itself alone: it counts neither towards :math:`\sigma_t` nor towards
    the exponent. Where all centred gradients are zero :math:`\alpha_t` is 1.

    **When to use it**: with SGD, where the scalar acts in full. **When not**: as a
    protection from spikes, for a larger :math:`\sigma` gives a larger
    :math:`\alpha`; with AdamW, where six candidates for f could not be told apart in
    our runs, since a constant factor cancels. ``autoscale="none"``, the mean removal
    alone, is the control that every comparison needs.

    The mean is over the whole tensor, whatever its layout: kernels in Flax's (HWIO, IO)
    and in PyTorch's order get the same result. ``optax.centralize`` averages over all
    axes but the first instead, which is gradient centralization in PyTorch's alone.

    Args:
      autoscale: f. ``"tanh"``; ``"none"``, the constant 1; or a callable from
        :math:`\sigma`, f[], to a positive f[].
      exponent: Replaces p by a constant, at least 0.
      mask: Which leaves are weights, instead of the rule above: a pytree of bools that
        is the gradient's tree or a prefix of it, or a function that makes one from the
        tree.
      num_stacked_axes: How many leading axes of a leaf index separate layers: each slice
        has statistics of its own. As in :func:`stablegrad`.

    Returns:
      A ``GradientTransformationExtraArgs`` with state
      :class:`GradientAutoscaledNormalizationState`. :func:`scale_factors` reads
      :math:`\alpha_t` from it, for each weight.

    Raises:
      ValueError: At construction for an unknown ``autoscale`` or an ``exponent``
        outside its range; in ``init`` or ``update`` for a ``mask`` or ``num_stacked_axes``
        that does not fit the tree; in ``update`` if a gradient is an integer, if the
        gradients are not those of the parameters, or if ``autoscale`` returns no real
        scalar.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from stablegrad_optax import gradient_autoscaled_normalization, scale_factors
      >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
      >>> grads = {
      ...     "kernel": jnp.array([[3.0, 2.0], [2.0, 1.0]]),
      ...     "bias": jnp.array([2.0, 1.0]),
      ... }
      >>> tx = optax.chain(gradient_autoscaled_normalization(), optax.sgd(1.0))
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> with jnp.printoptions(precision=3, suppress=True):
      ...     print(updates["kernel"], updates["bias"])
      [[-0.609 -0.   ]
       [-0.     0.609]] [-2. -1.]
      >>> {
      ...     name: f"{factor:.3f}"
      ...     for name, factor in scale_factors(state, params).items()
      ... }
      {'kernel': '0.609'}

      The control, and another transform:

      >>> tx = gradient_autoscaled_normalization("none")
      >>> tx = gradient_autoscaled_normalization(
      ...     lambda std: std / (1 + std), exponent=0.5
      ... )

    References:
      Yun, `Insights from Gradient Dynamics: Gradient Autoscaled Normalization
      <https://arxiv.org/abs/2509.03677>`_, 2025
    """
    is_name = isinstance(autoscale, str) and autoscale in AUTOSCALES
    if not callable(autoscale) and not is_name:
        raise ValueError(
            f"autoscale must be one of {tuple(AUTOSCALES)} or a callable, which "
            "optax.inject_hyperparams takes for a schedule unless static_args names "
            f"it; got {autoscale!r}."
        )
    if exponent is not None:
        require_number("exponent", exponent, at_least=0)
    transform = autoscale if callable(autoscale) else AUTOSCALES[autoscale]

    def lay_out(tree: optax.Updates) -> _leaves.Layout:
        return _leaves.lay_out(tree, mask=mask, num_stacked_axes=num_stacked_axes)

    def init_fn(params: optax.Params) -> GradientAutoscaledNormalizationState:
        layout = lay_out(params)
        dtype = layout.dtype
        return GradientAutoscaledNormalizationState(
            grad_std=jnp.zeros((), dtype),
            exponent=jnp.zeros((), dtype),
            scale_factors=jnp.ones(layout.num_slices, dtype),
            leaf_ids=jnp.array(layout.leaf_ids),
        )

    def update_fn(
        updates: optax.Updates,
        state: GradientAutoscaledNormalizationState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GradientAutoscaledNormalizationState]:
        del extra_args
        layout = lay_out(updates)
        _leaves.require_gradients(layout, state.leaf_ids, params)
        dtype, weights = state.grad_std.dtype, layout.weights

        arrays = _slices.take(updates, weights)
        means, deviations = _statistics.means_and_deviations(arrays, weights)
        std, all_finite = _pool(deviations.astype(dtype), weights)
        alpha, fixed = _alpha(transform, std, exponent, state.exponent)
        of_leaves = zip(arrays, _slices.read(means, weights), strict=True)
        scaled = [_centre_and_scale(array, mean, alpha) for array, mean in of_leaves]
        return (
            _slices.replace(updates, weights, scaled),
            GradientAutoscaledNormalizationState(
                grad_std=std,
                exponent=jnp.where(all_finite & (std > 0), fixed, state.exponent),
                scale_factors=jnp.full_like(state.scale_factors, alpha),
                leaf_ids=state.leaf_ids,
            ),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _pool(
    deviations: jax.Array, leaves: Sequence[_leaves.Leaf]
) -> tuple[jax.Array, jax.Array]:
    """The std of all centred entries of finite slices, and whether all slices are."""
    finite = jnp.isfinite(deviations)
    sizes = _statistics.per_slice(leaves, lambda leaf: leaf.slice_size, float)
    shares = jnp.where(finite, sizes / max(sizes.sum(), 1), 0).astype(deviations.dtype)
    total = shares.sum()
    shares = shares / jnp.where(total == 0, 1, total)
    deviations = jnp.where(finite, deviations, 0)
    return _statistics.pooled(deviations, shares), finite.all()


def _alpha(
    transform: Callable[[jax.Array], jax.Array],
    std: jax.Array,
    exponent: float | jax.Array | None,
    fixed: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The factor of this step, and the exponent that it holds for the later ones."""
    dtype = std.dtype
    nothing = std == 0
    value = transform(jnp.where(nothing, 1, std))
    value = require_scalar("autoscale(sigma)", value).astype(dtype)
    usable = jnp.isfinite(value) & (value > 0)
    log = jnp.log(jnp.where(usable, value, 1))
    if exponent is not None:
        power = fixed = jnp.asarray(exponent, dtype)
    else:
        power = jnp.where(fixed == 0, 1 / jnp.maximum(1, jnp.abs(log)), fixed)
        fixed = jnp.where(usable, power, fixed)
    alpha = jnp.where(usable, jnp.exp(power * log), value)
    return jnp.where(nothing, 1, alpha), fixed


@jax.jit
def _centre_and_scale(
    array: jax.Array, mean: jax.Array, factor: jax.Array
) -> jax.Array:
    dtype = sum_dtype(array.dtype)
    mean = (mean if jnp.iscomplexobj(array) else mean.real).astype(dtype)
    mean = mean.reshape(mean.shape + (1,) * (array.ndim - mean.ndim))
    return narrow(scale(array.astype(dtype) - mean, factor), array.dtype)

"""Gradient Autoscaled Normalization: centred gradients times one global scalar."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from stablegrad_optax import _gradients, _leaves, _slices, _statistics
from stablegrad_optax._checks import renamed, require_number, require_scalar
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
    scale_factors: jax.Array  # f[slices], alpha of each, 1 before the first update
    leaf_ids: jax.Array  # u32[slices], the id of each slice's leaf


@renamed(stacked_axes="num_stacked_axes")
def gradient_autoscaled_normalization(
    autoscale: str | Callable[[jax.Array], jax.Array] = "tanh",
    *,
    exponent: float | jax.Array | None = None,
    mask: _leaves.Selection | None = None,
    num_stacked_axes: _leaves.NumStackedAxes | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Removes each weight's mean gradient and damps all weights by one scalar.

    .. math::

        g_l \leftarrow \alpha_t\, (g_l - \bar g_l), \qquad
        \alpha_t = f(\sigma_t)^p, \qquad
        p = \min\bigl(1,\ 1 / |\ln f(\sigma_1)|\bigr)

    where :math:`\bar g_l` is the mean of weight ``l``'s gradient over all its elements,
    :math:`\sigma_t` the standard deviation of all centred gradients together, and f the
    hyperbolic tangent. So :math:`0 < \alpha_t \le 1`, and at the first step
    :math:`\alpha_1 = \max(f(\sigma_1), 1/e)`.

    The published rule removes the mean of each layer and scales all weights by one
    function of the global deviation. The formulas of f and p, and the choice of
    weights, are choices of this package, because the paper's full text was not
    available to this project.

    A weight is a floating array with at least two axes and two elements whose own name
    is not ``bias``. Other arrays stay as they are. The first update whose
    :math:`\sigma` is finite and not zero fixes the exponent. An array that is not
    finite counts neither towards :math:`\sigma_t` nor towards the exponent. If all
    centred gradients are zero, :math:`\alpha_t` is 1.

    Args:
      autoscale: The function f: ``"tanh"``, ``"none"`` for the constant 1, which leaves
        the removal of the mean alone, or a callable from :math:`\sigma`, f[], to a
        positive f[].
      exponent: Replaces p by a constant, at least 0.
      mask: Which arrays to transform: a pytree of bools, a prefix of one, or a function
        of the tree that returns one. ``False`` leaves an array exactly as it is.
        Default: all. Mask embeddings, whose untouched rows would move.
      num_stacked_axes: How many leading axes of an array index separate layers (see
        :func:`stablegrad`). Each slice then has its own mean. Default: none.

    Returns:
      A ``GradientTransformationExtraArgs`` with state
      :class:`GradientAutoscaledNormalizationState`. :func:`scale_factors` reads
      :math:`\alpha_t` from it, for each weight.

    Raises:
      ValueError: At construction for an unknown ``autoscale`` or an ``exponent``
        outside its range; in ``init`` or ``update`` if ``mask`` or ``num_stacked_axes``
        does not fit the tree; in ``update`` if a gradient is an integer, if the
        gradients are not those of the parameters, or if ``autoscale`` does not return a
        real scalar.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from stablegrad_optax import gradient_autoscaled_normalization
      >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
      >>> kernel = jnp.array([[3.0, 2.0], [2.0, 1.0]])
      >>> grads = {"kernel": kernel, "bias": jnp.array([2.0, 1.0])}
      >>> tx = optax.chain(gradient_autoscaled_normalization(), optax.sgd(1.0))
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> with jnp.printoptions(precision=3, suppress=True):
      ...     print(updates["kernel"], updates["bias"])
      [[-0.609 -0.   ]
       [-0.     0.609]] [-2. -1.]

    References:
      Yun, `Insights from Gradient Dynamics: Gradient Autoscaled Normalization
      <https://arxiv.org/abs/2509.03677>`_, 2025

      Yun, `Hyperparameter-Free Auto-Scaled Gradient Normalization via Global Standard
      Deviation Dynamics <https://openreview.net/forum?id=d4e2FnDNl3>`_, 2025
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

    lay_out = functools.partial(
        _gradients.lay_out,
        mask=mask,
        num_stacked_axes=num_stacked_axes,
        default=_leaves.is_weight_by_default,
    )

    def init_fn(params: optax.Params) -> GradientAutoscaledNormalizationState:
        layout = lay_out(params)
        return GradientAutoscaledNormalizationState(
            grad_std=jnp.zeros((), layout.dtype),
            exponent=jnp.zeros((), layout.dtype),
            scale_factors=layout.ones(),
            leaf_ids=jnp.array(layout.leaf_ids),
        )

    def update_fn(
        updates: optax.Updates,
        state: GradientAutoscaledNormalizationState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GradientAutoscaledNormalizationState]:
        del extra_args
        grads = _gradients.receive(updates, lay_out, state, params)
        weights = grads.layout.weights
        means, deviations = _statistics.means_and_deviations(grads.arrays(), weights)
        std, all_finite = _pool(deviations.astype(grads.dtype), weights)  # sigma_t
        alpha, fixed = _alpha(transform, std, exponent, state.exponent)
        centred = map(
            functools.partial(_centre_and_scale, factor=alpha),
            grads.arrays(),
            _slices.read(means, weights),
        )
        return (
            _slices.replace(updates, weights, centred),
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
    """Returns the std of all centred finite slices, and whether all are finite."""
    finite = jnp.isfinite(deviations)
    sizes = _slices.per_slice(leaves, lambda leaf: leaf.slice_size, float)
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
    """Returns the factor of this step, and the exponent for the later steps."""
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

"""StableGrad: rescales each weight's gradient to a reference standard deviation."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from stablegrad_optax import _gradients, _leaves
from stablegrad_optax._checks import (
    renamed,
    require_bool,
    require_number,
    require_scalar,
)
from stablegrad_optax._numerics import divide

REFERENCE_DECAY = 0.95  # the decay of the mean that max_reference_growth multiplies


class StableGradState(NamedTuple):
    """State of :func:`stablegrad`.

    A vector has one entry per slice of each scaled leaf, in the order of the tree;
    its floats are float32, or float64 where the tree holds double precision leaves.
    Read it with :func:`scale_factors`.
    """

    reference_std: jax.Array  # f[], the reference that the last update used
    grad_std: jax.Array  # f[slices], the spread that the factor divides by
    scale_factors: jax.Array  # f[slices], 1 before the first update
    leaf_ids: jax.Array  # u32[slices], the id of each slice's leaf
    reference_mean: jax.Array  # f[], running mean of the reference, not bias-corrected
    reference_count: jax.Array  # i32[], the number of references in the mean


@renamed(stacked_axes="num_stacked_axes")
def stablegrad(
    reference_std: float | jax.Array | None = 1.0,
    *,
    eps: float | jax.Array = 1e-30,
    scale_biases: bool = True,
    weights: _leaves.Selection | None = None,
    mask: _leaves.Selection | None = None,
    num_stacked_axes: _leaves.NumStackedAxes | None = None,
    max_reference_growth: float | jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales each weight's gradient to a reference standard deviation.

    .. math::

        g_l \leftarrow \frac{\sigma_{out}}{d_l + \epsilon}\, g_l,
        \qquad d_l = \max(\sigma_l,\ \mathrm{rms}_l / 10)

    where :math:`\sigma_l` is the standard deviation of the gradient of weight ``l``
    over all its elements and :math:`\sigma_{out}` is the reference. The gradient is not
    centred. Place it before the optimizer: the model, its input derivatives and a PDE
    residual stay as they are.

    The scalar :math:`\sigma_{out} / (\sigma_l + \epsilon)` for each layer is the
    published rule. The constant reference, the factor of the biases, the floor
    ``rms_l / 10`` and the value of ``eps`` are choices of this package.

    A weight is a floating array with at least two axes and two elements whose own name
    is not ``bias``. Any other array follows the weights of its parent node: it takes
    their factor, or, if there are several, the reference divided by their pooled
    spread :math:`\sqrt{\sum n\, d^2 / \sum n}`. It stays as it is if its parent holds
    no weight. Zeros stay zero. An array that is not finite changes only itself and
    its followers. Statistics are float32 (float64 for float64 arrays), and right for
    standard deviations from 1e-36 to 1e37.

    Args:
      reference_std: The reference :math:`\sigma_{out}`, at least 0, of an update that
        is given no ``prediction_grad_std``. With ``None`` every update must be given
        one.
      eps: A number at least 0 that is added to the spread. It is a numerical floor: a
        larger value, such as 1e-8, leaves gradients that vanish below it unscaled.
      scale_biases: Whether arrays that are not weights follow their layer. ``False``
        is the letter of the paper.
      weights: Which arrays have a statistic of their own, instead of the rule above:
        a pytree of bools, a prefix of one, or a function of the tree that returns one.
        A pytree that can be called, such as an Equinox module, is a pytree.
      mask: Which arrays to transform, in the same forms, as in ``optax.masked``.
        ``False`` leaves an array exactly as it is, and no other array follows it.
        Default: all.
      num_stacked_axes: How many leading axes of an array index separate layers
        (``nn.scan``, ``nnx.vmap``, ensembles). Each slice then has its own statistic
        and factor. An int for all arrays, a pytree of ints, a prefix of one, or a
        function of the tree. Default: none. With ``optax.inject_hyperparams`` name this
        argument, ``weights`` and ``mask`` in ``static_args``.
      max_reference_growth: Limits the reference to this multiple, above 1, of its own
        running mean. Use 2 with a live ``prediction_grad_std``, which grows with the
        loss and would pass its spikes through. Default: no limit.

    Returns:
      A ``GradientTransformationExtraArgs`` with state :class:`StableGradState`. Its
      ``update`` takes ``prediction_grad_std``, a real scalar that overrides
      ``reference_std`` for this step (see :func:`prediction_grad_std`).

    Raises:
      ValueError: At construction if a number is outside its range; in ``init`` or
        ``update`` if ``weights``, ``mask`` or ``num_stacked_axes`` does not fit the
        tree; in ``update`` if there is no reference, if a gradient is an integer, or if
        the gradients are not those of the parameters.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from stablegrad_optax import scale_factors, stablegrad
      >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
      >>> kernel = jnp.array([[1e6, -1e6], [1e6, -1e6]])
      >>> grads = {"kernel": kernel, "bias": jnp.array([2e6, 0.0])}
      >>> tx = optax.chain(stablegrad(), optax.sgd(0.1))
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> print(updates["kernel"][0], updates["bias"])
      [-0.1  0.1] [-0.2 -0. ]
      >>> {name: f"{f:.1e}" for name, f in scale_factors(state, params).items()}
      {'bias': '1.0e-06', 'kernel': '1.0e-06'}

    References:
      Mestre et al., `StableGrad: Backward Scale Control without Batch Normalization
      <https://arxiv.org/abs/2605.19856>`_, 2026
    """
    if reference_std is not None:
        require_number("reference_std", reference_std, at_least=0)
    require_number("eps", eps, at_least=0)
    require_bool("scale_biases", scale_biases)
    if max_reference_growth is not None:
        require_number("max_reference_growth", max_reference_growth, above=1)

    lay_out = functools.partial(
        _gradients.lay_out_with_followers,
        mask=mask,
        num_stacked_axes=num_stacked_axes,
        weights=weights,
        scale_biases=scale_biases,
    )

    def init_fn(params: optax.Params) -> StableGradState:
        layout = lay_out(params)
        return StableGradState(
            reference_std=jnp.zeros((), layout.dtype),
            grad_std=layout.zeros(),
            scale_factors=layout.ones(),
            leaf_ids=jnp.array(layout.leaf_ids),
            reference_mean=jnp.zeros((), layout.dtype),
            reference_count=jnp.zeros((), jnp.int32),
        )

    def update_fn(
        updates: optax.Updates,
        state: StableGradState,
        params: optax.Params | None = None,
        *,
        prediction_grad_std: jax.typing.ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, StableGradState]:
        del extra_args
        grads = _gradients.receive(updates, lay_out, state, params)
        reference = _reference(prediction_grad_std, reference_std)  # sigma_out
        reference, mean, count = _limit(reference, state, max_reference_growth)
        spreads = grads.spreads()  # d_l
        is_zero = spreads == 0
        divisor = jnp.where(is_zero, 1, spreads + jnp.asarray(eps, grads.dtype))
        factors = jnp.where(is_zero, 1, divide(reference, divisor))
        return grads.multiply(factors), StableGradState(
            reference_std=reference,
            grad_std=spreads,
            scale_factors=factors,
            leaf_ids=state.leaf_ids,
            reference_mean=mean,
            reference_count=count,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _reference(
    prediction_grad_std: jax.typing.ArrayLike | None,
    reference_std: float | jax.Array | None,
) -> jax.Array:
    if prediction_grad_std is not None:
        return require_scalar("prediction_grad_std", prediction_grad_std)
    if reference_std is None:
        raise ValueError(
            "stablegrad has no reference: pass prediction_grad_std to update (see "
            "stablegrad_optax.prediction_grad_std), or give stablegrad a constant "
            "reference_std."
        )
    return jnp.asarray(reference_std)


def _limit(
    reference: jax.Array,
    state: StableGradState,
    max_growth: float | jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Limits the reference to a multiple of its running mean, and updates the mean.

    A reference that is zero or not finite says nothing about the scale: it leaves the
    mean as it is, because one exact zero would limit all later references to zero.
    """
    mean, count = state.reference_mean, state.reference_count
    reference = reference.astype(mean.dtype)
    if max_growth is None:
        return reference, mean, count
    is_first = count == 0
    weight = 1 - jnp.power(REFERENCE_DECAY, count.astype(mean.dtype))
    limit = jnp.asarray(max_growth, mean.dtype) * mean / jnp.where(is_first, 1, weight)
    reference = jnp.where(is_first, reference, jnp.minimum(reference, limit))
    accepted = jnp.isfinite(reference) & (reference > 0)
    new_mean = REFERENCE_DECAY * mean + (1 - REFERENCE_DECAY) * reference
    mean = jnp.where(accepted, new_mean, mean)
    count = jnp.where(accepted, optax.safe_increment(count), count)
    return reference, mean, count

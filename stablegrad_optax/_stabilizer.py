"""GradientStabilizer: gives each array's gradient a norm that its history sets."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from stablegrad_optax import _gradients, _leaves
from stablegrad_optax._checks import renamed, require_bool, require_number
from stablegrad_optax._numerics import divide, mean_weights, weighted_mean


class GradientStabilizerState(NamedTuple):
    """State of :func:`gradient_stabilizer`.

    A vector has one entry per slice of each chosen leaf, in the order of the tree;
    floats are float32, or float64 where the tree holds double precision leaves. Read
    the factors with :func:`scale_factors`.
    """

    norm_mean: jax.Array  # f[slices], running mean of the norm, bias-corrected
    norm_rms: jax.Array  # f[slices], running root mean square norm, bias-corrected
    num_accepted: jax.Array  # i32[slices], the number of norms in the statistics
    scale_factors: jax.Array  # f[slices], 1 before the first update
    leaf_ids: jax.Array  # u32[slices], the id of each slice's leaf


@renamed(stacked_axes="num_stacked_axes")
def gradient_stabilizer(
    gamma1: float | jax.Array = 0.6,
    gamma2: float | jax.Array = 0.999,
    *,
    eps: float | jax.Array = 1e-12,
    bias_correction: bool = True,
    max_norm_ratio: float | jax.Array | None = None,
    mask: _leaves.Selection | None = None,
    num_stacked_axes: _leaves.NumStackedAxes | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Gives each array's gradient a norm that its own history sets.

    .. math::

        R &= \|g\|_2 \\
        m &\leftarrow \gamma_1 m + (1-\gamma_1) R, \qquad
        v \leftarrow \gamma_2 v + (1-\gamma_2) R^2 \\
        \rho &= \frac{m / (1-\gamma_1^s)}{\sqrt{v / (1-\gamma_2^s)} + \epsilon} \\
        g &\leftarrow \frac{\rho}{\max(R, \epsilon)}\, g

    where :math:`s` counts the norms that the array has seen. The direction stays, and
    the norm becomes :math:`\rho`, which is 1 for constant norms of any scale and
    bounded for any gradient. An array that is zero or not finite passes unchanged and
    its statistics stand still. Norms are right from 1e-36 to 1e37 in any dtype.

    The rule with bias correction is that of the authors' released code, and
    ``bias_correction=False`` is Algorithm 1 of the paper. ``max_norm_ratio`` is a
    choice of this package.

    Args:
      gamma1: The decay of the mean norm, in [0, 1). An array that is rounded to 1, as
        ``inject_hyperparams`` makes of .999 in a bfloat16 tree, is taken as the largest
        float32 number below 1.
      gamma2: The decay of the mean squared norm, in [0, 1).
      eps: A numerical floor of the norm, at least 0. Arrays with smaller norms fade:
        use 0 or 1e-30 if gradients vanish.
      bias_correction: Whether the means are corrected for their start at zero. Without
        the correction :math:`\rho` starts at 12.65 for the default gammas, a hidden
        warm-up.
      max_norm_ratio: Limits what the statistics see to this multiple, above 1, of the
        current mean norm, so that a single spike is forgotten. Use 2 if gradients
        spike. Default: no limit.
      mask: Which arrays to transform: a pytree of bools, a prefix of one, or a function
        of the tree that returns one. ``False`` leaves an array exactly as it is.
        Default: all floating arrays.
      num_stacked_axes: How many leading axes of an array index separate layers (see
        :func:`stablegrad`). Each slice then has statistics of its own. Default: none.

    Returns:
      A ``GradientTransformationExtraArgs`` with state :class:`GradientStabilizerState`.

    Raises:
      ValueError: At construction if an argument is outside its range; in ``init`` or
        ``update`` if ``mask`` or ``num_stacked_axes`` does not fit the tree; in
        ``update`` if a gradient is an integer, or if the gradients are not those of the
        parameters.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from stablegrad_optax import gradient_stabilizer
      >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
      >>> tx = gradient_stabilizer()
      >>> state = tx.init(params)
      >>> for size in 1.0, 1.0, 1000.0:
      ...     grads = jax.tree.map(lambda p: p * size, params)
      ...     updates, state = tx.update(grads, state)
      ...     print(f"{optax.tree.norm(updates['kernel']):.3f}")
      1.000
      1.000
      0.884

    References:
      Huang et al., `GradientStabilizer: Fix the Norm, Not the Gradient
      <https://arxiv.org/abs/2502.17055>`_, ICML 2026; first version: Stable-SPAM, 2025

      TianjinYellow/GradientStabilizer, the authors' PyTorch code
    """
    require_number("gamma1", gamma1, at_least=0, below=1)
    require_number("gamma2", gamma2, at_least=0, below=1)
    require_number("eps", eps, at_least=0)
    require_bool("bias_correction", bias_correction)
    if max_norm_ratio is not None:
        require_number("max_norm_ratio", max_norm_ratio, above=1)

    lay_out = functools.partial(
        _gradients.lay_out, mask=mask, num_stacked_axes=num_stacked_axes
    )

    def init_fn(params: optax.Params) -> GradientStabilizerState:
        layout = lay_out(params)
        return GradientStabilizerState(
            norm_mean=layout.zeros(),
            norm_rms=layout.zeros(),
            num_accepted=layout.zeros().astype(jnp.int32),
            scale_factors=layout.ones(),
            leaf_ids=jnp.array(layout.leaf_ids),
        )

    def update_fn(
        updates: optax.Updates,
        state: GradientStabilizerState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GradientStabilizerState]:
        del extra_args
        grads = _gradients.receive(updates, lay_out, state, params)
        norm = grads.norms()  # R
        accepted = jnp.isfinite(norm) & (norm > 0)
        norm = jnp.where(accepted, norm, 1)
        count = optax.safe_increment(state.num_accepted)  # s
        seen = _limit(norm, state, max_norm_ratio)
        # The state holds m / (1 - gamma1^s) and sqrt(v / (1 - gamma2^s)), because v
        # itself may overflow.
        total1, weight1 = mean_weights(gamma1, count, grads.dtype)
        total2, weight2 = mean_weights(gamma2, count, grads.dtype)
        mean = weighted_mean(state.norm_mean, seen, weight1)
        rms = _root_mean_square(state.norm_rms, seen, weight2)
        # Without bias correction the ratio is that of m and v themselves, so that the
        # factors 1 - gamma^s are restored.
        m, root_v = (1, 1) if bias_correction else (total1, jnp.sqrt(total2))
        floor = jnp.asarray(eps, grads.dtype)
        rho = _ratio(mean, rms, floor / root_v) * m / root_v
        factors = jnp.where(accepted, divide(rho, jnp.maximum(norm, floor)), 1)
        return grads.multiply(factors), GradientStabilizerState(
            norm_mean=jnp.where(accepted, mean, state.norm_mean),
            norm_rms=jnp.where(accepted, rms, state.norm_rms),
            num_accepted=jnp.where(accepted, count, state.num_accepted),
            scale_factors=factors,
            leaf_ids=state.leaf_ids,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _limit(
    norm: jax.Array,
    state: GradientStabilizerState,
    max_norm_ratio: float | jax.Array | None,
) -> jax.Array:
    """Limits what the statistics see to a multiple of the mean norm."""
    if max_norm_ratio is None:
        return norm
    limit = jnp.asarray(max_norm_ratio, norm.dtype) * state.norm_mean
    return jnp.where(state.num_accepted == 0, norm, jnp.minimum(norm, limit))


def _root_mean_square(rms: jax.Array, norm: jax.Array, weight: jax.Array) -> jax.Array:
    """Computes ``sqrt((1 - weight) rms^2 + weight norm^2)``.

    Squares are taken in units of the larger term, so that none leaves the range. The
    unit's inverse is a factor, because XLA merges divisions in a row, and what it then
    divides by leaves the range.
    """
    rms = jnp.where(weight < 1, rms, 0)  # gamma2 = 0 forgets even a giant norm
    unit = _unit(jnp.maximum(rms, norm))
    old, new = rms * (1 / unit), norm * (1 / unit)
    root = jnp.sqrt(weighted_mean(old**2, new**2, weight))
    # A long mean keeps its digits if the change alone is rounded. The change of a
    # large weight would cancel the mean.
    change = weight * (new - old) * (new + old) / (root + old)
    return jnp.where(weight < 0.5, rms + change * unit, root * unit)


def _ratio(mean: jax.Array, rms: jax.Array, eps: jax.Array) -> jax.Array:
    """Computes ``mean / (rms + eps)`` in units of rms."""
    inverse = 1 / _unit(rms)
    return mean * inverse / (rms * inverse + eps * inverse)


def _unit(scale: jax.Array) -> jax.Array:
    """Returns a unit whose inverse is a normal number, constant for derivatives."""
    largest = float(jnp.finfo(scale.dtype).max) / 16
    return jax.lax.stop_gradient(jnp.minimum(scale, largest))

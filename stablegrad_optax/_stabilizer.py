"""GradientStabilizer: each leaf's gradient at a norm that its history sets."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from stablegrad_optax import _leaves, _slices, _statistics
from stablegrad_optax._checks import require_number
from stablegrad_optax._numerics import divide, mean_weights


class GradientStabilizerState(NamedTuple):
    """State of :func:`gradient_stabilizer`: one vector per statistic.

    A vector has one entry per slice of each chosen leaf, in the order of the tree;
    floats are float32, or float64 where the tree holds double precision leaves. Read
    the factors with :func:`scale_factors`.
    """

    norm_mean: jax.Array  # f[slices], running mean of the norm, bias-corrected
    norm_rms: jax.Array  # f[slices], running root mean square of it, bias-corrected
    num_accepted: jax.Array  # i32[slices], how many norms they have seen
    scale_factors: jax.Array  # f[slices], 1 before the first update
    leaf_ids: jax.Array  # u32[slices], which leaf the slice belongs to


def gradient_stabilizer(
    gamma1: float | jax.Array = 0.6,
    gamma2: float | jax.Array = 0.999,
    *,
    eps: float | jax.Array = 1e-12,
    bias_correction: bool = True,
    max_norm_ratio: float | jax.Array | None = None,
    mask: _leaves.Mask | None = None,
    num_stacked_axes: _leaves.NumStackedAxes | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Gives each leaf's gradient a norm that its own history sets.

    .. math::

        R &= \|g\|_2 \\
        m &\leftarrow \gamma_1 m + (1-\gamma_1) R, \qquad
        v \leftarrow \gamma_2 v + (1-\gamma_2) R^2 \\
        \rho &= \frac{m / (1-\gamma_1^s)}{\sqrt{v / (1-\gamma_2^s)} + \epsilon} \\
        g &\leftarrow \frac{\rho}{\max(R, \epsilon)}\, g

    with :math:`s` the number of norms the leaf has seen. The direction of a leaf stays,
    its norm becomes :math:`\rho`: 1 for constant norms, whatever their scale, and
    bounded whatever the gradient.

    **The paper's** (Algorithm 1): :math:`\rho = m / \sqrt v` without bias correction,
    which starts at 12.6 and decays over some 3000 steps, a hidden warm-up; the gammas.
    Its bounds: :math:`\rho \le 15.82` at the default gammas,
    :math:`(1-\gamma_1) / \sqrt{1-\gamma_2} / \sqrt{1-\gamma_1^2/\gamma_2}` in general;
    and at a step with :math:`R \ge \kappa m`
    :math:`\rho \le (1-\gamma_1 + \gamma_1/\kappa) / \sqrt{1-\gamma_2}`.
    **The released code's**: bias correction, ``eps`` (beside the uncorrected root where
    there is none), every leaf counts, biases too; a leaf that is zero or not finite
    passes unchanged, and its statistics stand still. **Ours**: ``max_norm_ratio``,
    ``mask``, ``num_stacked_axes``, statistics in float32 (float64 for double precision
    leaves) that neither overflow nor underflow for norms from 1e-36 to 1e37 in any
    dtype, and, by Cauchy and Schwarz, the bound of the bias-corrected form at step t,
    :math:`\rho^2 \le \sum_j a_j^2/b_j` with :math:`a_j = (1-\gamma_1)\gamma_1^j /
    (1-\gamma_1^t)` and :math:`b_j` alike: 1, 1.59, 4.88 and 12.58 at steps 1, 10, 100
    and 1000.

    **When to use it**: gradients that spike, with ``max_norm_ratio``. The paper also
    names low precision and weight decay that is added to the gradient; our small runs
    (``python -m benchmarks run spikes``) show no gain there over a clip beyond the
    spread of the seeds. **When not**: behind Adam alone a leaf's constant factor
    cancels; deep nets without normalisation did not train with it in our runs where
    :func:`stablegrad` did; and the steps of SGD no longer shrink with the gradient, so
    that the learning rate has to. ``optax.clip_by_global_norm(1.0)`` did as well or
    better on spikes in our runs and belongs into every comparison.

    A spike's *magnitude* is bounded, its *memory* is not: it enters v, and the leaf
    takes small steps until v has forgotten it. After a spike of 1000 :math:`\rho` falls
    to 0.03 and is back at 0.5 after 5800 steps; with ``max_norm_ratio=2`` it does not
    fall below 0.99.

    **The same authors' first version** of the paper (Stable-SPAM, there AdaGN) has the
    same rule with ``gamma1=0.7, gamma2=0.9, eps=1e-8``: after that spike it falls to
    0.01 and is back at 0.5 after 99 steps, and :math:`\rho` is at most 1.41 in place of
    15.8. Where spikes last they did better in our runs: after ten giant losses in a row
    the final loss of a small decoder rose by 0.06 nats, with the defaults by 0.53
    (five seeds, ``python -m benchmarks run spikes --preset remedies``).
    With ``gamma1=0, gamma2=0, eps=0`` nothing is remembered: every leaf comes out at
    norm 1.

    Args:
      gamma1: Decay of the mean norm, in [0, 1). An array of 1 (``inject_hyperparams``
        casts .999 to the dtype of a bfloat16 tree; its ``hyperparam_dtype`` keeps it)
        is taken as the largest float32 below.
      gamma2: Decay of the mean squared norm, in [0, 1).
      eps: A numerical floor for the norm, at least 0. Leaves whose norms fall below it
        fade: 1e-30 where gradients vanish, 0 is safe.
      bias_correction: ``False`` is the paper's Algorithm 1.
      max_norm_ratio: Feeds the statistics at most this many times the current mean
        norm; above 1. A single spike is then forgotten; a norm that stays high is
        followed within some steps. Default: no limit, as published.
      mask: Which leaves to scale: a pytree of bools that is the gradient's tree or a
        prefix of it, or a function that makes one from the tree. Default: all floating
        leaves.
      num_stacked_axes: How many leading axes of a leaf index separate layers: each slice
        has statistics of its own. As in :func:`stablegrad`.

    Returns:
      A ``GradientTransformationExtraArgs`` with state :class:`GradientStabilizerState`.
      :func:`scale_factors` reads :math:`\rho / R` from it, and 1 for a leaf that stood
      still.

    Raises:
      ValueError: At construction for an argument outside its range; in ``init`` or
        ``update`` for a ``mask`` or ``num_stacked_axes`` that does not fit the tree; in
        ``update`` if a gradient is an integer, or if the gradients are not those of the
        parameters.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from stablegrad_optax import gradient_stabilizer, scale_factors
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
      >>> {name: f"{f:.1e}" for name, f in scale_factors(state, params).items()}
      {'bias': '6.3e-04', 'kernel': '4.4e-04'}

    References:
      Huang et al., `GradientStabilizer: Fix the Norm, Not the Gradient
      <https://arxiv.org/abs/2502.17055>`_, ICML 2026; its first version: Stable-SPAM,
      2025

      TianjinYellow/GradientStabilizer and TianjinYellow/StableSPAM, the authors'
      PyTorch code
    """
    require_number("gamma1", gamma1, at_least=0, below=1)
    require_number("gamma2", gamma2, at_least=0, below=1)
    require_number("eps", eps, at_least=0)
    if not isinstance(bias_correction, bool):
        raise ValueError(
            f"bias_correction must be True or False; got {bias_correction!r}."
        )
    if max_norm_ratio is not None:
        require_number("max_norm_ratio", max_norm_ratio, above=1)

    def lay_out(tree: optax.Updates) -> _leaves.Layout:
        return _leaves.lay_out(
            tree,
            mask=mask,
            num_stacked_axes=num_stacked_axes,
            default=_leaves.has_gradient,
        )

    def init_fn(params: optax.Params) -> GradientStabilizerState:
        layout = lay_out(params)
        dtype, num_slices = layout.dtype, layout.num_slices
        return GradientStabilizerState(
            norm_mean=jnp.zeros(num_slices, dtype),
            norm_rms=jnp.zeros(num_slices, dtype),
            num_accepted=jnp.zeros(num_slices, jnp.int32),
            scale_factors=jnp.ones(num_slices, dtype),
            leaf_ids=jnp.array(layout.leaf_ids),
        )

    def update_fn(
        updates: optax.Updates,
        state: GradientStabilizerState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GradientStabilizerState]:
        del extra_args
        layout = lay_out(updates)
        _leaves.require_gradients(layout, state.leaf_ids, params)
        dtype = state.norm_mean.dtype

        arrays = _slices.take(updates, layout.weights)
        norm = _statistics.norms(arrays, layout.weights).astype(dtype)
        accepted = jnp.isfinite(norm) & (norm > 0)
        norm = jnp.where(accepted, norm, 1)

        count = optax.safe_increment(state.num_accepted)
        mean_total, mean_weight = mean_weights(gamma1, count, dtype)
        square_total, square_weight = mean_weights(gamma2, count, dtype)
        seen = norm
        if max_norm_ratio is not None:
            limit = jnp.asarray(max_norm_ratio, dtype) * state.norm_mean
            seen = jnp.where(count == 1, norm, jnp.minimum(norm, limit))
        floor = jnp.asarray(eps, dtype)
        # What turns the corrected ratio into that of the uncorrected means.
        correction = 1 if bias_correction else jnp.sqrt(square_total)
        mean = (1 - mean_weight) * state.norm_mean + mean_weight * seen
        rms, ratio = _rms_and_ratio(
            mean, state.norm_rms, seen, square_weight, floor / correction
        )
        if not bias_correction:
            ratio = ratio * mean_total / correction
        factors = divide(ratio, jnp.maximum(norm, floor))
        factors = jnp.where(accepted, factors, 1)
        return (
            _slices.multiply(updates, layout.weights, factors),
            GradientStabilizerState(
                norm_mean=jnp.where(accepted, mean, state.norm_mean),
                norm_rms=jnp.where(accepted, rms, state.norm_rms),
                num_accepted=jnp.where(accepted, count, state.num_accepted),
                scale_factors=factors,
                leaf_ids=state.leaf_ids,
            ),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _rms_and_ratio(
    mean: jax.Array,
    rms: jax.Array,
    norm: jax.Array,
    weight: jax.Array,
    eps: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The root mean square with a new norm of this weight, and ``mean / (rms + eps)``.

    Squares are taken in units of the larger term, so that none leaves the range. The
    unit is multiplied by: XLA merges divisions in a row, and what it divides by then
    leaves the range.
    """
    rms = jnp.where(weight < 1, rms, 0)  # gamma2 = 0 forgets, even a giant
    largest = float(jnp.finfo(norm.dtype).max) / 16  # its inverse is a normal number
    unit = jnp.minimum(jax.lax.stop_gradient(jnp.maximum(rms, norm)), largest)
    inverse = 1 / unit
    old, new = rms * inverse, norm * inverse
    root = jnp.sqrt((1 - weight) * old**2 + weight * new**2)
    # The change alone is rounded, not the whole: a long mean keeps its digits.
    change = weight * (new - old) * (new + old) / (root + old)
    return rms + change * unit, mean * inverse / (root + eps * inverse)

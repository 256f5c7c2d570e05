"""StableGrad: each weight's gradient at a reference standard deviation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from stablegrad_optax import _leaves, _slices, _statistics
from stablegrad_optax._checks import require_number, require_scalar
from stablegrad_optax._numerics import divide

REFERENCE_DECAY = 0.95  # of the running mean behind max_reference_growth


class StableGradState(NamedTuple):
    """State of :func:`stablegrad`: one vector per statistic.

    A vector has one entry per slice of each scaled leaf, in the order of the tree;
    its floats are float32, or float64 where the tree holds double precision leaves.
    Read it with :func:`scale_factors`.
    """

    reference_std: jax.Array  # f[], the reference that the last update used
    grad_std: jax.Array  # f[slices], the spread that the factor divides by
    scale_factors: jax.Array  # f[slices], 1 before the first update
    leaf_ids: jax.Array  # u32[slices], which leaf the slice belongs to
    reference_mean: jax.Array  # f[], running mean of the reference, not bias-corrected
    reference_count: jax.Array  # i32[], how many references it has seen


def stablegrad(
    reference_std: float | jax.Array | None = 1.0,
    *,
    eps: float | jax.Array = 1e-30,
    scale_biases: bool = True,
    mask: _leaves.Mask | None = None,
    num_stacked_axes: _leaves.NumStackedAxes | None = None,
    max_reference_growth: float | jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales each weight's gradient to a reference standard deviation.

    .. math::

        g_l \leftarrow \frac{\sigma_{out}}{d_l + \epsilon}\, g_l,
        \qquad d_l = \max(\sigma_l,\ \mathrm{rms}_l / 10)

    with :math:`\sigma_l` the (population) standard deviation of the gradient of weight
    ``l`` over all its elements and :math:`\sigma_{out}` the reference. The gradient is
    not centred. It comes after backpropagation and before the optimizer, so that the
    model, its input derivatives and a PDE residual stay exactly as they are.

    **The paper's**: one scalar a layer, :math:`\sigma_{out} / (\sigma_l + \epsilon)`,
    and, second hand, :math:`\sigma_{out}` as the standard deviation of the *prediction
    gradient* dL/dy, taken anew each step: hand it to ``update`` as
    ``prediction_grad_std`` (see :func:`prediction_grad_std`).

    **Ours**, where the paper's text was not available to us or a measurement argued
    for it: the constant default reference, biases that share their layer's factor, the
    value of ``eps``, the floor ``rms_l / 10`` (a gradient whose spread is negligible
    beside its mean is not blown up: no scaled weight's RMS exceeds ten references),
    ``mask``, ``num_stacked_axes`` and ``max_reference_growth``.

    A *weight* is a floating leaf with at least two axes and two elements whose own name
    is not ``bias`` (Flax's attention biases have two axes, Equinox's convolutions'
    three). A leaf that is not a weight follows the weights under its own parent node:
    it takes their factor, or, where there are several, the reference divided by their
    pooled spread :math:`\sqrt{\sum n\, d^2 / \sum n}`. It passes unchanged where its
    parent holds no weight. A weight whose gradient is zero has no scale to share: it
    stays zero, and its factor, and that of those who follow it alone, is 1.

    Statistics are taken in float32 (float64 for double precision leaves), for standard
    deviations from 1e-36 to 1e37: right to 1e-5 relative where the mean is at most two
    deviations, to 1e-3 up to the floor. A scaled leaf has its own dtype; it saturates
    where that has no infinity (float8). A leaf that is not finite harms itself and its
    followers only.

    With Adam after it a factor that stays constant cancels: what acts there is that
    large gradients at the start, or spikes, no longer fill Adam's second moment.
    ``optax.clip_by_global_norm(1.0)`` and Adam with ``b2=0.9`` do much of the same and
    belong into every comparison. With SGD the factor acts in full; a constant
    reference then wants a learning rate schedule that decays.

    Args:
      reference_std: The reference :math:`\sigma_{out}` where ``update`` is given no
        ``prediction_grad_std``; at least 0. Default 1, a constant, since a chain
        cannot know dL/dy. ``None``: every update must be given one.
      eps: Added to the spread; at least 0. A numerical floor alone: 1e-8 would cap the
        factor, and vanishing gradients of 1e-16 would stay so.
      scale_biases: Whether leaves that are not weights follow their layer. ``False`` is
        the paper's letter; in our runs momentum SGD failed with it on deep nets, while
        most PINNs of 4 to 8 layers with small initial weights did better.
      mask: Which leaves are weights, instead of the rule above: a pytree of bools that
        is the gradient's tree or a prefix of it, or a function that makes one from the
        tree (a pytree that can be called, an Equinox module, is a pytree). Leaves below
        a prefix ``True`` are each a weight of their own.
      num_stacked_axes: How many leading axes of a leaf index separate layers (``nn.scan``,
        ``nnx.vmap``, vmapped ensembles): each slice has its own statistic and factor.
        An int for all leaves, a pytree (prefix) of ints, or a function that makes one.
        ``optax.inject_hyperparams`` must be told that it, like a function as ``mask``,
        is structural: ``static_args=("num_stacked_axes", "mask")``.
      max_reference_growth: Limits the reference to this many times its own running
        mean (decay 0.95 a step, bias-corrected, fed with the limited value); above 1.
        A live ``prediction_grad_std`` grows with the loss and passes its spikes
        through: 2 stopped that in our runs. Default: no limit.

    Returns:
      A ``GradientTransformationExtraArgs`` with state :class:`StableGradState`. Its
      ``update(updates, state, params=None, *, prediction_grad_std=None)`` takes the
      reference of this step, a real scalar, which overrides ``reference_std``.

    Raises:
      ValueError: At construction for a number outside its range; in ``init`` or
        ``update`` for a ``mask`` or ``num_stacked_axes`` that does not fit the tree; in
        ``update`` if there is no reference, if a gradient is an integer, or if the
        gradients are not those of the parameters: the transformation belongs behind
        the aggregation where each example has a gradient of its own.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from stablegrad_optax import scale_factors, stablegrad
      >>> params = {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
      >>> grads = {
      ...     "dense": {
      ...         "kernel": jnp.array([[1e6, -1e6], [1e6, -1e6]]),
      ...         "bias": jnp.array([2e6, 0.0]),
      ...     }
      ... }
      >>> tx = optax.chain(stablegrad(), optax.sgd(0.1))
      >>> state = tx.init(params)
      >>> updates, state = tx.update(grads, state, params)
      >>> print(updates["dense"]["kernel"])
      [[-0.1  0.1]
       [-0.1  0.1]]
      >>> print(updates["dense"]["bias"])
      [-0.2 -0. ]
      >>> {name: f"{f:.1e}" for name, f in scale_factors(state, params).items()}
      {'dense/bias': '1.0e-06', 'dense/kernel': '1.0e-06'}

      The paper's reference, taken anew each step:

      >>> tx = optax.chain(stablegrad(reference_std=None), optax.sgd(0.1))
      >>> updates, _ = tx.update(
      ...     grads, tx.init(params), params, prediction_grad_std=jnp.float32(0.5)
      ... )
      >>> print(updates["dense"]["kernel"])
      [[-0.05  0.05]
       [-0.05  0.05]]

    References:
      Mestre et al., `StableGrad: Backward Scale Control without Batch Normalization
      <https://arxiv.org/abs/2605.19856>`_, 2026
    """
    if reference_std is not None:
        require_number("reference_std", reference_std, at_least=0)
    require_number("eps", eps, at_least=0)
    if not isinstance(scale_biases, bool):
        raise ValueError(f"scale_biases must be True or False; got {scale_biases!r}.")
    if max_reference_growth is not None:
        require_number("max_reference_growth", max_reference_growth, above=1)

    def lay_out(tree: optax.Updates) -> _leaves.Layout:
        return _leaves.lay_out(
            tree, mask=mask, num_stacked_axes=num_stacked_axes, followers=scale_biases
        )

    def init_fn(params: optax.Params) -> StableGradState:
        layout = lay_out(params)
        dtype, num_slices = layout.dtype, layout.num_slices
        return StableGradState(
            reference_std=jnp.zeros((), dtype),
            grad_std=jnp.zeros(num_slices, dtype),
            scale_factors=jnp.ones(num_slices, dtype),
            leaf_ids=jnp.array(layout.leaf_ids),
            reference_mean=jnp.zeros((), dtype),
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
        layout = lay_out(updates)
        _leaves.require_gradients(layout, state.leaf_ids, params)
        dtype = state.reference_std.dtype

        reference = _reference(prediction_grad_std, reference_std).astype(dtype)
        mean, count = state.reference_mean, state.reference_count
        if max_reference_growth is not None:
            growth = jnp.asarray(max_reference_growth, dtype)
            reference, mean, count = _limit(reference, growth, mean, count)

        arrays = _slices.take(updates, layout.weights)
        spreads = _statistics.spreads(arrays, layout.weights).astype(dtype)
        spreads = _shared(spreads, layout)
        is_zero = spreads == 0
        divisor = jnp.where(is_zero, 1, spreads + jnp.asarray(eps, dtype))
        factors = jnp.where(is_zero, 1, divide(reference, divisor))
        return _slices.multiply(updates, layout.scaled, factors), StableGradState(
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


def _shared(spreads: jax.Array, layout: _leaves.Layout) -> jax.Array:
    """The spread that each scaled slice is divided by, from those of the weights.

    A follower has that of the weight it follows, or of several pooled: slice by slice
    those that are stacked like it, and the whole of the others.
    """
    places = dict(zip(layout.weights, _slices.places(layout.weights), strict=True))
    values, num_values = [spreads], spreads.size
    found: dict[tuple[Any, ...], _slices.Indices] = {}
    for leaf, sources in layout.sources.items():
        key = (sources, leaf.stack)
        if key in found:
            continue
        of_sources = [
            places[source].reshape((1, -1) if source.stack == leaf.stack else (-1, 1))
            for source in sources
        ]
        rows = np.concatenate(
            [np.broadcast_to(of, (len(of), leaf.num_slices)) for of in of_sources]
        )
        found[key] = rows[0]
        if len(rows) > 1:
            sizes = np.repeat([s.slice_size for s in sources], [*map(len, of_sources)])
            shares = (sizes / sizes.sum())[:, None]
            values.append(_statistics.pooled(spreads[rows], shares))
            found[key] = num_values + np.arange(leaf.num_slices)
            num_values += leaf.num_slices
    chosen = [found[sources, leaf.stack] for leaf, sources in layout.sources.items()]
    everything = _slices.concatenate(values)
    return everything[np.concatenate([np.zeros(0, np.int64), *chosen])]


def _limit(
    reference: jax.Array, growth: jax.Array, mean: jax.Array, count: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The reference at most ``growth`` times its running mean, and the new mean.

    A reference that is zero or not finite is no evidence of scale: the mean stands
    still, lest one exact zero limit all later references to zero.
    """
    first = count == 0
    weight = 1 - jnp.power(REFERENCE_DECAY, count.astype(mean.dtype))
    limit = growth * mean / jnp.where(first, 1, weight)
    reference = jnp.where(first, reference, jnp.minimum(reference, limit))
    accepted = jnp.isfinite(reference) & (reference > 0)
    new_mean = REFERENCE_DECAY * mean + (1 - REFERENCE_DECAY) * reference
    mean = jnp.where(accepted, new_mean, mean)
    count = jnp.where(accepted, optax.safe_increment(count), count)
    return reference, mean, count

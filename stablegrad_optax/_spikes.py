"""skip_spikes: skips a step whose gradient or loss is an outlier."""

import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from stablegrad_optax import _leaves, _slices, _statistics
from stablegrad_optax._checks import require_number, require_scalar, with_extra_args
from stablegrad_optax._conditional_step import Step, step_unless
from stablegrad_optax._numerics import divide, mean_weights, widest_statistics_dtype

# The deviation counts as at least this share of the mean, because in training without
# noise it is almost zero, and every rise would be a spike. During the warm-up the mean
# itself is the floor, because the deviation of a few values is unreliable.
DEVIATION_FLOOR = 0.01
WARMUP_DEVIATION_FLOOR = 1.0
# The warm-up judges no value before it has seen this many.
FIRST_JUDGED = 10


class SkipSpikesState(NamedTuple):
    """State of :func:`skip_spikes`.

    A vector has one entry for the gradient norm and one for the loss. Floats are
    float32, or float64 where the tree holds double precision leaves.
    """

    inner_state: optax.OptState  # after the last step that was taken
    mean: jax.Array  # f[2], running means, bias-corrected
    deviation: jax.Array  # f[2], running standard deviations about the means
    num_seen: jax.Array  # i32[2], how many values the statistics have seen
    num_skipped: jax.Array  # i32[], how many steps were skipped in all
    skipped_in_a_row: jax.Array  # i32[], how many were skipped since the last one taken
    last_deviation: jax.Array  # f[], (x - m) / s of the last step; inf if not finite
    last_skipped: jax.Array  # bool[], whether the last step was skipped


def skip_spikes(
    inner: optax.GradientTransformation,
    max_deviation: float | jax.Array = 6.0,
    *,
    decay: float | jax.Array = 0.99,
    warmup_steps: int | jax.Array = 100,
    max_consecutive_skips: int | jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Skips a step whose gradient norm or loss is not finite or is an outlier.

    .. math::

        x > m + k\,s, \qquad s = \max(d,\ |m| / 100), \qquad k = \text{max\_deviation}

    where x is the norm of the whole gradient, m its running mean and d its running
    standard deviation. The loss is judged in the same way if ``update`` receives it:
    ``update(grads, state, params, value=loss)``. A skipped step returns zero updates
    and leaves the state of ``inner`` as it was.

    The first ``warmup_steps`` values are judged by :math:`s = \max(d, |m|)`, from the
    tenth on. Clip the gradient as well, as in the example, to bound the first ten. The
    statistics see a limited value c, whether or not the step is skipped:

    .. math::

        c = \min(\max(x,\ m - k s),\ m + k s), \quad
        d^2 \leftarrow (1 - w)\,(d^2 + w\,(c - m)^2), \quad
        m \leftarrow (1 - w)\, m + w\, c

    with :math:`w = 1 - \text{decay}`, corrected for the start at zero. Values that are
    not finite or exactly zero do not enter. The rule is a choice of this package, after
    the optimizers of OLMo-core that skip steps.

    Args:
      inner: The optimizer, or any transformation. Its ``update`` receives all extra
        arguments, including ``value``.
      max_deviation: The number of deviations k, above 1.
      decay: The decay of the running mean and deviation, in [0, 1).
      warmup_steps: After how many values a statistic judges by its deviation alone; at
        least 0.
      max_consecutive_skips: After so many skipped steps in a row the next step is
        taken, **even if it is not finite**, as in ``optax.apply_if_finite``; at least
        1. Default: no limit, and ``inner`` never receives a step that is not finite.

    Returns:
      A ``GradientTransformationExtraArgs`` with state :class:`SkipSpikesState`. Read it
      with :func:`health`. With data parallelism, pass averaged gradients and losses, so
      that every process decides alike.

    Raises:
      ValueError: At construction for a number outside its range, or if ``inner`` is not
        a transformation; in ``update`` if ``value`` is not a real scalar.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from stablegrad_optax import skip_spikes
      >>> params = {"kernel": jnp.ones((2, 2))}
      >>> optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
      >>> tx = skip_spikes(optimizer, warmup_steps=3)
      >>> state = tx.init(params)
      >>> update = jax.jit(tx.update)
      >>> for size in 1.0, 1.1, 0.9, 1e4, float("nan"), 1.0:
      ...     grads = jax.tree.map(lambda p: p * size, params)
      ...     updates, state = update(grads, state, params, value=jnp.float32(0.5))
      ...     print(bool(state.last_skipped), state.skipped_in_a_row)
      False 0
      False 0
      False 0
      True 1
      True 2
      False 0

      Accumulate gradients inside ``skip_spikes``, because ``MultiSteps`` outside would
      keep a NaN in its accumulator:

      >>> tx = skip_spikes(optax.MultiSteps(optax.adamw(1e-3), 4))

    References:
      AI2, `OLMo-core <https://github.com/allenai/OLMo-core>`_, ``SkipStepOptimizer``
    """
    require_number("max_deviation", max_deviation, above=1)
    require_number("decay", decay, at_least=0, below=1)
    require_number("warmup_steps", warmup_steps, at_least=0)
    if max_consecutive_skips is not None:
        require_number("max_consecutive_skips", max_consecutive_skips, at_least=1)
    wrapped = with_extra_args("inner", inner)

    def init_fn(params: optax.Params) -> SkipSpikesState:
        dtype = widest_statistics_dtype(leaf.dtype for leaf in _leaves.describe(params))
        return SkipSpikesState(
            inner_state=wrapped.init(params),
            mean=jnp.zeros(2, dtype),
            deviation=jnp.zeros(2, dtype),
            num_seen=jnp.zeros(2, jnp.int32),
            num_skipped=jnp.zeros((), jnp.int32),
            skipped_in_a_row=jnp.zeros((), jnp.int32),
            last_deviation=jnp.zeros((), dtype),
            last_skipped=jnp.zeros((), bool),
        )

    def update_fn(
        updates: optax.Updates,
        state: SkipSpikesState,
        params: optax.Params | None = None,
        *,
        value: jax.typing.ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SkipSpikesState]:
        dtype = state.mean.dtype
        leaves = tuple(filter(_leaves.has_gradient, _leaves.describe(updates)))
        norms = _statistics.norms(_slices.take(updates, leaves), leaves)
        watched = [_statistics.global_norm(norms.astype(dtype))]
        if value is not None:
            # `require_scalar` rejects Python numbers that are NaN or negative, but a
            # loss may be either.
            loss = jnp.asarray(value) if isinstance(value, numbers.Real) else value
            watched.append(require_scalar("value", loss).astype(dtype))
            extra_args["value"] = value
        is_spike, state = _judge(watched, state, max_deviation, decay, warmup_steps)
        if max_consecutive_skips is not None:
            is_spike &= state.skipped_in_a_row < jnp.asarray(max_consecutive_skips)

        def step() -> Step:
            return wrapped.update(updates, state.inner_state, params, **extra_args)

        updates, inner_state = step_unless(is_spike, step, state.inner_state)
        total, in_a_row = state.num_skipped, state.skipped_in_a_row
        return updates, state._replace(
            inner_state=inner_state,
            num_skipped=jnp.where(is_spike, optax.safe_increment(total), total),
            skipped_in_a_row=jnp.where(is_spike, optax.safe_increment(in_a_row), 0),
            last_skipped=is_spike,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _judge(
    watched: list[jax.Array],
    state: SkipSpikesState,
    max_deviation: float | jax.Array,
    decay: float | jax.Array,
    warmup_steps: int | jax.Array,
) -> tuple[jax.Array, SkipSpikesState]:
    """Tells whether a value is a spike or not finite, and updates the statistics."""
    m, d, dtype = state.mean, state.deviation, state.mean.dtype
    is_given = jnp.arange(2) < len(watched)
    x = jnp.stack([*watched, jnp.ones((), dtype)][:2])
    is_finite = jnp.isfinite(x)
    x = jnp.where(is_finite, x, 0)

    k, warmup = jnp.asarray(max_deviation, dtype), jnp.asarray(warmup_steps, dtype)
    seen = state.num_seen.astype(dtype)
    floor = jnp.where(seen < warmup, WARMUP_DEVIATION_FLOOR, DEVIATION_FLOOR)
    s = jnp.maximum(d, floor.astype(dtype) * jnp.abs(m))
    has_scale = (seen > 0) & (s > 0)
    deviations = jnp.where(has_scale, divide(x - m, jnp.where(has_scale, s, 1)), 0)
    is_judged = seen >= jnp.minimum(warmup, FIRST_JUDGED)
    is_spike = is_given & (is_judged & (deviations > k) | ~is_finite)

    # Every quantity below is finite for every finite x, because a weighted mean and
    # half a difference of finite values are. An infinite `k * s` limits nothing.
    count = optax.safe_increment(state.num_seen)
    _, w = mean_weights(decay, count, dtype)
    c = jnp.where(has_scale, jnp.clip(x, m - k * s, m + k * s), x)
    half_change = jnp.abs(c / 2 - m / 2)
    d_new = _statistics.pooled(
        jnp.stack([d, half_change]), jnp.stack([1 - w, 4 * (1 - w) * w])
    )
    d_new = jnp.minimum(d_new, float(jnp.finfo(dtype).max))
    is_counted = is_given & is_finite & (x != 0)
    last = jnp.where(is_finite, deviations, jnp.inf)
    return is_spike.any(), state._replace(
        mean=jnp.where(is_counted, (1 - w) * m + w * c, m),
        deviation=jnp.where(is_counted, d_new, d),
        num_seen=jnp.where(is_counted, count, state.num_seen),
        last_deviation=jnp.where(is_given, last, -jnp.inf).max(),
    )

"""skip_spikes: a step that stands out from those before it is not taken."""

import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from stablegrad_optax import _leaves, _slices, _statistics
from stablegrad_optax._checks import require_number, require_scalar, with_extra_args
from stablegrad_optax._numerics import divide, mean_weights, widest_statistics_dtype

# A deviation is taken as at least this share of the mean: training without noise would
# have none, and each rise would be a spike.
DEVIATION_FLOOR = 0.01


class SkipSpikesState(NamedTuple):
    """State of :func:`skip_spikes`; the statistics are (of the norm, of the loss).

    Floats are float32, or float64 where the tree holds double precision leaves.
    """

    inner_state: optax.OptState  # of the last step that was taken
    mean: jax.Array  # f[2], running means, bias-corrected
    deviation: jax.Array  # f[2], running standard deviations about them
    num_seen: jax.Array  # i32[2], how many values they have seen
    num_skipped: jax.Array  # i32[], how many steps were not taken, in all
    last_deviation: jax.Array  # f[], of the last step, in deviations; inf: not finite
    last_skipped: jax.Array  # bool[], whether it was not taken


def skip_spikes(
    inner: optax.GradientTransformation,
    max_deviation: float | jax.Array = 6.0,
    *,
    decay: float | jax.Array = 0.99,
    warmup_steps: int | jax.Array = 100,
) -> optax.GradientTransformationExtraArgs:
    r"""Does not take a step whose gradient or loss stands out from those before it.

    With x the norm of the whole gradient, m its running mean and d the running standard
    deviation about it, a step is skipped where

    .. math::

        x > m + k\, \max(d,\ |m| / 100), \qquad k = \text{max\_deviation},

    or where x is not finite. The same is asked of the loss where ``update`` is given
    one, ``update(grads, state, params, value=loss)``. A skipped step has updates of
    zero and leaves every state of ``inner`` bit for bit as it was: neither Adam's
    moments nor its step count, nor a schedule, know of it.

    The statistics are fed with :math:`\min(x,\ m + k \max(d, |m|/100))`, skipped or
    not, with weight :math:`1 - \text{decay}` and corrected for their start at zero:

    .. math::

        d^2 \leftarrow (1 - w)\,(d^2 + w\,(x - m)^2), \quad m \leftarrow m + w\,(x - m)

    So one spike changes them little, however large; a level that stays is followed,
    since the deviation grows by a sixth at each step at the limit; and values that are
    not finite, or exactly zero, do not enter them.

    All of this is **ours**: no paper is behind it. Several training code bases skip
    steps by the mean and deviation of a window of losses or norms; six deviations is
    what OLMo-core's ``SkipStepAdamW`` has as its default.

    **When to use it**: a batch now and then whose gradient is harmful as such, such as
    corrupt data, and overflows of low precision. **When not**: where a large gradient
    is right but for its length, for a clip still takes its direction; with few steps
    in all, for none is judged before ``warmup_steps`` values were seen; and after a
    *rise* that lasts it waits, some 20 to 100 steps by its height, before it trusts it.

    It costs one read of the gradient. On accelerators nothing is branched on and no
    state is written twice: what the optimizer writes is chosen within its own loops. On
    a CPU a conditional is cheaper.

    Args:
      inner: The optimizer, or any transformation; what ``update`` is given beside
        gradients, state and parameters, ``value`` too, is handed on to it.
      max_deviation: k, above 1.
      decay: Of the running mean and deviation, in [0, 1).
      warmup_steps: How many values a statistic must have seen before it may call a
        value a spike; at least 0. What is not finite is skipped from the first.

    Returns:
      A ``GradientTransformationExtraArgs`` with state :class:`SkipSpikesState`, whose
      ``update`` takes the loss, a real scalar, as ``value``. :func:`health` reads
      how many steps were skipped. With data parallelism hand it averaged gradients and
      losses: then every process decides alike.

    Raises:
      ValueError: At construction for a number outside its range or an ``inner`` that is
        no transformation; in ``update`` for a ``value`` that is no real scalar.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from stablegrad_optax import skip_spikes
      >>> params = {"kernel": jnp.ones((2, 2))}
      >>> tx = skip_spikes(optax.adamw(1e-3), warmup_steps=3)
      >>> state = tx.init(params)
      >>> update = jax.jit(tx.update)
      >>> for size in 1.0, 1.1, 0.9, 1e4, float("nan"), 1.0:
      ...     grads = jax.tree.map(lambda p: p * size, params)
      ...     updates, state = update(grads, state, params)
      ...     print(bool(state.last_skipped), f"{state.last_deviation:.3g}")
      False 0
      False 10
      False -4.34
      True 1.51e+05
      True inf
      False -0.479
      >>> print(state.num_skipped, optax.tree.get(state, "mu")["kernel"][0, 0] > 1)
      2 False

      With the loss, where the larger of the two deviations counts:

      >>> updates, state = update(grads, state, params, value=jnp.float32("nan"))
      >>> print(state.num_skipped)
      3

      Around accumulation it judges each part and drops it, inside it the mean of all:

      >>> tx = skip_spikes(optax.MultiSteps(optax.adamw(1e-3), 4))
      >>> tx = optax.MultiSteps(skip_spikes(optax.adamw(1e-3)), 4)

    References:
      AI2, `OLMo-core <https://github.com/allenai/OLMo-core>`_, ``SkipStepOptimizer``
    """
    require_number("max_deviation", max_deviation, above=1)
    require_number("decay", decay, at_least=0, below=1)
    require_number("warmup_steps", warmup_steps, at_least=0)
    wrapped = with_extra_args("inner", inner)

    def init_fn(params: optax.Params) -> SkipSpikesState:
        dtype = widest_statistics_dtype(leaf.dtype for leaf in _leaves.describe(params))
        return SkipSpikesState(
            inner_state=wrapped.init(params),
            mean=jnp.zeros(2, dtype),
            deviation=jnp.zeros(2, dtype),
            num_seen=jnp.zeros(2, jnp.int32),
            num_skipped=jnp.zeros((), jnp.int32),
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
            # A number may be NaN or below 0, unlike other arguments.
            loss = jnp.asarray(value) if isinstance(value, numbers.Real) else value
            watched.append(require_scalar("value", loss).astype(dtype))
            extra_args["value"] = value
        judged = _judge(watched, state, max_deviation, decay, warmup_steps)
        skip = judged.last_skipped

        def step() -> tuple[optax.Updates, optax.OptState]:
            return wrapped.update(updates, state.inner_state, params, **extra_args)

        def stay() -> tuple[optax.Updates, optax.OptState]:
            shapes, _ = jax.eval_shape(step)
            return jax.tree.map(jnp.zeros_like, shapes), state.inner_state

        updates, inner_state = lax.platform_dependent(
            cpu=lambda: lax.cond(
                skip, lambda: _varying(skip, stay()), lambda: _varying(skip, step())
            ),
            default=lambda: _step_unless(skip, *step(), state.inner_state),
        )
        return updates, judged._replace(inner_state=inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _judge(
    watched: list[jax.Array],
    state: SkipSpikesState,
    max_deviation: float | jax.Array,
    decay: float | jax.Array,
    warmup_steps: int | jax.Array,
) -> SkipSpikesState:
    """The state with new statistics, and whether the step is to be skipped."""
    dtype = state.mean.dtype
    is_given = jnp.arange(2) < len(watched)
    x = jnp.stack([*watched, jnp.ones((), dtype)][:2])
    is_finite = jnp.isfinite(x)
    x = jnp.where(is_finite, x, 0)

    spread = jnp.maximum(state.deviation, DEVIATION_FLOOR * jnp.abs(state.mean))
    has_spread = (state.num_seen > 0) & (spread > 0)
    deviations = divide(x - state.mean, jnp.where(has_spread, spread, 1))
    deviations = jnp.where(has_spread, deviations, 0)
    most = jnp.asarray(max_deviation, dtype)
    is_judged = state.num_seen.astype(dtype) >= jnp.asarray(warmup_steps, dtype)
    is_spike = is_judged & (deviations > most)
    skipped = (is_given & (is_spike | ~is_finite)).any()

    count = optax.safe_increment(state.num_seen)
    _, weight = mean_weights(decay, count, dtype)
    change = jnp.where(has_spread, jnp.minimum(deviations, most) * spread, x)
    rest = 1 - weight
    both = jnp.stack([state.deviation, jnp.abs(change)])
    deviation = _statistics.pooled(both, jnp.stack([rest, rest * weight]))
    is_counted = is_given & is_finite & (x != 0)
    return state._replace(
        mean=jnp.where(is_counted, state.mean + weight * change, state.mean),
        deviation=jnp.where(is_counted, deviation, state.deviation),
        num_seen=jnp.where(is_counted, count, state.num_seen),
        num_skipped=jnp.where(
            skipped, optax.safe_increment(state.num_skipped), state.num_skipped
        ),
        last_deviation=jnp.where(
            is_given, jnp.where(is_finite, deviations, jnp.inf), -jnp.inf
        ).max(),
        last_skipped=skipped,
    )


def _varying(skip: jax.Array, tree: Any) -> Any:
    """As it is, but in `shard_map` over the axes too that `skip` varies over.

    Both branches of a conditional must vary over the same ones.
    """
    return jax.tree.map(lambda leaf: jnp.where(skip, leaf, leaf), tree)


def _step_unless(
    skip: jax.Array, updates: Any, new: Any, old: Any
) -> tuple[optax.Updates, optax.OptState]:
    """A choice for each entry, which XLA fuses into the loops that make it."""
    return (
        jax.tree.map(lambda u: jnp.where(skip, jnp.zeros_like(u), u), updates),
        jax.tree.map(lambda new, old: jnp.where(skip, old, new), new, old),
    )

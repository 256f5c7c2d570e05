"""health: what the transformations did in the last step, as numbers for a logger."""

import functools
import operator
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import optax

from stablegrad_optax._diagnostics import (
    has_scale_factors,
    leaf_ids,
    one_step,
    read,
    scale_factors,
    skips_inside_accumulation,
    states,
)
from stablegrad_optax._history import ClipByHistoryState
from stablegrad_optax._spikes import SkipSpikesState


def health(
    opt_state: optax.OptState, params: optax.Params | None = None
) -> dict[str, float | str]:
    """Reads what the transformations did in the last step, for any logger.

    The function reads the states of this package in an optimizer's state, which are a
    few numbers per array, and not the gradient. Call it outside ``jit``, on the state
    that a step returned, as often as you log.

    Args:
      opt_state: The state of an optimizer.
      params: The parameters that ``init`` was given. With them, each array's factor has
        an entry.

    Returns:
      A dict of Python floats, and one name, with the entries that the states know:

      =======================  ====================================================
      key                      value
      =======================  ====================================================
      scale_factor/min, /max   the smallest and the largest factor of an array
      scale_factor/<array>     the factor of each scaled array, the product over all
                               transformations. The name of a stacked array ends in
                               ``[0]`` and so on. An array called ``min`` or ``max``
                               is written ``['min']``
      smallest_scale_factor    with ``params``, the name of the array that has it
      nonfinite_leaves         the number of arrays whose spread is not finite in some
                               slice. A bias has the spread of the weight that it
                               follows. ``gradient_autoscaled_normalization`` does not
                               count them
      reference_std            the reference of ``stablegrad``, the largest of several
      limited_leaves           the number of arrays that ``clip_by_history`` clipped
                               in some slice
      num_leaves               the number of arrays that ``clip_by_history`` may clip
      skipped_steps            the number of steps that ``skip_spikes`` skipped
      skipped_in_a_row         the number of those since the last step that was taken
      last_skipped             1 if ``skip_spikes`` skipped the last step, otherwise
                               0. After a skipped step, the entries of the inner
                               transformation are those of the last step taken
      last_deviation           the distance of the last step from the mean, in
                               deviations, the largest of several; infinite if the
                               step was not finite
      =======================  ====================================================

    Raises:
      ValueError: If ``opt_state`` holds no state of this package or states of several
        steps or members, or inside ``jit``.

    Warns:
      UserWarning: If ``optax.MultiSteps`` wraps ``skip_spikes`` and would keep a NaN.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from stablegrad_optax import health, stablegrad
      >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
      >>> grads = {"kernel": jnp.diag(jnp.array([8.0, 8.0])), "bias": jnp.ones(2)}
      >>> tx = optax.chain(stablegrad(), optax.adamw(1e-3))
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> health(state)["scale_factor/max"]
      0.25
      >>> health(state, params)["scale_factor/kernel"]
      0.25

      For Weights & Biases: ``wandb.log(health(opt_state, params), step=step)``.
      For TensorBoard, with a ``SummaryWriter``::

          for name, value in health(opt_state, params).items():
              add = writer.add_text if isinstance(value, str) else writer.add_scalar
              add(name, value, step)
    """
    own = list(states(opt_state))
    if not own:
        raise ValueError(
            "opt_state holds no state of this package's methods; got a "
            f"{type(opt_state).__name__}."
        )
    for state in own:
        # A state of one step has no leading axis.
        is_scaling = has_scale_factors(state)
        one_step(read(state.leaf_ids) if is_scaling else read(state.num_skipped)[None])
    if skips_inside_accumulation(opt_state):
        warnings.warn(_INSIDE_ACCUMULATION, stacklevel=2)
    values: dict[str, float | str] = {}
    if any(map(has_scale_factors, own)):
        values |= _factor_entries(opt_state, params, own)
    for reading in _READINGS:
        values_read = [reading.read(x) for x in own if reading.applies(x)]
        known = [value for value in values_read if value is not None]
        if known:
            values[reading.name] = functools.reduce(reading.join, known)
    return values


_INSIDE_ACCUMULATION = (
    "optax.MultiSteps(skip_spikes(...)) keeps the NaN of one micro-batch in its "
    "accumulator, and skip_spikes then skips every step. Write "
    "skip_spikes(optax.MultiSteps(...)), or give MultiSteps "
    "should_skip_update_fn=optax.skip_not_finite."
)


def _factor_entries(
    opt_state: optax.OptState, params: optax.Params | None, own: list[Any]
) -> dict[str, float | str]:
    if params is None:
        scaling = filter(has_scale_factors, own)
        factors = np.concatenate([one_step(read(x.scale_factors)) for x in scaling])
        return _ends(factors.tolist())
    by_name = {
        name if np.ndim(factor) == 0 else f"{name}[{i}]": float(value)
        for name, factor in scale_factors(opt_state, params).items()
        for i, value in enumerate(np.atleast_1d(factor))
    }
    named = {
        f"scale_factor/{[name] if name in ('min', 'max') else name}": factor
        for name, factor in by_name.items()
    }
    smallest: dict[str, float | str] = {}
    if by_name:
        smallest["smallest_scale_factor"] = min(by_name, key=lambda name: by_name[name])
    return _ends(list(by_name.values())) | smallest | named


def _ends(factors: list[float]) -> dict[str, float | str]:
    if not factors:
        return {}
    return {"scale_factor/min": min(factors), "scale_factor/max": max(factors)}


class _Reading(NamedTuple):
    """Describes one entry of :func:`health`."""

    name: str
    applies: Callable[[Any], bool]  # whether a state has the entry
    read: Callable[[Any], float | None]  # the value of a state, None if unknown
    join: Callable[[float, float], float]  # joins the values of two states


def _nonfinite_leaves(state: Any) -> float | None:
    spreads = read(state.grad_std)
    if spreads.ndim < read(state.leaf_ids).ndim:
        return None  # the state has one spread for all finite leaves
    return float(len(np.unique(leaf_ids(state)[~np.isfinite(spreads)])))


def _limited_leaves(state: ClipByHistoryState) -> float:
    return float(len(np.unique(leaf_ids(state)[read(state.scale_factors) < 1])))


def _num_leaves(state: ClipByHistoryState) -> float:
    return float(len(np.unique(leaf_ids(state))))


def _has(field: str) -> Callable[[Any], bool]:
    return lambda state: hasattr(state, field)


def _is(kind: type) -> Callable[[Any], bool]:
    return lambda state: isinstance(state, kind)


def _number(field: str) -> Callable[[Any], float]:
    return lambda state: float(read(getattr(state, field)))


_READINGS = (
    _Reading("nonfinite_leaves", _has("grad_std"), _nonfinite_leaves, operator.add),
    _Reading("reference_std", _has("reference_std"), _number("reference_std"), max),
    _Reading("limited_leaves", _is(ClipByHistoryState), _limited_leaves, operator.add),
    _Reading("num_leaves", _is(ClipByHistoryState), _num_leaves, operator.add),
    *(
        _Reading(name, _is(SkipSpikesState), _number(field), join)
        for name, field, join in (
            ("skipped_steps", "num_skipped", operator.add),
            ("skipped_in_a_row", "skipped_in_a_row", max),
            ("last_skipped", "last_skipped", max),
            ("last_deviation", "last_deviation", max),
        )
    ),
)

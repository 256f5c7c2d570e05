"""What the transformations did: the factor of every leaf, and what to log of them."""

import operator
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax

from stablegrad_optax._leaves import describe


def scale_factors(
    opt_state: optax.OptState, params: optax.Params
) -> dict[str, float | np.ndarray]:
    """The factor by which the last update multiplied each leaf.

    Reads the states of this package's methods wherever they stand in an optimizer's
    state (chains, ``optax.masked``, ``optax.MultiSteps``, ``nnx.Optimizer`` ...). With
    several methods in a chain it is the product of their factors; hand over a part of
    the state for one method alone. Call it outside ``jit``, on the state that a step
    returned.

    Args:
      opt_state: The state of an optimizer, or of ``jax.lax.scan``'s stacked states.
      params: The parameters that ``init`` was given: they carry the names.

    Returns:
      ``{"path/to/kernel": factor}``, one entry for each leaf that was scaled, those
      that follow a weight included, in the order of the tree; ``{}`` if there was none
      to scale. Leaves that would share a name have their full path. A stacked leaf's
      entry is an array f[slices]; if the states carry further leading axes (steps of a
      scan, members of a population) these come first, f[steps] or f[steps, slices].

    Raises:
      ValueError: If ``opt_state`` holds no state of this package's methods, if its
        leaves are not those of ``params``, or inside ``jit``.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from stablegrad_optax import scale_factors, stablegrad
      >>> params = {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
      >>> tx = optax.chain(stablegrad(), optax.adamw(1e-3))
      >>> grads = {
      ...     "dense": {
      ...         "kernel": jnp.array([[4.0, -4.0], [4.0, -4.0]]),
      ...         "bias": jnp.ones(2),
      ...     }
      ... }
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> scale_factors(state, params)
      {'dense/bias': 0.25, 'dense/kernel': 0.25}
    """
    states = [state for state in _states(opt_state) if _is_scaling(state)]
    if not states:
        raise ValueError(
            "opt_state holds no state of stablegrad, gradient_stabilizer, "
            "gradient_autoscaled_normalization or clip_by_history; got a "
            f"{type(opt_state).__name__}."
        )
    leaves = describe(params)
    names = {leaf.id: leaf.name for leaf in leaves}
    if len(names) < len(leaves):
        alike = [leaf.name for leaf in leaves if leaf.name not in names.values()]
        raise ValueError(
            f"params has leaves of one checksum (CRC-32): {', '.join(alike)} cannot be "
            "told from another. Rename them."
        )
    factors: dict[str, np.ndarray] = {}
    for state in states:
        ids, scales = _leaf_ids(state), _read(state.scale_factors)
        if not set(ids.tolist()) <= names.keys():
            raise ValueError(
                "opt_state was initialized for other leaves than those of params; "
                f"params has {', '.join(names.values()) or 'none'}."
            )
        for leaf_id in dict.fromkeys(ids.tolist()):
            of_leaf = scales[..., ids == leaf_id]
            factor = of_leaf[..., 0] if of_leaf.shape[-1] == 1 else of_leaf
            name = names[leaf_id]
            factors[name] = factors[name] * factor if name in factors else factor
    return {
        name: factors[name].item() if factors[name].ndim == 0 else factors[name]
        for name in names.values()
        if name in factors
    }


def health(
    opt_state: optax.OptState, params: optax.Params | None = None
) -> dict[str, float]:
    """What this package's methods did in the last step, as a flat dict for a logger.

    It reads whatever of this package stands in an optimizer's state, a few numbers a
    leaf: no further pass over the gradient. Call it outside ``jit``, on the state that
    a step returned, as often as you log.

    Args:
      opt_state: The state of an optimizer.
      params: The parameters that ``init`` was given: with them each leaf's factor has
        an entry.

    Returns:
      Python floats, of the following those that the state knows:

      =======================  ====================================================
      key                      value
      =======================  ====================================================
      scale_factor/min, /max   the smallest and the largest factor of a leaf
      scale_factor/<leaf>      of each scaled leaf, ``[0]`` and so on behind the name
                               of a stacked one; several methods are multiplied
      nonfinite_leaves         how many leaves had a spread that is not finite, in a
                               slice at least; a bias that follows a weight has that
                               of the weight. ``gradient_autoscaled_normalization``
                               keeps none
      reference_std            the reference that ``stablegrad`` scaled to, the largest
                               of several
      limited_leaves           how many ``clip_by_history`` clipped, in a slice at
                               least
      skipped_steps            how many steps ``skip_spikes`` has not taken, in all
      last_deviation           of the last step, in running deviations, the largest of
                               several; infinite if it was not finite
      =======================  ====================================================

    Raises:
      ValueError: If ``opt_state`` holds no state of this package; for states of several
        steps or members; inside ``jit``.

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

      TensorBoard, with ``writer = tensorboardX.SummaryWriter()`` or PyTorch's::

          for name, value in health(opt_state, params).items():
              writer.add_scalar(name, value, step)

      Weights & Biases: ``wandb.log(health(opt_state, params), step=step)``.
    """
    values: dict[str, float] = {}
    states = list(_states(opt_state))
    if not states:
        raise ValueError(
            "opt_state holds no state of this package's methods; got a "
            f"{type(opt_state).__name__}."
        )
    if any(_is_scaling(state) for state in states):
        factors = _flat_factors(opt_state, params, states)
        if factors:
            values["scale_factor/min"] = min(factors.values())
            values["scale_factor/max"] = max(factors.values())
        if params is not None:
            values |= {f"scale_factor/{name}": x for name, x in factors.items()}
    for state in states:
        for field, (name, reading, join) in _READINGS.items():
            value = reading(state) if hasattr(state, field) else None
            if value is not None:
                values[name] = join(values[name], value) if name in values else value
    return values


def _flat_factors(
    opt_state: optax.OptState, params: optax.Params | None, states: list[Any]
) -> dict[str, float]:
    """The factor of each slice by its name, or by its place if there are no names."""
    if params is not None:
        by_leaf = scale_factors(opt_state, params)
    else:
        by_leaf = {}
        for i, state in enumerate(states):
            if _is_scaling(state):
                by_leaf[str(i)] = _one_step(_read(state.scale_factors))
    return {
        name if np.ndim(factor) == 0 else f"{name}[{i}]": float(value)
        for name, factor in by_leaf.items()
        for i, value in enumerate(np.atleast_1d(factor))
    }


def _count_nonfinite(state: Any) -> float | None:
    """The leaves of which some slice has a spread that is not finite.

    None of a state that has one spread of all finite leaves together.
    """
    spreads = _read(state.grad_std)
    if spreads.ndim < _read(state.leaf_ids).ndim:
        return None
    bad = ~np.isfinite(_one_step(spreads))
    return float(len(np.unique(_leaf_ids(state)[bad])))


def _count_limited(state: Any) -> float:
    """The leaves of which some slice was limited."""
    is_limited = _one_step(_read(state.is_limited))
    return float(len(np.unique(_leaf_ids(state)[is_limited])))


def _number(field: str) -> Callable[[Any], float]:
    return lambda state: float(_read(getattr(state, field)))


# A field of a state -> the name of what it says, how to read it (None: of nothing)
# and how to join what several states say under one name: counts are added.
_READINGS: dict[
    str, tuple[str, Callable[[Any], float | None], Callable[[float, float], float]]
] = {
    "grad_std": ("nonfinite_leaves", _count_nonfinite, operator.add),
    "reference_std": ("reference_std", _number("reference_std"), max),
    "is_limited": ("limited_leaves", _count_limited, operator.add),
    "num_skipped": ("skipped_steps", _number("num_skipped"), operator.add),
    "last_deviation": ("last_deviation", _number("last_deviation"), max),
}


def _states(opt_state: Any) -> Iterator[Any]:
    """The states of this package's methods, wherever they stand, in their order."""
    for node in jax.tree.leaves(opt_state, is_leaf=_is_ours):
        if _is_ours(node):
            yield node
            for field in node:  # of a wrapper: the state of what it wraps
                yield from _states(field)


def _is_ours(node: object) -> bool:
    return _is_scaling(node) or hasattr(node, "num_skipped")


def _is_scaling(state: object) -> bool:
    return hasattr(state, "leaf_ids") and hasattr(state, "scale_factors")


def _leaf_ids(state: Any) -> np.ndarray:
    """The ids u32[slices] of a state, of the first of several steps or members."""
    ids = _read(state.leaf_ids)
    return ids.reshape(-1, ids.shape[-1])[0] if ids.size else ids.reshape(-1)


def _one_step(array: np.ndarray) -> np.ndarray:
    if array.ndim > 1:
        raise ValueError(
            "health reads the state of one step; got states of several steps or "
            "members. Take one: jax.tree.map(lambda x: x[-1], opt_state)."
        )
    return array


def _read(field: jax.Array) -> np.ndarray:
    (array,) = jax.tree.leaves(field)  # nnx boxes the arrays of a state
    try:
        return np.asarray(array)
    except jax.errors.TracerArrayConversionError as error:
        raise ValueError(
            "scale_factors and health need values: call them outside jit, on the state "
            "that the step returned."
        ) from error

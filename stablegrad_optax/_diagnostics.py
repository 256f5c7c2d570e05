"""scale_factors: reads the states of this package in the state of any optimizer."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax

from stablegrad_optax._leaves import describe


def scale_factors(
    opt_state: optax.OptState, params: optax.Params
) -> dict[str, float | np.ndarray]:
    """Reads the factor by which the last update multiplied each array.

    The states of this package's transformations are found anywhere in an optimizer's
    state, such as in a chain, ``optax.masked``, ``optax.MultiSteps`` or
    ``nnx.Optimizer``. The factor is the product over all transformations of a chain;
    pass a part of the state to read one of them alone. Call the function outside
    ``jit``, on the state that a step returned.

    Args:
      opt_state: The state of an optimizer, or stacked states as ``jax.lax.scan``
        returns them.
      params: The parameters that ``init`` was given. They carry the names.

    Returns:
      ``{"path/to/kernel": factor}`` with an entry for each array that was scaled, in
      the order of the tree. Arrays that would share a name have their full path. The
      entry of an array that stacks layers is f[slices]. Leading axes of the states,
      such as the steps of a scan or the members of a population, come first: f[steps]
      or f[steps, slices].

    Raises:
      ValueError: If ``opt_state`` holds no state of this package's transformations, if
        its arrays are not those of ``params``, or inside ``jit``.

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
    scaling = list(filter(has_scale_factors, states(opt_state)))
    if not scaling:
        raise ValueError(
            "opt_state holds no state of stablegrad, gradient_stabilizer, "
            "gradient_autoscaled_normalization, normalize_by_leaf_norm or "
            f"clip_by_history; got a {type(opt_state).__name__}."
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
    for state in scaling:
        ids, scales = leaf_ids(state), read(state.scale_factors)
        if not set(ids.tolist()) <= names.keys():
            raise ValueError(
                "opt_state was initialized for other leaves than those of params; "
                f"params has {', '.join(names.values()) or 'none'}."
            )
        for leaf_id in dict.fromkeys(ids.tolist()):
            slices = scales[..., ids == leaf_id]
            factor = slices[..., 0] if slices.shape[-1] == 1 else slices
            name = names[leaf_id]
            factors[name] = factors[name] * factor if name in factors else factor
    return {
        name: factors[name].item() if factors[name].ndim == 0 else factors[name]
        for name in names.values()
        if name in factors
    }


def states(opt_state: Any) -> Iterator[Any]:
    """Yields the states of this package's transformations, outer ones first."""
    for node in jax.tree.leaves(opt_state, is_leaf=_is_own):
        if _is_own(node):
            yield node
            for field in node:  # may hold the state of an inner transformation
                yield from states(field)


def has_scale_factors(state: object) -> bool:
    """Tells whether a state is one of this package with a factor per slice."""
    return hasattr(state, "leaf_ids") and hasattr(state, "scale_factors")


def _is_own(node: object) -> bool:
    return has_scale_factors(node) or hasattr(node, "num_skipped")


def skips_inside_accumulation(opt_state: Any) -> bool:
    """Tells whether ``optax.MultiSteps`` keeps a NaN that ``skip_spikes`` would skip.

    ``MultiSteps`` without a ``should_skip_update_fn`` has an empty ``skip_state``.
    """

    def accumulates(node: object) -> bool:
        return isinstance(node, optax.MultiStepsState)

    return any(
        accumulates(node)
        and not jax.tree.leaves(node.skip_state)
        and any(hasattr(state, "num_skipped") for state in states(node.inner_opt_state))
        for node in jax.tree.leaves(opt_state, is_leaf=accumulates)
    )


def leaf_ids(state: Any) -> np.ndarray:
    """Returns the ids u32[slices] of a state, of its first step if it has several."""
    ids = read(state.leaf_ids)
    return ids.reshape(-1, ids.shape[-1])[0] if ids.size else ids.reshape(-1)


def one_step(array: np.ndarray) -> np.ndarray:
    """Returns the vector, or raises if it has an axis of steps or members."""
    if array.ndim > 1:
        raise ValueError(
            "health reads the state of one step; got states of several steps or "
            "members. Take one: jax.tree.map(lambda x: x[-1], opt_state)."
        )
    return array


def read(field: jax.Array) -> np.ndarray:
    """Returns the values of a state's array, which may be in a box of nnx."""
    (array,) = jax.tree.leaves(field)
    try:
        return np.asarray(array)
    except jax.errors.TracerArrayConversionError as error:
        raise ValueError(
            "scale_factors and health need values: call them outside jit, on the state "
            "that the step returned."
        ) from error

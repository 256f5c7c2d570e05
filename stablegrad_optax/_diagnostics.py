"""What the transformations did: the factor of every leaf, for a logger."""

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
      that follow a weight included, in the order of the tree. A stacked leaf's entry is
      an array f[slices]; if the states carry further leading axes (steps of a scan,
      members of a population) these come first, f[steps] or f[steps, slices].

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
    states = [
        state
        for state in jax.tree.leaves(opt_state, is_leaf=_is_scaling)
        if _is_scaling(state)
    ]
    if not states:
        raise ValueError(
            "opt_state holds no state of stablegrad, gradient_stabilizer or "
            f"gradient_autoscaled_normalization; got a {type(opt_state).__name__}."
        )
    names = {leaf.id: leaf.name for leaf in describe(params)}
    factors: dict[str, np.ndarray] = {}
    for state in states:
        ids, scales = _read(state.leaf_ids), _read(state.scale_factors)
        ids = ids.reshape(-1, ids.shape[-1])[:1].reshape(-1)
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


def _is_scaling(state: object) -> bool:
    return hasattr(state, "leaf_ids") and hasattr(state, "scale_factors")


def _read(field: jax.Array) -> np.ndarray:
    (array,) = jax.tree.leaves(field)  # nnx boxes the arrays of a state
    try:
        return np.asarray(array)
    except jax.errors.TracerArrayConversionError as error:
        raise ValueError(
            "scale_factors needs values: call it outside jit, on the state that the "
            "step returned."
        ) from error

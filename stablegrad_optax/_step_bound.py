"""The largest learning rate at which a plain step decreases the loss."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stablegrad_optax._leaves import split
from stablegrad_optax._numerics import scale, widest_statistics_dtype

PyTree = Any


def local_decrease_bound(
    loss_fn: Callable[[PyTree], jax.Array], params: PyTree, direction: PyTree
) -> jax.Array:
    r"""Computes the largest learning rate at which a plain step decreases the loss.

    .. math::

        \eta_{max} = \frac{2 \, g^\top d}{d^\top H d}

    For the step :math:`\theta - \eta d`, the local quadratic model of the loss with the
    gradient :math:`g` and the Hessian :math:`H`,

    .. math::

        L(\theta - \eta d) \approx
            L(\theta) - \eta \, g^\top d + \tfrac{1}{2} \eta^2 \, d^\top H d ,

    lies below :math:`L(\theta)` for :math:`0 < \eta < \eta_{max}`, and is lowest at
    :math:`\eta_{max} / 2`. The bound is exact for a quadratic loss. It holds for the
    plain step of ``optax.sgd``, not for Adam after a scaled gradient.

    The paper of StableGrad has a theorem of local decrease for the scaled gradient
    :math:`d = P g`, whose text was not available to this project. The bound above is a
    choice of this package.

    The function costs one Hessian-vector product, about two gradients in time and
    memory.

    Args:
      loss_fn: The loss f[] as a function of the parameters alone. Bind the data with a
        ``lambda`` or ``functools.partial``.
      params: The parameters, any pytree of real or complex arrays.
      direction: What the step subtracts, in the structure of ``params``: the gradient,
        or the updates of :func:`~stablegrad_optax.stablegrad` before the learning rate
        turns their sign. Parameters whose direction is ``None`` or
        ``optax.MaskedNode`` are constants, as in the gradients of Equinox.

    Returns:
      f[], float32, or float64 where an array has double precision. It is infinite if
      the curvature along ``direction`` is not positive, 0 if ``direction`` does not
      descend to first order, and NaN if the gradient is not finite.

    Raises:
      ValueError: If ``direction`` has another structure than ``params``, or an array of
        another shape.

    Examples:
      For the loss :math:`a x^2 / 2` the bound is :math:`2 / a`:

      >>> import jax, jax.numpy as jnp
      >>> from stablegrad_optax.theory import local_decrease_bound
      >>> loss_fn = lambda params: 4.0 * params["x"] ** 2 / 2
      >>> params = {"x": jnp.array(3.0)}
      >>> print(local_decrease_bound(loss_fn, params, jax.grad(loss_fn)(params)))
      0.5

      For the scaled gradient of a network::

        grads = jax.grad(loss_fn)(params)
        updates, _ = tx.update(grads, tx.init(params))  # tx = stablegrad()
        bound = jax.jit(local_decrease_bound, static_argnums=0)(
            loss_fn, params, updates
        )

    References:
      Mestre et al., `StableGrad: Backward Scale Control without Batch Normalization
      <https://arxiv.org/abs/2605.19856>`_, 2026
    """
    steps = _steps(params, direction)
    moved, join = split(params, [step is not None for step in steps])
    if not moved:
        return jnp.zeros(())
    direction = [step for step in steps if step is not None]

    # The direction is scaled to entries of at most 1, because otherwise g d and d H d
    # would under- or overflow for gradients that have vanished or exploded.
    dtype = widest_statistics_dtype(step.dtype for step in direction)
    sizes = [jnp.max(jnp.abs(step), initial=0).astype(dtype) for step in direction]
    invertible = float(jnp.finfo(dtype).max) / 16
    size = jnp.minimum(jnp.max(jnp.stack(sizes)), invertible)
    unit = 1 / jnp.where(size > 0, size, 1)
    along = [
        scale(step, unit).astype(leaf.dtype)
        for step, leaf in zip(direction, moved, strict=True)
    ]
    gradient = jax.grad(lambda values: loss_fn(join(values)))
    grads, bent = jax.jvp(gradient, (moved,), (along,))
    slope, curvature = _inner(grads, along, dtype), _inner(bent, along, dtype)
    bound = 2 * slope / jnp.maximum(curvature, 0) * unit
    return jnp.where(slope <= 0, 0, bound)


def _steps(params: PyTree, direction: PyTree) -> list[Any]:
    """Returns the direction of each parameter, None for a constant."""
    treedef: Any = jax.tree.structure(params)
    try:
        nodes = treedef.flatten_up_to(direction)
    except ValueError as error:
        raise ValueError(
            f"direction must have the structure of params, {treedef}; got "
            f"{jax.tree.structure(direction)}."
        ) from error
    steps = []
    for leaf, node in zip(jax.tree.leaves(params), nodes, strict=True):
        arrays = jax.tree.leaves(node)
        if arrays and (len(arrays) > 1 or np.shape(arrays[0]) != np.shape(leaf)):
            raise ValueError(
                "direction must have a leaf of the same shape for each of params; got "
                f"{[np.shape(x) for x in arrays]} for {np.shape(leaf)}."
            )
        moves = arrays and jnp.issubdtype(jnp.result_type(arrays[0]), jnp.inexact)
        steps.append(jnp.asarray(arrays[0]) if moves else None)
    return steps


def _inner(xs: list[jax.Array], ys: list[jax.Array], dtype: Any) -> jax.Array:
    """Computes the derivative along ys from the gradient xs, summed in dtype."""

    def inner(x: jax.Array, y: jax.Array) -> jax.Array:
        real = jnp.sum(x.real.astype(dtype) * y.real.astype(dtype))
        if jnp.iscomplexobj(x):  # jax.grad holds dL/d(re) - i dL/d(im)
            real -= jnp.sum(x.imag.astype(dtype) * y.imag.astype(dtype))
        return real

    return jnp.sum(jnp.stack([inner(x, y) for x, y in zip(xs, ys, strict=True)]))

"""The reference of StableGrad: the std of the loss's gradient by the predictions."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stablegrad_optax._checks import require_number
from stablegrad_optax._moments import square
from stablegrad_optax._numerics import safe_sqrt, statistics_dtype

PyTree = Any
AxisName = str | tuple[str, ...]


def prediction_grad_std(
    prediction_grad: PyTree,
    *,
    num_examples: float | jax.Array | None = None,
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Computes the standard deviation of the gradient with respect to the predictions.

    .. math::

        \sigma_{out} = \mathrm{std}(\partial L / \partial y)

    The standard deviation is that of all entries of all arrays, about their common
    mean. Pass it to ``update`` as ``prediction_grad_std`` in each step, together with
    ``stablegrad(max_reference_growth=2)``.

    The reference :math:`\sigma_{out}` is the published one. The pooling over several
    outputs and ``num_examples`` are choices of this package.

    Args:
      prediction_grad: The gradient :math:`\partial L / \partial y`, a pytree of
        floating arrays. Arrays of ``float0`` do not count.
      num_examples: The number of examples that the loss is a mean over, on all devices.
        The gradient of a mean shrinks as the batch grows; this number multiplies the
        result, which then does not depend on the batch size. Default: 1.
      axis_name: The mapped axis (``pmap``, ``shard_map``, ``vmap``), or axes, over
        which the batch is split, where each part has the mean loss of its own examples.
        The result is then that of the mean loss over the whole batch.

    Returns:
      f[], float32, or float64 where an array has double precision. Squares neither
      overflow nor underflow in the range of the dtype.

    Raises:
      ValueError: If ``prediction_grad`` has no entry or is not floating, or if
        ``num_examples`` is not above 0.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from stablegrad_optax import prediction_grad_std
      >>> y, target = jnp.array([1.0, 2.0, 3.0, 6.0]), jnp.zeros(4)
      >>> dL_dy = jax.grad(lambda y: jnp.mean((y - target) ** 2))(y)
      >>> print(f"{prediction_grad_std(dL_dy):.4f}")
      0.9354
      >>> print(f"{prediction_grad_std(dL_dy, num_examples=4):.4f}")
      3.7417

    References:
      Mestre et al., `StableGrad: Backward Scale Control without Batch Normalization
      <https://arxiv.org/abs/2605.19856>`_, 2026
    """
    if num_examples is not None:
        require_number("num_examples", num_examples, above=0)
    arrays = [jnp.asarray(leaf) for leaf in jax.tree.leaves(prediction_grad)]
    arrays = [array for array in arrays if array.dtype != jax.dtypes.float0]
    if not sum(array.size for array in arrays):
        raise ValueError("prediction_grad must hold at least one floating entry.")
    for array in arrays:
        if not jnp.issubdtype(array.dtype, jnp.inexact):
            raise ValueError(f"prediction_grad must be floating; got {array.dtype}.")
    dtype = np.result_type(
        *(statistics_dtype(array.dtype) for array in arrays),
        np.complex64 if any(map(jnp.iscomplexobj, arrays)) else np.float32,
    )
    arrays = [array.astype(dtype) for array in arrays]
    num_devices = 1 if axis_name is None else jax.lax.psum(1, axis_name)

    def over_all(collective: Callable[..., Any], values: list[jax.Array]) -> jax.Array:
        local = jnp.stack(values)
        local = local.max() if collective is jax.lax.pmax else local.sum()
        return local if axis_name is None else collective(local, axis_name)

    # In units of the largest entry no square leaves the range of the dtype. The unit
    # needs an inverse that is a normal number, because XLA may multiply by it.
    largest = over_all(jax.lax.pmax, [jnp.max(jnp.abs(a), initial=0) for a in arrays])
    invertible = float(jnp.finfo(largest.dtype).max) / 16
    unit = jnp.where(largest > 0, jnp.minimum(largest, invertible), 1)
    unit = jax.lax.stop_gradient(unit)
    arrays = [array / unit.astype(dtype) for array in arrays]
    size = num_devices * sum(array.size for array in arrays)
    mean = over_all(jax.lax.psum, [jnp.sum(array) for array in arrays]) / size
    squares = [jnp.sum(square(array - mean)) for array in arrays]
    std = safe_sqrt(over_all(jax.lax.psum, squares) / size) * unit / num_devices
    if num_examples is not None:
        std = std * jnp.asarray(num_examples, std.dtype)
    return std


def value_and_grad_with_prediction_std(
    apply_fn: Callable[..., Any],
    loss_fn: Callable[..., jax.Array],
    *,
    has_aux: bool = False,
    per_example: bool = False,
    axis_name: AxisName | None = None,
) -> Callable[..., tuple[Any, PyTree, jax.Array]]:
    r"""Transforms a loss to return :math:`\sigma_{out}` with its value and gradients.

    .. math::

        L = \ell(y), \quad y = f(\theta, x), \qquad
        \sigma_{out} = \mathrm{std}(\partial L / \partial y)

    One backward pass computes :math:`\partial L / \partial y` on the way to the
    parameters, so the result costs what ``jax.value_and_grad`` costs. The gradients are
    bitwise the same.

    The standard deviation of :math:`\partial L / \partial y` is the published
    reference. What y is for a physics-informed network is a choice: let ``apply_fn``
    return the residuals of the equation and of the boundary and initial conditions, and
    ``loss_fn`` weigh their squares. Every term of the loss then counts.

    Args:
      apply_fn: ``apply_fn(params, inputs) -> predictions``, a pytree of arrays; with
        ``has_aux`` ``-> (predictions, aux)``.
      loss_fn: ``loss_fn(predictions, *loss_args) -> f[]``, the loss.
      has_aux: Whether ``apply_fn`` returns something in addition to the predictions,
        such as updated ``batch_stats``.
      per_example: Whether to multiply the reference by the number of examples, the size
        of the predictions' first axis. Use it if the loss is a mean over examples and
        the batch size varies.
      axis_name: The mapped axes, as in :func:`prediction_grad_std`. The loss and the
        gradients stay those of this device, so average them as usual.

    Returns:
      ``f(params, inputs, *loss_args) -> (loss, grads, prediction_grad_std)``, with
      ``(loss, aux)`` in place of ``loss`` if ``has_aux``.

    Raises:
      ValueError: When called, if ``per_example`` is given and the predictions have no
        axes.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from stablegrad_optax import prediction_grad_std, stablegrad
      >>> from stablegrad_optax import value_and_grad_with_prediction_std
      >>> params = {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
      >>> inputs = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
      >>> targets = jnp.zeros((3, 2))
      >>> f = value_and_grad_with_prediction_std(
      ...     lambda params, x: x @ params["kernel"],
      ...     lambda y, target: jnp.mean((y - target) ** 2),
      ... )
      >>> loss, grads, sigma_out = f(params, inputs, targets)
      >>> tx = optax.chain(stablegrad(None), optax.sgd(0.1))
      >>> updates, state = tx.update(
      ...     grads, tx.init(params), params, prediction_grad_std=sigma_out
      ... )
      >>> print(f"{loss:.3f} {sigma_out:.4f}")
      13.667 0.5329

      For u'' = -1 with u(0) = 0, the predictions are the residuals, or u itself:

      >>> def u(params, x):
      ...     return jnp.tanh(x * params["a"]).sum()
      >>> def residuals(params, x):
      ...     u_xx = jax.vmap(jax.grad(jax.grad(u, 1), 1), (None, 0))
      ...     return {"pde": u_xx(params, x) + 1, "boundary": u(params, 0.0)}
      >>> def loss_fn(r):
      ...     return jnp.mean(r["pde"] ** 2) + 100 * r["boundary"] ** 2
      >>> f = value_and_grad_with_prediction_std(residuals, loss_fn)
      >>> params, x = {"a": jnp.array([0.5, 2.0])}, jnp.linspace(0.0, 1.0, 8)
      >>> loss, grads, sigma_out = f(params, x)
      >>> dL_dr = jax.grad(loss_fn)(residuals(params, x))
      >>> sigma_out = prediction_grad_std(dL_dr["boundary"])

    References:
      Mestre et al., `StableGrad: Backward Scale Control without Batch Normalization
      <https://arxiv.org/abs/2605.19856>`_, 2026
    """

    def value_and_grad(
        params: PyTree, inputs: Any, *loss_args: Any
    ) -> tuple[Any, PyTree, jax.Array]:
        def apply(params: PyTree) -> Any:
            return apply_fn(params, inputs)

        aux: Any = None
        if has_aux:
            predictions, pull_back, aux = jax.vjp(apply, params, has_aux=True)
        else:
            predictions, pull_back = jax.vjp(apply, params)
        loss, prediction_grad = jax.value_and_grad(loss_fn, allow_int=True)(
            predictions, *loss_args
        )
        (grads,) = pull_back(prediction_grad)
        num_examples = _num_examples(predictions, axis_name) if per_example else None
        std = prediction_grad_std(
            prediction_grad, num_examples=num_examples, axis_name=axis_name
        )
        return ((loss, aux) if has_aux else loss), grads, std

    return value_and_grad


def _num_examples(predictions: PyTree, axis_name: AxisName | None) -> int:
    shape = jnp.shape(jax.tree.leaves(predictions)[0])
    if not shape:
        raise ValueError(
            "predictions must have a leading axis of examples for per_example=True; "
            "got a scalar."
        )
    num_devices: int = 1 if axis_name is None else jax.lax.psum(1, axis_name)
    return shape[0] * num_devices

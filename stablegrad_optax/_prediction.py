"""The prediction gradient dL/dy: the reference that StableGrad's paper scales to."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stablegrad_optax._checks import require_number
from stablegrad_optax._numerics import safe_sqrt, statistics_dtype

PyTree = Any
AxisName = str | tuple[str, ...]


def prediction_grad_std(
    prediction_grad: PyTree,
    *,
    num_examples: float | jax.Array | None = None,
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""The standard deviation of the gradient with respect to the predictions.

    .. math::

        \sigma_{out} = \mathrm{std}(\partial L / \partial y)

    pooled over all entries of all leaves, about their common mean. **The paper's**
    (second hand): it is StableGrad's reference, taken anew each step; hand it to
    ``update`` as ``prediction_grad_std``. **Ours**: the pooling over several outputs
    and the per-example form. For a loss that is a mean over examples dL/dy, and with
    it the reference, shrinks as 1/batch; times the number of examples it does not.

    Args:
      prediction_grad: dL/dy, a pytree of floating arrays of any shapes. Leaves without
        a gradient (``float0``) do not count.
      num_examples: The number of examples that the loss is a mean over, on all devices
        together: gives the per-example form. Default: the literal one.
      axis_name: The mapped axis (``pmap``, ``shard_map``, ``vmap``), or axes, over
        which the batch is split, each part with the mean loss of its own examples. The
        moments are pooled over it and the result divided by its size, so that it is
        exactly that of the mean loss over the whole batch.

    Returns:
      f[], float32, or float64 where a leaf has double precision; safe for gradients of
      any magnitude in the range of their dtype.

    Raises:
      ValueError: Without any floating entry, for integer gradients, or for a number of
        examples that is not above 0.

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

    # In units of the largest entry no square leaves the range of the dtype.
    largest = over_all(jax.lax.pmax, [jnp.max(jnp.abs(a), initial=0) for a in arrays])
    # But no larger than what has an inverse: XLA may multiply by that.
    invertible = float(jnp.finfo(largest.dtype).max) / 16
    unit = jnp.where(largest > 0, jnp.minimum(largest, invertible), 1)
    unit = jax.lax.stop_gradient(unit)
    arrays = [array / unit.astype(dtype) for array in arrays]
    size = num_devices * sum(array.size for array in arrays)
    mean = over_all(jax.lax.psum, [jnp.sum(array) for array in arrays]) / size
    squares = [jnp.sum(_abs_squared(array - mean)) for array in arrays]
    std = safe_sqrt(over_all(jax.lax.psum, squares) / size) * unit / num_devices
    if num_examples is not None:
        std = std * jnp.asarray(num_examples, std.dtype)
    return std


def _abs_squared(x: jax.Array) -> jax.Array:
    return (x * x.conj()).real


def value_and_grad_with_prediction_std(
    apply_fn: Callable[..., Any],
    loss_fn: Callable[..., jax.Array],
    *,
    has_aux: bool = False,
    per_example: bool = False,
    axis_name: AxisName | None = None,
) -> Callable[..., tuple[Any, PyTree, jax.Array]]:
    r"""Loss, parameter gradients and :math:`\sigma_{out}` from one backward pass.

    The backward pass is taken in its two natural parts, from the loss to the
    predictions and from there to the parameters, and the standard deviation of what
    flows between them is kept. It costs what ``jax.value_and_grad`` costs, and the
    parameter gradients are bitwise the same.

    **The paper's**: the reference is the standard deviation of dL/dy. What y is for a
    PINN was not available to us. Two recipes, **ours**:

    *Residual probe*: y is all residuals together (PDE, boundary, initial). It sees
    every term of the loss at its weight, and is the reading under which the flow
    follows the paper's kernel ``K = J P J^T``; it is zero only where all residuals are.
    Let ``apply_fn`` return the residuals and ``loss_fn`` weigh their squares (the
    second example below).

    *Field probe*: y is the field u itself, by an additive probe. It sees only the
    direct dependence of the loss on u, not that through its derivatives: for the
    interior of Poisson's equation, u_xx + u_yy = f, it is exactly zero, so that the
    boundary alone sets the reference; for Burgers it sees the factor u of u u_x. Let
    ``apply_fn`` return u with its derivatives, close over none of them, and hand
    :func:`prediction_grad_std` the part of dL/dy that belongs to u (third example).

    Neither is claimed to be the paper's.

    Args:
      apply_fn: ``apply_fn(params, inputs) -> predictions``, a pytree of arrays; with
        ``has_aux`` ``-> (predictions, aux)``.
      loss_fn: ``loss_fn(predictions, *loss_args) -> f[]``, the loss.
      has_aux: Whether ``apply_fn`` returns something beside the predictions: updated
        ``batch_stats``, say.
      per_example: Times the number of examples, which is the size of the first axis of
        the predictions (times the size of ``axis_name``). For a loss that is a mean
        over examples this takes the batch size out of the reference.
      axis_name: As in :func:`prediction_grad_std`. The loss and the gradients stay
        those of this device: average them as ever.

    Returns:
      ``f(params, inputs, *loss_args) -> (loss, grads, prediction_grad_std)``, with
      ``(loss, aux)`` in place of ``loss`` where ``has_aux``.

    Raises:
      ValueError: When called, with ``per_example`` and predictions without axes.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import stablegrad_optax
      >>> params = {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
      >>> inputs = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
      >>> targets = jnp.zeros((3, 2))
      >>> f = stablegrad_optax.value_and_grad_with_prediction_std(
      ...     lambda params, x: x @ params["kernel"],
      ...     lambda y, target: jnp.mean((y - target) ** 2),
      ... )
      >>> loss, grads, sigma_out = f(params, inputs, targets)
      >>> tx = optax.chain(stablegrad_optax.stablegrad(None), optax.sgd(0.1))
      >>> updates, state = tx.update(
      ...     grads, tx.init(params), params, prediction_grad_std=sigma_out
      ... )
      >>> print(f"{loss:.3f} {sigma_out:.4f}")
      13.667 0.5329

      The residual probe, for u'' = -1 with u(0) = 0, and the field probe:

      >>> def u(params, x):
      ...     return jnp.tanh(x * params["a"]).sum()
      >>> def fields(params, x):
      ...     u_xx = jax.vmap(jax.grad(jax.grad(u, 1), 1), (None, 0))
      ...     return {"u": u(params, 0.0), "u_xx": u_xx(params, x)}
      >>> def residuals(params, x):
      ...     y = fields(params, x)
      ...     return {"pde": y["u_xx"] + 1, "boundary": y["u"]}
      >>> def loss(r):
      ...     return jnp.mean(r["pde"] ** 2) + 100 * r["boundary"] ** 2
      >>> f = stablegrad_optax.value_and_grad_with_prediction_std(residuals, loss)
      >>> params, x = {"a": jnp.array([0.5, 2.0])}, jnp.linspace(0.0, 1.0, 8)
      >>> value, grads, sigma_out = f(params, x)
      >>> dL_dy = jax.grad(lambda y: loss({"pde": y["u_xx"] + 1, "boundary": y["u"]}))(
      ...     fields(params, x)
      ... )
      >>> sigma_out = stablegrad_optax.prediction_grad_std(dL_dy["u"])

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
            "per_example needs predictions with a leading axis of examples; got a "
            "scalar."
        )
    num_devices: int = 1 if axis_name is None else jax.lax.psum(1, axis_name)
    return shape[0] * num_devices

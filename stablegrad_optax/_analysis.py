"""What the scaled step does to first and second order: kernel and step bound."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

from stablegrad_optax._leaves import Leaf, describe, scale, widest_statistics_dtype

PyTree = Any
Factors = Mapping[str, ArrayLike]


def local_decrease_bound(
    loss_fn: Callable[[PyTree], jax.Array], params: PyTree, direction: PyTree
) -> jax.Array:
    r"""The largest learning rate at which a plain step still decreases the loss.

    For the step :math:`\theta - \eta d` the local quadratic model of the loss,

    .. math::

        L(\theta - \eta d) \approx
            L(\theta) - \eta \, g^\top d + \tfrac{1}{2} \eta^2 \, d^\top H d ,

    with gradient :math:`g` and Hessian :math:`H`, lies below :math:`L(\theta)` for
    :math:`0 < \eta < \eta_{max}`,

    .. math::

        \eta_{max} = \frac{2 \, g^\top d}{d^\top H d} ,

    and is lowest at half of it. **The paper's** is a theorem of local decrease
    for the direction d = P g of the scaled gradient, of which we know the title.
    **Ours** is this bound: for a loss with curvature at most :math:`\beta` it
    follows that every :math:`\eta < 2 g^\top P g / (\beta \|P g\|^2)` decreases the
    loss; here the curvature along d takes the place of :math:`\beta`. It is exact
    for a quadratic loss and a local statement otherwise. It speaks of the plain step,
    as ``optax.sgd`` takes it, not of Adam fed with P g.

    It costs one Hessian-vector product: about two gradients in time and memory.

    Args:
      loss_fn: The loss as a function of the parameters alone, returning f[]. Bind data
        with a ``lambda`` or ``functools.partial``.
      params: The parameters, any pytree; real or complex.
      direction: What the step subtracts, in the structure of ``params``: the gradient,
        or the updates of :func:`~stablegrad_optax.stablegrad` (before a learning rate
        turns their sign). Leaves that are ``None`` or ``optax.MaskedNode`` stand
        still, as in the gradients of Equinox.

    Returns:
      f[], float32, or float64 where a leaf has double precision. Infinite where the
      curvature along ``direction`` is not positive, 0 where ``direction`` does not
      descend to first order, NaN where the gradient is not finite.

    Raises:
      ValueError: If ``direction`` has another structure than ``params``, or a leaf of
        another shape.

    Examples:
      For the loss :math:`a x^2 / 2` the gradient step overshoots beyond 2 / a:

      >>> import jax, jax.numpy as jnp
      >>> from stablegrad_optax import local_decrease_bound
      >>> loss_fn = lambda params: 4.0 * params["x"] ** 2 / 2
      >>> params = {"x": jnp.array(3.0)}
      >>> print(local_decrease_bound(loss_fn, params, jax.grad(loss_fn)(params)))
      0.5

      The scaled gradient of a network::

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
    moved, join = _split(params, [step is not None for step in steps])
    if not moved:
        return jnp.zeros(())
    direction = [step for step in steps if step is not None]

    # With the direction at unit scale, g d and d H d neither under- nor overflow for
    # gradients that have vanished or exploded.
    dtype = widest_statistics_dtype(describe(moved))
    sizes = [jnp.max(jnp.abs(step), initial=0).astype(dtype) for step in direction]
    size = jnp.max(jnp.stack(sizes))
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


def effective_kernel(
    apply_fn: Callable[[PyTree, Any], PyTree],
    params: PyTree,
    inputs: Any,
    factors: Factors | None = None,
) -> jax.Array:
    r"""The kernel K = J P J^T by which the scaled plain step moves the outputs.

    With :math:`J = \partial y / \partial \theta` the Jacobian of all outputs and
    :math:`P = \mathrm{blockdiag}(p_l I)` the factors by which the gradient's leaves
    are multiplied, the flow :math:`\dot\theta = -P \nabla_\theta L` moves the
    outputs and the loss by

    .. math::

        \dot y = -K \nabla_y L, \qquad
        \dot L = -(\nabla_y L)^\top K \, \nabla_y L = -\sum_l p_l \|g_l\|^2 .

    **The paper's**: the kernel with the factors of StableGrad,
    :math:`p_l = \sigma_{out} / (\sigma_l + \epsilon)`. **Ours**: any factors, those of
    biases included. Without factors it is the empirical neural tangent kernel.

    The matrix has :math:`n_{out}^2` entries and takes :math:`n_{out}` backward passes
    at once, hence :math:`n_{out}` times the memory of the parameters;
    :func:`~stablegrad_optax.effective_kernel_operator` avoids both. For a network of
    many layers wrap it in ``jax.jit`` with ``static_argnums=0``.

    Args:
      apply_fn: ``apply_fn(params, inputs)`` returns the outputs, real floating arrays
        of any shapes in any pytree. It must support forward-mode differentiation.
      params: The parameters, any pytree. All floating arrays in it count; other leaves
        (integers, Python numbers, functions of an Equinox module) are held constant.
      inputs: What ``apply_fn`` takes beside the parameters: usually a batch.
      factors: ``{"path/to/kernel": factor}`` as
        :func:`~stablegrad_optax.scale_factors` returns it: a float, or an array
        f[slices] for a leaf that stacks layers along its leading axes. Leaves that are
        not named have factor 1. Must not be negative.

    Returns:
      f[n_out, n_out], symmetric and, for factors that are not negative, positive
      semi-definite up to rounding; n_out counts the outputs of all inputs, in the
      order of ``jax.flatten_util.ravel_pytree``.

    Raises:
      ValueError: If ``factors`` names no floating leaf of ``params`` or does not fit
        its leading axes, if ``params`` has no floating leaf, or if the outputs are not
        real floating.

    Examples:
      Two inputs of a linear model: K = X X^T + 1.

      >>> import jax.numpy as jnp
      >>> from stablegrad_optax import effective_kernel
      >>> params = {"dense": {"kernel": jnp.ones((2, 1)), "bias": jnp.zeros(1)}}
      >>> def apply_fn(params, x):
      ...     return x @ params["dense"]["kernel"] + params["dense"]["bias"]
      >>> x = jnp.array([[1.0, 0.0], [0.0, 2.0]])
      >>> print(effective_kernel(apply_fn, params, x))
      [[2. 1.]
       [1. 5.]]
      >>> print(effective_kernel(apply_fn, params, x, {"dense/kernel": 10.0}))
      [[11.  1.]
       [ 1. 41.]]

    References:
      Mestre et al., `StableGrad: Backward Scale Control without Batch Normalization
      <https://arxiv.org/abs/2605.19856>`_, 2026
    """
    multiply, outputs = _kernel_operator(apply_fn, params, inputs, factors)
    kernel = jax.vmap(multiply)(jnp.eye(outputs.size, dtype=outputs.dtype))
    return (kernel + kernel.T) / 2  # symmetric to the last bit


def effective_kernel_operator(
    apply_fn: Callable[[PyTree, Any], PyTree],
    params: PyTree,
    inputs: Any,
    factors: Factors | None = None,
) -> Callable[[ArrayLike], jax.Array]:
    r"""The product v -> K v of :func:`~stablegrad_optax.effective_kernel`, matrix-free.

    The network is linearized once; each product then costs one backward and one forward
    pass through the linearization, and the memory of one gradient.

    Args:
      apply_fn: As for :func:`~stablegrad_optax.effective_kernel`.
      params: As there.
      inputs: As there.
      factors: As there.

    Returns:
      A function from f[n_out] to f[n_out] in the outputs' dtype; wrap it in ``jax.jit``
      to apply it more than once or twice. It raises ``ValueError`` for a vector of
      another shape.

    Raises:
      ValueError: As :func:`~stablegrad_optax.effective_kernel`.

    Examples:
      The largest eigenvalues by SciPy's Lanczos iteration:

      >>> import jax, jax.numpy as jnp, numpy as np
      >>> from scipy.sparse.linalg import LinearOperator, eigsh
      >>> from stablegrad_optax import effective_kernel_operator
      >>> params = {"kernel": jnp.ones((3, 1))}
      >>> x = jnp.diag(jnp.array([1.0, 2.0, 3.0]))
      >>> multiply = jax.jit(
      ...     effective_kernel_operator(lambda p, x: x @ p["kernel"], params, x)
      ... )
      >>> kernel = LinearOperator((3, 3), matvec=multiply, dtype=np.float32)
      >>> print(eigsh(kernel, k=2, return_eigenvectors=False).round(3))
      [4. 9.]
    """
    return _kernel_operator(apply_fn, params, inputs, factors)[0]


def _kernel_operator(
    apply_fn: Callable[[PyTree, Any], PyTree],
    params: PyTree,
    inputs: Any,
    factors: Factors | None,
) -> tuple[Callable[[ArrayLike], jax.Array], jax.Array]:
    """Returns v -> K v and the outputs, raveled."""
    is_parameter = [_is_floating_array(leaf) for leaf in jax.tree.leaves(params)]
    values, join = _split(params, is_parameter)
    if not values:
        raise ValueError("params must have a floating array among its leaves.")

    def outputs_of(values: list[jax.Array]) -> jax.Array:
        return ravel_pytree(apply_fn(join(values), inputs))[0]

    outputs, push = jax.linearize(outputs_of, values)
    if not jnp.issubdtype(outputs.dtype, jnp.floating):
        raise ValueError(
            f"apply_fn must return real floating outputs; got dtype {outputs.dtype}."
        )
    pull = jax.linear_transpose(push, values)
    scales = _per_leaf(factors or {}, _named(params))

    def multiply(vector: ArrayLike) -> jax.Array:
        vector = jnp.asarray(vector, outputs.dtype)
        if vector.shape != outputs.shape:
            raise ValueError(
                f"vector must have shape {outputs.shape}, one entry for each output; "
                f"got {vector.shape}."
            )
        (grads,) = pull(vector)
        # A complex leaf's cotangent is the conjugate of its direction of descent.
        step = [
            scale(jnp.conj(grad), factor)
            for grad, factor in zip(grads, scales, strict=True)
        ]
        product: jax.Array = push(step)
        return product

    return multiply, outputs


def _per_leaf(factors: Factors, leaves: list[Leaf]) -> list[jax.Array]:
    """One factor for each leaf, over its leading axes."""
    unknown = factors.keys() - {leaf.name for leaf in leaves}
    if unknown:
        raise ValueError(
            f"factors must name floating leaves of params, of which it has "
            f"{', '.join(leaf.name for leaf in leaves)}; got "
            f"{', '.join(sorted(unknown))}."
        )
    given = [jnp.asarray(factors.get(leaf.name, 1.0)) for leaf in leaves]
    return [
        _over_leading_axes(factor, leaf)
        for factor, leaf in zip(given, leaves, strict=True)
    ]


def _over_leading_axes(factor: jax.Array, leaf: Leaf) -> jax.Array:
    """Reshapes a factor for each slice to the leading axes that count slices."""
    for axes in range(len(leaf.shape) + 1):
        # Slices are counted over all stacked axes together.
        if factor.size == np.prod(leaf.shape[:axes], dtype=int):
            return factor.reshape(leaf.shape[:axes])
    raise ValueError(
        f"factors['{leaf.name}'] must be a scalar or have one entry for each slice "
        f"along the leading axes of {leaf.shape}; got shape {factor.shape}."
    )


def _split(
    params: PyTree, chosen: Sequence[bool]
) -> tuple[list[jax.Array], Callable[[Sequence[jax.Array]], PyTree]]:
    """The chosen leaves as arrays, and what puts values in their places."""
    leaves, treedef = jax.tree.flatten(params)

    def join(values: Sequence[jax.Array]) -> PyTree:
        remaining = iter(values)
        merged = [
            next(remaining) if is_chosen else leaf
            for leaf, is_chosen in zip(leaves, chosen, strict=True)
        ]
        return jax.tree.unflatten(treedef, merged)

    arrays = [
        jnp.asarray(leaf)
        for leaf, is_chosen in zip(leaves, chosen, strict=True)
        if is_chosen
    ]
    return arrays, join


def _steps(params: PyTree, direction: PyTree) -> list[Any]:
    """The direction of each leaf of params, None where it stands still."""
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
        found = jax.tree.leaves(node)
        if found and (len(found) > 1 or np.shape(found[0]) != np.shape(leaf)):
            raise ValueError(
                "direction must have a leaf of the same shape for each of params; got "
                f"{[np.shape(x) for x in found]} for {np.shape(leaf)}."
            )
        moves = found and jnp.issubdtype(jnp.result_type(found[0]), jnp.inexact)
        steps.append(jnp.asarray(found[0]) if moves else None)
    return steps


def _inner(xs: list[jax.Array], ys: list[jax.Array], dtype: Any) -> jax.Array:
    """The derivative along ys that the gradient xs stands for, summed in dtype."""

    def of_leaf(x: jax.Array, y: jax.Array) -> jax.Array:
        real = jnp.sum(x.real.astype(dtype) * y.real.astype(dtype))
        if jnp.iscomplexobj(x):  # jax.grad holds dL/d(re) - i dL/d(im)
            real -= jnp.sum(x.imag.astype(dtype) * y.imag.astype(dtype))
        return real

    return jnp.sum(jnp.stack([of_leaf(x, y) for x, y in zip(xs, ys, strict=True)]))


def _named(params: PyTree) -> list[Leaf]:
    """Describes the floating arrays of a tree that may hold anything else."""
    return describe(
        jax.tree.map(lambda leaf: leaf if _is_floating_array(leaf) else None, params)
    )


def _is_floating_array(leaf: Any) -> bool:
    is_array = isinstance(leaf, jax.Array | np.ndarray | np.generic)
    return is_array and bool(jnp.issubdtype(leaf.dtype, jnp.inexact))

"""The kernel that relates a scaled gradient step to the change of the outputs."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

from stablegrad_optax._leaves import Leaf, describe, split
from stablegrad_optax._numerics import scale

PyTree = Any
Factors = Mapping[str, ArrayLike]


def effective_kernel(
    apply_fn: Callable[[PyTree, Any], PyTree],
    params: PyTree,
    inputs: Any,
    factors: Factors | None = None,
) -> jax.Array:
    r"""Computes the kernel by which a scaled gradient step changes the outputs.

    .. math::

        K = J P J^\top, \qquad \dot y = -K \nabla_y L, \qquad
        \dot L = -(\nabla_y L)^\top K \, \nabla_y L = -\sum_l p_l \|g_l\|^2

    where :math:`J = \partial y / \partial \theta` is the Jacobian of all outputs,
    :math:`P = \mathrm{blockdiag}(p_l I)` holds the factor of each array's gradient, and
    the dot is the derivative along the flow :math:`\dot\theta = -P \nabla_\theta L`.
    Without factors, K is the empirical neural tangent kernel.

    The published kernel has the factors of StableGrad,
    :math:`p_l = \sigma_{out} / (\sigma_l + \epsilon)`. This function takes any factors,
    and those of biases too.

    The matrix has :math:`n_{out}^2` entries and takes :math:`n_{out}` backward passes
    at once, so the memory is :math:`n_{out}` times that of the parameters. Use
    :func:`effective_kernel_operator` for many outputs, and wrap the function in
    ``jax.jit`` with ``static_argnums=0`` for a network of many layers.

    Args:
      apply_fn: ``apply_fn(params, inputs)`` returns the outputs, real floating arrays
        in any pytree. It must support forward-mode differentiation.
      params: The parameters, any pytree. All floating arrays count; other leaves, such
        as integers or the functions of an Equinox module, are constants.
      inputs: The second argument of ``apply_fn``, usually a batch.
      factors: ``{"path/to/kernel": factor}`` as
        :func:`~stablegrad_optax.scale_factors` returns it: a number, or f[slices] for
        an array that stacks layers along its leading axes. They must not be negative.
        Arrays that are not named have the factor 1.

    Returns:
      f[n_out, n_out], symmetric and, up to rounding, positive semi-definite. The
      outputs of all inputs are in the order of ``jax.flatten_util.ravel_pytree``.

    Raises:
      ValueError: If ``factors`` names no floating array of ``params``, does not fit its
        leading axes, or is negative, which is not checked for JAX arrays; if ``params``
        has no floating array; or if the outputs are not real floating.

    Examples:
      >>> import jax.numpy as jnp
      >>> from stablegrad_optax.theory import effective_kernel
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
    r"""Returns the function v -> K v of :func:`effective_kernel`, without the matrix.

    .. math::

        K v = J P J^\top v

    The network is linearized once. Each product then costs one backward and one forward
    pass through the linearization, and the memory of one gradient.

    Args:
      apply_fn: The network, as for :func:`effective_kernel`.
      params: The parameters, as for :func:`effective_kernel`.
      inputs: The second argument of ``apply_fn``.
      factors: The factors, as for :func:`effective_kernel`.

    Returns:
      A function from f[n_out] to f[n_out] in the dtype of the outputs. Wrap it in
      ``jax.jit`` to apply it several times. It raises ``ValueError`` for a vector of
      another shape.

    Raises:
      ValueError: In the cases of :func:`effective_kernel`.

    Examples:
      SciPy's Lanczos iteration computes the largest eigenvalues:

      >>> import jax, jax.numpy as jnp, numpy as np
      >>> from scipy.sparse.linalg import LinearOperator, eigsh
      >>> from stablegrad_optax.theory import effective_kernel_operator
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
    """Returns v -> K v and the vector of all outputs."""
    is_parameter = [_is_floating_array(leaf) for leaf in jax.tree.leaves(params)]
    values, join = split(params, is_parameter)
    if not values:
        raise ValueError("params must have at least one floating array; got none.")

    def raveled_outputs(values: list[jax.Array]) -> jax.Array:
        return ravel_pytree(apply_fn(join(values), inputs))[0]

    outputs, push = jax.linearize(raveled_outputs, values)
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
        # JAX's cotangent of a complex array is the conjugate of the direction of
        # ascent.
        step = [
            scale(jnp.conj(grad), factor)
            for grad, factor in zip(grads, scales, strict=True)
        ]
        product: jax.Array = push(step)
        return product

    return multiply, outputs


def _per_leaf(factors: Factors, leaves: list[Leaf]) -> list[jax.Array]:
    """Returns the factor of each leaf, reshaped to its leading axes."""
    unknown = factors.keys() - {leaf.name for leaf in leaves}
    if unknown:
        raise ValueError(
            "factors must name floating arrays of params, which are "
            f"{', '.join(leaf.name for leaf in leaves)}; got "
            f"{', '.join(sorted(unknown))}."
        )
    for name, factor in factors.items():
        # The values of a JAX array may be unknown, because it may be traced.
        if not isinstance(factor, jax.Array) and not np.all(np.asarray(factor) >= 0):
            raise ValueError(f"factors['{name}'] must not be negative; got {factor!r}.")
    given = [jnp.asarray(factors.get(leaf.name, 1.0)) for leaf in leaves]
    return [
        _over_leading_axes(factor, leaf)
        for factor, leaf in zip(given, leaves, strict=True)
    ]


def _over_leading_axes(factor: jax.Array, leaf: Leaf) -> jax.Array:
    """Reshapes the factors of all slices to the leading axes that index slices."""
    for axes in range(len(leaf.shape) + 1):
        # One axis of factors may stand for several stacked axes.
        if factor.size == np.prod(leaf.shape[:axes], dtype=int):
            return factor.reshape(leaf.shape[:axes])
    raise ValueError(
        f"factors['{leaf.name}'] must be a scalar or have one entry for each slice "
        f"along the leading axes of {leaf.shape}; got shape {factor.shape}."
    )


def _named(params: PyTree) -> list[Leaf]:
    """Describes the floating arrays of a tree that may hold anything else."""
    return describe(
        jax.tree.map(lambda leaf: leaf if _is_floating_array(leaf) else None, params)
    )


def _is_floating_array(leaf: Any) -> bool:
    is_array = isinstance(leaf, jax.Array | np.ndarray | np.generic)
    return is_array and bool(jnp.issubdtype(leaf.dtype, jnp.inexact))

"""The kernel by which the scaled plain step moves a network's outputs."""

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
    :func:`effective_kernel_operator` avoids both. For a network of many layers wrap it
    in ``jax.jit`` with ``static_argnums=0``.

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
      ValueError: If ``factors`` names no floating leaf of ``params``, does not fit its
        leading axes or, unless they are arrays of jax, has negative ones; if ``params``
        has no floating leaf; or if the outputs are not real floating.

    Examples:
      Two inputs of a linear model: K = X X^T + 1.

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
    r"""The product v -> K v of :func:`effective_kernel`, matrix-free.

    The network is linearized once; each product then costs one backward and one forward
    pass through the linearization, and the memory of one gradient.

    Args:
      apply_fn: As for :func:`effective_kernel`.
      params: As there.
      inputs: As there.
      factors: As there.

    Returns:
      A function from f[n_out] to f[n_out] in the outputs' dtype; wrap it in ``jax.jit``
      to apply it more than once or twice. It raises ``ValueError`` for a vector of
      another shape.

    Raises:
      ValueError: As :func:`effective_kernel`.

    Examples:
      The largest eigenvalues by SciPy's Lanczos iteration:

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
    """Returns v -> K v and the outputs, raveled."""
    is_parameter = [_is_floating_array(leaf) for leaf in jax.tree.leaves(params)]
    values, join = split(params, is_parameter)
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
    for name, factor in factors.items():
        # Those of jax pass: they may be traced.
        if not isinstance(factor, jax.Array) and not np.all(np.asarray(factor) >= 0):
            raise ValueError(f"factors['{name}'] must not be negative; got {factor!r}.")
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


def _named(params: PyTree) -> list[Leaf]:
    """Describes the floating arrays of a tree that may hold anything else."""
    return describe(
        jax.tree.map(lambda leaf: leaf if _is_floating_array(leaf) else None, params)
    )


def _is_floating_array(leaf: Any) -> bool:
    is_array = isinstance(leaf, jax.Array | np.ndarray | np.generic)
    return is_array and bool(jnp.issubdtype(leaf.dtype, jnp.inexact))

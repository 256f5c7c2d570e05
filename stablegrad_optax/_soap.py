"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner."""

import functools
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from stablegrad_optax import _gradients, _leaves, _soap_layout
from stablegrad_optax._checks import require_count, require_number
from stablegrad_optax._numerics import newest_share
from stablegrad_optax._orthogonal import Precision
from stablegrad_optax._soap_update import (
    Hyperparams,
    Options,
    SoapState,
    initial_state,
    updated,
)


def soap(
    learning_rate: optax.ScalarOrSchedule,
    b1: float | jax.Array = 0.95,
    b2: float | jax.Array = 0.95,
    eps: float | jax.Array = 1e-8,
    *,
    weight_decay: float | jax.Array = 0.0,
    mask: Any = None,
    precondition_frequency: int | jax.Array = 10,
    max_precondition_size: int = 10_000,
    num_stacked_axes: _leaves.NumStackedAxes | None = None,
    weight_dimension_numbers: _soap_layout.DimensionNumbers | None = None,
    relative_eps: bool = True,
    normalize_updates: bool = False,
    precision: Precision = "highest",
) -> optax.GradientTransformationExtraArgs:
    r"""Runs Adam in the eigenbasis of Shampoo's preconditioner.

    For a matrix with gradient :math:`G_n`, of step :math:`n`, and eigenbases
    :math:`Q_L` and :math:`Q_R`:

    .. math::

        M &\leftarrow \beta_1 M + (1 - \beta_1) G \\
        V &\leftarrow \beta_2 V + (1 - \beta_2) (Q_L^T G Q_R)^2 \\
        \Delta W &= -\eta \frac{\sqrt{1 - \beta_2^n}}{1 - \beta_1^n} \,
            Q_L \left[ \frac{Q_L^T M Q_R}{\sqrt{V} + \epsilon s} \right] Q_R^T \\
        L &\leftarrow \beta_2 L + (1 - \beta_2) G G^T, \quad
        R \leftarrow \beta_2 R + (1 - \beta_2) G^T G

    Every ``precondition_frequency`` steps :math:`Q_L` becomes the orthonormal factor of
    a QR decomposition of :math:`L Q_L`, and :math:`Q_R` that of :math:`R Q_R`. The
    running maximum :math:`s` of the absolute gradient makes :math:`\epsilon` relative
    to the size of each array's gradient, so that gradients from 1e-30 to 1e30 train
    alike.

    As in the released code, the first update sets the bases to the eigenvectors of
    :math:`L` and :math:`R` and makes no step, so that :math:`n` counts the updates
    before. The columns are sorted by :math:`\text{diag}(Q^T L Q)` before each QR
    decomposition. Vectors and scalars have plain Adam, and an array of more axes has
    one basis for each axis. Weight decay is that of :func:`optax.adamw`.

    Args:
      learning_rate: A number or a schedule.
      b1: Decay of M, at least 0 and below 1.
      b2: Decay of V, L and R, at least 0 and below 1.
      eps: Epsilon, at least 0 (see ``relative_eps``).
      weight_decay: Decoupled weight decay, multiplied by the learning rate.
      mask: Which arrays decay: a pytree of bools, a prefix of one, or a function of the
        parameters that returns one, as in :func:`optax.adamw`. Default: all.
      precondition_frequency: Steps between two QR decompositions. A smaller number
        follows the gradient's covariance more closely and costs more.
      max_precondition_size: The longest axis that has a basis. Name it in the
        ``static_args`` of ``optax.inject_hyperparams`` if ``init`` is compiled.
      num_stacked_axes: How many leading axes of an array index separate layers (see
        :func:`stablegrad`): each slice has bases of its own. Default: none.
      weight_dimension_numbers: Which axes of an array are the rows and the columns of a
        matrix: ``optax.contrib.MuonDimensionNumbers`` or ``None`` for each array, a
        prefix of such a tree, or a function of the parameters that returns one. Axes
        that it does not name index separate matrices. Default: one basis for each axis.
      relative_eps: Whether ``eps`` is relative to the running maximum of the array's
        absolute gradient. ``False`` makes it absolute, as in the released code.
      normalize_updates: Whether to divide each array's preconditioned update by its
        root mean square, as ``normalize_grads`` of the released code does.
      precision: The precision of all matrix products, as in ``jax.numpy.matmul``.

    Returns:
      A ``GradientTransformationExtraArgs``.

    Raises:
      ValueError: For an argument outside its range, or that does not fit the
        parameters; in ``update`` if the gradients are not those of the parameters.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from stablegrad_optax import soap
      >>> params = {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}
      >>> loss = lambda p: jnp.sum((p["kernel"] + p["bias"] - 1.0) ** 2)
      >>> tx = soap(optax.cosine_decay_schedule(0.1, 100))
      >>> state = tx.init(params)
      >>> for _ in range(100):
      ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> bool(loss(params) < 1e-3)
      True

    References:
      Vyas et al., `SOAP: Improving and Stabilizing Shampoo using Adam
      <https://arxiv.org/abs/2409.11321>`_, 2024

      `The released code <https://github.com/nikhilvyas/SOAP>`_
    """
    require_number("weight_decay", weight_decay, at_least=0)
    parts = [
        scale_by_soap(
            b1,
            b2,
            eps,
            precondition_frequency=precondition_frequency,
            max_precondition_size=max_precondition_size,
            num_stacked_axes=num_stacked_axes,
            weight_dimension_numbers=weight_dimension_numbers,
            relative_eps=relative_eps,
            normalize_updates=normalize_updates,
            precision=precision,
        ),
        optax.scale_by_learning_rate(learning_rate),
    ]
    # Without decay the update needs no parameters.
    if not (isinstance(weight_decay, numbers.Real) and weight_decay == 0):
        parts.insert(1, optax.add_decayed_weights(weight_decay, mask))
    return optax.chain(*parts)


def scale_by_soap(
    b1: float | jax.Array = 0.95,
    b2: float | jax.Array = 0.95,
    eps: float | jax.Array = 1e-8,
    *,
    precondition_frequency: int | jax.Array = 10,
    max_precondition_size: int = 10_000,
    num_stacked_axes: _leaves.NumStackedAxes | None = None,
    weight_dimension_numbers: _soap_layout.DimensionNumbers | None = None,
    relative_eps: bool = True,
    normalize_updates: bool = False,
    precision: Precision = "highest",
) -> optax.GradientTransformationExtraArgs:
    """Rescales updates according to the SOAP algorithm.

    This is :func:`soap` without learning rate and weight decay. The equation and the
    arguments are explained there.

    Args:
      b1: Decay of M, at least 0 and below 1.
      b2: Decay of V, L and R, at least 0 and below 1.
      eps: Epsilon, at least 0 (see ``relative_eps``).
      precondition_frequency: Steps between two QR decompositions.
      max_precondition_size: The longest axis that has a basis.
      num_stacked_axes: How many leading axes of an array index separate layers.
      weight_dimension_numbers: Which axes make the rows and columns of a matrix.
      relative_eps: Whether ``eps`` is relative to the size of the array's gradient.
      normalize_updates: Whether to divide each update by its root mean square.
      precision: The precision of all matrix products, as in ``jax.numpy.matmul``.

    Returns:
      A ``GradientTransformationExtraArgs`` with state :class:`SoapState`.

    Raises:
      ValueError: As :func:`soap` does.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from stablegrad_optax import scale_by_soap
      >>> tx = optax.chain(scale_by_soap(), optax.scale_by_learning_rate(1e-3))
      >>> grads = {"kernel": jnp.eye(2)}
      >>> state = tx.init(grads)
      >>> for _ in range(2):
      ...     updates, state = tx.update(grads, state)
      >>> print((1e3 * updates["kernel"]).round(3))
      [[-1. -0.]
       [-0. -1.]]

    References:
      Vyas et al., `SOAP: Improving and Stabilizing Shampoo using Adam
      <https://arxiv.org/abs/2409.11321>`_, 2024
    """
    require_number("b1", b1, at_least=0, below=1)
    require_number("b2", b2, at_least=0, below=1)
    require_number("eps", eps, at_least=0)
    if not isinstance(precondition_frequency, jax.Array):
        require_count("precondition_frequency", precondition_frequency)
    if not isinstance(max_precondition_size, jax.Array):
        require_count("max_precondition_size", max_precondition_size)

    lay_out = functools.partial(_gradients.lay_out, num_stacked_axes=num_stacked_axes)

    def group(
        tree: Any, layout: _gradients.Layout, has_side: Callable[[int], bool]
    ) -> tuple[_soap_layout.Group, ...]:
        numbers = _soap_layout.per_leaf_numbers(weight_dimension_numbers, tree)
        return _soap_layout.group(layout.scaled, numbers, has_side)

    def init_fn(params: optax.Params) -> SoapState:
        layout = lay_out(params)
        longest = _static_size(max_precondition_size)
        return initial_state(
            params, layout, group(params, layout, lambda size: size <= longest)
        )

    def update_fn(
        updates: optax.Updates,
        state: SoapState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SoapState]:
        del extra_args
        layout = lay_out(updates)
        _gradients.require_gradients(layout, state.leaf_ids, params)
        # The state knows which sizes have a basis, where the argument may be traced.
        sizes = {basis.shape[-1] for basis in jax.tree.leaves(state.bases)}
        return updated(
            updates,
            state,
            Hyperparams(
                newest_share(b1, layout.dtype),
                newest_share(b2, layout.dtype),
                jnp.asarray(eps, layout.dtype),
                jnp.asarray(precondition_frequency),
            ),
            groups=group(updates, layout, sizes.__contains__),
            options=Options(relative_eps, normalize_updates, precision),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _static_size(max_precondition_size: int | jax.Array) -> int:
    if isinstance(max_precondition_size, jax.core.Tracer):
        raise ValueError(
            "max_precondition_size must be an int when init is compiled, because the "
            f"state's shapes depend on it; got {max_precondition_size}. Please name it "
            "in static_args of optax.inject_hyperparams."
        )
    return int(max_precondition_size)

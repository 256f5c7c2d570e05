"""Block-normalized gradient: each array divided by its own norm."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from stablegrad_optax import _gradients, _leaves
from stablegrad_optax._numerics import divide


class NormalizeByLeafNormState(NamedTuple):
    """State of :func:`normalize_by_leaf_norm`.

    It records the last update, and no update depends on it. Read it with
    :func:`scale_factors`.
    """

    scale_factors: jax.Array  # f[slices], 1 before the first update
    leaf_ids: jax.Array  # u32[slices], the id of each slice's leaf


def normalize_by_leaf_norm(
    *,
    mask: _leaves.Selection | None = None,
    num_stacked_axes: _leaves.NumStackedAxes | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Divides each array by its own Euclidean norm.

    .. math::

        g \leftarrow g / \|g\|_2

    Every array comes out with norm 1, whatever the unit of the loss. An array of zeros
    stays zero, and an array that is not finite changes no other. The norm is right from
    1e-36 to 1e37, and no update depends on an earlier one.

    Args:
      mask: Which arrays to normalize: a pytree of bools, a prefix of one, or a function
        of the tree that returns one. ``False`` leaves the array exactly as it is.
        Default: all floating arrays.
      num_stacked_axes: How many leading axes of an array index separate layers (see
        :func:`stablegrad`): each slice is divided by its own norm. Default: none.

    Returns:
      A ``GradientTransformationExtraArgs`` with state
      :class:`NormalizeByLeafNormState`.

    Raises:
      ValueError: In ``init`` or ``update`` if ``mask`` or ``num_stacked_axes`` does not
        fit the tree; in ``update`` if a gradient is an integer, or if the gradients are
        not those of the parameters.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from stablegrad_optax import normalize_by_leaf_norm
      >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
      >>> grads = {"kernel": jnp.full((2, 2), 1e-20), "bias": jnp.array([3.0, 4.0])}
      >>> tx = optax.chain(normalize_by_leaf_norm(), optax.sgd(1.0))
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> print(updates["kernel"])
      [[-0.5 -0.5]
       [-0.5 -0.5]]
      >>> print(updates["bias"])
      [-0.6 -0.8]

    References:
      Yu et al., `Block-Normalized Gradient Method: An Empirical Study for Training Deep
      Neural Network <https://arxiv.org/abs/1707.04822>`_, 2017
    """
    lay_out = functools.partial(
        _gradients.lay_out, mask=mask, num_stacked_axes=num_stacked_axes
    )

    def init_fn(params: optax.Params) -> NormalizeByLeafNormState:
        layout = lay_out(params)
        return NormalizeByLeafNormState(layout.ones(), jnp.array(layout.leaf_ids))

    def update_fn(
        updates: optax.Updates,
        state: NormalizeByLeafNormState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, NormalizeByLeafNormState]:
        del extra_args
        grads = _gradients.receive(updates, lay_out, state, params)
        norm = grads.norms()
        norm = jnp.where(jnp.isfinite(norm) & (norm > 0), norm, 1)
        factors = divide(jnp.ones_like(norm), norm)
        return grads.multiply(factors), state._replace(scale_factors=factors)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)

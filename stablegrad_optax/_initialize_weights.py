"""New weights for a network of any framework that was initialized before."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import Initializer, glorot_uniform

from stablegrad_optax._leaves import (
    Leaf,
    NumStackedAxes,
    PyTree,
    Selection,
    describe,
    select_weights,
)

# Parts of the names of arrays that multiply, as in a normalization, and are no biases.
_FACTORS = ("scale", "gamma", "gain", "norm", "slope")

_glorot = glorot_uniform()


def initialize_weights(
    params: PyTree,
    key: jax.Array,
    initializer: Initializer = _glorot,
    *,
    weights: Selection | None = None,
    num_stacked_axes: NumStackedAxes | None = None,
    zero_biases: bool = True,
    out_axis: int = -1,
) -> PyTree:
    """Draws the weights of a network anew and sets its biases to zero.

    If a deep network does not train, try this first: for tanh networks Glorot weights
    with zero biases keep the gradients of all layers at one scale, and the default
    weights of Equinox and PyTorch do not. The function works on any pytree: parameters
    of Flax linen, the state of a Flax nnx module, an Equinox module as it is, or plain
    dictionaries, lists and tuples of arrays. Functions, static fields, normalization
    parameters and numbers stay as they are.

    Args:
      params: The parameters, or a module that is a pytree.
      key: A key of :func:`jax.random.key`. Each array is drawn from the key and its own
        path, so a layer that you add elsewhere does not change the others.
      initializer: A function ``initializer(key, shape, dtype)`` as those of
        :mod:`jax.nn.initializers`. It gets the shape of one layer in the layout of
        Flax, ``(*spatial, in, out)``, whatever ``out_axis`` is. Use
        :func:`~stablegrad_optax.activation_aware_normal` for another activation.
      weights: Which arrays are drawn: a pytree of bools, a prefix of one, or a function
        of ``params`` that returns one. By default these are the floating arrays with at
        least two axes, not counting stacked ones, and at least two elements, whose own
        name is not ``bias``.
      num_stacked_axes: How many leading axes of an array index separate layers: an int,
        a pytree of ints, a prefix of one, or a function of ``params`` that returns one.
        Each layer is drawn with its own key and fan-in.
      zero_biases: Whether biases become zero. A bias is a floating array in the same
        node as a drawn weight that is named ``bias``, or has one axis and is not named
        as a scale.
      out_axis: Where a weight has its outputs. Use -1, the default, for Flax, whose
        kernels are ``(*spatial, in, out)``, and 0 for Equinox and PyTorch, whose
        weights are ``(out, in, *spatial)``.

    Returns:
      A tree of the same structure, shapes and dtypes. An array on several devices, or
      with an explicit sharding, is replaced by one with the same sharding.

    Raises:
      ValueError: If no array is a weight, a weight has fewer than two axes,
        ``out_axis`` is neither -1 nor 0, ``initializer`` is not a function or returns
        another shape or dtype, or an array that stays is a ``jax.ShapeDtypeStruct``.

    Examples:
      Equinox::

        model = initialize_weights(model, key, out_axis=0)

      Flax linen and nnx::

        params = initialize_weights(model.init(key, x), key)
        nnx.update(model, initialize_weights(nnx.state(model, nnx.Param), key))

      By hand:

      >>> import jax
      >>> import jax.numpy as jnp
      >>> from stablegrad_optax import initialize_weights
      >>> params = {"kernel": jnp.ones((200, 300)), "bias": jnp.ones(300)}
      >>> params = initialize_weights(params, jax.random.key(0))
      >>> print(f"{params['kernel'].std():.3f} {params['bias'].std():.3f}")
      0.063 0.000

    Notes:
      The shape of an array does not tell everything. Exclude by ``weights`` what has
      another meaning of its axes: embeddings, whose inputs are indices, and attention
      kernels of Flax, (features, heads, head_dim), which read as those of a convolution
      and would be drawn too small.

      ``params`` may hold ``jax.ShapeDtypeStruct`` in place of weights and biases, which
      need only their shapes; a ``sharding`` of theirs is kept. Inside ``jit`` on an
      automatic mesh the compiler chooses the sharding; name it by ``out_shardings``.

    References:
      Glorot and Bengio, `Understanding the difficulty of training deep feedforward
      neural networks <https://proceedings.mlr.press/v9/glorot10a.html>`_, 2010
    """
    if not callable(initializer):
        raise ValueError(
            "initializer must be a function such as jax.nn.initializers.he_normal(); "
            f"got {initializer!r}."
        )
    if isinstance(out_axis, bool) or out_axis not in (-1, 0):
        raise ValueError(
            "out_axis must be -1, for weights (*spatial, in, out), or 0, for weights "
            f"(out, in, *spatial); got {out_axis!r}."
        )
    values, structure = jax.tree.flatten(params)
    leaves = describe(params, num_stacked_axes)
    drawn = {leaf.position for leaf in select_weights(weights, params, leaves)}
    if not drawn:
        shapes = ", ".join(f"'{leaf.name}' {leaf.shape}" for leaf in leaves)
        raise ValueError(
            "params must hold a weight: a floating array of at least two axes that is "
            "not named 'bias', or one that weights selects; got "
            f"{shapes or 'no array'}."
        )
    parents = {leaves[i].parent for i in drawn}
    for i, leaf in enumerate(leaves):
        if i in drawn:
            new = _draw(leaf, key, initializer, out_axis)
        elif zero_biases and leaf.parent in parents and _is_bias(leaf):
            new = jnp.zeros(leaf.shape, leaf.dtype)
        elif isinstance(values[i], jax.ShapeDtypeStruct):
            raise ValueError(
                f"params must hold the value of '{leaf.name}', which is neither a "
                f"weight nor a bias and stays as it is; got {values[i]}."
            )
        else:
            continue
        values[i] = _placed(new, values[i])
    return jax.tree.unflatten(structure, values)


def _is_bias(leaf: Leaf) -> bool:
    name = leaf.path[-1].lower() if leaf.path else ""
    is_vector = len(leaf.shape) - leaf.num_stacked == 1
    is_factor = any(factor in name for factor in _FACTORS)
    return leaf.is_floating and (name == "bias" or (is_vector and not is_factor))


def _draw(
    leaf: Leaf, key: jax.Array, initializer: Initializer, out_axis: int
) -> jax.Array:
    """Draws each layer that the leaf holds."""
    shape = leaf.shape[leaf.num_stacked :]
    if len(shape) < 2:
        raise ValueError(
            "weights must select arrays with an input and an output axis; "
            f"'{leaf.name}' has shape {leaf.shape} and {leaf.num_stacked} stacked axes."
        )
    if out_axis == 0:
        shape = (*shape[2:], shape[1], shape[0])

    def draw(key: jax.Array) -> jax.Array:
        array = initializer(key, shape, leaf.dtype)
        if jnp.shape(array) != shape or array.dtype != leaf.dtype:
            raise ValueError(
                f"initializer must return an array of shape {shape} and dtype "
                f"{leaf.dtype} for '{leaf.name}'; got {array!r}."
            )
        return jnp.moveaxis(array, (-1, -2), (0, 1)) if out_axis == 0 else array

    key = jax.random.fold_in(key, np.uint32(leaf.id))
    if not leaf.num_stacked:
        return draw(key)
    # The layers are drawn one after the other, because an orthogonal initializer calls
    # LAPACK, which may deadlock on a CPU when it is batched.
    layers = jax.lax.map(draw, jax.random.split(key, leaf.num_slices))
    return layers.reshape(leaf.shape)


def _placed(new: jax.Array, old: Any) -> jax.Array:
    """Places an array where the one that it replaces is."""
    if isinstance(old, jax.core.Tracer):
        sharding = jax.typeof(old).sharding
        is_explicit = any(axis is not None for axis in sharding.spec)
        return jax.sharding.reshard(new, sharding) if is_explicit else new
    sharding = getattr(old, "sharding", None)
    # An array that was never placed on a device stays free to move.
    if sharding is None or not getattr(old, "committed", True):
        return new
    return jax.device_put(new, sharding)

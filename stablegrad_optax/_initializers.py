"""An initializer whose scale fits the activation that follows the layer."""

from collections.abc import Callable
from typing import Any, Literal

import jax
from jax.nn.initializers import Initializer, variance_scaling
from jax.typing import ArrayLike

from stablegrad_optax._checks import require_number
from stablegrad_optax._mean_field import gradient_gain, signal_state


def activation_aware_normal(
    activation: Callable[[jax.Array], ArrayLike],
    *,
    preserve: Literal["signal", "gradient"] = "signal",
    input_second_moment: float | None = None,
    out_axis: int = -1,
    dtype: Any = None,
) -> Initializer:
    r"""Makes an initializer whose gain fits the activation that follows the layer.

    The weights are normal, with :math:`n_\text{in}` the product of all axes but the
    output's. Set biases to zero.

    .. math::

        W \sim N\left(0, \frac{g^2}{n_\text{in}}\right)

    For an activation :math:`f` and pre-activations :math:`z \sim N(0, q)`, the gain
    :math:`g` preserves one of two scales from layer to layer:

    * ``"gradient"`` solves :math:`g^2 E[f'(z)^2] = 1` where :math:`q` is a stable fixed
      point, :math:`q = g^2 E[f(z)^2]` (Schoenholz et al.). The gradient keeps its
      scale, and so do derivatives with respect to the inputs. **Use it for a
      physics-informed network**, whose loss contains such derivatives.
    * ``"signal"`` solves :math:`E[f(z)^2] = 1`, or :math:`\mathrm{Var}[f(z)] = V / 2`
      where :math:`V = \sup_q \mathrm{Var}[f(z)] < 1 / 0.98`, for the smallest
      :math:`q`, and takes :math:`g = \sqrt{q / E[a^2]}` with :math:`a` the layer's
      input. The activations keep their scale. The gradient of a deep network of tanh
      expands from layer to layer, and so do derivatives with respect to the inputs: do
      not use it for a deep physics-informed network of tanh or sin.

    ==========  =================  =================  ==============
    activation  gain, "gradient"   gain, "signal"     :math:`E[a^2]`
    ==========  =================  =================  ==============
    tanh        1                  1.891              1/2
    sin         1                  1.177              1/4
    relu        1.4142             1.4142             1
    elu         1                  1.2780             1
    selu        0.6905             1.0000             1
    gelu        none               1.4680             1
    silu        none               1.5588             1
    mish        none               1.4515             1
    softplus    none               1.0831             1
    ==========  =================  =================  ==============

    gelu, silu and mish preserve the gradient at the fixed point zero alone, which is
    not stable, and softplus at none. ``python -m benchmarks run initializers`` trains
    deep physics-informed networks from each initializer.

    Args:
      activation: The activation that *follows* the layer: any elementwise callable,
        such as ``jnp.tanh``, ``jax.nn.gelu`` or a lambda. ``"gradient"`` needs one that
        JAX can differentiate. The equations are solved when the initializer is made,
        which works inside ``jit`` too (modules make their initializers there).
      preserve: Which scale is preserved, ``"signal"`` or ``"gradient"``.
      input_second_moment: :math:`E[a^2]` of the layer's input, for ``"signal"`` only.
        ``None``, the default, stands for the stationary output of the same activation,
        which is right for every hidden layer of a network with one activation. The
        **first layer** sees data instead: pass ``1.0`` for standardized inputs, ``1/3``
        for coordinates uniform in [-1, 1]. After *another* activation pass that one's
        value in the table.
      out_axis: The axis of the kernel that indexes outputs; all others count as
        inputs. -1, the default, is right for Flax (dense, convolution and attention
        kernels alike); Equinox and PyTorch kernels need 0. Keep -1 for
        :func:`~stablegrad_optax.initialize_weights`, which has an ``out_axis`` itself.
      dtype: The default dtype of the weights; ``None`` is JAX's default float dtype.

    Returns:
      An initializer ``init(key, shape, dtype=dtype)`` as those of
      :mod:`jax.nn.initializers`, for shapes of two axes or more.

    Raises:
      ValueError: If ``activation`` is not callable, does not keep shapes, or has no
        gain of the kind that ``preserve`` names; if ``preserve`` is another word; if
        ``input_second_moment`` is not positive and finite, or is given with
        ``preserve="gradient"``. ``init`` raises it for a shape of fewer than two axes.

    Examples:
      Give a network that is made already new weights, Equinox's for example::

        init = activation_aware_normal(jnp.tanh, preserve="gradient")
        model = initialize_weights(model, key, init, out_axis=0)

      Flax also takes it as a ``kernel_init``::

        nnx.Linear(64, 64, kernel_init=init, rngs=rngs)

      By hand:

      >>> import jax
      >>> import jax.numpy as jnp
      >>> from stablegrad_optax import activation_aware_normal
      >>> init = activation_aware_normal(jnp.tanh, preserve="gradient")
      >>> kernel = init(jax.random.key(0), (256, 512))
      >>> print(f"{float(kernel.std()) * 256**0.5:.2f}")
      1.00

    Notes:
      The equations hold at infinite width. With ``"signal"``, tanh, sin, selu and elu
      forget the random factors of a finite width, relu accumulates them, and mish, gelu
      and silu amplify them with depth: deep plain networks of these need residual
      connections or normalization.

      The StableGrad paper pairs its method with an activation-aware initializer whose
      formula was not available to this project. The equations of ``"signal"`` are this
      project's, after the public initialization library of the paper's first author;
      they are not claimed to be the paper's.

    References:
      Poole et al., `Exponential expressivity in deep neural networks through transient
      chaos <https://arxiv.org/abs/1606.05340>`_, 2016

      Schoenholz et al., `Deep Information Propagation
      <https://arxiv.org/abs/1611.01232>`_, 2017

      Mestre et al., `StableGrad: Backward Scale Control without Batch Normalization
      <https://arxiv.org/abs/2605.19856>`_, 2026
    """
    if not callable(activation):
        raise ValueError(
            "activation must be an elementwise callable such as jnp.tanh, got "
            f"{activation!r}."
        )
    if preserve not in ("signal", "gradient"):
        raise ValueError(f"preserve must be 'signal' or 'gradient'; got {preserve!r}.")
    if preserve == "gradient":
        if input_second_moment is not None:
            raise ValueError(
                "input_second_moment must be None for preserve='gradient', whose gain "
                f"is the same in every layer; got {input_second_moment!r}."
            )
        gain = gradient_gain(activation)
    else:
        sigma, second_moment = signal_state(activation)
        if input_second_moment is not None:
            require_number("input_second_moment", input_second_moment, above=0)
            second_moment = input_second_moment
        gain = sigma / second_moment**0.5
    # No axis is named as input: all but the output's then count as receptive field.
    scaled = variance_scaling(gain**2, "fan_in", "normal", (), out_axis, dtype=dtype)

    def init(
        key: jax.Array, shape: Any, dtype: Any = dtype, out_sharding: Any = None
    ) -> jax.Array:
        if len(shape) < 2:
            raise ValueError(
                "shape must have at least two axes, inputs and outputs, for "
                f"activation_aware_normal; got {shape!r}."
            )
        return scaled(key, shape, dtype, out_sharding)

    return init

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

    .. math::

        W \sim N\left(0, \frac{g^2}{n_\text{in}}\right)

    where :math:`n_\text{in}` is the product of all axes but the output's, and biases
    are zero. For the activation :math:`f` and pre-activations :math:`z \sim N(0, q)`,
    the gain :math:`g` preserves one of two scales from layer to layer:

    * ``"gradient"`` solves :math:`g^2 E[f'(z)^2] = 1` at a stable fixed point
      :math:`q = g^2 E[f(z)^2]`. Gradients keep their scale, and so do derivatives with
      respect to the inputs. **Use it for a physics-informed network** of tanh or sin.
    * ``"signal"`` solves :math:`E[f(z)^2] = 1`, or :math:`\mathrm{Var}[f(z)] = V / 2`
      if :math:`V = \sup_q \mathrm{Var}[f(z)] < 1 / 0.98`, for the smallest :math:`q`,
      with :math:`g = \sqrt{q / E[a^2]}` for the layer's input :math:`a`. Activations
      keep their scale, and the gradients of a deep network of tanh or sin grow. Use it
      for gelu, silu and mish.

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

    The ``"gradient"`` rule is that of Schoenholz et al. The ``"signal"`` rule is a
    choice of this package. The formula of the activation-aware initializer in the
    StableGrad paper was not available to this project.

    gelu, silu and mish preserve the gradient at the fixed point zero alone, which is
    not stable, and softplus at none. ``python -m benchmarks run initializers`` trains
    deep physics-informed networks from each initializer.

    Args:
      activation: The activation that *follows* the layer, any elementwise callable. It
        must be differentiable by JAX for ``"gradient"``.
      preserve: Which scale is preserved, ``"signal"`` or ``"gradient"``.
      input_second_moment: :math:`E[a^2]` of the layer's input, for ``"signal"`` only.
        The default is right for hidden layers of a network with one activation. For the
        first layer, pass ``1.0`` for standardized inputs, or ``1/3`` for coordinates
        uniform in [-1, 1].
      out_axis: The axis of the kernel that indexes outputs. Use -1, the default, for
        Flax and for :func:`initialize_weights`, and 0 for Equinox and PyTorch.
      dtype: The default dtype of the weights; None is JAX's default float dtype.

    Returns:
      An initializer ``init(key, shape, dtype=dtype)`` like those of
      :mod:`jax.nn.initializers`, for shapes of at least two axes.

    Raises:
      ValueError: If an argument is outside its range, or if ``activation`` has no gain
        of the kind that ``preserve`` names.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from stablegrad_optax import activation_aware_normal
      >>> init = activation_aware_normal(jnp.tanh, preserve="gradient")
      >>> kernel = init(jax.random.key(0), (256, 512))
      >>> print(f"{float(kernel.std()) * 256**0.5:.2f}")
      1.00

    References:
      Schoenholz et al., `Deep Information Propagation
      <https://arxiv.org/abs/1611.01232>`_, 2017

      Mestre et al., `StableGrad: Backward Scale Control without Batch Normalization
      <https://arxiv.org/abs/2605.19856>`_, 2026
    """
    if not callable(activation):
        raise ValueError(
            "activation must be an elementwise callable such as jnp.tanh; got "
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
    # Without an input axis, JAX counts all axes but the output's as receptive field.
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

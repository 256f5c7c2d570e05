"""Gains at which a wide layer preserves the scale of its signal or of its gradient.

Pre-activations of a wide layer are normal, z ~ N(0, sigma^2), and a layer of gain g
maps their variance q = sigma^2 to g^2 E[f(z)^2]. All expectations are quadratures over
a grid, and they are computed in NumPy when an initializer is made.
"""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from numpy.typing import NDArray

Activation = Callable[[jax.Array], ArrayLike]
_Floats = NDArray[np.float64]

# The nodes are midpoints of equal cells over +-8 standard deviations. The error is the
# square of the cell for an activation with a kink, for which Gauss-Hermite is less
# accurate, and exponentially small for a smooth one.
_NODES = (np.arange(8000) + 0.5) * 2e-3 - 8.0
_WEIGHTS = np.exp(-0.5 * _NODES**2) / np.exp(-0.5 * _NODES**2).sum()

# Beyond a scale of 100 the nodes no longer resolve an activation that oscillates.
_LARGEST = 1e2
_SIGNAL_SCALES = np.geomspace(1e-3, _LARGEST, 31)
# The smallest scale stands for the fixed point at zero, where an activation equals its
# tangents on both sides of zero.
_GRADIENT_SCALES = np.geomspace(1e-6, _LARGEST, 65)

# A bounded activation shows the variance that it can reach at this scale.
_INFINITY = 1e6

# An activation that reaches a unit second moment only far out in its saturation
# counts as bounded.
_UNBOUNDED_VARIANCE = 1 / 0.98

# Float32 values of an activation leave less than this of a ratio of two expectations.
_TOLERANCE = 1e-4


def signal_state(activation: Activation) -> tuple[float, float]:
    """Returns the scale sigma* that preserves the signal, and E[f(z)^2] there."""
    second_moments, variances = _moments(
        activation, np.append(_SIGNAL_SCALES, _INFINITY)
    )
    reachable = variances.max()
    bounded = bool(reachable < _UNBOUNDED_VARIANCE)
    above = variances >= reachable / 2 if bounded else second_moments >= 1
    above = above[:-1]
    if above[0] or not above.any():
        raise ValueError(
            "activation must be an elementwise callable f for which "
            f"{'Var[f(z)] = V / 2' if bounded else 'E[f(z)^2] = 1'} has a solution "
            f"with z ~ N(0, sigma^2) and sigma between {_SIGNAL_SCALES[0]:g} and "
            f"{_LARGEST:g}; {activation!r} has none."
        )

    def reached(sigma: float) -> bool:
        second_moment, variance = _moments(activation, np.array([sigma]))
        enough = variance >= reachable / 2 if bounded else second_moment >= 1
        return bool(enough[0])

    first = int(above.argmax())
    sigma = _bisect(reached, *_SIGNAL_SCALES[first - 1 : first + 1])
    return sigma, float(_moments(activation, np.array([sigma]))[0][0])


def gradient_gain(activation: Activation) -> float:
    """Returns the gain g with g^2 E[f'(z)^2] = 1 at a stable fixed point.

    At a fixed point q = g^2 E[f(z)^2], so those with this gain are the solutions of
    E[f(z)^2] = q E[f'(z)^2]. One is stable if E[f(z)^2] grows no faster than q there.
    """
    growth, slopes = _growth(activation, _GRADIENT_SCALES)
    with np.errstate(all="ignore"):
        balance = growth / slopes
        change = growth / growth[0] - 1

    # The fixed point at zero is stable if the first change of the growth is a decrease.
    changed = abs(change) > 10 * _TOLERANCE
    is_stable = not changed.any() or change[changed.argmax()] < 0
    if abs(balance[0] - 1) < _TOLERANCE and is_stable:
        return float(slopes[0] ** -0.5)

    def crossed(sigma: float) -> bool:
        growth, slopes = _growth(activation, np.array([sigma]))
        return bool((growth[0] > slopes[0]) == starts_below)

    # Near the fixed point at zero the balance is 1 up to rounding.
    clear = np.flatnonzero(abs(balance - 1) > _TOLERANCE)
    for low, high in itertools.pairwise(clear):
        starts_below = balance[low] < 1
        if starts_below == (balance[high] < 1):
            continue
        sigma = _bisect(crossed, _GRADIENT_SCALES[low], _GRADIENT_SCALES[high])
        growth, slopes = _growth(activation, sigma * np.array([0.99, 1, 1.01]))
        if growth[0] >= growth[2]:
            return float(slopes[1] ** -0.5)
    raise ValueError(
        "activation must have a stable fixed point of the variance at which the layers "
        f"preserve the gradient, for preserve='gradient'; {activation!r} has none. "
        "tanh, sin, relu, leaky_relu, elu and selu have one; gelu, silu, mish and "
        "softplus have none: use preserve='signal' or Glorot weights for them."
    )


def _bisect(reached: Callable[[float], bool], low: float, high: float) -> float:
    """Returns the first scale between low and high that is high enough."""
    while high - low > 1e-7 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return float(high)


def _growth(activation: Activation, scales: _Floats) -> tuple[_Floats, _Floats]:
    """Returns E[f(z)^2] / scale^2 and E[f'(z)^2] for z ~ N(0, scale^2)."""

    def slope(z: jax.Array) -> jax.Array:
        try:
            return jax.jvp(activation, (z,), (jnp.ones_like(z),))[1]
        except jax.errors.TracerArrayConversionError as error:
            raise ValueError(
                "activation must be a function that JAX can differentiate, for "
                f"preserve='gradient'; got {activation!r}."
            ) from error

    return _moments(activation, scales)[0] / scales**2, _moments(slope, scales)[0]


def _moments(activation: Activation, scales: _Floats) -> tuple[_Floats, _Floats]:
    """Returns E[f(z)^2] and Var[f(z)], f64[scales], for z ~ N(0, scale^2)."""
    nodes = np.asarray(scales[:, None] * _NODES, np.float32)
    # Modules make their initializers while they are traced.
    with jax.ensure_compile_time_eval():
        values = np.asarray(activation(jnp.asarray(nodes)), np.float64)
    if values.shape != nodes.shape:
        raise ValueError(
            "activation must keep the shape of its argument; "
            f"{activation!r} maps {nodes.shape} to {values.shape}."
        )
    with np.errstate(all="ignore"):
        mean = values @ _WEIGHTS
        second_moment = values**2 @ _WEIGHTS
        variance = (values - mean[:, None]) ** 2 @ _WEIGHTS
    # Overflow and NaN count as infinite, which is never a solution.
    return (
        np.where(np.isfinite(second_moment), second_moment, np.inf),
        np.where(np.isfinite(variance), variance, np.inf),
    )

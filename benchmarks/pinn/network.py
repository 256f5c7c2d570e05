"""Multilayer perceptrons and their derivatives with respect to the inputs.

A network of depth D has D hidden layers `a <- f(a W + b)` and a linear output without
a bias (the last hidden biases already provide the constant), so 2 D + 1 leaves::

    {"dense_0": {"kernel": [inputs, width], "bias": [width]},
     ...
     "dense_<D-1>": {"kernel": [width, width], "bias": [width]},
     "dense_<D>": {"kernel": [width, 1]}}
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp

from stablegrad_optax import activation_aware_normal

Params = dict[str, dict[str, jax.Array]]
SecondOrder = tuple[tuple[float, ...], ...]


class Derivatives(NamedTuple):
    """A scalar field u and its derivatives at points of shape [..., inputs]."""

    value: jax.Array  # f[...]
    gradient: jax.Array | None = None  # f[inputs, ...]: du/dx_j
    second: jax.Array | None = None  # f[rows, ...]: sum_j row[j] d2u/dx_j2


def _tanh(z: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    f = jnp.tanh(z)
    slope = 1 - f * f
    return f, slope, -2 * f * slope


def _sin(z: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    f = jnp.sin(z)
    return f, jnp.cos(z), -f


def _silu(z: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    s = jax.nn.sigmoid(z)
    f = z * s
    slope = s + f * (1 - s)
    return f, slope, s * (1 - s) * (2 + z - 2 * f)


# name -> z -> f(z), f'(z), f''(z)
ACTIVATIONS: dict[
    str, Callable[[jax.Array], tuple[jax.Array, jax.Array, jax.Array]]
] = {"tanh": _tanh, "sin": _sin, "silu": _silu}


@dataclass(frozen=True)
class Network:
    """The shape of a perceptron and the law of its initial weights.

    Attributes:
        depth: number of hidden layers, at least 1.
        width: units in each hidden layer.
        activation: a name of `ACTIVATIONS`.
        initializer: a name of `INITIALIZERS`.
        gain: multiplies the standard deviation of the hidden kernels; read by the
            initializer "normal" alone.
        inputs: number of coordinates of a point.
    """

    depth: int = 32
    width: int = 32
    activation: str = "tanh"
    initializer: str = "normal"
    gain: float = 5 / 3
    inputs: int = 2

    def kernel_shape(self, layer: int) -> tuple[int, int]:
        return (
            self.inputs if layer == 0 else self.width,
            1 if layer == self.depth else self.width,
        )

    def init(self, key: jax.Array) -> Params:
        """Initial parameters, float32; equal keys give equal parameters."""
        initializer = INITIALIZERS[self.initializer]
        return {
            f"dense_{layer}": initializer(self, layer, key_of_layer)
            for layer, key_of_layer in enumerate(jax.random.split(key, self.depth + 1))
        }

    def derivatives(
        self, params: Params, points: jax.Array, second: SecondOrder | None
    ) -> Derivatives:
        """The network and its input derivatives, by forward streams.

        The value a, its first derivatives a_j and the wanted second-order sums
        s_k = sum_j c_kj a_jj go through the layers together, one matrix product for
        all of them. With z, z_j, r_k their images under the kernel (the bias acts on
        z alone)::

            a = f(z),   a_j = f'(z) z_j,   s_k = f'(z) r_k + f''(z) sum_j c_kj z_j^2

        A Laplacian costs one stream this way, not one for each direction
        (Li et al., "A computational framework for neural network-based variational
        Monte Carlo with Forward Laplacian", arXiv 2307.08214).

        Args:
            params: what `init` returns.
            points: f[..., inputs].
            second: the rows c_k; `()` for first derivatives alone, None for the value.

        Returns:
            The fields `value`, `gradient`, `second` that `second` asks for.
        """
        flat = points.reshape(-1, self.inputs)
        streams = _input_streams(flat, second)
        for layer in range(self.depth):
            dense = params[f"dense_{layer}"]
            streams = _product(streams, dense["kernel"])
            streams = self._activate(streams, dense["bias"], second or ())
        streams = _product(streams, params[f"dense_{self.depth}"]["kernel"])
        streams = streams.reshape(len(streams), *points.shape[:-1])
        if second is None:
            return Derivatives(streams[0])
        split = 1 + self.inputs
        return Derivatives(streams[0], streams[1:split], streams[split:])

    def apply(self, params: Params, points: jax.Array) -> jax.Array:
        """The network's value at points f[..., inputs]."""
        return self.derivatives(params, points, None).value

    def _activate(
        self, streams: jax.Array, bias: jax.Array, second: SecondOrder
    ) -> jax.Array:
        value, slope, curvature = ACTIVATIONS[self.activation](streams[0] + bias)
        if len(streams) == 1:
            return value[None]
        first, rest = streams[1 : 1 + self.inputs], streams[1 + self.inputs :]
        bends = [
            sum(c * first[j] ** 2 for j, c in enumerate(row) if c) for row in second
        ]
        sums = [
            slope * r + curvature * bend for r, bend in zip(rest, bends, strict=True)
        ]
        return jnp.stack([value, *(slope * first), *sums])


def _input_streams(flat: jax.Array, second: SecondOrder | None) -> jax.Array:
    """Streams of the identity map: x, the unit vectors, zero second derivatives."""
    if second is None:
        return flat[None]
    num_points, inputs = flat.shape
    unit = jnp.broadcast_to(
        jnp.eye(inputs, dtype=flat.dtype)[:, None], (inputs, num_points, inputs)
    )
    zero = jnp.zeros((len(second), num_points, inputs), flat.dtype)
    return jnp.concatenate([flat[None], unit, zero])


def _product(streams: jax.Array, kernel: jax.Array) -> jax.Array:
    # "highest" because a GPU's default, TF32, leaves three digits of a residual.
    return jnp.matmul(streams, kernel, precision="highest")


def _normal(network: Network, layer: int, key: jax.Array) -> dict[str, jax.Array]:
    shape = network.kernel_shape(layer)
    gain = 1.0 if layer == network.depth else network.gain
    kernel = gain / shape[0] ** 0.5 * jax.random.normal(key, shape)
    return _with_zero_bias(network, layer, kernel)


def _glorot(network: Network, layer: int, key: jax.Array) -> dict[str, jax.Array]:
    kernel = jax.nn.initializers.glorot_uniform()(key, network.kernel_shape(layer))
    return _with_zero_bias(network, layer, kernel)


def _uniform(network: Network, layer: int, key: jax.Array) -> dict[str, jax.Array]:
    shape = network.kernel_shape(layer)
    bound = shape[0] ** -0.5
    key_kernel, key_bias = jax.random.split(key)
    kernel = jax.random.uniform(key_kernel, shape, minval=-bound, maxval=bound)
    if layer == network.depth:
        return {"kernel": kernel}
    bias = jax.random.uniform(key_bias, shape[1:], minval=-bound, maxval=bound)
    return {"kernel": kernel, "bias": bias}


def _activation_aware(
    network: Network, layer: int, key: jax.Array
) -> dict[str, jax.Array]:
    shape = network.kernel_shape(layer)
    if layer == network.depth:
        return {"kernel": shape[0] ** -0.5 * jax.random.normal(key, shape)}
    initializer = _aware_initializer(network.activation, first=layer == 0)
    return _with_zero_bias(network, layer, initializer(key, shape))


@cache
def _aware_initializer(
    activation: str, *, first: bool
) -> jax.nn.initializers.Initializer:
    # Coordinates uniform in [-1, 1], or in [0, 1], have the second moment 1/3.
    return activation_aware_normal(
        lambda z: ACTIVATIONS[activation](z)[0],
        input_second_moment=1 / 3 if first else None,
    )


def _with_zero_bias(
    network: Network, layer: int, kernel: jax.Array
) -> dict[str, jax.Array]:
    if layer == network.depth:
        return {"kernel": kernel}
    return {"kernel": kernel, "bias": jnp.zeros(kernel.shape[1])}


# name -> (network, layer, key) -> the layer's leaves.
# "normal": N(0, gain^2 / fan_in), the output N(0, 1 / fan_in), biases 0.
# "uniform": kernels and biases uniform +-1/sqrt(fan_in), as Equinox and torch do.
# "glorot": kernels uniform +-sqrt(6 / (fan_in + fan_out)), biases 0.
# "activation_aware": `activation_aware_normal`, the output N(0, 1 / fan_in), biases 0.
INITIALIZERS: dict[str, Callable[[Network, int, jax.Array], dict[str, jax.Array]]] = {
    "normal": _normal,
    "uniform": _uniform,
    "glorot": _glorot,
    "activation_aware": _activation_aware,
}

"""Multilayer perceptrons and their derivatives with respect to the inputs.

A network of depth D has D hidden layers `a <- f(a W + b)` and a linear output without
a bias (the last hidden biases already provide the constant), so 2 D + 1 leaves::

    {"dense_0": {"kernel": [inputs, width], "bias": [width]},
     ...
     "dense_<D-1>": {"kernel": [width, width], "bias": [width]},
     "dense_<D>": {"kernel": [width, 1]}}

Before the first layer the inputs may be embedded in features, which take their place.
A residual network has a scalar `gate_<l>`, c, for each hidden layer but the first, and
computes `a <- c f(a W + b) + (1 - c) a`. All gates are 0 at first, so that the network
starts with the depth 1 (PirateNet, Wang et al., arXiv 2402.00326, whose blocks have
three layers each and two encoders of the inputs as well).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.tasks.pinn.ansatz import (
    Derivatives,
    Function,
    SecondOrder,
    derivatives_of,
    identity,
)
from stablegrad_optax import activation_aware_normal

Params = dict[str, dict[str, jax.Array]]


class Bend(NamedTuple):
    """An activation f and its derivatives at z, each of z's shape."""

    value: jax.Array
    slope: jax.Array
    curvature: jax.Array
    third: jax.Array


def _tanh(z: jax.Array) -> Bend:
    f = jnp.tanh(z)
    slope = 1 - f * f
    return Bend(f, slope, -2 * f * slope, slope * (6 * f * f - 2))


def _sin(z: jax.Array) -> Bend:
    f, slope = jnp.sin(z), jnp.cos(z)
    return Bend(f, slope, -f, -slope)


def _silu(z: jax.Array) -> Bend:
    s = jax.nn.sigmoid(z)
    f = z * s
    slope = s + f * (1 - s)
    bell = s * (1 - s)  # the sigmoid's slope
    half = 2 + z - 2 * f
    return Bend(f, slope, bell * half, bell * ((1 - 2 * s) * half + 1 - 2 * slope))


def _gelu(z: jax.Array) -> Bend:
    """The exact one, z times the normal distribution function."""
    share, density = jax.scipy.stats.norm.cdf(z), jax.scipy.stats.norm.pdf(z)
    return Bend(
        z * share,
        share + z * density,
        (2 - z * z) * density,
        z * (z * z - 4) * density,
    )


# name -> z -> f(z), f'(z), f''(z), f'''(z)
ACTIVATIONS: dict[str, Callable[[jax.Array], Bend]] = {
    "tanh": _tanh,
    "sin": _sin,
    "silu": _silu,
    "gelu": _gelu,
}


@dataclass(frozen=True)
class Network:
    """The shape of a perceptron and the law of its initial weights.

    Networks of one shape are equal: programs are compiled for the shape alone.

    Attributes:
        depth: number of hidden layers, at least 1.
        width: units in each hidden layer.
        activation: a name of `ACTIVATIONS`.
        initializer: a name of `INITIALIZERS`.
        gain: multiplies the standard deviation of the hidden kernels; read by the
            initializer "normal" alone.
        inputs: number of coordinates of a point.
        embedding: points f[..., inputs] -> what the first layer gets, f[..., features].
        residual: whether hidden layers have gates, 0 at first, and shortcuts.
    """

    depth: int = 32
    width: int = 32
    activation: str = "tanh"
    initializer: str = field(default="normal", compare=False)
    gain: float = field(default=5 / 3, compare=False)
    inputs: int = 2
    embedding: Function = identity
    residual: bool = False

    @cached_property
    def num_features(self) -> int:
        return jax.eval_shape(self.embedding, jnp.zeros(self.inputs)).shape[-1]

    def kernel_shape(self, layer: int) -> tuple[int, int]:
        return (
            self.num_features if layer == 0 else self.width,
            1 if layer == self.depth else self.width,
        )

    def init(self, key: jax.Array) -> Params:
        """Initial parameters, float32; equal keys give equal parameters."""
        initializer = INITIALIZERS[self.initializer]
        dense = {
            f"dense_{layer}": initializer(self, layer, key_of_layer)
            for layer, key_of_layer in enumerate(jax.random.split(key, self.depth + 1))
        }
        if not self.residual:
            return dense
        gates = {f"gate_{layer}": jnp.zeros(()) for layer in range(1, self.depth)}
        return dense | gates

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
        streams = _input_streams(self.embedding, flat, second)
        for layer in range(self.depth):
            dense, shortcut = params[f"dense_{layer}"], streams
            streams = _product(streams, dense["kernel"])
            streams = _activate(self.activation, second, streams, dense["bias"])
            if self.residual and layer:
                gate = params[f"gate_{layer}"]
                streams = gate * streams + (1 - gate) * shortcut
        streams = _product(streams, params[f"dense_{self.depth}"]["kernel"])
        streams = streams.reshape(len(streams), *points.shape[:-1])
        if second is None:
            return Derivatives(streams[0])
        split = 1 + self.inputs
        return Derivatives(streams[0], streams[1:split], streams[split:])

    def apply(self, params: Params, points: jax.Array) -> jax.Array:
        """The network's value at points f[..., inputs]."""
        return self.derivatives(params, points, None).value


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _activate(
    activation: str, second: SecondOrder | None, streams: jax.Array, bias: jax.Array
) -> jax.Array:
    """Returns the streams after an activation, given those that enter it.

    Its backward pass is written out: XLA:CPU makes more than twice as many kernels of
    the one that JAX derives, and a training step takes a third longer.
    """
    f = ACTIVATIONS[activation](streams[0] + bias)
    if second is None:
        return f.value[None]
    first, sums = _split(streams, second)
    return jnp.stack(
        [
            f.value,
            *(f.slope * z for z in first),
            *(
                f.slope * r + f.curvature * squares
                for r, squares in zip(sums, _squares(first, second), strict=True)
            ),
        ]
    )


def _activate_forward(
    activation: str, second: SecondOrder | None, streams: jax.Array, bias: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _activate(activation, second, streams, bias), (streams, bias)


def _activate_backward(
    activation: str,
    second: SecondOrder | None,
    inputs: tuple[jax.Array, jax.Array],
    grads: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    streams, bias = inputs
    f = ACTIVATIONS[activation](streams[0] + bias)
    if second is None:
        grad = f.slope * grads
        return grad, grad[0].sum(0)
    first, sums = _split(streams, second)
    grads_first, grads_sums = _split(grads, second)
    grad = f.slope * grads[0]
    for z, of_z in zip((*first, *sums), (*grads_first, *grads_sums), strict=True):
        grad += f.curvature * z * of_z
    for squares, sum_grad in zip(_squares(first, second), grads_sums, strict=True):
        grad += f.third * squares * sum_grad
    return jnp.stack(
        [
            grad,
            *(
                f.slope * of_z
                + 2
                * f.curvature
                * z
                * sum(
                    row[j] * sum_grad
                    for row, sum_grad in zip(second, grads_sums, strict=True)
                )
                for j, (z, of_z) in enumerate(zip(first, grads_first, strict=True))
            ),
            *(f.slope * sum_grad for sum_grad in grads_sums),
        ]
    ), grad.sum(0)


_activate.defvjp(_activate_forward, _activate_backward)


def _split(
    streams: jax.Array, second: SecondOrder
) -> tuple[list[jax.Array], list[jax.Array]]:
    """The first derivatives and the second-order sums, one array each."""
    _, *rest = streams
    inputs = len(rest) - len(second)
    return rest[:inputs], rest[inputs:]


def _squares(first: list[jax.Array], second: SecondOrder) -> list[jax.Array]:
    """sum_j c_kj z_j^2 for every row c_k."""
    return [
        sum(c * z * z for c, z in zip(row, first, strict=True) if c) for row in second
    ]


def _input_streams(
    embedding: Function, flat: jax.Array, second: SecondOrder | None
) -> jax.Array:
    """Streams of the features; of the coordinates x, unit vectors, and zeros."""
    features = derivatives_of(embedding, flat, second)
    if second is None:
        return features.value[None]
    return jnp.concatenate([features.value[None], features.gradient, features.second])


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
    # Of coordinates uniform in [-1, 1], or in [0, 1]; of sines.
    moment = 1 / 3 if network.embedding is identity else 1 / 2
    initializer = _aware_initializer(network.activation, moment if layer == 0 else None)
    return _with_zero_bias(network, layer, initializer(key, shape))


@cache
def _aware_initializer(
    activation: str, input_second_moment: float | None
) -> jax.nn.initializers.Initializer:
    return activation_aware_normal(
        lambda z: ACTIVATIONS[activation](z).value,
        input_second_moment=input_second_moment,
    )


def _gradient_preserving(
    network: Network, layer: int, key: jax.Array
) -> dict[str, jax.Array]:
    initializer = activation_aware_normal(
        lambda z: ACTIVATIONS[network.activation](z).value, preserve="gradient"
    )
    kernel = initializer(key, network.kernel_shape(layer))
    return _with_zero_bias(network, layer, kernel)


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
# "gradient_preserving": `activation_aware_normal(preserve="gradient")`, biases 0; for
#   tanh the kernels are N(0, 1 / fan_in).
INITIALIZERS: dict[str, Callable[[Network, int, jax.Array], dict[str, jax.Array]]] = {
    "normal": _normal,
    "uniform": _uniform,
    "glorot": _glorot,
    "activation_aware": _activation_aware,
    "gradient_preserving": _gradient_preserving,
}

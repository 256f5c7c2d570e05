"""The scales that `activation_aware_normal` preserves, and where it can be used."""

from statistics import NormalDist

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.integrate import quad

from stablegrad_optax._initializers import activation_aware_normal

# As the docstring derives them: E[a^2] and the gain of each activation.
STATED = {
    jax.nn.relu: (1.0, 1.4142),
    jax.nn.gelu: (1.0, 1.4680),
    jax.nn.silu: (1.0, 1.5588),
    jax.nn.elu: (1.0, 1.2780),
    jax.nn.selu: (1.0, 1.0),
    jax.nn.mish: (1.0, 1.4515),
    jax.nn.softplus: (1.0, 1.0831),
    jnp.tanh: (0.5, 1.891),
    jnp.sin: (0.25, 1.177),
}
each_activation = pytest.mark.parametrize(
    "activation", STATED, ids=lambda activation: activation.__name__
)


def gain(activation, shape=(4, 3), fan_in=4, **kwargs):
    """Returns the factor of the weights on the draws of jax.random.normal."""
    key = jax.random.key(0)
    weights = np.asarray(activation_aware_normal(activation, **kwargs)(key, shape))
    factor = weights / np.asarray(jax.random.normal(key, shape)) * fan_in**0.5
    np.testing.assert_allclose(factor, factor.ravel()[0], rtol=1e-5)
    return float(factor.ravel()[0])


def expectation(function, sigma):
    """Computes E[function(z)], z ~ N(0, sigma^2), by adaptive quadrature in float64."""

    def integrand(z):
        return function(sigma * z) * np.exp(-z * z / 2) / np.sqrt(2 * np.pi)

    # Split where the tested activations have their kinks.
    kinks = [kink / sigma for kink in (-3, -1, 0, 1, 3, 6)]
    return quad(integrand, -9, 9, points=kinks, limit=400)[0]


@each_activation
def test_gains_are_the_stated_ones(activation):
    assert gain(activation) == pytest.approx(STATED[activation][1], rel=5e-4)


def test_sigma_is_what_a_unit_input_needs():
    # Closed forms: E[relu(z)^2] = sigma^2 / 2, Var[sin z] = (1 - e^(-2 sigma^2)) / 2.
    assert gain(jax.nn.relu, input_second_moment=1.0) == pytest.approx(2**0.5, rel=1e-5)
    sine = gain(jnp.sin, input_second_moment=1.0)
    assert sine == pytest.approx((np.log(2) / 2) ** 0.5, rel=1e-5)
    assert gain(jnp.tanh, input_second_moment=1.0) == pytest.approx(1.337, rel=3e-4)


# Kinks at zero and away from it, a slow tail, an even and an offset function, and
# one that oscillates within a small fraction of sigma's range.
ODD_ONES = {
    "hard_tanh": (jax.nn.hard_tanh, lambda x: np.clip(x, -1, 1), 0.5),
    "relu6": (jax.nn.relu6, lambda x: np.clip(x, 0, 6), None),
    "hard_silu": (jax.nn.hard_silu, lambda x: x * np.clip(x + 3, 0, 6) / 6, None),
    "leaky_relu": (jax.nn.leaky_relu, lambda x: np.where(x > 0, x, 0.01 * x), None),
    "soft_sign": (jax.nn.soft_sign, lambda x: x / (1 + abs(x)), 0.5),
    "sigmoid": (jax.nn.sigmoid, lambda x: 1 / (1 + np.exp(-x)), 0.125),
    "cos": (jnp.cos, np.cos, 0.25),
    "sin 30": (lambda x: jnp.sin(30 * x), lambda x: np.sin(30 * x), 0.25),
    "numpy": (np.tanh, np.tanh, 0.5),
    "identity": (lambda x: x, lambda x: x, None),
}


@pytest.mark.parametrize("name", ODD_ONES)
def test_any_callable_meets_its_level(name):
    activation, reference, variance = ODD_ONES[name]
    sigma = gain(activation, input_second_moment=1.0)
    second_moment = expectation(lambda x: reference(x) ** 2, sigma)
    mean = expectation(reference, sigma)
    reached, wanted = (
        (second_moment, 1) if variance is None else (second_moment - mean**2, variance)
    )
    # The reachable variance of soft_sign is read off at sigma = 1e6, not at infinity.
    assert reached == pytest.approx(wanted, rel=2e-5)
    assert gain(activation) == pytest.approx(sigma / second_moment**0.5, rel=2e-5)


# The gains that the docstring states, and two activations with a fixed point away from
# zero, whose gain is None. The slopes are written by hand.
GRADIENT = {
    "tanh": (jnp.tanh, np.tanh, lambda z: np.cosh(z) ** -2, 1.0),
    "sin": (jnp.sin, np.sin, np.cos, 1.0),
    "relu": (jax.nn.relu, lambda z: max(z, 0), lambda z: float(z > 0), 2**0.5),
    "elu": (
        jax.nn.elu,
        lambda z: z if z > 0 else np.expm1(z),
        lambda z: 1 if z > 0 else np.exp(z),
        1.0,
    ),
    "selu": (
        jax.nn.selu,
        lambda z: 1.0507 * (z if z > 0 else 1.67326 * np.expm1(z)),
        lambda z: 1.0507 * (1 if z > 0 else 1.67326 * np.exp(z)),
        0.6905,
    ),
    "hard_tanh": (
        jax.nn.hard_tanh,
        lambda z: np.clip(z, -1, 1),
        lambda z: float(abs(z) < 1),
        1.0,
    ),
    "cos": (jnp.cos, np.cos, lambda z: -np.sin(z), None),
    "sigmoid": (
        jax.nn.sigmoid,
        lambda z: 1 / (1 + np.exp(-z)),
        lambda z: np.exp(-z) / (1 + np.exp(-z)) ** 2,
        None,
    ),
}


@pytest.mark.parametrize("name", GRADIENT)
def test_the_gradient_is_preserved_at_a_stable_fixed_point(name):
    """Checks the gain by adaptive quadrature and by iterating the variance map."""
    activation, reference, slope, stated = GRADIENT[name]
    g = gain(activation, preserve="gradient")
    if stated is not None:
        # The fixed point at zero is replaced by a variance of 1e-12.
        assert g == pytest.approx(stated, rel=1e-4)

    def next_variance(variance):
        return g**2 * expectation(lambda z: reference(z) ** 2, variance**0.5)

    if name not in ("cos", "sigmoid"):
        # A variance near zero stays; one far away does not grow.
        assert next_variance(1e-4) == pytest.approx(1e-4, rel=0.03)
        assert next_variance(4.0) <= 4.0 * (1 + 1e-5)
        return
    variance = 1.0
    for _ in range(60):
        variance = next_variance(variance)
    chi = g**2 * expectation(lambda z: slope(z) ** 2, variance**0.5)
    # The gain is solved to 1e-4 of a ratio of float32 expectations.
    assert chi == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("preserve", ["gradient", "signal"])
@pytest.mark.parametrize("activation", [jnp.tanh, jnp.sin, jax.nn.relu, jax.nn.elu])
def test_gradients_of_a_deep_network(activation, preserve):
    """The backward pass of 50 simulated layers: preserved, or expanding with tanh."""
    init = activation_aware_normal(activation, preserve=preserve)
    keys = jax.random.split(jax.random.key(0), 50)

    def network(x, key):
        def layer(x, key):
            return activation(x @ init(key, (256, 256))), None

        x, _ = jax.lax.scan(layer, x, keys)
        return x @ jax.random.normal(key, (256,))

    input_gradients = jax.jit(jax.vmap(jax.grad(network), (None, 0)))
    # A small input: tanh and sin reach their fixed point at zero only algebraically.
    inputs = 0.1 * jax.random.normal(jax.random.key(1), (256,))
    keys_out = jax.random.split(jax.random.key(2), 4)
    growth = float(jnp.mean(input_gradients(inputs, keys_out) ** 2))
    # The variance of tanh, sin and elu falls to its fixed point as a power of the
    # depth, and the gradient changes as another. The random factors of relu add up.
    if preserve == "gradient" or activation is jax.nn.relu:
        assert 0.05 < growth < 20
    elif activation is jnp.tanh:
        assert growth > 100


@pytest.mark.parametrize(
    "activation",
    [
        jax.nn.gelu,
        jax.nn.silu,
        jax.nn.mish,
        jax.nn.softplus,
        lambda x: jax.nn.gelu(0.01 * x),
        jnp.exp,
        jnp.sinh,
        lambda x: x**3,
        lambda x: 0 * x,
        lambda x: x * jnp.nan,
    ],
)
def test_activations_without_a_point_that_preserves_the_gradient(activation):
    with pytest.raises(ValueError, match=r"a stable fixed point .* has none"):
        activation_aware_normal(activation, preserve="gradient")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preserve": "both"}, "'signal' or 'gradient'; got 'both'"),
        (
            {"preserve": "gradient", "input_second_moment": 1.0},
            "input_second_moment must be None",
        ),
    ],
)
def test_what_preserve_can_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        activation_aware_normal(jnp.tanh, **arguments)


def test_a_function_of_numpy_has_no_slope():
    with pytest.raises(ValueError, match="JAX can differentiate"):
        activation_aware_normal(np.tanh, preserve="gradient")


def test_gelu_has_no_stable_point_by_an_independent_search():
    """E[f^2] / q rises from zero on, and below E[f'^2]: no other point has chi = 1."""
    normal = NormalDist()

    def gelu(z):
        return z * normal.cdf(z)

    def slope(z):
        return normal.cdf(z) + z * normal.pdf(z)

    scales = np.geomspace(0.05, 20, 12)
    growth = [expectation(lambda z: gelu(z) ** 2, s) / s**2 for s in scales]
    chi = [expectation(lambda z: slope(z) ** 2, s) for s in scales]
    assert np.all(np.diff(growth) > 0)
    assert np.all(np.array(growth) < np.array(chi))


def forward(activation, num_layers=50, width=512, num_inputs=32):
    """Returns the second moment of each layer's activations for standard inputs."""
    first = activation_aware_normal(activation, input_second_moment=1.0)
    hidden = activation_aware_normal(activation)

    @jax.jit
    def run(key):
        inputs, first_key, hidden_key = jax.random.split(key, 3)
        a = jax.random.normal(inputs, (num_inputs, width))
        a = activation(a @ first(first_key, (width, width)))

        def layer(a, key):
            a = activation(a @ hidden(key, (width, width)))
            return a, jnp.mean(a**2)

        return jax.lax.scan(layer, a, jax.random.split(hidden_key, num_layers))[1]

    return run(jax.random.key(0))


@pytest.mark.parametrize("activation", [jnp.tanh, jnp.sin, jax.nn.selu])
def test_fifty_layers_keep_the_second_moment(activation):
    """These activations forget the random factors of a finite width in every layer."""
    np.testing.assert_allclose(forward(activation), STATED[activation][0], rtol=0.1)


@each_activation
def test_each_layer_maps_the_stationary_state_to_itself(activation):
    """The stationary second moment is a fixed point of one layer.

    Each of several independent layers of width 512 receives activations in the
    stationary state. A single layer may differ by up to sqrt(c / 512) = 11 %, because
    its width is finite. Inputs that share no direction and four layers average this
    difference down to about 1 %.
    """
    sigma = gain(activation, input_second_moment=1.0)
    init = activation_aware_normal(activation)

    @jax.jit
    @jax.vmap
    def layer(key):
        inputs, weights = jax.random.split(key)
        a = activation(sigma * jax.random.normal(inputs, (32, 512)))
        return jnp.mean(activation(a @ init(weights, (512, 512))) ** 2)

    moments = layer(jax.random.split(jax.random.key(0), 4))
    np.testing.assert_allclose(moments.mean(), STATED[activation][0], rtol=0.03)


def test_fan_in_is_every_axis_but_the_output():
    assert gain(jnp.tanh, (3, 8, 5), 24) == pytest.approx(1.891, rel=3e-4)
    torch_like = gain(jnp.tanh, (5, 8, 3), 24, out_axis=0)
    assert torch_like == pytest.approx(1.891, rel=3e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.complex64])
def test_dtype(dtype):
    init = activation_aware_normal(jax.nn.relu)
    weights = init(jax.random.key(0), (256, 512), dtype)
    assert weights.dtype == dtype
    # Sampling error of a standard deviation over 131,072 draws: 0.2 %.
    spread = np.std(np.asarray(weights, np.complex64)) * 16
    assert spread == pytest.approx(2**0.5, rel=0.01)
    default = activation_aware_normal(jax.nn.relu, dtype=dtype)
    assert default(jax.random.key(0), (2, 2)).dtype == dtype


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = activation_aware_normal(jnp.tanh)  # made while the module is traced
        x = nn.Conv(16, (3, 3), kernel_init=init)(x)
        x = nn.Dense(32, kernel_init=init)(x)
        return nn.MultiHeadDotProductAttention(4, kernel_init=init)(x)


def test_flax_linen():
    inputs = jnp.ones((1, 4, 4, 16))
    net = LinenNet()
    params = jax.jit(net.init)(jax.random.key(0), inputs)["params"]
    kernels = {
        144: params["Conv_0"]["kernel"],
        16: params["Dense_0"]["kernel"],
        32: params["MultiHeadDotProductAttention_0"]["query"]["kernel"],
    }
    for fan_in, kernel in kernels.items():
        # 512 draws and more: sampling error 3 %.
        assert kernel.std() * fan_in**0.5 == pytest.approx(1.891, rel=0.1)


def test_flax_nnx():
    init = activation_aware_normal(jax.nn.relu)
    layer = nnx.Linear(64, 256, kernel_init=init, rngs=nnx.Rngs(0))
    assert layer.kernel[...].std() * 8 == pytest.approx(2**0.5, rel=0.05)


def test_equinox():
    init = activation_aware_normal(jax.nn.relu, out_axis=0)
    linear = eqx.nn.Linear(64, 256, key=jax.random.key(0))
    weight = init(jax.random.key(1), linear.weight.shape)
    linear = eqx.tree_at(lambda layer: layer.weight, linear, weight)
    assert linear.weight.std() * 8 == pytest.approx(2**0.5, rel=0.05)


@pytest.mark.parametrize("transform", ["jit", "vmap", "grad"])
def test_can_be_made_inside_a_transformation(transform):
    def draw(scale):
        init = activation_aware_normal(jax.nn.gelu)
        return scale * init(jax.random.key(0), (2, 2))[0, 0]

    expected = float(draw(1.0))
    got = {
        "jit": lambda: jax.jit(draw)(1.0),
        "vmap": lambda: jax.vmap(draw)(jnp.ones(2))[0],
        "grad": lambda: jax.grad(draw)(1.0),
    }[transform]()
    assert float(got) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "activation",
    [
        lambda x: 0 * x,
        lambda x: 0 * x + 1,
        lambda x: x * jnp.nan,
        lambda x: 1e-8 * x,
        lambda x: 1 + jax.nn.relu(x),
        jnp.exp,
        jnp.log,
        jnp.sign,
        jax.nn.glu,
        "tanh",
    ],
)
def test_activations_without_a_stationary_scale(activation):
    with pytest.raises(ValueError, match="activation must"):
        activation_aware_normal(activation)


@pytest.mark.parametrize("moment", [0.0, -1.0, float("nan"), float("inf"), "1"])
def test_bad_input_second_moment(moment):
    with pytest.raises(ValueError, match="input_second_moment must be"):
        activation_aware_normal(jnp.tanh, input_second_moment=moment)


@pytest.mark.parametrize("shape", [(), (3,)])
def test_shapes_without_a_fan_in(shape):
    with pytest.raises(ValueError, match="at least two axes"):
        activation_aware_normal(jnp.tanh)(jax.random.key(0), shape)

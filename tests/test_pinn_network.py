"""Forward streams are the network's derivatives; initial weights follow their law."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.tasks.pinn.network import ACTIVATIONS, INITIALIZERS, Network

SECOND = ((1.0, 1.0), (1.0, 0.0), (0.5, -2.0))


def plain(network, params, x):
    """The network as one would write it, for one point."""
    gelu = partial(jax.nn.gelu, approximate=False)
    named = {"tanh": jnp.tanh, "sin": jnp.sin, "silu": jax.nn.silu, "gelu": gelu}
    f = named[network.activation]
    for layer in range(network.depth):
        dense = params[f"dense_{layer}"]
        y = f(x @ dense["kernel"] + dense["bias"])
        gate = params.get(f"gate_{layer}")
        x = y if gate is None else gate * y + (1 - gate) * x
    return (x @ params[f"dense_{network.depth}"]["kernel"])[0]


def by_jax(network, params, points):
    """Computes `Network.derivatives` by JAX's own derivatives of `plain`."""
    u = partial(plain, network, params)

    def at_point(x):
        hessian = jnp.diag(jax.hessian(u)(x))
        return u(x), jax.grad(u)(x), jnp.asarray(SECOND) @ hessian

    value, *others = jax.vmap(jax.vmap(at_point))(points)
    return value, *(jnp.moveaxis(other, -1, 0) for other in others)


def assert_near(actual, expected):
    # Sums of 16 products of order one in float32, a few layers deep.
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_activations_know_their_derivatives(activation):
    z = jnp.linspace(-4, 4, 41)
    f = activation(z)
    for lower, higher in pairwise(f._fields):
        derivative = jax.vmap(
            jax.grad(lambda z, name=lower: getattr(activation(z), name))
        )
        # A few roundings of terms up to 4.
        np.testing.assert_allclose(getattr(f, higher), derivative(z), atol=4e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("depth", [1, 4])
def test_streams_agree_with_jax_hessian(activation, depth):
    network = Network(depth, 16, activation, initializer="uniform")
    params = network.init(jax.random.key(1))
    points = jax.random.uniform(jax.random.key(2), (3, 5, 2), minval=-1)
    u = jax.jit(lambda p, x: network.derivatives(p, x, SECOND))(params, points)
    expected = jax.jit(partial(by_jax, network))(params, points)
    jax.tree.map(assert_near, tuple(u), expected)


def test_a_residual_network_starts_with_one_layer():
    network = Network(4, 16, initializer="uniform", residual=True)
    params = network.init(jax.random.key(1))
    points = jax.random.uniform(jax.random.key(2), (3, 5, 2), minval=-1)
    shallow = {"dense_0": params["dense_0"], "dense_1": params["dense_4"]}
    expected = Network(1, 16).derivatives(shallow, points, SECOND)
    jax.tree.map(assert_near, network.derivatives(params, points, SECOND), expected)
    open_gates = {f"gate_{layer}": jnp.float32(0.3 * layer) for layer in range(1, 4)}
    params |= open_gates
    u = network.derivatives(params, points, SECOND)
    jax.tree.map(assert_near, tuple(u), by_jax(network, params, points))


@pytest.mark.parametrize(
    "activation",
    [
        pytest.param(name, marks=() if name == "tanh" else pytest.mark.slow)
        for name in ACTIVATIONS
    ],
)
def test_their_gradient_agrees_with_jax(activation):
    network = Network(3, 16, activation, initializer="uniform")
    params = network.init(jax.random.key(1))
    points = jax.random.uniform(jax.random.key(2), (15, 1, 2), minval=-1)

    @partial(jax.jit, static_argnums=0)
    def gradient(derivatives, params):
        """Differentiates a sum in which every derivative has its own weights."""

        def weighted(params):
            fields = tuple(derivatives(params, points))
            keys = jax.random.split(jax.random.key(3), len(fields))
            return sum(
                jnp.mean(jax.random.normal(key, field.shape) * field)
                for key, field in zip(keys, fields, strict=True)
            )

        return jax.grad(weighted)(params)

    ours = gradient(lambda p, x: network.derivatives(p, x, SECOND), params)
    jax.tree.map(assert_near, ours, gradient(partial(by_jax, network), params))
    value_alone = gradient(lambda p, x: (network.apply(p, x),), params)
    expected = gradient(lambda p, x: by_jax(network, p, x)[:1], params)
    jax.tree.map(assert_near, value_alone, expected)


def test_asking_for_less_gives_the_same_less():
    network = Network(2, 8)
    params = network.init(jax.random.key(0))
    points = jax.random.normal(jax.random.key(1), (7, 2))
    full, first, value = jax.jit(
        lambda p, x: [network.derivatives(p, x, rows) for rows in (SECOND, (), None)]
    )(params, points)
    np.testing.assert_allclose(first.gradient, full.gradient, rtol=1e-6, atol=1e-6)
    assert first.second.shape == (0, 7)
    np.testing.assert_allclose(value.value, full.value, rtol=1e-6, atol=1e-6)
    assert value.gradient is None
    np.testing.assert_allclose(
        network.apply(params, points), value.value, rtol=1e-6, atol=1e-6
    )


def test_a_deep_network_has_two_leaves_a_hidden_layer_and_one_at_its_output():
    params = Network(32, 32).init(jax.random.key(0))
    assert len(jax.tree.leaves(params)) == 65
    assert params["dense_0"]["kernel"].shape == (2, 32)
    assert params["dense_32"]["kernel"].shape == (32, 1)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("initializer", "hidden", "output"),
    [
        ("normal", 1.5 / 200**0.5, 1 / 200**0.5),
        ("uniform", (1 / 3 / 200) ** 0.5, (1 / 3 / 200) ** 0.5),
        ("glorot", (2 / 400) ** 0.5, (2 / 201) ** 0.5),
        ("activation_aware", 1.891 / 200**0.5, 1 / 200**0.5),
        ("gradient_preserving", 1 / 200**0.5, 1 / 200**0.5),
    ],
)
def test_initial_weights_have_their_laws_standard_deviation(
    initializer, hidden, output
):
    assert initializer in INITIALIZERS
    params = Network(2, 200, initializer=initializer, gain=1.5).init(jax.random.key(0))
    # Five standard errors: std / sqrt(2 n) with n = 40000 and 200 (normal's is the
    # widest law).
    assert jnp.std(params["dense_1"]["kernel"]) == pytest.approx(hidden, rel=0.02)
    assert jnp.std(params["dense_2"]["kernel"]) == pytest.approx(output, rel=0.25)
    bias = params["dense_1"]["bias"]
    if initializer == "uniform":
        assert jnp.std(bias) == pytest.approx(hidden, rel=0.25)
        assert jnp.abs(bias).max() <= 200**-0.5
    else:
        assert not bias.any()

"""Forward streams are the network's derivatives; initial weights follow their law."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.pinn.network import ACTIVATIONS, INITIALIZERS, Network

SECOND = ((1.0, 1.0), (1.0, 0.0), (0.5, -2.0))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("depth", [1, 4])
def test_streams_agree_with_jax_hessian(activation, depth):
    network = Network(depth, 16, activation, initializer="uniform")
    params = network.init(jax.random.key(1))
    points = jax.random.uniform(jax.random.key(2), (3, 5, 2), minval=-1)

    def plain(x):
        """The network as one would write it, for one point."""
        f = {"tanh": jnp.tanh, "sin": jnp.sin, "silu": jax.nn.silu}[activation]
        for layer in range(depth):
            dense = params[f"dense_{layer}"]
            x = f(x @ dense["kernel"] + dense["bias"])
        return (x @ params[f"dense_{depth}"]["kernel"])[0]

    def over_points(function):
        return jax.jit(jax.vmap(jax.vmap(function)))(points)

    u = jax.jit(lambda p, x: network.derivatives(p, x, SECOND))(params, points)
    hessian = over_points(lambda x: jnp.diag(jax.hessian(plain)(x)))
    # Sums of 16 products of order one in float32, a few layers deep.
    near = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(u.value, over_points(plain), **near)
    np.testing.assert_allclose(
        u.gradient, jnp.moveaxis(over_points(jax.grad(plain)), -1, 0), **near
    )
    expected = jnp.moveaxis(hessian @ jnp.asarray(SECOND).T, -1, 0)
    np.testing.assert_allclose(u.second, expected, **near)


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

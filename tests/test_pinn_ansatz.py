"""Features and an ansatz have the derivatives of the functions that they are."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.tasks.pinn.ansatz import Ansatz, derivatives_of, fourier_features
from benchmarks.tasks.pinn.network import Network

SECOND = ((1.0, 1.0), (1.0, 0.0), (0.5, -2.0))
POINTS = jax.random.uniform(jax.random.key(2), (3, 5, 2), minval=-1)
FEATURES = fourier_features([(np.pi, 0.0), (2.0, -3.0)], coordinates=(1,))


def by_jax(function, points):
    """The function's derivatives, of one point at a time, by JAX's reverse mode."""

    def at_point(x):
        hessian = jnp.diagonal(jax.hessian(function)(x), axis1=-2, axis2=-1)
        return function(x), jax.jacrev(function)(x), hessian @ jnp.asarray(SECOND).T

    value, *others = jax.vmap(jax.vmap(at_point))(points)
    return value, *(jnp.moveaxis(other, -1, 0) for other in others)


def assert_near(actual, expected):
    # Sums of a dozen products of order ten in float32.
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_features_are_sines_and_cosines_beside_a_coordinate():
    x, t = POINTS[..., 0], POINTS[..., 1]
    phases = (np.pi * x, 2 * x - 3 * t)
    expected = [t, *map(jnp.cos, phases), *map(jnp.sin, phases)]
    np.testing.assert_allclose(FEATURES(POINTS), jnp.stack(expected, -1), atol=1e-6)


def test_derivatives_of_features_agree_with_jax_hessian():
    found = jax.jit(lambda x: derivatives_of(FEATURES, x, SECOND))(POINTS)
    jax.tree.map(assert_near, tuple(found), by_jax(FEATURES, POINTS))


@pytest.mark.parametrize(
    "built_in", [pytest.param(False, marks=pytest.mark.slow), True]
)
def test_a_network_on_features_agrees_with_jax_hessian(built_in):
    """Alone, and in an ansatz whose parts vary in both coordinates."""
    network = Network(2, 8, initializer="uniform", embedding=FEATURES)
    params = network.init(jax.random.key(1))
    assert params["dense_0"]["kernel"].shape == (5, 8)
    ansatz = Ansatz(
        lambda x: x[..., 0] ** 2 * jnp.cos(x[..., 1]),
        lambda x: x[..., 1] ** 2 * jnp.exp(x[..., 0]),
    )

    def plain(x):
        a = FEATURES(x)
        for layer in range(2):
            dense = params[f"dense_{layer}"]
            a = jnp.tanh(a @ dense["kernel"] + dense["bias"])
        u = (a @ params["dense_2"]["kernel"])[0]
        start, factor = ansatz
        return start(x) + factor(x) * u if built_in else u

    @partial(jax.jit, static_argnums=1)
    def ours(points, second):
        u = network.derivatives(params, points, second)
        return ansatz(points, u, second) if built_in else u

    expected = by_jax(plain, POINTS)
    jax.tree.map(assert_near, tuple(ours(POINTS, SECOND)), expected)
    first, value = ours(POINTS, ()), ours(POINTS, None)
    jax.tree.map(assert_near, tuple(first)[:2], expected[:2])
    assert first.second.shape == (0, 3, 5)
    assert_near(value.value, expected[0])
    assert value.gradient is None

"""normalize_by_leaf_norm against NumPy in float64, and against its older spelling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_trees_close, gradients

from stablegrad_optax import (
    gradient_stabilizer,
    health,
    normalize_by_leaf_norm,
    scale_factors,
)

update = jax.jit(normalize_by_leaf_norm().update)


@pytest.mark.parametrize("exponent", [-30, -20, 0, 20, 35])
def test_equals_the_quotient_of_array_and_norm_over_100_steps(exponent):
    rng = np.random.default_rng(0)
    shapes = {"a": (4, 5), "b": (3,), "c": ()}
    state = None
    for _ in range(100):
        grads = {
            name: np.asarray(10.0**exponent * rng.normal(0.3, 1, shape), np.float32)
            for name, shape in shapes.items()
        }
        state = state or normalize_by_leaf_norm().init(grads)
        updates, state = update(grads, state)
        for name, grad in grads.items():
            wide = np.float64(grad)
            expected = wide / np.sqrt(np.sum((wide / 10.0**exponent) ** 2))
            expected /= 10.0**exponent
            np.testing.assert_allclose(updates[name], expected, rtol=1e-6)


def test_slices_are_normalized_by_themselves():
    stack = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 5)), jnp.float32)
    grads = {"stack": stack * jnp.array([1e-9, 1.0, 1e9])[:, None, None]}
    tx = normalize_by_leaf_norm(num_stacked_axes=1)
    updates, state = tx.update(grads, tx.init(grads))
    norms = jnp.linalg.norm(updates["stack"].reshape(3, -1), axis=1)
    np.testing.assert_allclose(norms, 1, rtol=1e-6)
    assert scale_factors(state, grads)["stack"].shape == (3,)


def test_equals_a_stabilizer_without_memory():
    tx = gradient_stabilizer(0.0, 0.0, eps=0.0)
    state = tx.init(gradients())
    own = normalize_by_leaf_norm().init(gradients())
    for seed in range(10):
        grads = gradients(seed, scale=10.0 ** (4 * seed - 20))
        expected, state = tx.update(grads, state)
        updates, own = update(grads, own)
        assert_trees_close(updates, expected, rtol=1e-6)
        np.testing.assert_allclose(own.scale_factors, state.scale_factors, rtol=1e-6)


def test_zero_stays_zero_and_nan_harms_itself_alone():
    grads = {"zero": jnp.zeros(3), "nan": jnp.array([1.0, np.nan]), "a": jnp.ones(4)}
    updates, state = update(grads, normalize_by_leaf_norm().init(grads))
    np.testing.assert_array_equal(updates["zero"], 0)
    np.testing.assert_array_equal(updates["nan"], grads["nan"])
    np.testing.assert_allclose(updates["a"], 0.5, rtol=1e-6)
    assert health(state)["scale_factor/min"] == pytest.approx(0.5)


def test_no_update_depends_on_an_earlier_one():
    grads = gradients()
    _, state = update(gradients(1, scale=1e6), normalize_by_leaf_norm().init(grads))
    expected, _ = update(grads, normalize_by_leaf_norm().init(grads))
    updates, _ = update(grads, state)
    assert_trees_close(updates, expected, rtol=0, atol=0)

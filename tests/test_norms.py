"""layer_norms against NumPy in float64, at any magnitude."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import gradients
from flax import nnx

from stablegrad_optax import layer_norms

TREE = {
    "stack": {"kernel": np.arange(24.0).reshape(2, 3, 4), "bias": np.ones((2, 4))},
    "head": {"kernel": np.array([[3.0, 4.0]]), "steps": np.arange(3), "empty": None},
}


def as_float32(tree):
    return jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32 if x.dtype == float else jnp.int32), tree
    )


def exact(array, axes=None):
    return np.sqrt(np.sum(np.abs(np.asarray(array, np.complex128)) ** 2, axis=axes))


@pytest.mark.parametrize("compiled", [False, True])
def test_norms_of_arrays_and_of_the_tree(compiled):
    function = jax.jit(layer_norms) if compiled else layer_norms
    values = function(as_float32(TREE))
    expected = {
        "norm/head/kernel": 5.0,
        "norm/stack/kernel": exact(TREE["stack"]["kernel"]),
        "norm/stack/bias": exact(TREE["stack"]["bias"]),
    }
    expected["global_norm"] = exact(list(expected.values()))
    assert values.keys() == expected.keys()
    for name, value in values.items():
        assert value.shape == ()
        assert value == pytest.approx(expected[name], rel=1e-6), name


def test_stacked_arrays_have_a_norm_for_each_layer():
    values = layer_norms(
        as_float32(TREE), num_stacked_axes={"stack": 1, "head": 0}, histograms=True
    )
    kernel = TREE["stack"]["kernel"]
    np.testing.assert_allclose(
        values["norm/stack/kernel"], exact(kernel, (1, 2)), rtol=1e-6
    )
    assert values["norm/head/kernel"].shape == ()
    assert values["histogram/stack/kernel"].shape == (2, 64)
    assert values["histogram/head/kernel"].shape == (64,)


@pytest.mark.parametrize("magnitude", [1e-35, 1e-20, 1.0, 1e20, 1e36])
def test_magnitudes_at_which_squares_leave_the_range(magnitude):
    tree = jax.tree.map(lambda g: magnitude * g, gradients(0))
    values = layer_norms(tree)
    arrays = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
    assert values["global_norm"] == pytest.approx(
        np.sqrt(sum(np.sum(x**2) for x in arrays)), rel=1e-5
    )
    assert values["norm/hidden/kernel"] == pytest.approx(
        exact(tree["hidden"]["kernel"]), rel=1e-5
    )
    if magnitude in (1e-35, 1e36):  # the reason for a function of its own
        assert not 0 < optax.tree.norm(tree) < np.inf


def test_the_norm_relative_to_the_parameters():
    params, updates = gradients(0), jax.tree.map(lambda g: 1e-3 * g, gradients(0))
    params["hidden"]["bias"] = jnp.zeros_like(params["hidden"]["bias"])
    params["norm"]["scale"] *= 0
    updates["norm"]["scale"] *= 0
    stacked = {"stack": 1, "hidden": 0, "norm": 0}
    values = jax.jit(lambda u, p: layer_norms(u, params=p, num_stacked_axes=stacked))(
        updates, params
    )
    assert values["relative_norm/hidden/kernel"] == pytest.approx(1e-3, rel=1e-5)
    np.testing.assert_allclose(
        values["relative_norm/stack/kernel"], [1e-3, 1e-3], rtol=1e-5
    )
    assert values["relative_norm/hidden/bias"] == np.inf
    assert values["relative_norm/norm/scale"] == 0
    other = {**params, "hidden": {**params["hidden"], "kernel": jnp.ones((1, 2))}}
    with pytest.raises(ValueError, match=r"'hidden/kernel' has .* shape \(1, 2\)"):
        layer_norms(updates, params=other)
    with pytest.raises(ValueError, match=r"'stack/bias' has .* is missing"):
        layer_norms(updates, params={**params, "stack": {}})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
def test_histograms_count_magnitudes(dtype):
    rng = np.random.default_rng(0)
    values = rng.normal(size=5000) * 10.0 ** rng.uniform(-4, 4, 5000)
    values = values.astype(jnp.dtype(dtype)).reshape(50, 100)
    values[0, :4] = 0, np.inf, np.nan, -0.0
    edges = 2.0 ** np.arange(-128, 129, 4)
    magnitude = np.abs(values.astype(np.complex128)).ravel()
    exact = magnitude[np.isfinite(magnitude) & (magnitude > 0)]
    counts = layer_norms({"w": jnp.asarray(values)}, histograms=True)["histogram/w"]
    np.testing.assert_array_equal(counts, np.histogram(exact, edges)[0])


def test_powers_of_two_lie_in_the_bin_that_begins_with_them():
    powers = 2.0 ** np.arange(-124, 128, 4, dtype=np.float32)
    counts = layer_norms(jnp.asarray(powers), histograms=True)["histogram"]
    np.testing.assert_array_equal(counts, [0] + [1] * 63)
    below = np.nextafter(powers, np.float32(0))
    counts = layer_norms(jnp.asarray(below), histograms=True)["histogram"]
    np.testing.assert_array_equal(counts, [1] * 63 + [0])


def test_models_of_any_framework():
    model = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))
    values = eqx.filter_jit(layer_norms)(eqx.filter(model, eqx.is_inexact_array))
    assert values["norm/layers/0/weight"] == pytest.approx(
        exact(model.layers[0].weight), rel=1e-6
    )
    state = nnx.state(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    assert layer_norms(state).keys() == {"global_norm", "norm/bias", "norm/kernel"}
    assert layer_norms({}) == {"global_norm": 0}


def test_small_arrays_are_reduced_together():
    """Thirty-two layers take far fewer reductions than one for each."""
    tree = {str(i): {"kernel": jnp.ones((8, 8))} for i in range(32)}
    text = jax.jit(layer_norms).lower(tree).compile().as_text()
    assert len(re.findall(r" = .* reduce\(", text)) < 16


def test_a_histogram_writes_no_comparison_out():
    array = jax.ShapeDtypeStruct((1000, 1000), jnp.float32)
    compiled = jax.jit(lambda x: layer_norms(x, histograms=True)).lower(array).compile()
    # 64 comparisons of a byte each would be 64 MB, the numbers of the bins are 4 MB.
    assert compiled.memory_analysis().temp_size_in_bytes < 20e6

"""Trees of real models, with biases, stacked layers and masks, for every method."""

import functools
from typing import NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import (
    assert_trees_close,
    assert_trees_equal,
    each_method,
    each_scaling_method,
)

from stablegrad_optax import health, scale_factors, stablegrad


def random_like(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) + 0.2, jnp.float32), tree
    )


def attention():
    model = nn.MultiHeadDotProductAttention(num_heads=2)
    x = jnp.ones((1, 3, 4))
    return jax.eval_shape(model.init, jax.random.key(0), x, x)["params"]


def convolution():
    make = functools.partial(eqx.nn.Conv2d, 2, 3, kernel_size=3)
    return eqx.filter_eval_shape(lambda: make(key=jax.random.key(0)))


def ensemble():
    make = eqx.filter_vmap(lambda key: eqx.nn.Linear(2, 3, key=key))
    return eqx.filter_eval_shape(lambda: make(jax.random.split(jax.random.key(0), 4)))


BIASES = {  # the model, and how many axes its biases have
    "flax attention": (attention, {1, 2}),
    "equinox convolution": (convolution, {3}),
    "ensemble": (ensemble, {2}),
}


@pytest.mark.parametrize("name", BIASES)
def test_biases_with_axes_are_no_weights(name):
    """An array named bias has the factor of its kernel, whatever its axes are."""
    make, num_axes = BIASES[name]
    grads = random_like(make())
    named = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(grads)
    }
    biases = {key: leaf for key, leaf in named.items() if key.endswith("bias")}
    assert {leaf.ndim for leaf in biases.values()} == num_axes
    tx = stablegrad()
    _, state = tx.update(grads, tx.init(grads))
    factors = scale_factors(state, grads)
    for key in biases:
        parent = key.removesuffix("bias")
        (kernel,) = (k for k in named if k.startswith(parent) and k not in biases)
        assert factors[key] == factors[kernel]
        assert factors[kernel] == pytest.approx(
            1 / np.std(np.asarray(named[kernel])), rel=1e-5
        )


def test_weights_true_makes_them_weights():
    grads = {"kernel": jnp.ones((2, 2)), "bias": jnp.array([[1.0, 3.0]])}
    tx = stablegrad(weights=True)
    updates, _ = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(updates["bias"], [[1, 3]], rtol=1e-6)


@each_scaling_method
def test_a_scanned_net_equals_the_unrolled_one(case):
    """Layers at 1e-4 to 1e4 in one leaf: each slice is a layer, at every step."""
    rng = np.random.default_rng(0)
    scales = 10.0 ** np.array([-4, 0, 4])
    tx, tx_stacked = case.make(), case.make(num_stacked_axes=1)
    update, update_stacked = (
        jax.jit(functools.partial(each.update, **case.extra_args))
        for each in (tx, tx_stacked)
    )
    state = state_stacked = None
    for _ in range(5):
        kernel = rng.normal(0.3, 1, (3, 4, 5)) * scales[:, None, None]
        bias = rng.normal(0.3, 1, (3, 5)) * scales[:, None]
        kernel, bias = jnp.asarray(kernel, "f"), jnp.asarray(bias, "f")
        stacked = {"kernel": kernel, "bias": bias}
        unrolled = [{"kernel": kernel[i], "bias": bias[i]} for i in range(3)]
        state = tx.init(unrolled) if state is None else state
        state_stacked = state_stacked or tx_stacked.init(stacked)
        updates, state = update(unrolled, state)
        updates_stacked, state_stacked = update_stacked(stacked, state_stacked)
        expected = jax.tree.map(lambda *layers: jnp.stack(layers), *updates)
        assert_trees_close(updates_stacked, expected, rtol=1e-6, atol=1e-6)
        factors = scale_factors(state, unrolled)
        for name, factor in scale_factors(state_stacked, stacked).items():
            np.testing.assert_allclose(
                factor, [factors[f"{i}/{name}"] for i in range(3)], rtol=1e-6
            )


class Module(eqx.Module):
    """Is a callable pytree, as every Equinox model is."""

    layer: eqx.nn.Linear

    def __call__(self, x):
        raise AssertionError("a mask is not called")


@pytest.mark.parametrize("argument", ["mask", "num_stacked_axes"])
@each_scaling_method
def test_masks_and_stacks_may_be_callable_pytrees(case, argument):
    model = Module(eqx.nn.Linear(2, 3, key=jax.random.key(0)))
    value = jax.tree.map(lambda leaf: leaf.ndim == 2, model)
    if argument == "num_stacked_axes":
        value = jax.tree.map(int, value)
    as_pytree = case.make(**{argument: value})
    as_function = case.make(**{argument: lambda tree: value})
    as_partial = case.make(**{argument: functools.partial(lambda v, tree: v, value)})
    grads = random_like(model)
    expected, _ = as_function.update(grads, as_function.init(grads), **case.extra_args)
    for tx in (as_pytree, as_partial):
        updates, _ = tx.update(grads, tx.init(grads), **case.extra_args)
        assert_trees_close(updates, expected)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@each_method
def test_gradients_of_single_examples_are_refused(case, compiled):
    """As before optax.contrib.dpsgd: one gradient an example, in a leading axis."""
    params = {"dense": {"bias": jnp.ones(3), "kernel": jnp.ones((2, 3))}}
    grads = jax.tree.map(lambda leaf: jnp.ones((8, *leaf.shape)), params)
    state = case.tx.init(params)
    update = functools.partial(case.tx.update, **case.extra_args)
    update = jax.jit(update) if compiled else update
    with pytest.raises(
        ValueError,
        match=r"'dense/bias' has shape \(8, 3\), the parameter \(3,\).*after the aggr",
    ):
        update(grads, state, params)


@each_scaling_method
def test_leaves_of_one_printed_name_are_told_apart(case):
    grads = {"a": {"b": jnp.ones((2, 2))}, "a/b": 2 * jnp.eye(2), "c": jnp.eye(2)}
    _, state = case.tx.update(grads, case.tx.init(grads), **case.extra_args)
    factors = scale_factors(state, grads)
    assert list(factors) == ["['a']['b']", "['a/b']", "c"]
    # A part of the tree, in which the name is not shared, has the same ids.
    tx = optax.masked(case.tx, {"a": True, "a/b": False, "c": True})
    _, state = tx.update(grads, tx.init(grads), **case.extra_args)
    assert list(scale_factors(state, grads)) == ["['a']['b']", "c"]


class _Attention(NamedTuple):
    query: jax.Array
    value: jax.Array
    bias: jax.Array


def test_a_field_called_value_is_a_leaf_like_any_other():
    kernel = jnp.array([[1.0, -1.0], [1.0, -1.0]])
    params = {
        "attention": _Attention(kernel, 3 * kernel, jnp.ones(2)),
        "scale": jnp.ones(()),
    }
    tx = stablegrad()
    updates, state = tx.update(params, tx.init(params), params)
    factors = scale_factors(state, params)
    assert factors == pytest.approx(
        {
            "attention/query": 1,
            "attention/value": 1 / 3,
            # Of both weights under its own parent, pooled.
            "attention/bias": 1 / np.sqrt(5),
        }
    )
    assert updates["scale"] == 1


@each_method
def test_params_may_be_a_whole_equinox_model(case):
    model = eqx.nn.MLP(3, 1, 4, 2, key=jax.random.key(0))
    grads = eqx.filter_grad(lambda model: jnp.sum(model(jnp.ones(3)) ** 2))(model)
    arrays = eqx.filter(model, eqx.is_inexact_array)
    state = case.tx.init(arrays)
    expected = case.tx.update(grads, state, arrays, **case.extra_args)
    updated = case.tx.update(grads, state, model, **case.extra_args)
    assert_trees_equal(updated, expected)
    if not case.has_moments:
        assert health(updated[1], model) == health(updated[1], arrays)


@each_method
def test_gradients_of_other_names_are_refused(case):
    params = {"a": jnp.eye(2), "b": jnp.eye(2)}
    grads, state = {"a": jnp.eye(2), "c": jnp.eye(2)}, case.tx.init(params)
    with pytest.raises(ValueError, match="'c' is not a parameter"):
        case.tx.update(grads, state, params, **case.extra_args)

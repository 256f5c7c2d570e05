"""What is read from the states of the methods: factors and health."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from stablegrad_optax import (
    gradient_autoscaled_normalization,
    gradient_stabilizer,
    health,
    scale_factors,
    stablegrad,
)

METHODS = (stablegrad, gradient_stabilizer, gradient_autoscaled_normalization)
GRADS = {
    "dense": {
        "kernel": jnp.array([[4.0, -4.0], [4.0, -4.0]]),
        "bias": jnp.ones(2),
    },
    "stack": {"kernel": jnp.array([1.0, 2.0, 4.0])[:, None, None] * jnp.eye(2)},
}


def updated(tx, grads):
    return tx.update(grads, tx.init(grads), grads)[1]


@pytest.mark.parametrize(
    "grads", [{}, {"bias": jnp.ones(2)}, {"a": {}, "b": None}], ids=str
)
def test_a_state_that_scaled_nothing_has_no_factors(grads):
    tx = optax.chain(stablegrad(), optax.sgd(0.1))
    assert scale_factors(updated(tx, grads), grads) == {}
    assert health(updated(tx, grads), grads).keys() == {
        "nonfinite_leaves",
        "reference_std",
    }


def test_everything_masked_has_no_factors():
    tx = stablegrad(mask=lambda tree: jax.tree.map(lambda _: False, tree))
    assert scale_factors(updated(tx, GRADS), GRADS) == {}

    @jax.jit
    def steps(state):
        return jax.lax.scan(
            lambda state, _: (tx.update(GRADS, state)[1],) * 2, state, length=3
        )[1]

    assert scale_factors(steps(tx.init(GRADS)), GRADS) == {}


def test_a_group_of_biases_beside_another_in_partition():
    groups = optax.partition(
        {"biases": stablegrad(), "weights": stablegrad()},
        lambda tree: jax.tree.map(
            lambda leaf: "biases" if leaf.ndim == 1 else "weights", tree
        ),
    )
    state = updated(groups, GRADS)
    assert scale_factors(state, GRADS).keys() == {"dense/kernel", "stack/kernel"}
    assert health(state)["nonfinite_leaves"] == 0


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_health_has_the_factor_of_every_leaf(method):
    state = updated(optax.chain(method(), optax.adam(1e-3)), GRADS)
    flat, factors = health(state, GRADS), scale_factors(state, GRADS)
    assert all(type(value) is float for value in flat.values())
    for name, factor in factors.items():
        assert flat[f"scale_factor/{name}"] == factor
    assert flat["scale_factor/min"] == min(factors.values())
    assert flat["scale_factor/max"] == max(factors.values())
    nameless = health(state)
    assert nameless == {
        key: value
        for key, value in flat.items()
        if not key.startswith("scale_factor/") or key[13:] in ("min", "max")
    }


def test_health_of_stacked_leaves_and_of_a_chain():
    stacked = {"dense": {"kernel": 0, "bias": 0}, "stack": {"kernel": 1}}
    tx = optax.chain(stablegrad(stacked_axes=stacked), gradient_stabilizer())
    flat = health(updated(tx, GRADS), GRADS)
    # 1 / std, and the stabilizer gives the whole leaf the norm 1: six entries of 2.
    assert [flat[f"scale_factor/stack/kernel[{i}]"] for i in range(3)] == pytest.approx(
        np.array([2.0, 1.0, 0.5]) / np.sqrt(6 * 2**2), rel=1e-5
    )
    assert flat["reference_std"] == 1.0


def test_health_counts_leaves_that_are_not_finite():
    bad = jax.tree.map(jnp.copy, GRADS)
    bad["stack"]["kernel"] = bad["stack"]["kernel"].at[:2, 0, 0].set(jnp.nan)
    stacked = {"dense": {"kernel": 0, "bias": 0}, "stack": {"kernel": 1}}
    for stacked_axes in (None, stacked):
        tx = stablegrad(stacked_axes=stacked_axes)
        assert health(updated(tx, bad))["nonfinite_leaves"] == 1
        assert health(updated(tx, GRADS))["nonfinite_leaves"] == 0


class Skipping(NamedTuple):
    num_skipped: jax.Array
    last_deviation: jax.Array
    inner_state: optax.OptState


class Limiting(NamedTuple):
    is_limited: jax.Array
    leaf_ids: jax.Array
    scale_factors: jax.Array


def test_wrappers_and_other_methods_are_read_by_their_fields():
    scaled = updated(stablegrad(), GRADS)
    limited = Limiting(jnp.array([True, False]), scaled.leaf_ids[:2], jnp.ones(2))
    state = (Skipping(jnp.array(3), jnp.array(1.5), (limited, scaled)), ())
    flat = health(state, GRADS)
    assert flat["skipped_steps"] == 3
    assert flat["last_deviation"] == 1.5
    assert flat["limited_leaves"] == 1
    assert flat["scale_factor/dense/kernel"] == 0.25
    assert scale_factors(state, GRADS) == scale_factors(scaled, GRADS)
    alone = health(Skipping(jnp.array(0), jnp.array(0.0), optax.EmptyState()))
    assert alone == {"skipped_steps": 0, "last_deviation": 0}


def test_health_of_an_nnx_optimizer():
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    tx = optax.chain(stablegrad(), optax.adamw(1e-3))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda m: jnp.sum(m(jnp.eye(2)) ** 2))(model))
    flat = health(optimizer.opt_state, nnx.state(model, nnx.Param))
    assert flat["scale_factor/kernel"] == flat["scale_factor/bias"] > 0


def test_health_wants_one_step_outside_jit():
    state = updated(stablegrad(), GRADS)
    several = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    with pytest.raises(ValueError, match="reads the state of one step"):
        health(several, GRADS)
    with pytest.raises(ValueError, match="outside jit"):
        jax.jit(health)(state)
    with pytest.raises(ValueError, match="holds no state of this package's methods"):
        health(optax.adam(1e-3).init(GRADS))
    assert np.isfinite(
        list(health(jax.tree.map(lambda x: x[-1], several)).values())
    ).all()

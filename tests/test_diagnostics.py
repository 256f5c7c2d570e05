"""Tests of what is read from the states of the methods: factors and health."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from stablegrad_optax import (
    clip_by_history,
    gradient_autoscaled_normalization,
    gradient_stabilizer,
    health,
    normalize_by_leaf_norm,
    scale_factors,
    skip_spikes,
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
    smallest = flat.pop("smallest_scale_factor")
    assert smallest == min(factors, key=factors.get)
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
    tx = optax.chain(stablegrad(num_stacked_axes=stacked), gradient_stabilizer())
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
    for num_stacked_axes in (None, stacked):
        tx = stablegrad(num_stacked_axes=num_stacked_axes)
        assert health(updated(tx, bad))["nonfinite_leaves"] == 1
        assert health(updated(tx, GRADS))["nonfinite_leaves"] == 0


def norms(tree):
    return {
        name: np.linalg.norm(np.asarray(leaf, np.float64))
        for name, leaf in {
            "dense/bias": tree["dense"]["bias"],
            "dense/kernel": tree["dense"]["kernel"],
            "stack/kernel": tree["stack"]["kernel"],
        }.items()
    }


def larger(by):
    """Returns the gradients with one of the three slices of a leaf enlarged."""
    factors = jnp.array([by, 1, 1])[:, None, None]
    return {**GRADS, "stack": {"kernel": GRADS["stack"]["kernel"] * factors}}


def test_health_of_clip_by_history():
    tx = clip_by_history(warmup_steps=0)
    _, state = tx.update(GRADS, tx.init(GRADS))
    assert health(state)["limited_leaves"] == 0
    updates, state = tx.update(larger(100), state)
    flat = health(state, GRADS)
    assert (flat["limited_leaves"], flat["num_leaves"]) == (1, 3)
    assert flat["smallest_scale_factor"] == "stack/kernel"
    before, after = norms(larger(100)), norms(updates)
    for name, factor in scale_factors(state, GRADS).items():
        assert flat[f"scale_factor/{name}"] == factor
        assert factor == pytest.approx(after[name] / before[name], rel=1e-6)
    assert flat["scale_factor/min"] == flat["scale_factor/stack/kernel"] < 0.1


def test_slices_of_a_limited_leaf_count_once():
    stacked = {"dense": {"kernel": 0, "bias": 0}, "stack": {"kernel": 1}}
    tx = clip_by_history(warmup_steps=0, num_stacked_axes=stacked)
    _, state = tx.update(GRADS, tx.init(GRADS))
    _, state = tx.update(jax.tree.map(lambda x: 9 * x, GRADS), state)
    assert health(state)["limited_leaves"] == health(state)["num_leaves"] == 3
    assert (state.scale_factors < 1).sum() == 5


def test_health_of_skip_spikes_and_of_what_it_wraps():
    inner = optax.chain(stablegrad(), clip_by_history(warmup_steps=0))
    tx = skip_spikes(inner, warmup_steps=1)
    _, state = tx.update(GRADS, tx.init(GRADS))
    assert health(state)["skipped_steps"] == 0
    taken = scale_factors(state, GRADS)
    for count, by in enumerate([1e6, jnp.nan], start=1):
        _, state = tx.update(larger(by), state)
        flat = health(state, GRADS)
        assert flat["skipped_steps"] == flat["skipped_in_a_row"] == count
        assert flat["last_skipped"] == 1
        assert flat["last_deviation"] > 6
        assert flat["nonfinite_leaves"] == flat["limited_leaves"] == 0
        assert scale_factors(state, GRADS) == taken  # of the step that was taken
    assert flat["last_deviation"] == np.inf
    assert flat["scale_factor/dense/kernel"] == 0.25
    assert flat["reference_std"] == 1.0
    alone = skip_spikes(optax.adam(1e-3)).init(GRADS)
    assert health(alone) == {
        "skipped_steps": 0,
        "skipped_in_a_row": 0,
        "last_skipped": 0,
        "last_deviation": 0,
    }


def test_a_step_that_is_taken_ends_the_streak():
    tx = skip_spikes(stablegrad())
    _, state = tx.update(larger(jnp.nan), tx.init(GRADS))
    assert health(state)["last_skipped"] == 1
    _, state = tx.update(GRADS, state)
    flat = health(state)
    assert (flat["last_skipped"], flat["skipped_in_a_row"]) == (0, 0)
    assert flat["skipped_steps"] == 1


def test_health_of_an_nnx_optimizer():
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    tx = optax.chain(stablegrad(), optax.adamw(1e-3))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda m: jnp.sum(m(jnp.eye(2)) ** 2))(model))
    flat = health(optimizer.opt_state, nnx.state(model, nnx.Param))
    assert flat["scale_factor/kernel"] == flat["scale_factor/bias"] > 0


EVERY_METHOD = {
    "stablegrad": stablegrad,
    "gradient_stabilizer": gradient_stabilizer,
    "gradient_autoscaled_normalization": gradient_autoscaled_normalization,
    "normalize_by_leaf_norm": normalize_by_leaf_norm,
    "clip_by_history": clip_by_history,
    "skip_spikes": lambda: skip_spikes(optax.sgd(1.0)),
    "skip_spikes around stablegrad": lambda: skip_spikes(stablegrad()),
}


@pytest.mark.parametrize("num_steps", [1, 2, 3])
@pytest.mark.parametrize("name", EVERY_METHOD)
def test_states_of_several_steps_or_members_raise(name, num_steps):
    state = updated(EVERY_METHOD[name](), GRADS)
    several = jax.tree.map(lambda x: jnp.stack([x] * num_steps), state)
    for params in (None, GRADS):
        with pytest.raises(ValueError, match="reads the state of one step"):
            health(several, params)
    last = jax.tree.map(lambda x: x[-1], several)
    assert health(last, GRADS) == health(state, GRADS)


def test_health_wants_values_of_this_package():
    with pytest.raises(ValueError, match="outside jit"):
        jax.jit(health)(updated(stablegrad(), GRADS))
    with pytest.raises(ValueError, match="holds no state of this package's methods"):
        health(optax.adam(1e-3).init(GRADS))


def test_leaves_called_min_or_max_do_not_collide():
    grads = {"min": 4 * jnp.eye(2), "max": 8 * jnp.eye(2), "other": jnp.eye(2)}
    flat = health(updated(stablegrad(), grads), grads)
    # The standard deviation of c * eye(2) is c / 2.
    assert flat["scale_factor/['min']"] == pytest.approx(0.5)
    assert flat["scale_factor/['max']"] == pytest.approx(0.25)
    assert flat["scale_factor/min"] == pytest.approx(0.25)
    assert flat["scale_factor/max"] == pytest.approx(2)
    assert flat["smallest_scale_factor"] == "max"


def test_counts_are_added_and_levels_are_not():
    grads = {"a": {"kernel": jnp.eye(2)}, "b": {"kernel": jnp.eye(2)}}
    parts = {
        "x": optax.chain(skip_spikes(stablegrad(3.0)), optax.sgd(1.0)),
        "y": optax.chain(skip_spikes(stablegrad(2.0)), optax.sgd(0.1)),
    }
    tx = optax.partition(parts, {"a": "x", "b": "y"})
    bad = jax.tree.map(lambda g: g * jnp.nan, grads)
    values = health(updated(tx, grads))
    assert values["reference_std"] == 3
    _, state = tx.update(bad, tx.init(grads), grads)
    assert health(state)["skipped_steps"] == 2
    nested = skip_spikes(skip_spikes(optax.identity(), warmup_steps=0), warmup_steps=0)
    state = nested.init(grads)
    for size in 1.0, 1.05:
        _, state = nested.update(optax.tree.scale(size, grads), state)
    assert health(state)["last_deviation"] == pytest.approx(5, rel=1e-4)


def test_a_state_that_knows_no_leaf_counts_none_as_finite():
    grads = {"a": jnp.eye(2), "b": jnp.eye(2) * jnp.nan}
    tx = gradient_autoscaled_normalization()
    assert "nonfinite_leaves" not in health(updated(tx, grads))


def test_leaves_of_one_checksum_are_not_merged():
    # CRC-32 knows no difference between these two words.
    grads = {"plumless": jnp.eye(2), "buckeroo": 2 * jnp.eye(2)}
    with pytest.raises(ValueError, match=r"one checksum .* cannot be told"):
        scale_factors(updated(stablegrad(), grads), grads)

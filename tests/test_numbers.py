"""Extreme numbers and symmetries, for every method of this package."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import (
    SCALING_METHODS,
    assert_trees_close,
    assert_trees_equal,
    each_case,
    each_method,
    each_scaling_case,
    gradients,
    is_weight,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import stablegrad_optax

# Rounding depends on how XLA compiles.
pytestmark = pytest.mark.optimized


def assert_finite(tree):
    for path, leaf in jax.tree.leaves_with_path(tree):
        assert np.isfinite(np.asarray(leaf, np.float32)).all(), (path, leaf)


@pytest.mark.parametrize("without_floor", [False, True], ids=["default", "eps=0"])
@each_case
def test_zero_gradients_stay_zero(case, without_floor):
    """Zeros stay zero in every dtype, whether or not eps guards a division."""
    tx = case.make(**dict.fromkeys(case.numerical_floors * without_floor, 0.0))
    zeros = {
        dtype: optax.tree.zeros_like(gradients(dtype=dtype))
        for dtype in ("float16", "bfloat16", "float32")
    }
    step = jax.jit(functools.partial(tx.update, **case.extra_args))
    state = tx.init(zeros)
    for _ in range(2):
        updates, state = step(zeros, state)
        assert_trees_equal(updates, zeros)
        assert_finite(state)


@pytest.mark.parametrize("scale", [1e-4, 300.0])
@each_case
def test_float16_equals_float32_of_the_same_numbers(case, scale):
    """Squares in float16 overflow at a scale of 300 and underflow at 1e-4."""
    narrow = gradients(dtype=jnp.float16, scale=scale)
    wide = optax.tree.cast(narrow, jnp.float32)
    expected = optax.tree.cast(case.first_update(wide), jnp.float16)
    # One unit in the last place of float16, or its smallest subnormal.
    assert_trees_close(case.first_update(narrow), expected, rtol=1e-3, atol=6e-8)


@each_case
def test_constant_leaves(case):
    """The spread of a constant is rounding: it must not become a factor of 1e7."""
    grads = jax.tree.map(lambda g: jnp.full_like(g, 1e3), gradients())
    largest = max(np.abs(x).max() for x in jax.tree.leaves(case.first_update(grads)))
    assert largest <= 1.001e3


@each_method
def test_leaves_of_any_shape_and_kind(case):
    """One element, empty, rank 0, NumPy and Python floats."""
    grads = {
        "one": {"kernel": jnp.ones((1, 1)), "bias": jnp.ones(1)},
        "empty": {"kernel": jnp.ones((0, 3)), "bias": jnp.ones(0)},
        "empty_stack": {"kernel": jnp.ones((0, 2, 2))},
        "scalar": jnp.float32(2),
        "numpy": {"kernel": np.array([[1.0, 2.0], [3.0, 5.0]], np.float32)},
        "float": 3.0,
    }
    updates, state = case.update(grads, case.tx.init(grads))
    assert_finite(updates)
    assert_finite(state)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, grads)
    # And without jit, where they arrive as they are.
    grads = {name: grads[name] for name in ("scalar", "numpy", "float")}
    updates, _ = case.tx.update(grads, case.tx.init(grads), **case.extra_args)
    assert_trees_close(case.update(grads, case.tx.init(grads))[0], updates)


@each_case
def test_extreme_magnitudes_stay_finite(case):
    """Leaves from 1e-36 to 1e37 side by side, and both ends within one leaf."""
    base = np.random.default_rng(0).uniform(0.5, 1, (3, 2)) * [1, -1]
    scales = [1e-36, 1e-30, 1e-20, 1.0, 1e19, 1e30, 1e37]
    grads = {str(s): {"kernel": np.float32(base * s)} for s in scales}
    grads["both"] = {"kernel": np.array([[1e-36, 1e37], [-1e37, 1e-36]], np.float32)}
    tree = grads | {
        # There the leaf, or the factor that it would need, may be flushed to zero.
        "subnormal": {"kernel": np.float32(base * 1e-40)},
        "max": {"kernel": np.full((2, 2), np.finfo(np.float32).max)},
    }
    state = case.tx.init(tree)
    for _ in range(2):
        updates, state = case.update(tree, state)
        assert_finite(updates)
        assert_finite(state)
    del updates["subnormal"], updates["max"]
    for before, after in zip(
        jax.tree.leaves(grads), jax.tree.leaves(updates), strict=True
    ):
        is_scaled = case.degree == 0 and not case.has_moments
        if is_scaled and case.is_layerwise:  # neither turned nor lost
            moved = np.abs(after) > 0
            np.testing.assert_array_equal(np.sign(after)[moved], np.sign(before)[moved])
            assert moved.any() or np.abs(before).max() < 2.0**case.lowest_exponent


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@each_scaling_case
def test_a_leaf_that_is_not_finite_harms_only_its_layer(case, bad):
    if not case.is_layerwise:
        pytest.skip("one statistic over all layers")
    grads = gradients()
    broken = grads | {
        "hidden": grads["hidden"]
        | {"kernel": grads["hidden"]["kernel"].at[0, 0].set(bad)}
    }
    updates, state = case.update(broken, case.tx.init(broken))
    expected = case.first_update(grads)
    for name in ("norm", "stack"):
        # The careful path serves the whole tree: it agrees to rounding only.
        assert_trees_close(jax.device_get(updates[name]), expected[name])
    kernel = updates["hidden"]["kernel"]
    assert not np.isfinite(kernel[0, 0]) or not kernel.any()  # or zeroed, if asked to
    # And it recovers: a healthy step after it is as if nothing had been.
    updates, _ = case.update(grads, state)
    assert_finite(updates)


@each_case
def test_gradients_through_the_update_are_finite(case):
    """Meta-learning differentiates the update, of zero and extreme leaves too."""
    normal = np.random.default_rng(0).normal(size=(3, 2))
    grads = {
        "zero": {"kernel": np.zeros((2, 2), np.float32)},
        "constant": {"kernel": np.ones((2, 2), np.float32)},
        "tiny": {"kernel": np.float32(1e-30 * normal)},
        "huge": {"kernel": np.float32(1e30 * normal)},
        "normal": {"kernel": np.float32(normal), "bias": np.ones(2, np.float32)},
    }

    def through(grads, std):
        extra_args = case.extra_args and {"prediction_grad_std": std}
        updates, _ = case.tx.update(grads, case.tx.init(grads), **extra_args)
        return optax.tree.sum(jax.tree.map(jnp.sin, updates))

    derivatives = jax.jit(jax.grad(through, (0, 1)))(grads, jnp.float32(0.5))
    assert_finite(derivatives)


@each_method
def test_derivatives_equal_finite_differences(case):
    """Central differences of 1e-5 are right to 1e-8 in float64."""
    with jax.enable_x64(True):
        grads = gradients(dtype=jnp.float64)["hidden"]
        direction = gradients(1, dtype=jnp.float64)["hidden"]

        @jax.jit
        @jax.value_and_grad
        def along(t):
            moved = optax.tree.add_scale(grads, t, direction)
            updates, _ = case.tx.update(moved, case.tx.init(moved), **case.extra_args)
            return optax.tree.sum(jax.tree.map(jnp.sin, updates))

        differences = (along(1e-5)[0] - along(-1e-5)[0]) / 2e-5
        np.testing.assert_allclose(along(0.0)[1], differences, rtol=1e-6)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 1000),
    exponent=st.integers(-60, 60),
    mantissa=st.floats(1, 2, width=32),
)
@each_case
def test_scale_equivariance(case, seed, exponent, mantissa):
    """The update of c g equals c^degree update(g) for c from 1e-18 to 1e18."""
    if case.degree is None:
        pytest.skip("neither equivariant nor invariant")
    grads = gradients(seed)
    factor = np.float32(mantissa * 2.0 ** max(exponent, case.lowest_exponent))
    updates = case.first_update(grads)
    scaled = case.first_update(jax.tree.map(lambda g: g * factor, grads))
    for (path, one), other in zip(
        jax.tree.leaves_with_path(updates), jax.tree.leaves(scaled), strict=True
    ):
        if is_weight(path):
            # The fast and the careful path agree to 1e-6; c g is rounded as well.
            expected = one * factor**case.degree
            smallest = 1e-6 * np.abs(expected).max()
            np.testing.assert_allclose(other, expected, rtol=3e-6, atol=smallest)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), order=st.permutations(range(12)))
@each_case
def test_permutation_equivariance(case, seed, order):
    """Statistics do not know where in its leaf an entry stands."""
    grads = gradients(seed)
    order = np.array(order)

    def permuted(tree):
        kernel = np.asarray(tree["hidden"]["kernel"])
        shuffled = kernel.ravel()[order].reshape(kernel.shape)
        return tree | {"hidden": tree["hidden"] | {"kernel": shuffled}}

    assert_trees_close(
        case.first_update(permuted(grads)),
        permuted(case.first_update(grads)),
        rtol=2e-6,  # sums are rounded in another order
        atol=1e-7,
    )


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
@each_case
def test_sign_equivariance(case, seed):
    grads = gradients(seed)
    negative = case.first_update(optax.tree.scale(-1, grads))
    assert_trees_equal(optax.tree.scale(-1, negative), case.first_update(grads))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), exponent=st.integers(-30, 30))
@each_case
def test_idempotence(case, seed, exponent):
    if not case.is_idempotent:
        pytest.skip("not idempotent")
    scale = 2.0 ** max(exponent, case.lowest_exponent)
    once = case.first_update(gradients(seed, scale=scale))
    twice = case.first_update(once)
    for one, other in zip(jax.tree.leaves(once), jax.tree.leaves(twice), strict=True):
        smallest = 1e-6 * np.abs(one).max()
        np.testing.assert_allclose(other, one, rtol=2e-6, atol=smallest)


@each_method
def test_vmap_over_a_population_equals_a_loop(case):
    members = [gradients(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    update = functools.partial(case.tx.update, **case.extra_args)

    @jax.jit
    @jax.vmap
    def two_steps(grads):
        updates, state = update(grads, case.tx.init(grads))
        return update(updates, state)[0]

    together = two_steps(stacked)
    for i, grads in enumerate(members):
        updates, state = case.update(grads, case.tx.init(grads))
        updates, _ = case.update(updates, state)
        member = jax.tree.map(lambda leaf, i=i: leaf[i], together)
        assert_trees_close(member, updates, rtol=1e-5, atol=1e-7)


def test_several_methods_in_one_chain_keep_states_of_their_own():
    """Each has its own state, and the factors multiply."""
    tx = optax.named_chain(*((case.name, case.tx) for case in SCALING_METHODS))
    grads = gradients()
    updates, state = jax.jit(tx.update)(grads, tx.init(grads))
    expected = grads
    product = {}
    for case in SCALING_METHODS:
        expected, own = case.update(expected, case.tx.init(grads))
        assert type(own) is type(state[case.name])
        assert_trees_close(state[case.name], own, rtol=1e-5)
        factors = stablegrad_optax.scale_factors(own, grads)
        assert factors == pytest.approx(
            stablegrad_optax.scale_factors(state[case.name], grads), rel=1e-5
        )
        for name, factor in factors.items():
            product[name] = product.get(name, 1.0) * factor
    assert_trees_close(updates, expected, rtol=1e-5, atol=1e-6)
    assert stablegrad_optax.scale_factors(state, grads) == pytest.approx(
        product, rel=1e-5
    )


@pytest.mark.parametrize("scale", [1e-30, 1e30, 1e37])
@each_case
def test_an_eager_update_of_finite_gradients_makes_no_nan(case, scale):
    """Nor do sums that overflow on the way: a user may run with jax_debug_nans."""
    grads = jax.tree.map(lambda g: g * np.float32(scale / 4), gradients())
    with jax.debug_nans(True):
        state = case.tx.init(grads)
        for _ in range(2):
            updates, state = case.tx.update(grads, state, **case.extra_args)
    assert_finite(updates)


@pytest.mark.parametrize(
    ("dtype", "beyond"),
    [
        ("float8_e4m3fn", 448),
        ("float8_e4m3b11fnuz", 30),
        ("float8_e5m2fnuz", 57344),
        ("float8_e5m2", np.inf),
    ],
)
def test_float8_saturates_where_it_has_no_infinity(dtype, beyond):
    """A cast of 1e6 would be NaN there; NaN stays NaN."""
    kernel = jnp.array([[1, -1], [0.25, -0.25]], dtype)
    grads = {"a": kernel, "b": kernel.at[0, 0].set(jnp.nan)}
    tx = stablegrad_optax.stablegrad(1e6)
    updates, _ = jax.jit(tx.update)(grads, tx.init(grads))
    assert updates["a"].dtype == dtype
    largest = np.asarray(updates["a"], np.float32)
    np.testing.assert_array_equal(largest, [[beyond, -beyond]] * 2)
    assert np.isnan(np.asarray(updates["b"], np.float32)[0, 0])


def other_trees():
    grads = gradients()
    return {
        "a leaf more": grads | {"new": {"kernel": jnp.ones((2, 2))}},
        "a layer less": {"hidden": grads["hidden"], "norm": grads["norm"]},
    }


@pytest.mark.parametrize("other", other_trees())
@each_method
def test_gradients_of_another_tree_raise(case, other):
    state = case.tx.init(gradients())
    with pytest.raises(ValueError, match="call init on a tree of the same structure"):
        case.tx.update(other_trees()[other], state, **case.extra_args)

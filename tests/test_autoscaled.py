"""Gradient Autoscaled Normalization against a literal reference, and its edges."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stablegrad_optax import scale_factors
from stablegrad_optax._autoscaled import gradient_autoscaled_normalization


class Reference:
    """Computes the rule line by line in float64."""

    def __init__(self, autoscale="tanh", exponent=None):
        self.f = {"tanh": np.tanh, "none": lambda std: 1.0}.get(autoscale, autoscale)
        self.exponent = exponent

    def __call__(self, grads):
        grads = {name: np.asarray(g, np.float64) for name, g in grads.items()}
        centred = {n: g - g.mean() for n, g in grads.items() if g.ndim >= 2}
        entries = np.concatenate([g.ravel() for g in centred.values()])
        std = np.sqrt(np.mean(entries**2))
        if self.exponent is None:
            log = np.log(self.f(std))
            self.exponent = min(1.0, 1 / abs(log)) if log else 1.0
        alpha = self.f(std) ** self.exponent
        return grads | {name: alpha * g for name, g in centred.items()}


@functools.cache
def updater(*args, **kwargs):
    return jax.jit(gradient_autoscaled_normalization(*args, **kwargs).update)


def fresh(tree):
    return gradient_autoscaled_normalization().init(tree)


def alphas(stds, *args, **kwargs):
    """Returns the factor of each step, for gradients with these deviations."""
    signs = jnp.array([[1.0, -1.0], [-1.0, 1.0]])
    state, out = fresh(signs), []
    for std in stds:
        _, state = updater(*args, **kwargs)(signs * std, state)
        out.append(float(state.scale_factors[0]))
    return np.array(out)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"autoscale": "none"},
        {"autoscale": lambda std: std / (1 + std)},
        {"exponent": 0.5},
        {"exponent": 0},
    ],
    ids=["tanh", "none", "callable", "exponent", "exponent 0"],
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_equals_a_literal_reference(kwargs, dtype):
    rng = np.random.default_rng(0)
    shapes = {"a": (4, 5), "b": (3,), "c": (2, 3, 4)}
    with jax.enable_x64(dtype == "float64"):
        tx, reference = gradient_autoscaled_normalization(**kwargs), Reference(**kwargs)
        update = jax.jit(tx.update)
        state = tx.init({name: jnp.zeros(s, dtype) for name, s in shapes.items()})
        for _ in range(100):
            scale = 10 ** rng.normal(-1)
            grads = {
                name: np.asarray((rng.normal(size=shape) + 0.3) * scale, dtype)
                for name, shape in shapes.items()
            }
            updates, state = update(grads, state)
            expected = reference(grads)
            for name in shapes:
                atol = 1e-6 * np.max(np.abs(expected[name]))
                np.testing.assert_allclose(
                    updates[name], expected[name], rtol=1e-6, atol=atol
                )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "complex64"])
def test_means_are_removed_and_other_leaves_untouched(dtype):
    rng = np.random.default_rng(0)
    grads = {
        "kernel": jnp.asarray(rng.normal(size=(32, 32)) + 2, dtype),
        "conv": jnp.asarray(rng.normal(size=(3, 3, 8, 8)) - 1, dtype),
        "bias": jnp.asarray(rng.normal(size=8) + 2, dtype),
        "scalar": jnp.asarray(3.0, dtype),
        "one": jnp.ones((1, 1), dtype),
    }
    if dtype == "complex64":
        grads = {name: g * (1 + 2j) for name, g in grads.items()}
    updates, state = updater()(grads, fresh(grads))
    for name in ("bias", "scalar", "one"):
        np.testing.assert_array_equal(updates[name], grads[name])
    for name in ("kernel", "conv"):
        assert updates[name].dtype == dtype
        g, update = np.asarray(grads[name]), np.asarray(updates[name])
        g, update = g.astype(complex), update.astype(complex)
        # The mean, summed in float32 in blocks, to a few units of its last place.
        resolution = float(jnp.finfo(dtype).eps)
        rounding = 16 * abs(g.mean()) * 2**-24
        assert abs(update.mean()) < max(resolution, rounding)
        alpha = scale_factors(state, grads)[name]
        exact = alpha * (g - g.mean())  # rounded once, at the end
        np.testing.assert_allclose(update, exact, rtol=resolution, atol=rounding)
    assert list(scale_factors(state, grads)) == ["conv", "kernel"]


@pytest.mark.parametrize(("mean", "rtol"), [(2.0, 1e-5), (10.0, 1e-3)])
def test_a_mean_that_dominates_is_removed_to_the_entries_resolution(mean, rtol):
    rng = np.random.default_rng(0)
    grads = jnp.asarray(rng.normal(size=(512, 512)) + mean, jnp.float32)
    updates, state = updater()(grads, fresh(grads))
    exact = np.asarray(grads, np.float64)
    assert state.grad_std == pytest.approx(exact.std(), rel=rtol)
    assert abs(np.asarray(updates, np.float64).mean()) < 1e-6 * mean  # 16 ulp


def test_alpha_is_in_0_to_1_and_monotone():
    stds = np.geomspace(1e-6, 100, 40)
    for first in (1e-30, 1e-3, 1.0, 50.0):
        alpha = alphas([first, *stds])
        assert np.all(alpha > 0)
        assert np.all(alpha <= 1)
        assert np.all(np.diff(alpha[1:]) >= 0)


@pytest.mark.parametrize("std", [1e-36, 1e-20, 1e-3, 0.3, 0.385, 0.5, 3.0, 1e20, 1e37])
def test_the_first_alpha_is_max_of_f_and_1_over_e(std):
    expected = max(np.tanh(std), 1 / np.e)
    assert alphas([std])[0] == pytest.approx(expected, rel=1e-5)


def test_the_first_step_fixes_the_exponent():
    expected = 1 / abs(np.log(np.tanh(1e-4)))
    alpha = alphas([1e-4, 1e-2, 1e-8])
    np.testing.assert_allclose(
        alpha, np.tanh([1e-4, 1e-2, 1e-8]) ** expected, rtol=1e-5
    )


@pytest.mark.parametrize("value", [0.0, 3.0, np.nan, np.inf])
def test_a_step_without_a_scale_does_not_fix_the_exponent(value):
    """Zeros, constants, and gradients that are not finite."""
    grads = {"a": jnp.full((2, 2), value)}
    updates, state = updater()(grads, fresh(grads))
    assert state.exponent == 0
    assert state.scale_factors[0] == 1
    assert np.all(np.isfinite(updates["a"])) == np.isfinite(value)
    assert not np.isfinite(value) or np.all(updates["a"] == 0)
    _, state = updater()({"a": jnp.array([[1e-4, -1e-4]] * 2)}, state)
    assert state.scale_factors[0] == pytest.approx(1 / np.e, rel=1e-5)


def test_a_leaf_that_is_not_finite_harms_itself_alone():
    rng = np.random.default_rng(0)
    a, b = jnp.array(rng.normal(size=(2, 3, 4)) * 1e-2, jnp.float32)
    updates, state = updater()({"a": a, "b": b.at[0, 0].set(np.inf)}, fresh([a, b]))
    assert state.exponent == 0
    assert state.grad_std == pytest.approx(np.std(np.asarray(a)), rel=1e-5)
    assert not np.all(np.isfinite(updates["b"]))
    alone, _ = updater()({"a": a}, fresh([a]))
    np.testing.assert_allclose(updates["a"], alone["a"], rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-36, 1e-19, 1e19, 1e36])
def test_range(scale):
    rng = np.random.default_rng(0)
    small, other = jnp.array(rng.choice([1.0, 2.0, -1.0], (2, 8, 8)) * scale)
    grads = [small, other * 1e-3 if scale > 1 else other * 1e3]
    updates, state = updater()(grads, fresh(grads))
    exact = [np.asarray(g, np.float64) for g in grads]
    exact = [g - g.mean() for g in exact]
    std = np.sqrt(np.mean(np.square(exact)))
    assert state.grad_std == pytest.approx(std, rel=1e-5)
    alpha = max(np.tanh(std), 1 / np.e)
    for update, g in zip(updates, exact, strict=True):
        np.testing.assert_allclose(update, alpha * g, rtol=1e-4, atol=1e-6 * scale)


def test_the_layout_does_not_matter():
    """Flax's HWIO and IO give the same updates as PyTorch's OIHW and OI."""
    rng = np.random.default_rng(0)
    flax = {
        "conv": jnp.array(rng.normal(size=(3, 3, 4, 5)) + 1, jnp.float32),
        "dense": jnp.array(rng.normal(size=(6, 7)), jnp.float32),
    }
    torch = {"conv": flax["conv"].transpose(3, 2, 0, 1), "dense": flax["dense"].T}
    updates, state = updater()(flax, fresh(flax))
    others, other_state = updater()(torch, fresh(torch))
    np.testing.assert_allclose(state.grad_std, other_state.grad_std, rtol=1e-6)
    np.testing.assert_allclose(
        updates["conv"].transpose(3, 2, 0, 1), others["conv"], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        updates["dense"].T, others["dense"], rtol=1e-5, atol=1e-6
    )
    centralized, _ = optax.centralize().update(flax, optax.EmptyState())
    assert np.max(np.abs(np.mean(centralized["dense"], 0))) > 0.01


def test_autoscale_none_is_mean_removal_alone():
    grads = jnp.array([[1.0, 2.0], [3.0, 10.0]])
    updates, state = updater("none")(grads, fresh(grads))
    np.testing.assert_array_equal(updates, grads - 4)
    assert state.grad_std == pytest.approx(np.std(np.asarray(grads)), rel=1e-6)


def test_a_callable_may_underflow():
    """An underflow to 0 does not fix the exponent, and gives 0 after it is fixed."""
    np.testing.assert_allclose(
        alphas([1e-30, 1e-2, 1e-30], lambda std: std * std), [0, 1 / np.e, 0], rtol=1e-5
    )


def test_integer_leaves_masks_and_trees():
    params = {"a": jnp.ones((3, 3)), "n": jnp.arange(4).reshape(2, 2), "none": None}
    tx = gradient_autoscaled_normalization()
    with pytest.raises(ValueError, match="leaf 'n' is int32"):
        tx.update(params, tx.init(params))
    grads = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([1.0, 3.0])}
    grads["c"] = jnp.array([[1.0, 3.0]])
    mask = {"a": False, "b": True, "c": True}
    tx = gradient_autoscaled_normalization("none", mask=mask)
    updates, state = tx.update(grads, tx.init(grads))
    np.testing.assert_array_equal(updates["a"], grads["a"])
    np.testing.assert_array_equal(updates["b"], grads["b"])  # not a weight
    np.testing.assert_array_equal(updates["c"], [[-1, 1]])
    assert scale_factors(state, grads) == {"c": 1.0}
    with pytest.raises(ValueError, match="2 slices to scale"):
        gradient_autoscaled_normalization().update([jnp.ones((2, 2))] * 2, state)


@pytest.mark.parametrize(
    "tree", [[], (), {}, {"a": None}, None, {"a": jnp.ones(3)}, [jnp.ones((2, 0))]]
)
def test_trees_without_anything_to_scale(tree):
    for mask in (None, True):
        tx = gradient_autoscaled_normalization(mask=mask)
        state = tx.init(tree)
        updates, new_state = jax.jit(tx.update)(tree, state)
        assert jax.tree.structure(updates) == jax.tree.structure(tree)
        assert jax.tree.map(jnp.shape, new_state) == jax.tree.map(jnp.shape, state)


def test_inject_hyperparams_equals_plain():
    plain = gradient_autoscaled_normalization("tanh", exponent=0.5)
    injected = optax.inject_hyperparams(
        gradient_autoscaled_normalization, static_args="autoscale"
    )("tanh", exponent=0.5)
    grads = jnp.array([[0.1, 0.2], [0.4, 0.3]])
    updates, _ = plain.update(grads, plain.init(grads))
    others, state = jax.jit(injected.update)(grads, injected.init(grads))
    assert set(state.hyperparams) == {"exponent"}
    np.testing.assert_allclose(updates, others, rtol=1e-6)


def test_vmap_equals_a_loop():
    tx = gradient_autoscaled_normalization()
    rng = np.random.default_rng(0)
    population = (
        rng.normal(size=(4, 3, 3)) * np.array([1e-20, 1, 0, np.nan])[:, None, None]
    )
    population = jnp.asarray(population, jnp.float32)
    state = jax.vmap(tx.init)(population)
    update_all = jax.jit(jax.vmap(lambda grads, state: tx.update(grads, state)))
    updates, state = update_all(population, state)
    for i in range(4):
        expected, own = updater()(population[i], tx.init(population[i]))
        np.testing.assert_allclose(updates[i], expected, rtol=1e-5)
        np.testing.assert_allclose(state.exponent[i], own.exponent, rtol=1e-5)


def test_derivatives_stay_finite():
    tx = gradient_autoscaled_normalization()
    grads = jnp.array([[1.0, 2.0], [-2.0, 3.0]])
    start = tx.init(grads)
    derivative = jax.jit(jax.grad(lambda g, state: tx.update(g, state)[0][0, 0]))
    for state in (start, updater()(grads, start)[1]):
        for scale in (0.0, 1e-36, 1e-20, 1.0, 1e20, 1e36):
            assert np.all(np.isfinite(derivative(grads * scale, state))), scale
        assert np.all(np.isfinite(derivative(jnp.ones((2, 2)), state)))


def test_derivative_equals_a_finite_difference():
    tx = gradient_autoscaled_normalization()
    with jax.enable_x64(True):
        x = np.array([[0.1, 0.2], [-0.4, 0.3]])
        step = 1e-6 * np.array([[3.0, -1.0], [2.0, 1.0]])
        first = tx.init(x)
        second = first._replace(exponent=jnp.float64(0.3))
        function = jax.value_and_grad(lambda x, state: tx.update(x, state)[0][0, 1])
        function = jax.jit(function)
        for state in (first, second):
            change = function(x + step, state)[0] - function(x - step, state)[0]
            expected = 2 * np.vdot(function(x, state)[1], step)
            assert float(change) == pytest.approx(expected, rel=1e-5)


def test_no_operation_makes_a_nan_of_zeros():
    tx = gradient_autoscaled_normalization()
    with jax.debug_nans(True):
        for grads in (jnp.zeros((2, 2)), jnp.ones((2, 2)), jnp.eye(2)):
            tx.update(grads, tx.init(grads))


def test_strict_promotion_and_rank():
    tx = gradient_autoscaled_normalization()
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        grads = {
            "a": jnp.eye(2, dtype=jnp.bfloat16),
            "b": jnp.eye(3, dtype=jnp.complex64),
            "c": jnp.ones(3, jnp.float16),
        }
        jax.jit(tx.update)(grads, tx.init(grads))


def test_works_with_map_params_and_extra_arguments():
    params = {"a": jnp.eye(3), "b": jnp.ones(2)}
    tx = optax.chain(gradient_autoscaled_normalization(), optax.adam(0.1))
    state = optax.tree.map_params(tx, lambda leaf: leaf + 1, tx.init(params))
    np.testing.assert_array_equal(state[0].scale_factors, [1])
    tx = gradient_autoscaled_normalization()
    tx.update(params, tx.init(params), params, value=1.0)


@pytest.mark.recent_xla
def test_nothing_of_gradient_size_is_written_beside_the_result():
    grads = jnp.ones((512, 512))
    tx = optax.chain(gradient_autoscaled_normalization(), optax.sgd(0.1))

    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(1, 2))
    compiled = step.lower(grads, tx.init(grads), grads).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < grads.nbytes / 100


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"autoscale": "relu"}, "autoscale must be one of .*'tanh', 'none'.*'relu'"),
        ({"autoscale": 2.0}, "autoscale must be one of"),
        ({"exponent": -1.0}, r"exponent must be .* at least 0; got -1\.0"),
        ({"exponent": True}, "exponent must be"),
    ],
)
def test_bad_arguments_raise(kwargs, match):
    with pytest.raises(ValueError, match=match):
        gradient_autoscaled_normalization(**kwargs)


def test_a_transform_that_returns_no_scalar_raises():
    tx = gradient_autoscaled_normalization(lambda std: jnp.ones(2))
    grads = jnp.eye(2)
    with pytest.raises(ValueError, match=r"autoscale\(sigma\) must be a real scalar"):
        tx.update(grads, tx.init(grads))

"""GradientStabilizer against a literal reference, its bounds, and its edges."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stablegrad_optax import scale_factors
from stablegrad_optax._stabilizer import gradient_stabilizer

SPIKES = (10, 100, 1000, 1e6)


class Reference:
    """Computes the rule of the paper and of the released code in float64."""

    def __init__(
        self,
        gamma1=0.6,
        gamma2=0.999,
        *,
        eps=1e-12,
        bias_correction=True,
        max_norm_ratio=None,
    ):
        self.gamma1, self.gamma2, self.eps = gamma1, gamma2, eps
        self.bias_correction = bias_correction
        self.max_norm_ratio = max_norm_ratio
        self.statistics = {}

    def __call__(self, grads):
        grads = {name: np.asarray(g, np.float64) for name, g in grads.items()}
        return {
            name: g * self.factor(name, np.sqrt(np.sum(g**2)))
            for name, g in grads.items()
        }

    def factor(self, key, norm):
        m, v, s = self.statistics.get(key, (0.0, 0.0, 0))
        if not np.isfinite(norm) or norm == 0:
            return 1.0
        seen = norm
        if self.max_norm_ratio is not None and s > 0:
            seen = min(seen, self.max_norm_ratio * m / (1 - self.gamma1**s))
        m = self.gamma1 * m + (1 - self.gamma1) * seen
        v = self.gamma2 * v + (1 - self.gamma2) * seen**2
        s += 1
        self.statistics[key] = m, v, s
        rho = m / (np.sqrt(v) + self.eps)
        if self.bias_correction:
            m_hat, v_hat = m / (1 - self.gamma1**s), v / (1 - self.gamma2**s)
            rho = m_hat / (np.sqrt(v_hat) + self.eps)
        return rho / max(norm, self.eps)


@functools.cache
def runner(**kwargs):
    tx = gradient_stabilizer(**kwargs)

    def step(state, norm):
        updates, state = tx.update(norm[None], state)
        return state, updates[0]

    return jax.jit(lambda norms: jax.lax.scan(step, tx.init(norms[:1]), norms)[1])


def run(norms, **kwargs):
    """Returns the norm rho of each update for a sequence of one-element gradients."""
    padding = np.zeros(-len(norms) % 1000)  # compiles for few lengths
    norms = jnp.asarray(np.r_[norms, padding], jnp.float32)
    return np.asarray(runner(**kwargs)(norms))[: len(norms) - len(padding)]


@functools.cache
def updater(**kwargs):
    return jax.jit(gradient_stabilizer(**kwargs).update)


def worst_case_norms(num_steps):
    """Returns norms that grow by gamma2 / gamma1, with equality in Cauchy-Schwarz."""
    exponents = np.arange(num_steps)[::-1] * np.log10(0.6 / 0.999)
    return 10.0 ** np.maximum(37 + exponents, -37)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"bias_correction": False},
        {"max_norm_ratio": 2.0},
        {"gamma1": 0.0, "gamma2": 0.9},
        {"gamma1": 0.9, "gamma2": 0.0},
        {"eps": 1.0},
        {"dtype": "float64"},
    ],
    ids=str,
)
def test_equals_a_literal_reference(kwargs):
    kwargs = dict(kwargs)
    dtype = kwargs.pop("dtype", "float32")
    rng = np.random.default_rng(0)
    shapes = {"a": (4, 5), "b": (3,), "c": ()}
    with jax.enable_x64(dtype == "float64"):
        tx, reference = gradient_stabilizer(**kwargs), Reference(**kwargs)
        update = jax.jit(tx.update)
        state = tx.init({name: jnp.zeros(s, dtype) for name, s in shapes.items()})
        for step in range(100):
            grads = {
                name: np.asarray(rng.normal(size=shape) * 10 ** rng.normal(), dtype)
                for name, shape in shapes.items()
            }
            if step % 7 == 3:
                grads["a"] = np.zeros_like(grads["a"])
            if step % 11 == 5:
                grads["b"] = grads["b"] * np.nan
            updates, state = update(grads, state)
            expected = reference(grads)
            for name in shapes:
                np.testing.assert_allclose(updates[name], expected[name], rtol=1e-6)


@pytest.mark.parametrize(
    ("bias_correction", "expected"),
    [
        (True, "1.0 1.025233 0 1.05961 nan 0.886564 0.972967 0.619816 0.395161"),
        (
            False,
            "12.649112 14.675611 0 15.174644 nan 12.210254 12.702562 7.638002 4.597754",
        ),
    ],
)
def test_golden_values(bias_correction, expected):
    norms = [3, 4, 0, 5, np.nan, 2, 1000, 1, 1]
    rho = run(norms, bias_correction=bias_correction)
    np.testing.assert_allclose(rho, np.array(expected.split(), float), rtol=2e-6)


def test_direction_is_kept_and_the_norm_is_rho():
    tx = gradient_stabilizer()
    rng = np.random.default_rng(0)
    grads = {"a": jnp.array(rng.normal(size=(6, 7)), jnp.float32), "b": jnp.ones(3)}
    _, state = updater()(grads, tx.init(grads))
    updates, state = updater()(jax.tree.map(lambda g: -3 * g, grads), state)
    rho = (0.6 * 0.4 + 0.4 * 3) / (1 - 0.6**2) / np.sqrt((0.999 + 9) / 1.999)
    for name, g in grads.items():
        g = np.asarray(g)
        expected = -rho * g / np.linalg.norm(g)
        np.testing.assert_allclose(updates[name], expected, rtol=1e-5)
    factors = scale_factors(state, grads)
    assert list(factors) == ["a", "b"]
    assert factors["b"] == pytest.approx(rho / np.sqrt(27), rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "complex64"])
def test_scale_invariant_over_the_range_of_the_dtype(dtype):
    """Leaf norms from 1e-36 to 1e37, and those that float16 can hold."""
    tx = gradient_stabilizer(eps=0.0)
    shape = (8,)
    update = jax.jit(tx.update)

    def history(scale):
        rng, outputs = np.random.default_rng(0), []
        state = tx.init([jnp.zeros(shape, dtype)] * 2)
        for _ in range(3):
            g = rng.choice([1.0, 2.0, 4.0, -2.0], (2, *shape)) * scale / 8
            updates, state = update([jnp.asarray(row, dtype) for row in g], state)
            outputs.append(np.asarray(updates, complex))
        return np.array(outputs)

    exponents = [-20, -10, 10] if dtype == "float16" else [-117, -60, 60, 122]
    expected = history(1.0)
    assert np.all(np.isfinite(expected))
    assert np.all(np.linalg.norm(expected, axis=-1) > 0.1)
    for exponent in exponents:
        np.testing.assert_allclose(history(2.0**exponent), expected, rtol=1e-5)


@pytest.mark.parametrize("norm", [1e-36, 1e-3, 1.0, 7.0, 1e19, 1e37])
def test_constant_norms_come_out_as_1(norm):
    rho = run(np.full(300, norm), eps=0.0)
    np.testing.assert_allclose(rho, 1, rtol=1e-6)


def test_eps_is_the_only_limit_of_small_norms():
    assert run([1e-16])[0] == pytest.approx(1e-8, rel=1e-3)
    assert run([1e-16], eps=1e-30)[0] == pytest.approx(1)


def heavy_tailed_norms(seed):
    return 10 ** np.random.default_rng(seed).standard_t(2, 2000).clip(-36, 36)


def test_published_bounds_hold():
    for seed in range(3):
        norms = heavy_tailed_norms(seed)
        rho = run(norms, bias_correction=False)
        assert rho.max() <= 15.82
        mean = 0.0
        for norm, ratio in zip(norms, rho, strict=True):
            if mean > 0 and norm >= mean:
                kappa = norm / mean
                bound = (1 - 0.6) / np.sqrt(1 - 0.999) + 0.6 / kappa / np.sqrt(
                    1 - 0.999
                )
                assert ratio <= bound * (1 + 1e-5)
            mean = 0.6 * mean + 0.4 * norm


def test_the_bound_at_every_step_is_attained():
    bound = 0.4 / np.sqrt(0.001) / np.sqrt(1 - 0.6**2 / 0.999)
    rho = run(worst_case_norms(1000), bias_correction=False)[-1]
    assert bound * (1 - 1e-3) < rho < bound * (1 + 1e-5)


def test_the_bound_on_a_spike_is_attained():
    """A spike attains the bound after so many small norms that v forgot all others."""
    norms = [1e30] * 10 + [1.0] * 1400 + [1e10]
    bound = 0.4 / np.sqrt(0.1)
    rho = run(norms, gamma2=0.9, bias_correction=False)[-1]
    assert rho == pytest.approx(bound, rel=1e-3)


@pytest.mark.parametrize(
    ("num_steps", "expected"), [(1, 1.0), (10, 1.588), (100, 4.88), (1000, 12.58)]
)
def test_the_bias_corrected_bound_is_tight(num_steps, expected):
    j = np.arange(num_steps)
    a = 0.4 * 0.6**j / (1 - 0.6**num_steps)
    b = 0.001 * 0.999**j / (1 - 0.999**num_steps)
    bound = np.sqrt(np.sum(a**2 / b))
    assert bound == pytest.approx(expected, rel=1e-3)
    rho = run(worst_case_norms(num_steps))[-1]
    assert bound * (1 - 1e-3) < rho < bound * (1 + 1e-5)
    others = run(heavy_tailed_norms(5)[:num_steps])
    assert others[-1] <= bound * (1 + 1e-5)


STATISTICS = ("norm_mean", "norm_rms", "num_accepted")


def warm_state(**kwargs):
    """Returns the state after three steps with the leaves ones(4) and ones(2, 2)."""
    grads = {"a": jnp.ones(4), "b": jnp.ones((2, 2))}
    state = gradient_stabilizer(**kwargs).init(grads)
    for _ in range(3):
        _, state = updater(**kwargs)(grads, state)
    return grads, state


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, -np.inf])
def test_a_leaf_without_a_norm_stands_still(value):
    grads, state = warm_state()
    grads["a"] = grads["a"].at[1].set(value) if value else jnp.zeros(4)
    updates, new_state = updater()(grads, state)
    np.testing.assert_array_equal(updates["a"], grads["a"])
    np.testing.assert_allclose(updates["b"], 0.5, rtol=1e-6)
    for field in STATISTICS:
        old, new = getattr(state, field), getattr(new_state, field)
        assert new[0] == old[0]
        assert field != "num_accepted" or new[1] == old[1] + 1
    assert scale_factors(new_state, grads) == {"a": 1.0, "b": pytest.approx(0.5)}


def test_a_giant_spike_neither_kills_the_leaf_nor_passes_raw():
    """The released code squares the norm: v is infinite then, and for ever."""
    rho = run(np.r_[np.ones(50), 1e25, np.ones(200)])
    assert 1 < rho[50] < 15.82
    assert np.all(rho > 0)
    limited = {"max_norm_ratio": 3.0}
    rho = run(np.r_[np.ones(50), 1e25, np.ones(200)], **limited)
    np.testing.assert_allclose(rho[[49, -1]], 1, atol=0.05)
    # It is forgotten: as large a norm for good becomes the new scale.
    rho = run(np.r_[np.ones(50), np.full(14_950, 1e25)], **limited)
    assert rho[-1] == pytest.approx(1, rel=1e-3)


def test_a_norm_beyond_the_range_does_not_pass_raw():
    giant, ones = [jnp.full(400, 3e38), jnp.full(400, -3e38)], [jnp.ones(400)] * 2
    state = gradient_stabilizer().init(ones)
    for grads in (giant, ones, giant, ones):
        updates, state = updater()(grads, state)
        assert all(np.all(np.abs(u) < 16) for u in updates)
        assert all(np.all(np.isfinite(field)) for field in state)
    assert np.all(state.num_accepted == 4)


def test_float16_factors_beyond_its_range():
    """A norm of 2e-6 asks for a factor of 5e5; float16 ends at 65504."""
    grads = jnp.full(4, 1e-6, jnp.float16)
    tx = gradient_stabilizer()
    updates, state = tx.update(grads, tx.init(grads))
    assert updates.dtype == jnp.float16
    assert state.scale_factors[0] > 65504
    np.testing.assert_allclose(updates, 0.5, rtol=1e-3)
    grads = jnp.full(400, 6e4, jnp.float16)
    updates, _ = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(updates, 0.05, rtol=1e-3)


def test_without_memory_it_is_the_unit_norm_of_each_leaf():
    """The norm is 1 at every step, for small and large gradients."""
    tx = gradient_stabilizer(0.0, 0.0, eps=0.0)
    rng = np.random.default_rng(0)
    grads = {"w": rng.normal(size=(5, 7)), "b": 1e5 * rng.normal(size=7)}
    state = tx.init(jax.tree.map(jnp.asarray, grads))
    for size in (1e-30, 1.0, 1e25):
        given = jax.tree.map(lambda g, size=size: jnp.float32(size * g), grads)
        updates, state = tx.update(given, state)
        for name, g in grads.items():
            expected = g / np.linalg.norm(g)
            # of the largest entry: some roundings of float32
            np.testing.assert_allclose(updates[name], expected, rtol=0, atol=1e-6)


def test_gamma2_of_0_forgets_at_once():
    rho = run([1.0, 1e25, 1.0, 1e-5], gamma1=0.0, gamma2=0.0)
    np.testing.assert_allclose(rho, 1, rtol=1e-5)


def recovery(num_steps=23_000, **kwargs):
    """Returns rho from a spike on after many norms of 1, with a leaf per spike."""
    tx = gradient_stabilizer(**kwargs)
    ones = jnp.ones(len(SPIKES))
    state = tx.init(list(ones))._replace(
        norm_mean=ones, norm_rms=ones, num_accepted=jnp.full(len(SPIKES), 10**6)
    )

    def step(state, grads):
        updates, state = tx.update(list(grads), state)
        return state, jnp.stack(updates)

    grads = jnp.ones((num_steps, len(SPIKES))).at[0].set(jnp.array(SPIKES))
    return np.asarray(jax.lax.scan(step, state, grads)[1])


FIRST_VERSION = {"gamma1": 0.7, "gamma2": 0.9, "eps": 1e-8}
ARMS = {
    "default": {},
    "`max_norm_ratio=2`": {"max_norm_ratio": 2.0},
    "first version": FIRST_VERSION,
    "first version, `max_norm_ratio=2`": FIRST_VERSION | {"max_norm_ratio": 2.0},
}


def table():
    """Returns how deep rho falls after a spike of X, and when it stays recovered."""
    rows = []
    for name, kwargs in ARMS.items():
        for spike, rho in zip(SPIKES, recovery(**kwargs).T, strict=True):
            steps = (np.flatnonzero(np.r_[0, rho] < x)[-1] for x in (0.5, 0.9))
            cells = [name, f"{spike:g}", f"{rho[0]:.3g}", f"{rho.min():.3g}"]
            cells += [f"{float(f'{n:.3g}'):g}" for n in steps]
            rows.append(f"| {' | '.join(cells)} |")
    return [
        "| arguments | X | rho at X | lowest rho | steps to 0.5 | steps to 0.9 |",
        "|---|---|---|---|---|---|",
        *rows,
    ]


def test_the_docs_show_the_recovery_after_a_spike():
    """Printed by `python tests/test_stabilizer.py`."""
    tables = Path(__file__).parents[1] / "docs" / "methods" / "tables"
    lines = (tables / "gradient_stabilizer_memory.md").read_text().splitlines()
    rows = table()
    assert lines[lines.index(rows[0]) :] == rows


def test_the_first_version_is_bounded_by_1_41():
    """The general bound at its gammas, attained by the worst growth of norms."""
    bound = 0.3 / np.sqrt(0.1) / np.sqrt(1 - 0.7**2 / 0.9)
    assert bound == pytest.approx(1.41, abs=0.01)
    exponents = np.arange(300)[::-1] * np.log10(0.7 / 0.9)
    norms = 10.0 ** np.maximum(37 + exponents, -37)
    rho = run(norms, **FIRST_VERSION | {"eps": 0.0})
    assert bound * (1 - 1e-3) < rho.max() < bound * (1 + 1e-5)
    assert run(heavy_tailed_norms(0), **FIRST_VERSION).max() < bound


class TorchRule:
    """Translates the authors' PyTorch code for one parameter to NumPy, line by line."""

    def __init__(self, gamma1, gamma2, eps):
        self.gamma1, self.gamma2, self.eps = gamma1, gamma2, eps
        self.m_norm_t, self.v_norm_t, self.step = 0.0, 0.0, 0

    def __call__(self, grad):
        grad_norm = np.linalg.norm(grad)
        if grad_norm == 0 or not np.isfinite(grad_norm):
            return grad
        self.step += 1
        self.m_norm_t = self.gamma1 * self.m_norm_t + (1 - self.gamma1) * grad_norm
        self.v_norm_t = self.gamma2 * self.v_norm_t + (1 - self.gamma2) * grad_norm**2
        m_norm_hat = self.m_norm_t / (1 - self.gamma1**self.step)
        v_norm_hat = self.v_norm_t / (1 - self.gamma2**self.step)
        c_norm_t = m_norm_hat / (np.sqrt(v_norm_hat) + self.eps)
        return grad / max(grad_norm, self.eps) * c_norm_t


@pytest.mark.parametrize(
    ("gamma1", "gamma2", "eps"), [(0.6, 0.999, 1e-12), (0.7, 0.9, 1e-8)]
)
def test_a_torch_run_goes_on_from_its_state(gamma1, gamma2, eps):
    """Half the steps there, then the state moved over, and the other half here."""
    rng = np.random.default_rng(0)
    grads = {
        "bias": rng.normal(size=(60, 3)) * 10 ** rng.normal(size=(60, 1)),
        "kernel": rng.normal(size=(60, 4, 5)) * 10 ** rng.normal(size=(60, 1, 1)),
    }
    grads["bias"][7] = 0  # so that the leaves have seen different numbers of norms
    rules = {name: TorchRule(gamma1, gamma2, eps) for name in grads}
    for i in range(30):
        for name, rule in rules.items():
            rule(grads[name][i])

    tx = gradient_stabilizer(gamma1, gamma2, eps=eps)
    m, v, s = (
        np.array([getattr(rule, field) for rule in rules.values()])  # the tree's order
        for field in ("m_norm_t", "v_norm_t", "step")
    )
    state = tx.init({name: jnp.asarray(g[0], "f") for name, g in grads.items()})
    state = state._replace(
        norm_mean=jnp.asarray(m / (1 - gamma1**s), jnp.float32),
        norm_rms=jnp.asarray(np.sqrt(v / (1 - gamma2**s)), jnp.float32),
        num_accepted=jnp.asarray(s, jnp.int32),
    )
    update = updater(gamma1=gamma1, gamma2=gamma2, eps=eps)
    for i in range(30, 60):
        expected = {name: rule(grads[name][i]) for name, rule in rules.items()}
        step = {name: jnp.asarray(g[i], jnp.float32) for name, g in grads.items()}
        updates, state = update(step, state)
        for name in grads:
            np.testing.assert_allclose(updates[name], expected[name], rtol=2e-6)


def test_multi_steps_sees_each_mean_once():
    tx = optax.MultiSteps(gradient_stabilizer(), 2)
    grads = [jnp.array([3.0, 4.0]), jnp.array([9.0, 12.0])]
    state = tx.init(grads[0])
    update = jax.jit(tx.update)
    for g, expected in zip(grads * 2, (0, 1, 0, 1), strict=True):
        updates, state = update(g, state)
        np.testing.assert_allclose(jnp.linalg.norm(updates), expected, rtol=1e-6)
    np.testing.assert_allclose(state.inner_opt_state.norm_mean, 10, rtol=1e-6)
    assert state.inner_opt_state.num_accepted == 2


def test_a_step_skipped_by_loss_scaling_leaves_every_statistic():
    tx = optax.apply_if_finite(optax.chain(gradient_stabilizer(), optax.adam(0.1)), 5)
    params = {"a": jnp.ones(4), "b": jnp.ones(2)}
    state, loss_scale = tx.init(params), jnp.float32(2.0**15)
    update = jax.jit(tx.update)
    skipped = 0
    for size in (1.0, 0.5, 3.0, 1.0, 5.0, 3.0):
        scaled = {name: p * size * loss_scale for name, p in params.items()}
        grads = {
            name: g.astype(jnp.float16).astype(jnp.float32) / loss_scale
            for name, g in scaled.items()
        }
        overflows = not np.all(np.isfinite(grads["a"]))
        updates, new_state = update(grads, state)
        if overflows:
            skipped += 1
            jax.tree.map(
                np.testing.assert_array_equal, new_state.inner_state, state.inner_state
            )
            assert all(np.all(u == 0) for u in jax.tree.leaves(updates))
        loss_scale = loss_scale / 2 if overflows else loss_scale
        state = new_state
    assert skipped == 2
    np.testing.assert_array_equal(state.inner_state[0].num_accepted, 4)


def test_weight_decay_added_to_the_gradient_keeps_its_size_beside_it():
    tx = optax.chain(gradient_stabilizer(), optax.add_decayed_weights(0.1))
    params = jnp.array([2.0, 0.0])
    for scale in (1e-3, 1e3):
        updates, _ = tx.update(jnp.array([0.0, scale]), tx.init(params), params)
        np.testing.assert_allclose(updates, [0.2, 1.0], rtol=1e-6)


def test_integer_leaves_masks_and_trees():
    params = {"a": jnp.ones(3), "n": jnp.arange(2), "none": None, "empty": jnp.ones(0)}
    tx = gradient_stabilizer()
    state = tx.init(params)
    assert state.norm_mean.shape == (1,)
    with pytest.raises(ValueError, match="leaf 'n' is int32"):
        tx.update(params, state)
    grads = {"a": jnp.full(3, 5.0), "b": jnp.full(4, 5.0)}
    tx = gradient_stabilizer(mask={"a": False, "b": True})
    updates, state = tx.update(grads, tx.init(grads))
    np.testing.assert_array_equal(updates["a"], 5.0)
    np.testing.assert_allclose(updates["b"], 0.5, rtol=1e-6)
    assert list(scale_factors(state, grads)) == ["b"]
    with pytest.raises(ValueError, match="2 slices to scale instead of 1, from 'a' on"):
        gradient_stabilizer().update(grads, state)


@pytest.mark.parametrize("tree", [[], (), {}, {"a": None}, None, {"a": jnp.ones(0)}])
def test_trees_without_anything_to_scale(tree):
    tx = gradient_stabilizer()
    state = tx.init(tree)
    updates, new_state = jax.jit(tx.update)(tree, state)
    assert jax.tree.structure(updates) == jax.tree.structure(tree)
    assert jax.tree.map(jnp.shape, new_state) == jax.tree.map(jnp.shape, state)


def test_inject_hyperparams_equals_plain():
    numbers = {"gamma1": 0.5, "gamma2": 0.99, "eps": 1e-6, "max_norm_ratio": 2.0}
    plain = gradient_stabilizer(**numbers)
    injected = optax.inject_hyperparams(gradient_stabilizer)(**numbers)
    grads = [jnp.ones(3), jnp.ones(2)]
    state, injected_state = plain.init(grads), injected.init(grads)
    assert set(injected_state.hyperparams) == set(numbers)
    for size in (1.0, 7.0, 0.1, 0.3):
        scaled = [g * size for g in grads]
        updates, state = plain.update(scaled, state)
        others, injected_state = jax.jit(injected.update)(scaled, injected_state)
        np.testing.assert_allclose(updates[0], others[0], rtol=2e-6)


def test_injected_hyperparams_of_a_bfloat16_tree_stay_numbers():
    """Optax casts them to bfloat16, where 0.999 is 1: a plain mean of all norms."""
    tx = optax.inject_hyperparams(gradient_stabilizer)()
    grads = {"kernel": jnp.ones((2, 2), jnp.bfloat16)}
    state = tx.init(grads)
    for size in (1.0, 2.0, 1000.0):
        updates, state = jax.jit(tx.update)({"kernel": grads["kernel"] * size}, state)
    assert state.hyperparams["gamma2"] == 1
    gammas = float(state.hyperparams["gamma1"]), 1 - 2.0**-24
    exact = Reference(*gammas)
    for size in (1.0, 2.0, 1000.0):
        expected = exact({"kernel": np.ones((2, 2)) * size})["kernel"]
    # One rounding to bfloat16, 2^-9, and that of its eps.
    np.testing.assert_allclose(
        np.asarray(updates["kernel"], float), expected, rtol=2**-8
    )


def test_eps_sits_where_the_released_code_has_it():
    """On the uncorrected root without bias correction: seen for norms about eps."""
    norms = np.array([1e-10, 3e-12, 1e-12])
    for bias_correction in (True, False):
        exact = Reference(bias_correction=bias_correction)
        expected = [exact({"a": np.array([norm])})["a"][0] for norm in norms]
        rho = run(norms, bias_correction=bias_correction)
        np.testing.assert_allclose(rho, expected, rtol=1e-5)


def test_vmap_equals_a_loop():
    tx = gradient_stabilizer(max_norm_ratio=2.0)
    update = jax.jit(tx.update)
    update_all = jax.jit(jax.vmap(lambda grads, state: tx.update(grads, state)))
    population = jnp.array([[1.0, 2.0], [0.0, 0.0], [np.nan, 1.0], [1e30, 1e30]])
    grads = {"a": population, "b": population[:, 0]}
    state = jax.vmap(tx.init)(grads)
    for _ in range(2):
        updates, state = update_all(grads, state)
    for i in range(4):
        one = {"a": grads["a"][i], "b": grads["b"][i]}
        own = tx.init(one)
        for _ in range(2):
            expected, own = update(one, own)
        np.testing.assert_allclose(updates["a"][i], expected["a"], rtol=1e-6)
    factors = scale_factors(state, {"a": jnp.ones(2), "b": jnp.ones(())})
    assert factors["a"].shape == (4,)


@pytest.mark.parametrize("kwargs", [{}, {"bias_correction": False}])
def test_derivatives_stay_finite(kwargs):
    tx = gradient_stabilizer(eps=0.0, max_norm_ratio=2.0, **kwargs)
    ones = {"a": jnp.ones(2), "b": jnp.ones(2)}
    fresh = tx.init(ones)

    @jax.jit
    @jax.grad
    def derivative(grads, state):
        updates, _ = tx.update(grads, state)
        return updates["a"][0] + updates["b"][0]

    for state in (fresh, tx.update(ones, fresh)[1]):
        for scale in (0.0, 1e-36, 1e-20, 1.0, 1e20, 1e36):
            grads = {"a": jnp.array([1.0, -2.0]) * scale, "b": jnp.zeros(2)}
            derivatives = derivative(grads, state)
            assert all(np.all(np.isfinite(d)) for d in derivatives.values()), scale


def test_derivative_equals_a_finite_difference():
    tx = gradient_stabilizer()
    with jax.enable_x64(True):
        x, step = np.array([1.0, 2.0]), 1e-5 * np.array([0.3, -0.5])
        _, state = jax.jit(tx.update)(x, tx.init(x))
        function = jax.jit(jax.value_and_grad(lambda x: tx.update(3 * x, state)[0][0]))
        change = function(x + step)[0] - function(x - step)[0]
        assert float(change) == pytest.approx(2 * float(function(x)[1] @ step))


def test_no_operation_makes_a_nan_of_zeros():
    tx = gradient_stabilizer(eps=0.0, max_norm_ratio=2.0)
    with jax.debug_nans(True):
        for grads in (jnp.zeros(2), jnp.ones(2)):
            tx.update(grads, tx.init(grads))


def test_strict_promotion_and_rank():
    tx = gradient_stabilizer(max_norm_ratio=2.0)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        grads = {
            "a": jnp.ones((2, 2), jnp.bfloat16),
            "b": jnp.ones(3, jnp.complex64),
            "c": jnp.ones((), jnp.float16),
        }
        jax.jit(tx.update)(grads, tx.init(grads))


def test_works_with_map_params_and_extra_arguments():
    params = {"a": jnp.ones(3), "b": jnp.ones((2, 2))}
    tx = optax.chain(gradient_stabilizer(), optax.adam(0.1))
    state = optax.tree.map_params(tx, lambda leaf: leaf + 1, tx.init(params))
    np.testing.assert_array_equal(state[0].norm_mean, 0)
    tx = gradient_stabilizer()
    tx.update(params, tx.init(params), params, value=1.0)


@pytest.mark.recent_xla
def test_nothing_of_gradient_size_is_written_beside_the_result():
    grads = jnp.ones((512, 512))
    tx = optax.chain(gradient_stabilizer(), optax.sgd(0.1))

    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(1, 2))
    compiled = step.lower(grads, tx.init(grads), grads).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < grads.nbytes / 100


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"gamma1": 1.0}, r"gamma1 must be .* at least 0 and below 1; got 1\.0"),
        ({"gamma2": -0.1}, "gamma2 must be"),
        ({"gamma2": "a"}, "gamma2 must be"),
        ({"eps": -1e-8}, "eps must be"),
        ({"bias_correction": 1}, "bias_correction must be True or False; got 1"),
        ({"max_norm_ratio": 1.0}, r"max_norm_ratio must be .* above 1; got 1\.0"),
    ],
)
def test_bad_arguments_raise(kwargs, match):
    with pytest.raises(ValueError, match=match):
        gradient_stabilizer(**kwargs)


if __name__ == "__main__":
    print(*table(), sep="\n")

"""The vocabulary of optimizers, and the methods that only the benchmarks have."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from benchmarks.lib import methods
from benchmarks.lib.optimizers import BASES, METHODS, Optimizer, chains, in_order
from benchmarks.lib.train import Rule, schedule
from stablegrad_optax import stablegrad

PARAMS = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
GRADS = {"kernel": jnp.arange(6.0).reshape(3, 2), "bias": jnp.array([1e3, -1e-3])}
PROBES = ("field", "residuals", "prediction")

close = partial(np.testing.assert_allclose, rtol=1e-5)


def first_updates(name, *probes, weight_decay=0.0):
    """Computes the first updates, of one program, for each of the probes."""
    tx = Optimizer.named(name)(lambda count: 1e-3, weight_decay)

    @jax.jit
    def update(probes):
        return tx.update(GRADS, tx.init(PARAMS), PARAMS, probes=probes)[0]

    return [update({name: std for name in PROBES}) for std in probes]


@pytest.mark.parametrize(
    "name", [*chains(METHODS, ["momentum"]), *(b for b in BASES if "optax" not in b)]
)
def test_optimizers_make_a_finite_first_step(name):
    """A probe reaches the methods of its name alone."""
    optimizer = Optimizer.named(name)
    assert optimizer.name == name
    assert len(optimizer.rates) >= 3
    assert list(optimizer.rates) == sorted(set(optimizer.rates))
    one, two = first_updates(name, 0.3, 0.6)
    for update in jax.tree.leaves(one):
        assert jnp.isfinite(update).all()
        assert update.any() or optimizer.base.startswith("SOAP")  # looks first
    ratio = 2.0 if any(probe in name for probe in PROBES) else 1.0
    close(two["kernel"], ratio * one["kernel"])


@pytest.mark.parametrize("name", ["StableGrad", "clip + AdamX", "x + AdamW", ""])
def test_an_unknown_name_is_refused(name):
    with pytest.raises(ValueError, match="an optimizer is one of Adam, AdamW, "):
        Optimizer.named(name)


def test_a_chain_is_the_method_before_the_base():
    tx = optax.chain(stablegrad(0.01), optax.sgd(1e-3, momentum=0.9))
    expected, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    (found,) = first_updates("StableGrad (reference_std=0.01) + momentum", 5.0)
    jax.tree.map(close, found, expected)


def test_skipping_encloses_the_optimizer_and_sees_the_loss():
    tx = Optimizer.named("skip spikes + Adam")(lambda count: 1e-3)
    update = jax.jit(partial(tx.update, probes={}))
    state = tx.init(PARAMS)
    for value in (1.0, np.nan):
        before = state
        updates, state = update(GRADS, state, PARAMS, value=jnp.float32(value))
    assert state.num_skipped == 1
    assert not any(u.any() for u in jax.tree.leaves(updates))
    assert jax.tree.all(
        jax.tree.map(lambda a, b: (a == b).all(), state.inner_state, before.inner_state)
    )


def test_decay_is_added_between_the_method_and_the_base():
    tx = optax.chain(
        optax.scale(30.0), optax.add_decayed_weights(0.5), optax.adam(1e-3)
    )
    expected, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    (found,) = first_updates("scale by 30 + Adam", 5.0, weight_decay=0.5)
    jax.tree.map(close, found, expected)


def test_muon_has_the_kernels_and_adam_the_rest():
    """A convolution's kernel is the matrix of all its axes but the last."""
    rng = np.random.default_rng(0)
    shapes = {"kernel": (3, 3, 2, 4), "bias": (3, 2), "embedding": (5, 4)}
    grads = {name: jnp.asarray(rng.normal(size=s)) for name, s in shapes.items()}
    tx = BASES["Muon"].make(1e-3)
    found, _ = tx.update(grads, tx.init(grads), grads)
    adam = optax.adamw(1e-3, weight_decay=0.0, nesterov=True)
    expected, _ = adam.update(grads, adam.init(grads), grads)
    close(found["bias"], expected["bias"])
    close(found["embedding"], expected["embedding"])
    matrix = {"kernel": grads["kernel"].reshape(18, 4)}
    muon = contrib.muon(1e-3)
    expected, _ = muon.update(matrix, muon.init(matrix), matrix)
    close(found["kernel"].reshape(18, 4), expected["kernel"], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])
def test_range_safe_muon_is_muon_at_any_scale_of_the_kernels(scale):
    """Muon at scale one is the reference, in the first step and after 120.

    The bias corrections, which the range-safe form leaves out, differ by 0.95^120, or
    0.2 %, of the momentum then. The iteration that follows amplifies small singular
    values 500 times, to a few per mille of the largest entry.
    """
    rng = np.random.default_rng(0)
    shapes = {"kernel": (3, 2, 4), "bias": (3,)}
    tx, safe = (Optimizer.named(n)(lambda _: 0.1) for n in ("Muon", "range-safe Muon"))
    state = tx.init({name: jnp.ones(shape) for name, shape in shapes.items()})
    safe_state = safe.init({name: jnp.ones(shape) for name, shape in shapes.items()})
    update, safe_update = jax.jit(tx.update), jax.jit(safe.update)
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    for step in range(120):
        grads = {
            name: jnp.asarray(rng.normal(size=shape), jnp.float32)
            for name, shape in shapes.items()
        }
        scaled = {**grads, "kernel": scale * grads["kernel"]}
        expected, state = update(grads, state, params)
        found, safe_state = safe_update(scaled, safe_state, params)
        if step in (0, 119):
            close(found["bias"], expected["bias"])
            close(found["kernel"], expected["kernel"], rtol=5e-3, atol=5e-4)
            assert abs(found["kernel"]).max() > 0.01


def test_names_come_in_the_order_of_the_lists():
    names = ["ZClip + Muon", "Muon", "clip + Adam", "clip + Muon", "Muon"]
    expected = ["clip + Adam", "Muon", "clip + Muon", "ZClip + Muon"]
    assert in_order(names) == expected


def test_a_module_called_stack_holds_many_layers():
    tree = {"stack_0": {"kernel": jnp.ones((3, 2, 2))}, "out": {"kernel": jnp.ones(4)}}
    expected = {"stack_0": {"kernel": 1}, "out": {"kernel": 0}}
    assert methods.stacked_by_name(tree) == expected


@pytest.mark.parametrize(
    "name", ["adadelta", "momo_adam", "polyak_sgd", "rprop", "sam"]
)
def test_optimizers_of_optax_take_a_step(name):
    """One of each kind: a schedule, the loss, a factory, a number, and no arguments."""
    tx = Optimizer.named(f"StableGrad + optax.{name}")(optax.constant_schedule(0.1))
    updates, _ = jax.jit(tx.update)(
        GRADS, tx.init(PARAMS), PARAMS, probes={}, value=jnp.float32(1.0)
    )
    assert all(jnp.isfinite(update).all() for update in jax.tree.leaves(updates))


# Schedules


def test_the_rate_rises_linearly_and_falls_along_a_half_cosine():
    rate = schedule(200, 0.5, warm_up=True)
    rates = [float(rate(count)) for count in (0, 4, 9, 104, 199)]
    assert rates == pytest.approx([0.05, 0.25, 0.5, 0.25, 0.0], abs=1e-6)
    rate = schedule(200, 0.5, warm_up=False)
    rates = [float(rate(count)) for count in (0, 100, 200)]
    assert rates == pytest.approx([0.5, 0.25, 0.0], abs=1e-6)


def test_an_optimizer_may_ask_for_a_warm_up():
    one, other = (
        Rule(Optimizer.named(name), 200)(0.1).update(GRADS, state, PARAMS)[0]
        for name in ("AdamW", "AdamW (warm-up)")
        for state in [optax.adamw(lambda count: 0.1).init(PARAMS)]
        for state in [(optax.EmptyState(), state)]
    )
    close(10 * other["kernel"], one["kernel"])


# Methods

NORMED = {
    "kernel": jnp.array([[3.0, 0.0]]),
    "bias": jnp.array([-4.0]),
    "zero": jnp.zeros(3),
}


@pytest.mark.parametrize("size", [1e-36, 1.0, 1e36])
def test_the_norm_of_all_arrays_is_1_at_any_scale(size):
    grads = jax.tree.map(lambda g: g * size, NORMED)
    tx = methods.normalize_globally()
    updates, _ = tx.update(grads, tx.init(grads))
    norms = jax.tree.map(lambda g: float(jnp.linalg.norm(g)), updates)
    expected = {"kernel": 0.6, "bias": 0.8, "zero": 0.0}
    assert norms == pytest.approx(expected, rel=1e-5)
    assert updates["bias"][0] < 0


def test_a_gradient_of_zeros_stays_zero():
    zero, tx = jax.tree.map(jnp.zeros_like, NORMED), methods.normalize_globally()
    updates, _ = tx.update(zero, tx.init(zero))
    assert not any(update.any() for update in jax.tree.leaves(updates))


def test_z_scores():
    g = np.random.default_rng(0).normal(3, 2, (4, 5)).astype(np.float32)
    tx = methods.znorm()
    grads = {"kernel": g, "bias": g[0], "zero": np.zeros((2, 2), np.float32)}
    updates, _ = tx.update(grads, tx.init(grads))
    expected = (g - g.mean()) / g.std()
    np.testing.assert_allclose(updates["kernel"], expected, rtol=1e-4)
    np.testing.assert_array_equal(updates["bias"], g[0])
    np.testing.assert_array_equal(updates["zero"], 0)


def literal_zclip(norms, z_threshold=2.5, alpha=0.97, warm_up=25):
    """Scalars only, from the description: norm -> norm after clipping."""
    mean = var = None
    for index, norm in enumerate(norms):
        if index < warm_up:
            yield norm
            if index == warm_up - 1:
                mean, var = np.mean(norms[:warm_up]), np.var(norms[:warm_up])
            continue
        z = (norm - mean) / (np.sqrt(var) + 1e-6)
        if z > z_threshold:
            norm = mean + z_threshold * np.sqrt(var) / (z / z_threshold)
        yield norm
        mean = alpha * mean + (1 - alpha) * norm
        var = alpha * var + (1 - alpha) * (norm - mean) ** 2


def test_zclip_is_its_literal_form():
    rng = np.random.default_rng(0)
    norms = rng.uniform(0.5, 1.5, 120)
    norms[[30, 31, 77]] *= [1e4, 3.0, 20.0]
    tx = methods.zclip()
    grads = {"kernel": np.array([[3.0, 0.0]]), "bias": np.array([-4.0])}
    state, update = tx.init(grads), jax.jit(tx.update)
    found = []
    for norm in norms:
        updates, state = update(jax.tree.map(lambda g, n=norm: g * n / 5, grads), state)
        found.append(float(optax.tree.norm(updates)))
        # One factor for all: the direction stays.
        assert updates["kernel"][0, 0] / updates["bias"][0] == pytest.approx(-0.75)
    expected = list(literal_zclip(norms))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert (np.array(expected) < 0.9 * norms).sum() >= 2  # it clipped at all

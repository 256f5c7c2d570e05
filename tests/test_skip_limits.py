"""skip_spikes at its limits: outliers of either sign, long streaks, no compilation."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import assert_trees_close, assert_trees_equal, gradients

from stablegrad_optax import health, skip_spikes

NAN = float("nan")
PARAMS = {"k": jnp.ones((2, 2))}


def run(norms, losses=None, inner=None, **kwargs):
    """Returns the states after each step, with the gradient ``norm * ones / 2``."""
    tx = skip_spikes(inner or optax.identity(), **kwargs)

    def step(state, x):
        norm, loss = x
        extra = {} if losses is None else {"value": loss}
        grads = {"k": jnp.full((2, 2), norm / 2)}
        return (tx.update(grads, state, PARAMS, **extra)[1],) * 2

    xs = jnp.asarray(norms, jnp.float32)
    ys = xs if losses is None else jnp.asarray(losses, jnp.float32)
    scan = jax.jit(lambda state: jax.lax.scan(step, state, (xs, ys))[1])
    return jax.device_get(scan(tx.init(PARAMS)))


def around_one(num_steps, seed=0):
    return 1 + 0.1 * np.random.default_rng(seed).normal(size=num_steps)


@pytest.mark.parametrize("outlier", [1e5, -1e3, -1e5, -1e10, -3e38, 3e38])
def test_one_finite_loss_of_either_sign_leaves_the_guard_on(outlier):
    losses = around_one(900)
    losses[300], losses[899] = outlier, 30.0
    states = run(around_one(900, seed=1), losses)
    assert states.last_skipped[899]
    # The deviation of the losses is 0.1. One limited value among the last hundred adds
    # (1 - decay) * 6^2 = 36 % to its square, which has decayed after 600 steps.
    assert states.mean[898, 1] == pytest.approx(1, abs=0.05)
    assert states.deviation[898, 1] == pytest.approx(0.1, rel=0.2)


@pytest.mark.parametrize("seed", range(5))
def test_no_finite_sequence_makes_the_statistics_infinite_or_nan(seed):
    rng = np.random.default_rng(seed)
    largest = float(np.finfo(np.float32).max)
    losses = rng.choice([largest, -largest, 1.0, -1e-45, 1e30, 0.0], size=300)
    states = run(np.abs(losses) / 4, losses, decay=rng.choice([0.0, 0.5, 0.99]))
    assert np.isfinite(states.mean).all()
    assert np.isfinite(states.deviation).all()


def test_the_warm_up_skips_a_giant_after_ten_values():
    norms = around_one(100)
    norms[[5, 50]] = 1e6
    states = run(norms)
    np.testing.assert_array_equal(np.flatnonzero(states.last_skipped), [50])
    # A factor of two or three is usual in the first steps, and is not skipped.
    norms = around_one(100) * np.linspace(3, 1, 100)
    norms[50] *= 3
    assert not run(norms).last_skipped.any()


def test_the_warm_up_follows_a_norm_that_rises_from_almost_zero():
    """A residual branch that starts at zero: the first norms are tiny."""
    norms = around_one(100) * np.minimum(1e-3 * 1.5 ** np.arange(100), 1)
    assert run(norms).num_skipped[-1] == 0


def test_a_streak_is_counted():
    norms = around_one(60)
    norms[[20, 21, 22, 40]] = NAN
    states = run(norms)
    assert states.skipped_in_a_row.max() == states.skipped_in_a_row[22] == 3
    np.testing.assert_array_equal(
        states.skipped_in_a_row[[19, 23, 40, 41]], [0, 0, 1, 0]
    )
    assert states.num_skipped[-1] == 4


@pytest.mark.parametrize("bad", [NAN, 1e30])
def test_after_max_consecutive_skips_a_step_is_taken(bad):
    norms = around_one(40)
    norms[20:27] = bad
    states = run(norms, max_consecutive_skips=3)
    expected = [20, 21, 22, 24, 25, 26]
    np.testing.assert_array_equal(np.flatnonzero(states.last_skipped), expected)
    assert run(norms).last_skipped.sum() == 7  # no limit is the default


def test_a_step_that_is_not_finite_reaches_the_optimizer_at_the_limit_alone():
    tx = skip_spikes(optax.adam(1e-2), max_consecutive_skips=2)
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    bad = {"k": jnp.full((2, 2), NAN)}
    finite = []
    for _ in range(3):
        _, state = update(bad, state, PARAMS)
        finite.append(bool(jnp.isfinite(optax.tree.get(state, "mu")["k"]).all()))
    assert finite == [True, True, False]


def test_max_consecutive_skips_may_be_injected():
    tx = optax.inject_hyperparams(skip_spikes)(optax.sgd(1.0), max_consecutive_skips=1)
    state, skipped = tx.init(PARAMS), []
    for _ in range(4):
        _, state = jax.jit(tx.update)({"k": jnp.full((2, 2), NAN)}, state, PARAMS)
        skipped.append(bool(state.inner_state.last_skipped))
    assert skipped == [True, False, True, False]
    with pytest.raises(
        ValueError, match=r"max_consecutive_skips must be .* at least 1"
    ):
        skip_spikes(optax.sgd(1.0), max_consecutive_skips=0)


def compilations(function):
    """Counts how often XLA compiles while the function runs."""
    count = 0

    def listen(event, duration, **kwargs):
        nonlocal count
        count += "backend_compile" in event

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        function()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return count


@pytest.mark.parametrize("with_loss", [False, True])
def test_nothing_is_compiled_after_the_second_eager_call(with_loss):
    tx = skip_spikes(
        optax.adamw(optax.cosine_decay_schedule(1e-2, 10)), max_consecutive_skips=3
    )
    params = gradients(100)
    batches = [gradients(seed) for seed in range(8)]
    batches[5] = jax.tree.map(lambda g: g * jnp.nan, batches[5])
    state = tx.init(params)

    def steps(batches):
        nonlocal state
        for i, grads in enumerate(batches):
            extra = {"value": jnp.float32(i)} if with_loss else {}
            _, state = tx.update(grads, state, params, **extra)

    # A first call that is taken and one that is skipped compile what either needs.
    steps([batches[0], batches[5]])
    assert compilations(lambda: steps(batches)) == 0
    assert state.num_skipped == 2
    # The count sees a compilation.
    assert compilations(lambda: jax.jit(lambda x: 3 * x)(jnp.ones(2))) > 0


def test_eager_steps_equal_compiled_ones():
    tx = skip_spikes(optax.adamw(1e-2), warmup_steps=2)
    params = gradients(100)
    eager = compiled = tx.init(params)
    update = jax.jit(tx.update)
    for seed, scale in enumerate([1.0, 1.1, 0.9, 1e5, NAN, 1.0]):
        grads = jax.tree.map(lambda g, scale=scale: scale * g, gradients(seed))
        updates, eager = tx.update(grads, eager, params)
        expected, compiled = update(grads, compiled, params)
        # Compiled as a whole, a loop may round differently.
        assert_trees_close(updates, expected, rtol=2e-5, atol=1e-7)
        assert_trees_close(eager, compiled, rtol=2e-5, atol=1e-7)
    assert eager.num_skipped == 2


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("make", [optax.adam, optax.adamw, optax.lion])
def test_bfloat16_parameters_with_float32_gradients(make, compiled):
    """The optimizer alone changes the dtype of its moments at the first step."""
    params = gradients(100, jnp.bfloat16)
    alone, tx = make(1e-2), skip_spikes(make(1e-2))
    own, state = alone.init(params), tx.init(params)
    wrap = jax.jit if compiled else lambda f: f
    for seed in range(3):
        expected, own = wrap(alone.update)(gradients(seed), own, params)
        updates, state = wrap(tx.update)(gradients(seed), state, params)
        assert_trees_close(updates, expected, rtol=2e-5, atol=1e-7)
        assert_trees_close(state.inner_state, own, rtol=2e-5, atol=1e-7)
    # A first step that is skipped changes the dtype as well, and no value.
    bad = jax.tree.map(lambda g: g * jnp.nan, gradients(0))
    start = tx.init(params)
    _, skipped = wrap(tx.update)(bad, start, params)
    assert_trees_equal(
        skipped.inner_state,
        jax.tree.map(lambda x, y: x.astype(y.dtype), start.inner_state, own),
    )


def test_extra_arguments_that_the_signature_names_are_handed_on():
    def update(updates, state, params=None, *, value=None):
        factor = 0.0 if value is None else value
        return jax.tree.map(lambda u: factor * u, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    tx = skip_spikes(inner)
    extra = {"value": jnp.float32(2.0), "unknown": 1}
    for update_fn in (tx.update, jax.jit(tx.update)):
        updates, _ = update_fn(PARAMS, tx.init(PARAMS), PARAMS, **extra)
        np.testing.assert_array_equal(updates["k"], 2)


def accumulate(tx, num_steps=400):
    """Trains with a NaN in the second micro-batch; the kernel moves by 1e-3 a step."""
    params, state, update = PARAMS, tx.init(PARAMS), jax.jit(tx.update)
    for i in range(num_steps):
        grads = jax.tree.map(lambda p, i=i: p * (NAN if i == 1 else 1.0), PARAMS)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return float(params["k"][0, 0]), state


def test_skipping_around_accumulation_survives_a_nan():
    adamw = optax.adamw(1e-3)
    inside = optax.MultiSteps(
        skip_spikes(adamw), 4, should_skip_update_fn=optax.skip_not_finite
    )
    outside = skip_spikes(optax.MultiSteps(adamw, 4))
    for tx in (outside, inside):
        kernel, state = accumulate(tx)
        assert kernel == pytest.approx(0.901, abs=1e-3)  # 99 steps of Adam
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            health(state)


def test_health_warns_of_skip_spikes_inside_accumulation():
    """The warning is true: no further step is taken."""
    kernel, state = accumulate(optax.MultiSteps(skip_spikes(optax.adamw(1e-3)), 4), 40)
    assert kernel == 1.0
    with pytest.warns(UserWarning, match=r"skip_spikes\(optax.MultiSteps"):
        assert health(state)["skipped_in_a_row"] == 10


def test_a_checkpoint_without_skip_spikes_continues_with_it():
    adam, grads = optax.adam(1e-2), [gradients(seed) for seed in range(6)]
    params, own = gradients(100), adam.init(gradients(100))
    for g in grads[:3]:
        _, own = adam.update(g, own, params)
    tx = skip_spikes(adam)
    state = tx.init(params)._replace(inner_state=own)
    for g in grads[3:]:
        expected, own = adam.update(g, own, params)
        updates, state = tx.update(g, state, params)
        assert_trees_close(updates, expected, rtol=2e-5, atol=1e-7)

"""skip_spikes against a literal reference, and wherever an optimizer may stand."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import assert_trees_close, assert_trees_equal, gradients
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from stablegrad_optax import skip_spikes, stablegrad

NAN = float("nan")


class Reference:
    """Computes the rule of the docstring in float64 for one statistic."""

    def __init__(self, max_deviation=6.0, *, decay=0.99, warmup_steps=100):
        self.most, self.decay, self.warmup = max_deviation, decay, warmup_steps
        self.mean = self.variance = 0.0
        self.count = 0

    def __call__(self, x):
        """Tells whether x is a spike; x then enters the statistics."""
        if not np.isfinite(x):
            return True
        floor = abs(self.mean) / (1 if self.count < self.warmup else 100)
        reach = self.most * max(np.sqrt(self.variance), floor)
        if self.count == 0 or reach == 0:
            reach = np.inf
        is_judged = self.count >= min(self.warmup, 10)
        is_spike = is_judged and x > self.mean + reach
        if x != 0:
            self.count += 1
            weight = (1 - self.decay) / (1 - self.decay**self.count)
            change = np.clip(x, self.mean - reach, self.mean + reach) - self.mean
            self.mean += weight * change
            self.variance = (1 - weight) * (self.variance + weight * change**2)
        return is_spike


def run(norms, losses=None, inner=None, **kwargs):
    """States after each of a sequence of one-element gradients."""
    tx = skip_spikes(inner or optax.identity(), **kwargs)

    def step(state, x):
        norm, loss = x
        extra = {} if losses is None else {"value": loss}
        updates, state = tx.update({"a": norm[None]}, state, **extra)
        return state, (updates["a"][0], state)

    xs = jnp.asarray(norms, jnp.float32)
    ys = xs if losses is None else jnp.asarray(losses, jnp.float32)
    start = tx.init({"a": xs[:1]})
    return jax.device_get(
        jax.jit(functools.partial(jax.lax.scan, step))(start, (xs, ys))
    )


def noisy(num_steps, seed=0, noise=0.1):
    return np.exp(noise * np.random.default_rng(seed).normal(size=num_steps))


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"warmup_steps": 0},
        {"max_deviation": 2.0, "warmup_steps": 10},
        {"decay": 0.5, "warmup_steps": 5, "max_deviation": 3.0},
    ],
    ids=str,
)
def test_equals_a_literal_reference(kwargs):
    norms = noisy(400) * (1 + 100 * (np.random.default_rng(1).random(400) < 0.05))
    losses = np.random.default_rng(2).normal(size=400)  # of either sign
    losses[250:260] = 1e5
    norms[[0, 120, 130]], losses[[0, 140]], norms[50] = NAN, -np.inf, 0
    references = Reference(**kwargs), Reference(**kwargs)
    expected = [
        [reference(x) for x in np.float32(values)]
        for reference, values in zip(references, (norms, losses), strict=True)
    ]
    _, (updates, states) = run(norms, losses, **kwargs)
    skipped = np.any(expected, 0)
    assert 10 < skipped.sum() < 200
    np.testing.assert_array_equal(states.last_skipped, skipped)
    np.testing.assert_array_equal(updates, np.where(skipped, 0, np.float32(norms)))
    np.testing.assert_array_equal(states.num_skipped, np.cumsum(skipped))
    for i, reference in enumerate(references):
        actual = states.mean[-1, i], states.deviation[-1, i]
        exact = reference.mean, np.sqrt(reference.variance)
        np.testing.assert_allclose(actual, exact, rtol=1e-4)
        assert states.num_seen[-1, i] == reference.count


@pytest.mark.parametrize("scale", [1e-34, 1e-20, 1.0, 1e20, 1e34])
def test_it_knows_no_scale(scale):
    norms = noisy(150)
    norms[120:125] *= 50
    _, (_, states) = run(norms)
    _, (_, scaled) = run(norms * scale)
    np.testing.assert_array_equal(scaled.last_skipped, states.last_skipped)
    np.testing.assert_allclose(
        scaled.last_deviation, states.last_deviation, rtol=1e-3, atol=1e-3
    )
    assert states.num_skipped[-1] == 5


def params_and_grads(seed=0):
    return gradients(100), gradients(seed)


OPTIMIZERS = {
    "adamw": lambda: optax.adamw(optax.cosine_decay_schedule(1e-2, 10)),
    "momentum": lambda: optax.sgd(1e-2, momentum=0.9),
    "muon": lambda: optax.contrib.muon(1e-2),
    "noise": lambda: optax.chain(optax.add_noise(0.1, 0.5, 0), optax.adam(1e-2)),
    "partition": lambda: optax.partition(
        {"a": optax.adam(1e-2), "b": optax.set_to_zero()},
        {"hidden": "a", "norm": "b", "stack": "a"},
    ),
    "ours": lambda: optax.chain(stablegrad(), optax.lion(1e-3)),
    "inject": lambda: optax.inject_hyperparams(optax.adamw)(1e-2),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(1e-2), 2),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(1e-2), 3),
    "polyak": lambda: optax.polyak_sgd(),
    "dtypes": lambda: optax.adam(1e-2, mu_dtype=jnp.bfloat16),
}


def keys_as_data(tree):
    return jax.tree.map(
        lambda x: (
            jax.random.key_data(x)
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
            else x
        ),
        tree,
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_step_leaves_every_state_bit_for_bit(name):
    """Around any optimizer; a step that is taken is the optimizer's own."""
    inner = optax.with_extra_args_support(OPTIMIZERS[name]())
    tx = skip_spikes(inner, warmup_steps=2)
    params, grads = params_and_grads()
    update, alone = jax.jit(tx.update), jax.jit(inner.update)
    state, own = tx.init(params), inner.init(params)
    loss = jnp.float32(0.5)
    for seed in range(3):
        updates, state = update(gradients(seed), state, params, value=loss)
        expected, own = alone(gradients(seed), own, params, value=loss)
        # Compiled by itself or in a branch, a loop may round differently.
        assert_trees_close(updates, expected, rtol=2e-5, atol=1e-7)
    assert state.num_skipped == 0
    bad = {
        "spike": (jax.tree.map(lambda g: 1e4 * g, grads), loss),
        "NaN": (jax.tree.map(lambda g: g.at[0].set(NAN), grads), loss),
        "loss": (grads, jnp.float32(1e4)),
        "NaN loss": (grads, jnp.float32(NAN)),
    }
    for i, (spike, value) in enumerate(bad.values()):
        updates, skipped = update(spike, state, params, value=value)
        assert_trees_equal(updates, optax.tree.zeros_like(updates))
        assert_trees_equal(
            keys_as_data(skipped.inner_state), keys_as_data(state.inner_state)
        )
        assert skipped.num_skipped == 1, i


def test_the_select_of_accelerators_equals_the_branch_of_a_cpu(monkeypatch):
    """The accelerators' program runs on any device: here on this one."""
    tx = skip_spikes(optax.adamw(1e-2), warmup_steps=2)
    params = gradients(100)
    sequence = [1.0, 1.1, 0.9, 1e5, NAN, 1.0]

    def train():
        state, history = tx.init(params), []
        update = jax.jit(lambda *args: tx.update(*args))
        for seed, scale in enumerate(sequence):
            grads = jax.tree.map(lambda g, scale=scale: scale * g, gradients(seed))
            updates, state = update(grads, state, params)
            history.append((updates, state))
        return history

    expected = train()
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *args, default, **others: default(*args)
    )
    for actual, exact in zip(train(), expected, strict=True):
        assert_trees_close(actual, exact, rtol=2e-5, atol=1e-7)
    assert expected[-1][1].num_skipped == 2


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_no_value_means_no_loss(compiled):
    """And a loss that comes at some steps only is judged at those."""
    tx = skip_spikes(optax.sgd(1.0), warmup_steps=1)
    update = jax.jit(tx.update) if compiled else tx.update
    params, grads = params_and_grads()
    _, state = update(grads, tx.init(params), params)
    np.testing.assert_array_equal(state.num_seen, [1, 0])
    for value in (2.0, np.float32(2.0), jnp.bfloat16(2.0)):
        _, state = update(grads, state, params, value=value)
        assert not state.last_skipped
    np.testing.assert_array_equal(state.num_seen, [4, 3])
    assert state.mean[1] == pytest.approx(2)
    _, state = update(grads, state, params)
    np.testing.assert_array_equal(state.num_seen, [5, 3])
    _, state = update(grads, state, params, value=NAN)
    assert state.last_skipped
    np.testing.assert_array_equal(state.num_seen, [6, 3])


def test_the_loss_is_handed_on():
    tx = skip_spikes(optax.polyak_sgd())
    params, grads = params_and_grads()
    updates, _ = tx.update(grads, tx.init(params), params, value=jnp.float32(0.1))
    inner = optax.polyak_sgd()
    expected, _ = inner.update(grads, inner.init(params), params, value=0.1)
    assert_trees_close(updates, expected, rtol=1e-5)


@pytest.mark.parametrize("value", [jnp.ones(2), 1j, "0.5", True])
def test_a_loss_that_is_no_scalar_raises(value):
    tx = skip_spikes(optax.sgd(1.0))
    params, grads = params_and_grads()
    with pytest.raises(ValueError, match="value must be a "):
        tx.update(grads, tx.init(params), params, value=value)


def test_inside_multi_steps_it_judges_the_mean():
    """A micro-batch in which a spike hides is not judged; their mean is."""
    tx = optax.MultiSteps(skip_spikes(optax.sgd(1.0), warmup_steps=2), 2)
    params = {"a": jnp.ones(1)}
    state = tx.init(params)
    update = jax.jit(tx.update)
    applied = []
    for size in (1.0, 1.0, 1.0, 1.0, 1e4, 1.0, 1.0, 1.0):
        updates, state = update({"a": jnp.full(1, size)}, state, params)
        applied.append(float(updates["a"][0]))
    assert applied == [0, -1, 0, -1, 0, 0, 0, -1]
    assert state.inner_opt_state.num_skipped == 1


def test_around_multi_steps_it_drops_the_micro_batch():
    """A dropped one is not counted: the next takes its place in the mean."""
    inner = optax.MultiSteps(optax.sgd(1.0), 2)
    tx = skip_spikes(inner, warmup_steps=2)
    params = {"a": jnp.ones(1)}
    state = tx.init(params)
    update = jax.jit(tx.update)
    applied = []
    for size in (1.0, 1.0, 1.0, 1e4, NAN, 1.04):
        updates, state = update({"a": jnp.full(1, size)}, state, params)
        applied.append(float(updates["a"][0]))
    assert applied == pytest.approx([0, -1, 0, 0, 0, -1.02])
    assert state.num_skipped == 2


def test_inside_apply_if_finite_the_wrapper_sees_the_nan_first():
    tx = optax.apply_if_finite(skip_spikes(optax.adam(1e-2), warmup_steps=1), 5)
    params, grads = params_and_grads()
    _, state = jax.jit(tx.update)(grads, tx.init(params), params)
    updates, after = jax.jit(tx.update)(
        jax.tree.map(lambda g: g * jnp.nan, grads), state, params
    )
    assert_trees_equal(updates, optax.tree.zeros_like(grads))
    assert_trees_equal(after.inner_state, state.inner_state)
    _, after = jax.jit(tx.update)(jax.tree.map(lambda g: g * 1e4, grads), state, params)
    assert after.inner_state.num_skipped == 1
    assert after.last_finite


def test_inject_hyperparams_takes_the_numbers():
    """The inner optimizer is structure; a threshold may follow a schedule."""
    schedule = optax.piecewise_constant_schedule(1e6, {3: 6e-6})
    tx = optax.inject_hyperparams(skip_spikes)(
        optax.sgd(1.0), max_deviation=schedule, warmup_steps=1
    )
    params, grads = params_and_grads()
    state, skipped = tx.init(params), []
    for scale in (1.0, 1.0, 50.0, 1.0, 1e9, 1.0):
        scaled = jax.tree.map(lambda g, scale=scale: g * scale, grads)
        _, state = jax.jit(tx.update)(scaled, state, params)
        skipped.append(bool(state.inner_state.last_skipped))
    assert skipped == [False] * 4 + [True, False]


def test_vmap_over_a_population_decides_for_each_member():
    tx = skip_spikes(optax.adam(1e-2), warmup_steps=1)
    members = jnp.array([[1.0, 1.0], [1.0, 1e4], [NAN, 1.0]])

    def two_steps(sizes):
        params = {"a": jnp.ones(3)}
        state = tx.init(params)
        for size in sizes:
            grads = {"a": size * jnp.arange(1.0, 4)}
            updates, state = tx.update(grads, state, params)
        return updates, state

    updates, state = jax.jit(jax.vmap(two_steps))(members)
    np.testing.assert_array_equal(state.num_skipped, [0, 1, 1])
    np.testing.assert_array_equal(updates["a"][1], 0)
    for i, sizes in enumerate(members):
        expected = two_steps(sizes)
        member = jax.tree.map(lambda x, i=i: x[i], (updates, state))
        assert_trees_close(member, expected, rtol=1e-5)


def mesh():
    return jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))


def steps_on_one_device():
    tx, batches, params = data_parallel()
    state = tx.init(params)
    for grads in batches:
        mean = jax.tree.map(lambda g: g.mean(0), grads)
        updates, state = jax.jit(tx.update)(mean, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def data_parallel():
    """Gradients of eight devices; at one step one of them has a NaN, then a spike."""
    rng = np.random.default_rng(0)
    batches = [{"a": rng.normal(1, 0.1, (8, 8, 4)).astype("f")} for _ in range(6)]
    batches[2]["a"][5, 0, 0] = np.nan
    batches[4]["a"][3] *= 1e4
    return (
        skip_spikes(optax.adam(1e-2), warmup_steps=2),
        batches,
        {"a": np.ones((8, 4), np.float32)},
    )


@pytest.mark.parametrize("how", ["pmap", "shard_map", "sharded jit"])
def test_every_device_decides_alike(how):
    tx, batches, params = data_parallel()

    def step(params, state, grads):
        grads = jax.tree.map(lambda g: jax.lax.pmean(g, "x"), grads)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    whole, split = PartitionSpec(), PartitionSpec("x")
    if how == "pmap":
        mapped = jax.pmap(step, "x", in_axes=(None, None, 0), out_axes=None)
    elif how == "shard_map":
        mapped = jax.jit(
            jax.shard_map(
                lambda params, state, grads: step(
                    params, state, jax.tree.map(lambda g: g[0], grads)
                ),
                mesh=mesh(),
                in_specs=(whole, whole, split),
                out_specs=(whole, whole),
            )
        )
    else:  # the parameters, the moments and the gradients are cut in eight
        sharding = NamedSharding(mesh(), split)
        params = jax.device_put(params, sharding)
        state = jax.jit(tx.init)(params)

        @jax.jit
        def mapped(params, state, grads):
            mean = jax.tree.map(lambda g: g.mean(0), grads)
            updates, state = tx.update(mean, state, params)
            return optax.apply_updates(params, updates), state

        batches = [
            jax.device_put(grads, NamedSharding(mesh(), PartitionSpec(None, "x")))
            for grads in batches
        ]
    for grads in batches:
        params, state = mapped(params, state, grads)
    expected = steps_on_one_device()
    assert expected[1].num_skipped == 2
    actual = jax.device_get((params, state))
    assert_trees_close(actual, jax.device_get(expected), rtol=1e-5, atol=1e-6)


def test_in_shard_map_each_device_may_step_by_a_gradient_of_its_own():
    tx, batches, params = data_parallel()

    def steps(params, *batches):
        state = tx.init(params)
        for grads in batches:
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, state.num_skipped.reshape(1)

    whole, split = PartitionSpec(), PartitionSpec("x")
    mapped = jax.shard_map(
        lambda params, batches: steps(
            params, *({"a": grads["a"][0]} for grads in batches)
        ),
        mesh=mesh(),
        in_specs=(whole, split),
        out_specs=(split, split),
    )
    actual, num_skipped = jax.jit(mapped)(params, batches)
    for device in range(8):
        own = [{"a": grads["a"][device]} for grads in batches]
        expected, (expected_skipped,) = jax.jit(steps)(params, *own)
        assert num_skipped[device] == expected_skipped
        assert_trees_close(
            actual["a"].reshape(8, *params["a"].shape)[device], expected["a"], rtol=1e-6
        )
    assert num_skipped.tolist() == [0, 0, 0, 1, 0, 1, 0, 0]


def test_gradients_through_a_step_are_finite():
    tx = skip_spikes(optax.adam(1e-2), warmup_steps=1)
    params = {"a": jnp.ones(3)}

    @jax.jit
    @jax.grad
    def through(scale):
        state = tx.init(params)
        total = 0.0
        for size in (1.0, scale, 1.0):
            updates, state = tx.update({"a": size * jnp.arange(1.0, 4)}, state, params)
            total += updates["a"].sum()
        return total

    assert all(np.isfinite(through(scale)) for scale in (1.0, 1e5, 0.0))


START = 1000


def table():
    """Norms of mean 1 and deviation 0.1, and what happens from step START on."""
    rows = []

    def add(name, norms, losses=None):
        _, (_, states) = run(norms, losses)
        skipped = np.flatnonzero(states.last_skipped[START:])
        last = skipped[-1] + 1 if skipped.size else "-"
        before = states.mean[START - 1, 0], states.deviation[START - 1, 0]
        after = states.mean[START + 500, 0], states.deviation[START + 500, 0]
        growth = [f"{new / old:.3g}" for new, old in zip(after, before, strict=True)]
        rows.append(f"| {name} | {skipped.size} | {last} | {' | '.join(growth)} |")

    def times(factor, num_steps=3000):
        norms = noisy(START + 3000)
        norms[START : START + num_steps] *= factor
        return norms

    add("nothing", times(1))
    for factor in ("3", "10", "1e6"):
        add(f"one norm, {factor} times as large", times(float(factor), 1))
    for factor in ("3", "10", "1e6"):
        add(f"20 in a row, {factor} times as large", times(float(factor), 20))
    add("20 in a row, NaN", times(NAN, 20))
    for factor in ("1.5", "3", "10", "1e3", "1e6"):
        add(f"all from then on, {factor} times as large", times(float(factor)))
    climb = times(1)
    climb[START:] *= np.minimum(1.01 ** np.arange(3000), 1e3)
    add("a rise by 1 % a step to 1e3 times as large", climb)
    add("all from then on, a tenth as large", times(0.1))
    losses = np.ones(START + 3000)
    losses[START] = NAN
    add("one loss, NaN", times(1), losses)
    return [
        "| from step 1000 on | skipped | the last after | mean | deviation |",
        "|---|---|---|---|---|",
        *rows,
    ]


def test_the_docs_show_what_is_skipped():
    """Printed by `python tests/test_skip_spikes.py`."""
    tables = Path(__file__).parents[1] / "docs" / "methods" / "tables"
    lines = (tables / "skip_spikes_skipped.md").read_text().splitlines()
    rows = table()
    assert lines[lines.index(rows[0]) :] == rows


def test_a_nan_at_the_first_step_is_as_if_it_had_not_been():
    norms = np.r_[NAN, noisy(200)]
    norms[150] *= 100
    _, (_, states) = run(norms)
    _, (_, without) = run(norms[1:])
    np.testing.assert_array_equal(states.mean[1:], without.mean)
    np.testing.assert_array_equal(states.last_skipped[1:], without.last_skipped)
    assert states.num_skipped[-1] == 2


def test_training_without_noise_is_not_stopped():
    """A norm that falls, stays, and slowly rises has hardly any deviation."""
    steps = np.arange(3000)
    falling = np.exp(-steps / 300)
    rising = np.exp(np.maximum(steps - 1500, 0) / 1000)
    _, (_, states) = run(falling)
    assert states.num_skipped[-1] == 0
    _, (_, states) = run(rising)
    assert states.num_skipped[-1] == 0


def test_a_level_that_was_zero_can_be_left():
    """No statistic of zeros may forbid everything else, of the loss either."""
    norms, losses = np.zeros(400), np.zeros(400)
    norms[200:], losses[300:] = 1.0, 1.0
    _, (_, states) = run(norms, losses)
    assert states.num_skipped[-1] == 0


def test_a_resumed_run_equals_the_uninterrupted_one():
    """The moments, counters and statistics survive a skipped step."""
    tx = skip_spikes(optax.adamw(1e-2), warmup_steps=2)
    update = jax.jit(tx.update)
    params = gradients(100)

    def train(state, steps):
        history = []
        for step in steps:
            scale = {3: 1e5, 5: NAN}.get(step, 1.0)
            grads = jax.tree.map(lambda g, scale=scale: scale * g, gradients(step))
            updates, state = update(grads, state, params, value=jnp.float32(step))
            history.append(updates)
        return history, state

    whole, end = train(tx.init(params), range(8))
    _, halfway = train(tx.init(params), range(4))
    template = tx.init(params)
    leaves = [np.asarray(x).copy() for x in jax.tree.leaves(halfway)]
    restored = jax.tree.unflatten(jax.tree.structure(template), leaves)
    rest, resumed_end = train(restored, range(4, 8))
    assert_trees_equal(rest, whole[4:])
    assert_trees_equal(resumed_end, end)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"max_deviation": 1.0}, r"max_deviation must be .* above 1; got 1\.0"),
        ({"decay": 1.0}, r"decay must be .* at least 0 and below 1; got 1\.0"),
        ({"warmup_steps": -1}, "warmup_steps must be .* at least 0; got -1"),
    ],
)
def test_bad_arguments_raise(kwargs, match):
    with pytest.raises(ValueError, match=match):
        skip_spikes(optax.sgd(1.0), **kwargs)


@pytest.mark.parametrize(
    "wrap", [lambda tx: tx, lambda tx: tx.gradient_transformation()]
)
def test_what_update_is_given_reaches_the_optimizer_within_multi_steps(wrap):
    params = {"kernel": jnp.array([[3.0, -3.0], [3.0, -3.0]])}
    inner = optax.chain(stablegrad(None), optax.sgd(1.0))
    tx = skip_spikes(wrap(optax.MultiSteps(inner, 1)))
    updates, _ = tx.update(params, tx.init(params), params, prediction_grad_std=0.5)
    np.testing.assert_allclose(updates["kernel"], -params["kernel"] / 6, rtol=1e-6)


@pytest.mark.parametrize("number", [float, np.float16, np.float32, np.float64])
def test_a_loss_may_be_any_number(number):
    params = {"kernel": jnp.eye(2)}
    tx = skip_spikes(optax.sgd(0.1))
    for loss, num_skipped in ((-1, 0), ("nan", 1)):
        _, state = tx.update(params, tx.init(params), params, value=number(loss))
        assert state.num_skipped == num_skipped
    _, state = tx.update(params, tx.init(params), params, value=-1)
    assert state.num_skipped == 0


@pytest.mark.parametrize("inner", [optax.adam, None, 1e-3])
def test_what_is_no_transformation_raises(inner):
    with pytest.raises(ValueError, match="inner must be an"):
        skip_spikes(inner)


if __name__ == "__main__":
    print(*table(), sep="\n")

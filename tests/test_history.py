"""clip_by_history against a literal reference, and its edges."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stablegrad_optax import clip_by_history, scale_factors


class Reference:
    """Computes AdaGC's Algorithm 1 in float64, with this package's edges."""

    def __init__(
        self,
        max_ratio=1.05,
        *,
        decay=0.98,
        warmup_steps=100,
        warmup_norm=1.0,
    ):
        self.max_ratio, self.decay = max_ratio, decay
        self.warmup_steps, self.warmup_norm = warmup_steps, warmup_norm
        self.means, self.step = {}, 0

    def __call__(self, grads):
        norms = {name: np.linalg.norm(np.float64(g)) for name, g in grads.items()}
        norms = {k: n for k, n in norms.items() if np.isfinite(n) and n > 0}
        total = np.sqrt(sum(n**2 for n in norms.values()))
        factors = {name: self.factor(name, n, total) for name, n in norms.items()}
        self.step += bool(norms)
        return {k: np.float64(g) * factors.get(k, 1) for k, g in grads.items()}

    def factor(self, key, norm, total):
        mean = self.means.get(key)
        if self.step < self.warmup_steps:
            factor = min(self.warmup_norm / total, 1)
            clipped = factor * norm
            self.means[key] = clipped if mean is None else min(mean, clipped)
        elif mean is None:
            factor, self.means[key] = 1, norm
        else:
            factor = min(self.max_ratio * mean / norm, 1)
            clipped = factor * norm
            self.means[key] = self.decay * mean + (1 - self.decay) * clipped
        return factor


@functools.cache
def updater(**kwargs):
    return jax.jit(clip_by_history(**kwargs).update)


def run(norms, **kwargs):
    """Returns the norms of the updates for a sequence of one-element gradients."""
    tx = clip_by_history(**kwargs)

    def step(state, norm):
        updates, state = tx.update(norm[None], state)
        return state, updates[0]

    norms = jnp.asarray(norms, jnp.float32)
    return np.asarray(jax.lax.scan(step, tx.init(norms[:1]), norms)[1])


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"warmup_steps": 20},
        {"warmup_steps": 0},
        {"warmup_steps": 30, "warmup_norm": 50.0, "max_ratio": 2.0, "decay": 0.5},
        {"max_ratio": 1.0, "decay": 0.0, "warmup_steps": 1},
        {"warmup_steps": 20, "dtype": "float64"},
    ],
    ids=str,
)
def test_equals_a_literal_reference(kwargs):
    kwargs = dict(kwargs)
    dtype = kwargs.pop("dtype", "float32")
    rng = np.random.default_rng(0)
    shapes = {"a": (4, 5), "b": (3,), "c": ()}
    with jax.enable_x64(dtype == "float64"):
        tx, reference = clip_by_history(**kwargs), Reference(**kwargs)
        update = jax.jit(tx.update)
        state = tx.init({name: jnp.zeros(s, dtype) for name, s in shapes.items()})
        for step in range(100):
            grads = {
                name: np.asarray(rng.normal(size=shape) * 10 ** rng.normal(), dtype)
                for name, shape in shapes.items()
            }
            if step % 7 == 3:
                grads["a"] = np.zeros_like(grads["a"])
            if step % 11 == 5 or step < 3:  # not before the fourth
                grads["b"] = grads["b"] * np.nan
            updates, state = update(grads, state)
            expected = reference(grads)
            for name in shapes:
                np.testing.assert_allclose(updates[name], expected[name], rtol=2e-6)


def test_a_spike_enters_the_mean_as_what_was_let_through():
    norms = np.ones(300)
    norms[[150, 151]] = 1e6, 1e37
    out = run(norms)
    expected = np.ones(300)
    mean = 0.98 + 0.02 * 1.05
    expected[[150, 151]] = 1.05, 1.05 * mean
    np.testing.assert_allclose(out, expected, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-36, 1e-20, 1e18, 1e36])
def test_the_history_knows_no_scale(scale):
    norms = np.r_[np.ones(5), 10.0, np.ones(5)]
    expected = run(norms, warmup_steps=0)
    np.testing.assert_allclose(
        run(norms * scale, warmup_steps=0), expected * np.float32(scale), rtol=1e-5
    )
    assert expected[5] == pytest.approx(1.05)


def test_it_never_enlarges():
    norms = 10.0 ** np.random.default_rng(0).normal(0, 2, 1000)
    for kwargs in ({}, {"warmup_steps": 0}):
        assert np.all(run(norms, **kwargs) <= np.float32(norms))


def steps_to_follow(rise, **kwargs):
    """Counts the steps until a lasting rise of the norm passes unclipped."""
    out = run(np.r_[np.ones(101), np.full(20_000, rise)], **kwargs)[101:]
    return 1 + int(np.argmax(out >= rise * (1 - 1e-6)))


def test_how_long_a_lasting_rise_is_cut():
    """As the docstring has it: ln(10 / 1.05) / ln(1.001) and ln(10 / 2) / ln(1.02)."""
    at_most = 0.02 * 0.05
    assert steps_to_follow(10.0) == pytest.approx(
        np.log(10 / 1.05) / np.log1p(at_most), abs=2
    )
    assert 2200 < steps_to_follow(10.0) < 2300
    assert steps_to_follow(10.0, max_ratio=2.0) == pytest.approx(
        np.log(10 / 2) / np.log(1.02), abs=2
    )


def test_a_leaf_that_the_warmup_never_saw_starts_from_its_first_norm():
    grads = {"a": jnp.ones(1), "late": jnp.zeros(1)}
    state = clip_by_history(warmup_steps=2).init(grads)
    update = updater(warmup_steps=2)
    for _ in range(3):
        updates, state = update(grads, state)
    grads["late"] = jnp.full(1, 7.0)
    updates, state = update(grads, state)
    assert updates["late"] == 7
    updates, state = update(grads | {"late": jnp.full(1, 70.0)}, state)
    assert updates["late"] == pytest.approx(7 * 1.05)
    np.testing.assert_array_equal(state.scale_factors < 1, [False, True])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("num_steps", [0, 5], ids=["warming", "warm"])
def test_a_leaf_that_is_not_finite_harms_itself_alone(bad, num_steps):
    """This holds in the warm-up too, whose norm is that of all leaves."""
    grads = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([1.0])}
    tx = clip_by_history(warmup_steps=3)
    state = tx.init(grads)
    update = updater(warmup_steps=3)
    for _ in range(num_steps):
        _, state = update(grads, state)
    updates, new = update(grads | {"b": jnp.array([bad])}, state)
    assert not np.isfinite(updates["b"]).any()
    expected, _ = update(grads | {"b": jnp.zeros(1)}, state)
    np.testing.assert_array_equal(updates["a"], expected["a"])
    assert new.norm_mean[1] == state.norm_mean[1]


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.98])
def test_a_small_norm_after_a_giant_keeps_its_digits(decay):
    """The mean of 1.4e9 and then 1.4, which a difference of the two would cancel."""
    means = [1.4e9]
    for norm in (1.4, 1.4e9):
        means.append(decay * means[-1] + (1 - decay) * min(norm, 1.05 * means[-1]))
    norms = run([1.4e9, 1.4, 1.4e9], warmup_steps=0, decay=decay)
    expected = [1.4e9, 1.4, min(1.4e9, 1.05 * means[1])]
    np.testing.assert_allclose(norms, expected, rtol=1e-6)


def test_factors_and_what_was_limited():
    grads = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([1.0])}
    tx = clip_by_history(warmup_steps=0)
    _, state = updater(warmup_steps=0)(grads, tx.init(grads))
    assert scale_factors(state, grads) == {"a": 1.0, "b": 1.0}
    spike = {"a": grads["a"] * 10, "b": grads["b"]}
    _, state = updater(warmup_steps=0)(spike, state)
    assert scale_factors(state, grads) == {"a": pytest.approx(0.105), "b": 1.0}
    np.testing.assert_array_equal(state.scale_factors < 1, [True, False])


def test_after_adam_it_bounds_the_update():
    """Adam takes a 30 times larger step where a gradient follows tiny ones."""
    tx = optax.chain(optax.scale_by_adam(), clip_by_history(warmup_steps=0))
    grads = np.full(200, 1e-6)
    grads[-1] = 1.0

    def largest(tx):
        def step(state, g):
            updates, state = tx.update(g[None], state)
            return state, updates[0]

        grads32 = jnp.asarray(grads, jnp.float32)
        return jax.lax.scan(step, tx.init(grads32[:1]), grads32)[1].max()

    assert largest(optax.scale_by_adam()) > 1.3
    assert largest(tx) < 1.06


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"max_ratio": 0.9}, r"max_ratio must be .* at least 1; got 0\.9"),
        ({"decay": 1.0}, r"decay must be .* at least 0 and below 1; got 1\.0"),
        ({"warmup_steps": -1}, "warmup_steps must be .* at least 0; got -1"),
        ({"warmup_norm": 0.0}, r"warmup_norm must be .* above 0; got 0\.0"),
    ],
)
def test_bad_arguments_raise(kwargs, match):
    with pytest.raises(ValueError, match=match):
        clip_by_history(**kwargs)

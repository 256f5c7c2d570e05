"""Tests of what the first steps add to a report: when and where trouble began."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stablegrad_optax import gradient_report, scale_factors, stablegrad


def layers(*stds):
    """Weights whose gradients have these standard deviations."""
    kernel = np.random.default_rng(0).normal(size=(5, 5))
    kernel = (kernel - kernel.mean()) / kernel.std()
    return {f"l{i}": {"kernel": std * kernel} for i, std in enumerate(stds)}


def constant(**factors):
    return {f"{name}/kernel": np.full(20, factor) for name, factor in factors.items()}


def diverging_run(num_steps):
    """Trains a residual network of squares that explodes under momentum."""
    params = {
        f"l{i}": {"kernel": 0.3 * jax.random.normal(jax.random.key(i), (8, 8))}
        for i in range(4)
    }

    def loss(params):
        y = 0.3 * jnp.ones((16, 8))
        for layer in params.values():
            y = (y @ layer["kernel"]) ** 2 + y
        return jnp.mean((y - 1) ** 2)

    tx = optax.chain(stablegrad(), optax.sgd(1.0, 0.9))

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), (state, value)

    start = params, tx.init(params)
    _, (states, losses) = jax.lax.scan(step, start, length=num_steps)
    return jax.grad(loss)(params), scale_factors(states, params), losses


def test_a_run_that_became_nan_is_not_fine():
    grads, history, losses = diverging_run(100)
    assert gradient_report(grads).verdict == "no trouble seen"
    assert not np.isfinite(losses[1:]).any()
    report = gradient_report(grads, history=history)
    assert report.verdict == "non-finite"
    assert report.trouble_step == 1
    assert report.trouble_array == "l0/kernel"
    assert report.history.nonfinite_steps == 99
    said = " ".join(str(report).split())
    assert "not finite at 99 of them, first at step 1 in l0/kernel" in said


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_any_factor_that_is_not_finite_or_zero_counts(bad):
    history = constant(l0=2.0, l1=2.0)
    history["l1/kernel"][7] = bad
    report = gradient_report(layers(1.0, 1.0), history=history)
    assert report.verdict == "non-finite"
    assert (report.trouble_step, report.trouble_array) == (7, "l1/kernel")
    every = {name: np.full(5, bad) for name in history}
    report = gradient_report(layers(1.0, 1.0), history=every)
    assert report.verdict == "non-finite"
    assert report.history.nonfinite_steps == 5


@pytest.mark.parametrize(
    "history",
    [
        constant(l0=2.0),  # of a stablegrad with a mask
        constant(l0=1.0, l1=1.0),  # a factor of 1 says nothing
        constant(l0=2.0, l1=1.0),
    ],
)
def test_a_history_that_says_little_overrides_nothing(history):
    grads = layers(1.0, 1e-5)
    assert gradient_report(grads).verdict == "unbalanced between layers"
    report = gradient_report(grads, history=history)
    assert report.verdict == "unbalanced between layers"
    assert not report.history.is_complete
    assert "nan" not in str(report)
    assert "the gradient itself counts too" in " ".join(str(report).split())
    large = gradient_report(layers(1e5, 1e5), history=history)
    assert large.verdict == "large"


def test_a_history_of_some_arrays_may_add_trouble():
    history = {"l0/kernel": np.geomspace(1e-6, 1.5, 50)}
    report = gradient_report(layers(1.0, 1.0), history=history)
    assert report.verdict == "exploding at initialization"
    assert (report.trouble_step, report.trouble_array) == (0, "l0/kernel")


def test_a_complete_history_decides():
    report = gradient_report(layers(1.0, 1e-5), history=constant(l0=2.0, l1=3.0))
    assert report.history.is_complete
    assert report.verdict == "no trouble seen"
    assert report.trouble_step is None


def test_the_step_from_which_the_ratio_stays_large():
    history = constant(l0=2.0, l1=2.0)
    history["l1/kernel"] = 2.0 * np.geomspace(1, 1e6, 20)  # the spread falls
    report = gradient_report(layers(1.0, 1.0), history=history)
    assert report.verdict == "exploding at initialization"  # a fall by 1e6 is graver
    rising = {"l0/kernel": history["l1/kernel"][::-1], "l1/kernel": np.full(20, 2e6)}
    report = gradient_report(layers(1.0, 1.0), history=rising)
    assert report.verdict == "unbalanced between layers"
    ratio = 2e6 / rising["l0/kernel"]
    assert report.trouble_step == np.flatnonzero(ratio > 1e3)[0]
    assert report.trouble_array == "l1/kernel"
    assert f"from step {report.trouble_step} on" in " ".join(str(report).split())


def test_a_dict_for_json():
    grads = {**layers(1.0, 1e-5), "scale": np.ones(1), "zero": np.zeros((2, 2))}
    history = {"l0/kernel": [1.0, 2.0, np.nan]}
    for report in (
        gradient_report(grads),
        gradient_report(grads, history=history),
        gradient_report({"zero": np.zeros((2, 2))}),
        gradient_report({"nan": np.full((2, 2), np.nan)}),
    ):
        flat = report.to_dict()
        assert json.loads(json.dumps(flat, allow_nan=False)) == flat
    flat = gradient_report(grads, history=history).to_dict()
    assert flat["verdict"] == "non-finite"
    assert (flat["trouble_step"], flat["trouble_array"]) == (2, "l0/kernel")
    assert flat["history/nonfinite_steps"] == 1


def test_a_history_of_stacked_layers():
    grads = {"kernel": np.stack([layers(1.0)["l0"]["kernel"]] * 3)}
    history = np.full((20, 3), 2.0)
    history[:, 2] = np.geomspace(1e-6, 2, 20)
    report = gradient_report(grads, num_stacked_axes=1, history={"kernel": history})
    assert report.verdict == "exploding at initialization"
    assert report.trouble_array == "kernel[2]"
    twice = {"kernel": np.stack([grads["kernel"]] * 2)}
    six = {"kernel": np.concatenate([history] * 2, 1)}
    report = gradient_report(twice, num_stacked_axes=2, history=six)
    assert report.trouble_array == "kernel[0, 2]"
    assert report.history.is_complete
    for num_stacked_axes in (None, 2):
        with pytest.raises(ValueError, match=r"f\[steps, .* got shape \(20, 3\)"):
            gradient_report(
                twice, num_stacked_axes=num_stacked_axes, history={"kernel": history}
            )


def test_a_history_from_a_python_loop():
    params, grads = layers(2.0, 2.0), layers(2.0, 2.0)
    tx = stablegrad()
    state, steps = tx.init(params), []
    for scale in (1e5, 1.0, 1.0, 1.0):
        scaled = jax.tree.map(lambda g, scale=scale: scale * g, grads)
        _, state = tx.update(scaled, state, params)
        steps.append(scale_factors(state, params))
    history = {name: [step[name] for step in steps] for name in steps[0]}
    report = gradient_report(grads, history=history)
    assert report.verdict == "exploding at initialization"


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ([1, 2], "history must be a dict of factors, .* got a list"),
        (3.0, "got a float"),
        ({"l0/kernel": ["a", "b"]}, "must hold numbers"),
        ({"l0/kernel": [1.0, -2.0]}, "factors of at least 0; got -2"),
        ({"l0/kernel": np.ones((3, 2, 2))}, r"got shape \(3, 2, 2\)"),
        ({"l0/kernel": [1.0]}, "of two steps at least"),
    ],
)
def test_bad_histories_raise(history, message):
    with pytest.raises(ValueError, match=message):
        gradient_report(layers(1.0, 1.0), history=history)

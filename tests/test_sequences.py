"""Sequences: data, models in few bits, disturbances, training, the page of spikes."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from benchmarks.lib import runs
from benchmarks.lib.curves import Curves, curves_of
from benchmarks.lib.grid import run_grid
from benchmarks.lib.optimizers import Optimizer
from benchmarks.lib.train import moments, schedule
from benchmarks.report import pages
from benchmarks.suites import spikes, spikes_page
from benchmarks.tasks import supervised
from benchmarks.tasks.disturbances import DISTURBANCES
from benchmarks.tasks.sequences import data
from benchmarks.tasks.sequences.models import (
    E1M2_LARGEST,
    E1M2_SPACING,
    fp4_dot_general,
    to_e1m2,
)


def settings_of(task, **others):
    """Returns the settings of the tiny model, one update of four examples."""
    (group, *_) = spikes.PRESETS["smoke"].groups
    plain = {"task": task, "size": "tiny", "steps": 1, "spike": 0, "batch": 4}
    return {**group[0].settings, **plain, **others}


def training_of(task, **others):
    return spikes.training(settings_of(task, **others), "reported")


# Disturbances and spikes are values: one program serves all of them.
gradient_of = jax.jit(lambda task, *where: task.gradient(*where))


@jax.jit
def _scores(task, params, held_out):
    return task.score(params, None, held_out)


def loss_of(training, params):
    return float(_scores(training.task, params, training.held_out)["loss"])


# Data


def test_text_is_split_by_file_and_always_alike():
    parts = data.text()
    whole = sum(map(len, parts.values()))
    assert whole > 1e6
    for split in ("validation", "test"):
        assert 0.01 < len(parts[split]) / whole < 0.1
    # A line of a file that is surely somewhere, and in one split alone.
    line = b"class OrderedDict(dict):"
    assert sum(line in part.tobytes() for part in parts.values()) == 1
    data.text.cache_clear()
    again = data.text()
    assert all((again[split] == parts[split]).all() for split in parts)


def test_series_have_range_1_where_they_train_and_no_gaps():
    lengths = {name: len(values) for name, values in data.series().items()}
    assert lengths == {"sunspots": 309, "elnino": 732, "co2": 2284}
    for values in data.series().values():
        train_part = values[: round(0.7 * len(values))]
        assert np.ptp(train_part) == pytest.approx(1, rel=1e-5)
        assert train_part.mean() == pytest.approx(0, abs=1e-5)
        assert np.isfinite(values).all()


def test_no_window_of_training_holds_a_value_that_is_predicted_elsewhere():
    parts = data.windows(np.arange(100.0), context=8, horizon=4)
    last_seen = max(parts["train"][0].max(), parts["train"][1].max())
    assert last_seen == 69
    assert parts["validation"][1].min() == 70
    assert parts["validation"][1].max() == 79
    assert parts["test"][1].min() == 80
    assert parts["test"][1].max() == 99
    for past, future in parts.values():
        np.testing.assert_array_equal(past[:, -1] + 1, future[:, 0])


# FP4


def test_e1m2_is_the_nearest_of_its_fifteen_values():
    # From the definition: exponent bias 1, and no implicit one at exponent 0.
    positive = [m / 4 for m in range(4)] + [1 + m / 4 for m in range(4)]
    grid = np.array(sorted({-v for v in positive} | set(positive)))
    assert len(grid) == 15
    assert grid.max() == E1M2_LARGEST
    assert np.diff(grid).tolist() == [E1M2_SPACING] * 14
    x = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)
    scale = np.abs(x).max() / grid.max()
    nearest = grid[np.abs(x[..., None] / scale - grid).argmin(-1)] * scale
    np.testing.assert_allclose(to_e1m2(x), nearest, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(to_e1m2(jnp.zeros(3)), 0)


def test_fp4_products_are_of_quantized_operands_and_differentiate_straight_through():
    rng = np.random.default_rng(1)
    x, w = (rng.normal(size=(4, 4)).astype(np.float32) for _ in range(2))
    dims = (((1,), (0,)), ((), ()))
    expected = np.asarray(to_e1m2(x)) @ np.asarray(to_e1m2(w))
    np.testing.assert_allclose(fp4_dot_general(x, w, dims), expected, rtol=1e-5)
    grad = jax.grad(lambda w: fp4_dot_general(x, w, dims).sum())(w)
    expected = np.asarray(to_e1m2(x)).T @ np.ones((4, 4))
    np.testing.assert_allclose(grad, expected, rtol=1e-5)


@pytest.fixture(scope="module")
def weights():
    """Returns weights of the tiny language model."""
    return supervised._init(training_of("lm").task, jax.random.key(0))


def test_equal_weights_lose_little_in_float16_and_not_the_same_in_fp4(weights):
    losses = {}
    for numbers in ("float32", "float16", "fp4"):
        losses[numbers] = loss_of(training_of("lm", numbers=numbers), weights)
    # At the start all logits are small: the loss is near that of 256 equal chances.
    assert losses["float32"] == pytest.approx(np.log(256), rel=0.1)
    assert losses["float16"] == pytest.approx(losses["float32"], rel=1e-2)
    assert len(set(losses.values())) == 3


def test_a_decoder_does_not_see_what_it_predicts(weights):
    training = training_of("lm")
    tokens = training.held_out.inputs[:2]
    changed = tokens.copy()
    changed[:, 5] = (changed[:, 5] + 1) % 256
    apply = jax.jit(training.task.model.apply)
    one, two = (apply({"params": weights}, t) for t in (tokens, changed))
    np.testing.assert_allclose(one[:, :5], two[:, :5], atol=1e-6)
    assert (jnp.abs(one - two)[:, 5:].max(-1) > 1e-6).any()


# Disturbances


def test_noise_meets_five_per_cent_of_the_inputs():
    inputs = jnp.zeros((100, 200))
    noisy = DISTURBANCES["noise of 2 ranges"].disturb_inputs(
        inputs, jnp.array(False), jax.random.key(0)
    )
    assert float((noisy != 0).mean()) == pytest.approx(0.05, rel=0.1)
    assert float(noisy[noisy != 0].std()) == pytest.approx(2, rel=0.1)


def gradient(weights, disturbance, step):
    """Computes the gradient of a step's batch; the second update is the spike."""
    task = training_of("lm", disturbance=disturbance, spike=2).task
    return gradient_of(task, weights, None, jax.random.key(1), step)


def test_a_spike_is_one_update_and_a_factor_of_the_whole_gradient(weights):
    for step, factor in ((0, 1), (1, 100), (2, 1)):
        clean, found = (gradient(weights, d, step) for d in ("none", "loss x100"))
        for got, of_clean in zip(
            *map(jax.tree.leaves, (found.grads, clean.grads)), strict=True
        ):
            np.testing.assert_allclose(got, factor * of_clean, rtol=1e-3, atol=1e-5)


def test_a_spike_may_last_and_nothing_else_is_one():
    for name, last in (("loss x1e4", 7), ("loss x1e4, 10 updates", 16)):
        disturbance = DISTURBANCES[name]
        found = [bool(disturbance.is_spike(update, 7)) for update in range(30)]
        assert found == [7 <= update <= last for update in range(30)]
        assert not any(disturbance.is_spike(update, 0) for update in range(30))


@pytest.mark.parametrize("shape", [(64,), (8, 16)])
def test_wrong_labels_are_the_right_ones_of_others(shape):
    targets = jnp.arange(np.prod(shape)).reshape(shape)
    wrong = DISTURBANCES["wrong labels"].disturb_targets(
        targets, True, jax.random.key(0)
    )
    assert (wrong != targets).mean() > 0.9
    np.testing.assert_array_equal(jnp.sort(wrong.ravel()), targets.ravel())
    for name, is_spike in (("wrong labels", False), ("loss x1e4", True)):
        same = DISTURBANCES[name].disturb_targets(targets, is_spike, jax.random.key(0))
        np.testing.assert_array_equal(same, targets)


def test_the_gradient_and_the_predictions_std_are_those_of_the_loss(weights):
    """Against plain autodiff on the same batch, and dL/dy = (softmax - one-hot) / n."""
    task, found = training_of("lm").task, gradient(weights, "none", 0)
    key_batch, _ = jax.random.split(jax.random.fold_in(jax.random.key(1), 0))
    inputs, targets = task.sample(key_batch, 4)

    def loss(params):
        logits = task.model.apply({"params": params}, inputs)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)
        return -chosen.mean(), logits

    expected, logits = jax.jit(jax.grad(loss, has_aux=True))(weights)
    for got, one in zip(*map(jax.tree.leaves, (found.grads, expected)), strict=True):
        np.testing.assert_allclose(got, one, rtol=1e-3, atol=1e-6)
    dy = (jax.nn.softmax(logits) - jax.nn.one_hot(targets, 256)) / targets.size
    std = found.probes["prediction"]
    assert float(std) == pytest.approx(4 * float(dy.std()), rel=1e-3)


# Training


@pytest.mark.slow
def test_training_is_adam_on_the_named_batches():
    seed, steps = 3, 4
    training = training_of("forecast", steps=steps)
    (curves,) = curves_of(moments([training], [0.01], [seed]))
    task, (past, future, _) = training.task, training.held_out
    _, key_data = jax.random.split(jax.random.key(seed))
    params, _ = task.init(jax.random.key(seed))
    num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    tx = optax.adam(schedule(steps, 0.01, warm_up=True))
    state = tx.init(params)

    def loss(params, past, future):
        prediction = task.model.apply({"params": params}, past)
        return jnp.mean((prediction - future) ** 2)

    @jax.jit
    def step_of(params, state, index):
        key, _ = jax.random.split(jax.random.fold_in(key_data, index))
        updates, state = tx.update(jax.grad(loss)(params, *task.sample(key, 4)), state)
        return optax.apply_updates(params, updates), state

    for index in range(steps):
        params, state = step_of(params, state, index)
    rmse = float(loss(params, past, future)) ** 0.5
    assert curves.scores["score"][-1] == pytest.approx(rmse, rel=1e-3)
    mean_error = np.mean((future - past.mean(1, keepdims=True)) ** 2) ** 0.5
    assert curves.scores["error"][-1] == pytest.approx(rmse / mean_error, rel=1e-3)
    assert curves.num_params == num_params


@pytest.mark.slow
def test_a_step_that_overflows_float16_is_skipped_and_the_next_is_not():
    """Loss times 1e4 in the first update, whose scale is 2^16 already."""
    training = training_of(
        "lm", numbers="float16", disturbance="loss x1e4", spike=1, steps=2
    )
    training = dataclasses.replace(
        training,
        rule=dataclasses.replace(
            training.rule, optimizer=Optimizer.named("GradientStabilizer + Adam")
        ),
    )
    at_start = loss_of(training, training.task.init(jax.random.key(0))[0])
    (curves,) = curves_of(moments([training], [1e-3], [0]))
    assert curves.steps.tolist() == [1, 2]
    losses = curves.scores["loss"]
    assert losses[0] == pytest.approx(at_start, abs=1e-6)
    assert losses[1] != pytest.approx(at_start, abs=1e-6)


def test_loss_scaling_changes_no_gradient():
    """Powers of two, which it multiplies by, are exact in float32."""
    task = training_of("lm").task
    scaling = dataclasses.replace(task, loss_scaling=True)
    found = []
    for one in (task, scaling):
        params, state = one.init(jax.random.key(0))
        found.append(gradient_of(one, params, state, jax.random.key(1), 0))
    plain, scaled = found
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-8)
    jax.tree.map(close, scaled.grads, plain.grads)
    close(scaled.probes["prediction"], plain.probes["prediction"])


def test_records_stand_around_a_spike():
    steps = spikes.recorded_steps(700, 200)
    assert {199, 200, 249, 699, 700} <= set(steps)
    assert steps == sorted(set(steps))
    assert max(spikes.recorded_steps(10, 5)) == 10


def test_a_task_names_what_it_lacks():
    with pytest.raises(ValueError, match="resnet20 is in float32 alone; got fp4"):
        training_of("resnet20", numbers="fp4")


def test_digits_that_are_guessed_have_failed():
    training = training_of("resnet20")
    params, _ = training.task.init(jax.random.key(0))
    score = jax.jit(training.task.score)(params, None, training.held_out)
    assert float(score["error"]) == pytest.approx(1 - float(score["score"]))
    (group, *_) = spikes.PRESETS["smoke"].groups
    run = group[0].reported(spikes.PRESETS["smoke"].protocol, [])[0]
    run = dataclasses.replace(run, settings=settings_of("resnet20"))
    for accuracy, failed in ((0.15, True), (0.1525, False)):
        scores = {"loss": 1.0, "score": accuracy, "error": np.float32(1 - accuracy)}
        scores = {name: np.array([value]) for name, value in scores.items()}
        curves = Curves(np.array([1]), scores, np.ones(1), np.ones((1, 1)), 1.0, 1)
        assert spikes.keep(run, curves)["failed"] == failed


# The page, of two methods of the grid "cpu" as if they had been run


def invented(runs, tick):
    """Rates from 0.1 diverge but for ZClip; a spike costs 2 nats, then half a nat."""
    records = []
    for run in runs:
        steps, spike = run.settings["steps"], run.settings["spike"]
        stops = np.array(spikes.recorded_steps(steps, spike))
        loss = np.full(len(stops), 2.0)
        if run.settings["disturbance"] != "none" and spike:
            loss += np.where(stops >= spike, 0.5, 0) + np.where(stops == spike, 1.5, 0)
        if run.learning_rate >= 0.1 and not run.settings["optimizer"].startswith(
            "ZClip"
        ):
            loss[-1] = np.nan
        scores = {"loss": loss, "score": loss / 4, "error": loss / 4}
        curves = Curves(stops, scores, loss, np.ones((len(stops), 1)), 1.0, 1)
        records.append(spikes.keep(run, curves))
    return records


def test_the_page_says_what_the_runs_hold(tmp_path):
    path, cpu = tmp_path / "spikes.jsonl", spikes.PRESETS["cpu"]
    short = dataclasses.replace(
        cpu,
        groups=[
            group
            for group in cpu.groups
            if group[0].settings["optimizer"] in ("Adam", "ZClip + Adam")
        ],
    )
    assert run_grid(short, invented, path, console=Console(quiet=True)) == 0
    pages.write(spikes_page.PAGE, runs.read(path), spikes.SUITE, tmp_path)
    figures = [f"spikes_cpu_{name}.png" for name in ("rates", "recovery")]
    text = (tmp_path / "spikes.md").read_text()
    for word in (*figures, "reported seeds 100 to 102"):
        assert word in text
    assert set(figures) <= {file.name for file in tmp_path.iterdir()}
    # A spike costs two nats at once, then half a nat.
    assert "| Adam | 0/3 | 2.000 | 0.500 | 0.500 |" in text
    # Rates up to 0.03 are good; at higher ones Adam diverges, and ZClip never does.
    assert "| Adam | 0.5 | 0.5 to 0.5 | 0/3 | 1.0e-03 | 30+ |" in text
    assert "| ZClip + Adam | 0.5 | 0.5 to 0.5 | 0/3 | 1.0e-03 | 1e+03+ |" in text

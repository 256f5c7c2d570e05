"""Spikes: data, models in few bits, ZClip, arms, training, the command, its report."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import report, runs
from benchmarks.spikes import __main__ as command
from benchmarks.spikes import data
from benchmarks.spikes.arms import ARMS, OPTIMIZERS, transformation
from benchmarks.spikes.disturbances import DISTURBANCES
from benchmarks.spikes.models import (
    E1M2_LARGEST,
    E1M2_SPACING,
    fp4_dot_general,
    to_e1m2,
)
from benchmarks.spikes.presets import PRESETS
from benchmarks.spikes.tasks import TASKS, task_of
from benchmarks.spikes.train import (
    Curves,
    compute_gradient,
    measure,
    recorded_steps,
    start,
    train,
)
from benchmarks.spikes.zclip import zclip
from benchmarks.vision.train import schedule

pytestmark = pytest.mark.usefixtures("quick_compilation")

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
    """Of the tiny language model."""
    return start(task_of("lm", "tiny", "float32"), jax.random.key(0))


def test_equal_weights_lose_little_in_float16_and_not_the_same_in_fp4(weights):
    losses = {}
    for numbers in ("float32", "float16", "fp4"):
        task = task_of("lm", "tiny", numbers)
        losses[numbers] = float(measure(task, weights, *task.held_out["test"])[0])
    # At the start all logits are small: the loss is near that of 256 equal chances.
    assert losses["float32"] == pytest.approx(np.log(256), rel=0.1)
    assert losses["float16"] == pytest.approx(losses["float32"], rel=1e-2)
    assert len(set(losses.values())) == 3


def test_a_decoder_does_not_see_what_it_predicts(weights):
    task = task_of("lm", "tiny", "float32")
    tokens = task.held_out["test"][0][:2]
    changed = tokens.copy()
    changed[:, 5] = (changed[:, 5] + 1) % 256
    apply = jax.jit(task.model.apply)
    one, two = (apply({"params": weights}, t) for t in (tokens, changed))
    np.testing.assert_allclose(one[:, :5], two[:, :5], atol=1e-6)
    assert (jnp.abs(one - two)[:, 5:].max(-1) > 1e-6).any()


# ZClip


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
    tx = zclip()
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


# Arms

PARAMS = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
GRADS = {"kernel": jnp.arange(6.0).reshape(3, 2), "bias": jnp.array([1e3, -1e-3])}


def updates_of(arm, optimizer, weight_decay=0.0):
    tx = transformation(arm, optimizer, lambda count: 1e-3, weight_decay)

    def first(params, grads, std):
        return tx.update(grads, tx.init(params), params, prediction_std=std)[0]

    return jax.jit(first)(PARAMS, GRADS, 0.3)


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_can_precede_every_optimizer(arm):
    for optimizer in OPTIMIZERS:
        for update in jax.tree.leaves(updates_of(arm, optimizer)):
            assert jnp.isfinite(update).all()
            assert update.any()


def test_decay_is_added_to_what_the_arm_makes_of_the_gradient():
    tx = optax.chain(
        optax.scale(30.0), optax.add_decayed_weights(0.5), optax.adam(1e-3)
    )
    expected, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    found = updates_of("constant factor 30", "Adam", weight_decay=0.5)
    close = partial(np.testing.assert_allclose, rtol=1e-5)
    jax.tree.map(close, found, expected)


def test_unit_norms():
    tx = ARMS["unit norm of each leaf"]()
    grads = {**GRADS, "zero": jnp.zeros(3)}
    updates, _ = tx.update(grads, tx.init(grads))
    norms = jax.tree.map(lambda g: float(jnp.linalg.norm(g)), updates)
    assert norms == pytest.approx({"kernel": 1.0, "bias": 1.0, "zero": 0.0})


# Disturbances


def test_noise_meets_five_per_cent_of_the_inputs():
    inputs = jnp.zeros((100, 200))
    noisy = DISTURBANCES["noise of 2 ranges"].of_inputs(
        inputs, jnp.array(False), jax.random.key(0)
    )
    assert float((noisy != 0).mean()) == pytest.approx(0.05, rel=0.1)
    assert float(noisy[noisy != 0].std()) == pytest.approx(2, rel=0.1)


def gradient(weights, disturbance, is_spike):
    task = task_of("lm", "tiny", "float32")
    key, values = jax.random.key(1), DISTURBANCES[disturbance]
    return compute_gradient(
        task, 4, weights, task.train, key, values, jnp.array(is_spike), None
    )


def test_a_spike_is_one_update_and_a_factor_of_the_whole_gradient(weights):
    clean = gradient(weights, "none", True)
    before = gradient(weights, "loss x100", False)
    spike = gradient(weights, "loss x100", True)
    jax.tree.map(np.testing.assert_array_equal, before, clean)
    for got, of_clean in zip(*map(jax.tree.leaves, (spike, clean)), strict=True):
        np.testing.assert_allclose(got, 100 * of_clean, rtol=1e-3, atol=1e-5)


def test_the_gradient_and_the_predictions_std_are_those_of_the_loss(weights):
    """Against plain autodiff on the same batch, and dL/dy = (softmax - one-hot) / n."""
    task, found = task_of("lm", "tiny", "float32"), gradient(weights, "none", False)
    key_batch, _ = jax.random.split(jax.random.key(1))
    inputs, targets = task.sample(task.train, key_batch, 4)

    def loss(params):
        logits = task.model.apply({"params": params}, inputs)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)
        return -chosen.mean(), logits

    expected, logits = jax.jit(jax.grad(loss, has_aux=True))(weights)
    for got, one in zip(*map(jax.tree.leaves, (found.grads, expected)), strict=True):
        np.testing.assert_allclose(got, one, rtol=1e-3, atol=1e-6)
    dy = (jax.nn.softmax(logits) - jax.nn.one_hot(targets, 256)) / targets.size
    assert float(found.prediction_std) == pytest.approx(4 * float(dy.std()), rel=1e-3)


# Training


def test_training_is_adam_on_the_named_batches():
    task, seed, steps = task_of("forecast", "tiny", "float32"), 3, 4
    curves = train(task, "none", learning_rate=0.01, seed=seed, steps=steps, batch=4)
    key_weights, key_data = jax.random.split(jax.random.key(seed))
    params = start(task, key_weights)
    tx = optax.adam(schedule(steps, 0.01))
    state = tx.init(params)

    @jax.jit
    def step_of(params, state, index):
        key, _ = jax.random.split(jax.random.fold_in(key_data, index))
        past, future = task.sample(task.train, key, 4)

        def loss(params):
            prediction = task.model.apply({"params": params}, past)
            return jnp.mean((prediction - future) ** 2)

        updates, state = tx.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    for index in range(steps):
        params, state = step_of(params, state, index)
    loss, score = measure(task, params, *task.held_out["test"])
    assert float(score) == pytest.approx(float(loss) ** 0.5)
    assert curves.score[-1] == pytest.approx(float(score), rel=1e-3)
    assert curves.num_params == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_a_step_that_overflows_float16_is_skipped_and_the_next_is_not():
    """Loss times 1e4 in the first update, whose scale is 2^16 already."""
    task = task_of("lm", "tiny", "float16")
    options = {"steps": 2, "batch": 4, "loss_scaling": True, "disturbance": "loss x1e4"}
    curves = train(task, "GradientStabilizer", spike=1, **options)
    untrained = start(task, jax.random.split(jax.random.key(0))[0])
    at_start = measure(task, untrained, *task.held_out["test"])[0]
    assert curves.steps.tolist() == [1, 2]
    assert curves.loss[0] == pytest.approx(float(at_start), abs=1e-6)
    assert curves.loss[1] != pytest.approx(float(at_start), abs=1e-6)


def test_records_stand_around_a_spike():
    steps = recorded_steps(700, 200)
    assert {199, 200, 249, 699, 700} <= set(steps)
    assert steps == sorted(set(steps))
    assert max(recorded_steps(10, 5)) == 10


def test_a_task_names_what_it_lacks():
    with pytest.raises(ValueError, match="resnet20 is in float32 alone; got fp4"):
        task_of("resnet20", "tiny", "fp4")


# The command


@pytest.mark.parametrize("name", PRESETS)
def test_presets_name_what_exists(name):
    preset = PRESETS[name]
    entries = [entry for group in preset.groups(name) for entry in group]
    ledger = runs.Ledger(entries, preset.protocol)
    assert len(ledger.missing(entries)) > 0
    keys = {(*entry.settings.values(), *entry.learning_rates) for entry in entries}
    assert len(keys) == len(entries)
    assert not set(preset.protocol.tuning_seeds) & set(preset.protocol.reported_seeds)
    assert len(preset.protocol.reported_seeds) >= (5 if name == "gpu" else 3)
    for cell in preset.cells:
        assert cell.task in TASKS
        assert cell.task != "resnet20" or cell.numbers == "float32"
        assert cell.task != "lm" or "loss" in cell.disturbance + "loss" * (
            cell.disturbance == "none"
        )
        assert cell.disturbance in DISTURBANCES
        assert cell.optimizer in OPTIMIZERS
        assert set(cell.arms) <= set(ARMS)
        float(cell.weight_decay)


def test_smoke_runs_resumes_and_is_reported(tmp_path, capsys, monkeypatch):
    path = tmp_path / "spikes.jsonl"
    arguments = ["--preset", "smoke", "--results", str(path)]
    assert command.main(arguments) == 0
    records = runs.read(path)
    keys = (
        "task optimizer arm learning_rate seed steps failed error score device jax date"
    )
    assert set(keys.split()) <= records[0].keys()
    assert len(records) == 12
    for record in records:
        assert record["failed"] == (record["error"] >= 1)
        assert record["curve"]["step"] == [1, 2, 3, 4]
    # Clean and disturbed runs of a seed are alike before the spike, and not from it on.
    calm, spiked = (
        [r["curve"]["loss"] for r in records if r["disturbance"] == name]
        for name in ("none", "inputs x100")
    )
    for one, other in zip(calm, spiked, strict=True):
        assert one[0] == other[0]
        assert one[1] != other[1]

    def refuse(*args):
        raise AssertionError("nothing is left to compute")

    monkeypatch.setattr(command, "train_runs", refuse)
    assert command.main(arguments) == 0
    assert runs.read(path) == records
    capsys.readouterr()
    assert report.main(["spikes", "--results", str(path)]) == 0
    written = capsys.readouterr().out.split()
    assert [name.rsplit("/")[-1] for name in written] == [
        "spikes.md",
        "spikes_smoke_recovery.png",
    ]


# The report, of two arms of the grid "cpu" as if they had been run


class Invented:
    """Stands for every task: its error is its score."""

    failure_error = 1.0

    def error(self, score, split):
        return score


def invented(task, arm, *, steps, spike, disturbance, learning_rate, **options):
    """Rates from 0.1 diverge but for ZClip; a spike costs 2 nats, then half a nat."""
    stops = np.array(recorded_steps(steps, spike))
    loss = 3.0 - stops / steps
    if disturbance == "loss x1e4":
        loss += np.where(stops >= spike, 0.5, 0) + np.where(stops == spike, 1.5, 0)
    if learning_rate >= 0.1 and arm != "ZClip":
        loss[-1] = np.nan
    return Curves(stops, loss, loss / 4, ms_per_step=1.0, num_params=1)


def test_the_report_says_what_the_runs_hold(tmp_path, monkeypatch):
    path, arms = tmp_path / "spikes.jsonl", ("none", "ZClip")
    cpu = PRESETS["cpu"]
    cells = tuple(dataclasses.replace(cell, arms=arms) for cell in cpu.cells)
    short = dataclasses.replace(cpu, cells=cells)
    monkeypatch.setitem(command.PRESETS, "cpu", short)
    monkeypatch.setattr(command, "task_of", lambda *of_run: Invented())
    monkeypatch.setattr(command, "train", invented)
    assert command.main(["--results", str(path)]) == 0
    (tmp_path / "spikes_cpu_notes.md").write_text("Written by hand.")
    assert report.main(["spikes", "--results", str(path)]) == 0
    names = {file.name for file in tmp_path.iterdir()}
    figures = [f"spikes_cpu_{name}.png" for name in ("rates", "recovery", "errors")]
    assert set(figures) <= names
    text = (tmp_path / "spikes.md").read_text()
    for word in (*figures, "Written by hand.", "reported seeds 100 to 102"):
        assert word in text
    assert text.count("| none | 2.000 / 0.500 / 0.500 (0/3) |") == 1
    # The rates of a sweep at which an arm diverges.
    (row,) = (line for line in text.splitlines() if "(3/3)" in line)
    assert row.startswith("| none | **0.500** (0/3) |")
    assert row.endswith("| **0.500** (0/3)" + 3 * " | 1.000 (3/3)" + " |")

"""Image classifiers: models, data, arms, training, the command and its report."""

import dataclasses
import sys
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import report, runs
from benchmarks.vision import __main__ as command
from benchmarks.vision import times
from benchmarks.vision.arms import ARMS, OPTIMIZERS, z_score
from benchmarks.vision.data import DATASETS, Data, Images, load
from benchmarks.vision.models import MODELS, PlainNet, ResNet
from benchmarks.vision.presets import PRESETS, Cell
from benchmarks.vision.train import (
    Recipe,
    Variables,
    compute_gradient,
    kernel_stds,
    schedule,
    score,
    start,
    train,
)
from stablegrad_optax import stablegrad
from tests.reference_data import reference_file

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = PlainNet(width=2, depth=4)


# Models


def shapes(model, size=32, channels=3):
    """Of parameters and running statistics, without computing them."""
    image = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), image)


def num_params(variables):
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


@pytest.mark.parametrize(
    ("name", "norm", "size", "num_classes", "published"),
    [
        ("ResNet-20", "batch", 32, 10, 0.27e6),
        ("ResNet-56", "batch", 32, 10, 0.85e6),
        ("ResNet-50", "batch", 224, 1000, 25.56e6),
        ("VGG-16", "none", 224, 1000, 138.36e6),
        ("VGG-16", "none", 224, 10, 134.30e6),
        ("EfficientNetV2-S", "batch", 224, 1000, 21.46e6),
    ],
)
def test_models_have_the_published_number_of_parameters(
    name, norm, size, num_classes, published
):
    width = {"width": 16} if name in ("ResNet-20", "ResNet-56") else {}
    model = MODELS[name](norm=norm, num_classes=num_classes, **width)
    digits = 2 if published < 1e6 else 4
    count = num_params(shapes(model, size))
    assert float(f"{count:.{digits}g}") == pytest.approx(
        float(f"{published:.{digits}g}")
    )


@pytest.mark.parametrize("name", MODELS)
def test_without_batchnorm_nothing_else_changes(name):
    def kernels(variables):
        return {
            jax.tree_util.keystr(path): leaf.shape
            for path, leaf in jax.tree.leaves_with_path(variables["params"])
            if leaf.ndim > 1
        }

    width = 24 if name == "EfficientNetV2-S" else 4
    with_norm = shapes(MODELS[name](norm="batch", width=width))
    without = shapes(MODELS[name](norm="none", width=width))
    assert kernels(with_norm) == kernels(without)
    assert "batch_stats" in with_norm
    assert "batch_stats" not in without
    # A shift for a shift: BatchNorm's scales are what is missing.
    if "no conv biases" not in name:
        scales = [
            leaf.size
            for path, leaf in jax.tree.leaves_with_path(with_norm["params"])
            if "scale" in jax.tree_util.keystr(path)
        ]
        assert num_params(with_norm) - num_params(without) == sum(scales)


def test_a_plain_net_has_24_layers_and_falls_with_its_gain():
    leaves = jax.tree.leaves(shapes(PlainNet(width=4))["params"])
    assert sum(leaf.ndim > 1 for leaf in leaves) == 24

    def kernel(gain):
        model = PlainNet(width=2, depth=4, gain=gain)
        params = start(model, load("digits"), jax.random.key(0)).params
        return params["Conv_2"]["Conv_0"]["kernel"]

    np.testing.assert_allclose(kernel(0.5), 0.5 * kernel(1.0), rtol=1e-6)


def test_a_wrong_depth_is_refused():
    with pytest.raises(ValueError, match=r"depth must be 6 n \+ 2; got 21"):
        shapes(ResNet(depth=21))


# Data


def test_digits_are_split_without_overlap_and_always_alike():
    data = load("digits")
    sizes = {split: len(images.labels) for split, images in data.splits.items()}
    assert sizes == {"train": 1197, "validation": 200, "test": 400}
    seen = np.concatenate([images.pixels for images in data.splits.values()])
    from sklearn.datasets import load_digits

    whole = (load_digits().data * 255 / 16).round().astype(np.uint8)
    rows = sorted(map(bytes, seen.reshape(len(seen), -1)))
    assert rows == sorted(map(bytes, whole))
    # By a fixed permutation: other splits would make other results.
    assert data.splits["test"].labels[:8].tolist() == FIRST_TEST_LABELS


FIRST_TEST_LABELS = [6, 6, 6, 2, 5, 6, 6, 2]


@pytest.mark.parametrize(
    ("name", "file", "folder"),
    [
        ("mnist", "mnist/mnist.npz", "mnist"),
        pytest.param(
            "cifar10-jpeg",
            "cifar10_jpeg/cifar10_jpeg_full.npz",
            "",
            marks=pytest.mark.slow,  # decodes 60,000 files
        ),
    ],
)
def test_files_are_read_from_the_folder_or_one_below(name, file, folder):
    path = reference_file(file)
    data = load(name, path.parent if folder else path.parents[1])
    assert len(data.splits["test"].labels) == 10_000
    assert len(data.splits["validation"].labels) == 5000
    for images in data.splits.values():
        counts = np.bincount(images.labels)
        assert len(counts) == data.num_classes == 10
        assert counts.min() > 0.08 * counts.sum()


def test_missing_files_are_told_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"mnist needs --data-dir, .* mnist\.npz"):
        load("mnist")
    with pytest.raises(ValueError, match=r"--data-dir must hold mnist\.npz.*; got /"):
        load("mnist", tmp_path)


def test_a_hub_that_cannot_be_reached_is_told_in_one_line(monkeypatch):
    def load_dataset(name):
        raise ConnectionError(f"no route to {name}\nat all")

    fake = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    with pytest.raises(ValueError, match="could not be fetched") as raised:
        load("cifar100")
    assert "\n" not in str(raised.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        load("cifar10")


def test_what_the_hub_gives_becomes_three_splits(monkeypatch):
    rng = np.random.default_rng(0)

    def split(n):
        return {
            "img": list(rng.integers(0, 256, (n, 4, 4, 3))),
            "fine_label": np.arange(n) % 100,
        }

    def load_dataset(name):
        assert name == "uoft-cs/cifar100"
        return {"train": split(5200), "test": split(100)}

    fake = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    data = DATASETS["cifar100"](None)
    assert [len(data.splits[s].labels) for s in ("train", "validation")] == [200, 5000]
    assert data.num_classes == 100
    assert data.failure_accuracy == pytest.approx(0.015)


# Images as inputs


def test_inputs_have_mean_0_and_variance_1_by_channel():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, [50, 150, 250], (64, 5, 5, 3)).astype(np.uint8)
    data = Data("noise", {"train": Images(pixels, np.zeros(64, int))}, 10)
    inputs = Recipe.of(data).normalize(pixels)
    np.testing.assert_allclose(inputs.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(inputs.std((0, 1, 2)), 1, rtol=1e-4)


def test_augmented_images_are_shifted_and_mirrored_copies():
    recipe = Recipe((0.0,), (1.0,), padding=2, flip=True)
    image = np.arange(1.0, 17.0).reshape(4, 4, 1)
    images = recipe.augment(jnp.tile(image, (200, 1, 1, 1)), jax.random.key(0))
    padded = np.pad(image, [(2, 2), (2, 2), (0, 0)])
    expected = {
        bytes(np.float32(copy))
        for y in range(5)
        for x in range(5)
        for crop in [padded[y : y + 4, x : x + 4]]
        for copy in (crop, crop[:, ::-1])
    }
    assert {bytes(np.asarray(image)) for image in images} <= expected
    assert len({bytes(np.asarray(image)) for image in images}) > 40


def test_digits_are_not_augmented():
    images = jax.random.normal(jax.random.key(0), (3, 8, 8, 1))
    recipe = Recipe.of(load("digits"))
    np.testing.assert_array_equal(recipe.augment(images, jax.random.key(1)), images)


# Arms

PARAMS = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
GRADS = {"kernel": jnp.arange(6.0).reshape(3, 2), "bias": jnp.array([1e4, -1e-4])}


def first_update(arm, optimizer, prediction_std):
    tx = ARMS[arm](optimizer, lambda count: 1e-3)
    return jax.jit(
        lambda params, grads, std: tx.update(
            grads, tx.init(params), params, prediction_std=std
        )[0]
    )(PARAMS, GRADS, prediction_std)


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_makes_a_finite_first_step(arm):
    for optimizer in OPTIMIZERS:
        assert len(ARMS[arm].rates(optimizer, OPTIMIZERS[optimizer].rates)) == 3
    for update in jax.tree.leaves(first_update(arm, "momentum", 0.3)):
        assert jnp.isfinite(update).all()
        assert update.any()


@pytest.mark.parametrize("arm", ARMS)
def test_the_prediction_reaches_the_arms_of_its_name_alone(arm):
    one, two = (first_update(arm, "momentum", std)["kernel"] for std in (0.3, 0.6))
    ratio = 2.0 if "prediction" in arm else 1.0
    np.testing.assert_allclose(two, ratio * one, rtol=1e-6)


def test_the_constant_arm_is_stablegrad_before_sgd():
    tx = optax.chain(stablegrad(0.01), optax.sgd(1e-3, momentum=0.9))
    expected, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    found = first_update("StableGrad, constant 0.01", "momentum", 5.0)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), found, expected)


def test_z_scores():
    g = np.random.default_rng(0).normal(3, 2, (4, 5)).astype(np.float32)
    tx = z_score()
    grads = {"kernel": g, "bias": g[0], "zero": np.zeros((2, 2), np.float32)}
    updates, _ = tx.update(grads, tx.init(grads))
    expected = (g - g.mean()) / g.std()
    np.testing.assert_allclose(updates["kernel"], expected, rtol=1e-4)
    np.testing.assert_array_equal(updates["bias"], g[0])
    np.testing.assert_array_equal(updates["zero"], 0)


def test_rates_follow_the_gradients_scale_under_momentum_alone():
    arm = ARMS["z-score"]
    assert arm.rates("momentum", (0.1, 1.0)) == (1e-3, 1e-2)
    assert arm.rates("AdamW", (0.1, 1.0)) == (0.1, 1.0)


# Training


def test_the_rate_rises_linearly_and_falls_along_a_half_cosine():
    rates = [float(schedule(200, 0.5)(count)) for count in (0, 4, 9, 104, 199)]
    assert rates == pytest.approx([0.05, 0.25, 0.5, 0.25, 0.0], abs=1e-6)


def test_training_is_momentum_sgd_on_the_named_batches():
    """Against a literal loop: no BatchNorm, arm "none"."""
    data, seed, steps, batch = load("digits"), 3, 6, 16
    curves = train(
        TINY, data, "none", learning_rate=0.05, seed=seed, steps=steps, batch=batch
    )
    key_weights, _ = jax.random.split(jax.random.key(seed))
    params = TINY.init(key_weights, jnp.zeros((1, 8, 8, 1)))["params"]
    pixels, labels = data.splits["train"]
    inputs = (pixels.astype(np.float32) - pixels.mean()) / pixels.std()
    order = np.random.default_rng(seed).permutation(len(labels)).reshape(-1)

    @jax.jit
    def loss_and_grad(params, x, y):
        def loss(params):
            logits = TINY.apply({"params": params}, x)
            return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(batch), y])

        return jax.value_and_grad(loss)(params)

    trace = jax.tree.map(jnp.zeros_like, params)
    losses = []
    for step in range(steps):
        chosen = order[step * batch : (step + 1) * batch]
        loss, grads = loss_and_grad(params, inputs[chosen], labels[chosen])
        losses.append(float(loss))
        trace = jax.tree.map(lambda m, g: 0.9 * m + g, trace, grads)
        rate = float(schedule(steps, 0.05)(step))
        params = jax.tree.map(lambda p, m, r=rate: p - r * m, params, trace)
    expected = [losses[step - 1] for step in curves.steps]
    np.testing.assert_allclose(curves.loss, expected, rtol=2e-3)
    accuracy = score(TINY, Recipe.of(data), Variables(params, {}), data.splits["test"])
    assert curves.accuracy[-1] == pytest.approx(accuracy, abs=0.01)


def test_equal_seeds_make_equal_runs_and_other_seeds_others():
    one, same, other = (
        train(TINY, load("digits"), "clip 1", seed=seed, steps=3, batch=8)
        for seed in (5, 5, 6)
    )
    np.testing.assert_array_equal(one.loss, same.loss)
    assert not np.array_equal(one.loss, other.loss)


def test_batchnorm_is_scored_by_its_running_statistics():
    data, model = load("digits"), PlainNet(width=2, depth=4, norm="batch")
    recipe, variables = Recipe.of(data), start(model, data, jax.random.key(0))
    train_images = jax.device_put(data.splits["train"])
    found = compute_gradient(
        model, recipe, variables, train_images, np.arange(32), jax.random.key(1)
    )
    before, after = (
        jax.tree.leaves(stats) for stats in (variables.batch_stats, found.batch_stats)
    )
    assert all((a != b).any() for a, b in zip(after, before, strict=True))
    # Whatever stands beside an image in its batch, its score is the same.
    images = Images(*(array[:40] for array in data.splits["test"]))
    variables = Variables(variables.params, found.batch_stats)
    whole = score(model, recipe, variables, images)
    parts = [
        score(model, recipe, variables, Images(*(a[i : i + 1] for a in images)))
        for i in range(40)
    ]
    assert whole == pytest.approx(np.mean(parts))


def test_scores_that_are_not_finite_are_wrong():
    data = load("digits")
    variables = start(TINY, data, jax.random.key(0))
    lost = jax.tree.map(lambda leaf: leaf * np.nan, variables)
    assert score(TINY, Recipe.of(data), lost, data.splits["test"]) == 0


def test_kernel_stds_come_in_the_order_of_the_layers():
    names = [f"Conv_{i}" for i in range(12)]
    grads = {
        name: {"kernel": jnp.array([[0.0, 2e-25 * (i + 1)]]), "bias": jnp.ones(3)}
        for i, name in enumerate(names)
    }
    expected = 1e-25 * np.arange(1, 13)
    np.testing.assert_allclose(np.stack(kernel_stds(grads)), expected, rtol=1e-5)


# The command


@pytest.mark.parametrize("name", PRESETS)
def test_presets_name_what_exists(name):
    preset = PRESETS[name]
    entries = [entry for group in preset.groups(name) for entry in group]
    ledger = runs.Ledger(entries, preset.protocol)
    assert len(ledger.missing(entries)) > 0
    assert len({tuple(e.settings.values()) for e in entries}) == len(entries)
    assert not set(preset.protocol.tuning_seeds) & set(preset.protocol.reported_seeds)
    assert len(preset.protocol.reported_seeds) >= (5 if name == "gpu" else 3)
    for cell in preset.cells:
        assert {cell.model, cell.data} <= {*MODELS, *DATASETS}
        assert set(cell.arms) <= set(ARMS)
        assert cell.optimizer in OPTIMIZERS


def test_smoke_runs_resumes_and_is_reported(tmp_path, capsys):
    path = tmp_path / "vision.jsonl"
    arguments = ["--preset", "smoke", "--results", str(path)]
    assert command.main(arguments) == 0
    records = runs.read(path)
    assert len(records) == 18
    assert command.main(arguments) == 0
    assert len(runs.read(path)) == 18
    for record in records:
        assert record["error"] == pytest.approx(1 - record["accuracy"])
        assert record["failed"] == (record["accuracy"] <= 0.15)
        assert ("curve" in record) == (record["phase"] == "reported")
    assert sum("layers" in record for record in records) == 3
    # What came of times.main, but for the times.
    timed = {
        **{key: records[0][key] for key in ("model", "width", "norm", "optimizer")},
        **{key: records[0][key] for key in ("data", "batch", "device", "jax", "date")},
        **{"phase": "timing", "arm": "none", "ratio": 1.0, "ratio_quartiles": [1, 1]},
    }
    runs.append(path, [timed])
    (tmp_path / "vision_smoke_notes.md").write_text("Written by hand.")
    capsys.readouterr()
    assert report.main(["vision", "--results", str(path)]) == 0
    written = capsys.readouterr().out.split()
    assert [name.rsplit("/")[-1] for name in written] == [
        "vision.md",
        "vision_smoke_accuracy.png",
        "vision_smoke_curves.png",
        "vision_smoke_gradients.png",
    ]
    text = (tmp_path / "vision.md").read_text()
    assert "Written by hand." in text
    assert "| none | 1.000 [1.000, 1.000] |" in text
    score_ = [r["accuracy"] for r in records if r["phase"] == "reported"][:3]
    assert f"**{100 * np.mean(score_):.1f}**" in text


def test_times_of_steps_are_over_none():
    cell = dataclasses.replace(
        Cell("ResNet-20", 2), arms=("none", "StableGrad, prediction")
    )
    records = times.time_arms(cell, load("digits"), rounds=1)
    assert [record["arm"] for record in records] == list(cell.arms)
    assert records[0]["ratio"] == 1
    assert records[1]["ratio"] > 0

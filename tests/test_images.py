"""Image classifiers: models, data, inputs, training, scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.lib.curves import curves_of
from benchmarks.lib.optimizers import Optimizer
from benchmarks.lib.suite import Entry
from benchmarks.lib.train import Rule, Training, kernels, moments
from benchmarks.lib.train import schedule as schedule_of
from benchmarks.suites import vision
from benchmarks.tasks.images.data import Data, Images, load
from benchmarks.tasks.images.models import MODELS, PlainNet, ResNet
from benchmarks.tasks.images.task import (
    Classifier,
    Recipe,
    batches,
    in_parts,
    on_device,
)
from tests.reference_data import reference_file

TINY = PlainNet(width=2, depth=4)


def task_of(model, batch=16, steps=6):
    data = load("digits")
    return Classifier(on_device(data), model, Recipe.for_data(data), batch, steps)


def train(optimizer, *, seed, rate=0.01, batch=16, steps=6):
    training = Training(
        task_of(TINY, batch, steps),
        Rule(Optimizer.named(optimizer), steps, warm_up=True),
        range(1, steps + 1),
        in_parts(load("digits"), "test"),
    )
    (curves,) = curves_of(moments([training], [rate], [seed]))
    return curves


# Models


def shapes(model, size=32, channels=3):
    """Returns the shapes of parameters and running statistics."""
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


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name == "EfficientNetV2-S" else ())
        for name in MODELS
    ],
)
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
        params, _ = task_of(model).init(jax.random.key(0))
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


@pytest.mark.slow  # decodes 60,000 files
@pytest.mark.parametrize("below", [0, 1])
def test_files_are_read_from_the_folder_or_one_below(below, monkeypatch):
    path = reference_file("cifar10_jpeg/cifar10_jpeg_full.npz")
    monkeypatch.setenv("STABLEGRAD_DATA", str(path.parents[below]))
    load.cache_clear()
    data = load("cifar10-jpeg")
    assert len(data.splits["test"].labels) == 10_000
    assert len(data.splits["validation"].labels) == 5000
    for images in data.splits.values():
        counts = np.bincount(images.labels)
        assert len(counts) == data.num_classes == 10
        assert counts.min() > 0.08 * counts.sum() / 10


def test_missing_files_are_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.delenv("STABLEGRAD_DATA", raising=False)
    with pytest.raises(ValueError, match=r"\$STABLEGRAD_DATA must name the folder"):
        load("cifar10-jpeg")
    monkeypatch.setenv("STABLEGRAD_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"must hold cifar10_jpeg_full.*; it is /"):
        load("cifar10-jpeg")


# Images as inputs


def test_inputs_have_mean_0_and_variance_1_by_channel():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, [50, 150, 250], (64, 5, 5, 3)).astype(np.uint8)
    data = Data("noise", {"train": Images(pixels, np.zeros(64, int))}, 10)
    inputs = Recipe.for_data(data).normalize(pixels)
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
    recipe = Recipe.for_data(load("digits"))
    np.testing.assert_array_equal(recipe.augment(images, jax.random.key(1)), images)


# Training


def test_training_is_momentum_sgd_on_the_named_batches():
    """Against a literal loop: no BatchNorm, momentum alone."""
    data, seed, steps, batch = load("digits"), 3, 6, 16
    curves = train("momentum", seed=seed, rate=0.05, batch=batch, steps=steps)
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
        rate = float(schedule_of(steps, 0.05, warm_up=True)(step))
        params = jax.tree.map(lambda p, m, r=rate: p - r * m, params, trace)
    expected = [losses[step - 1] for step in curves.steps]
    np.testing.assert_allclose(curves.loss, expected, rtol=2e-3)
    accuracy = score(TINY, params, {}, data.splits["test"])
    assert curves.scores["accuracy"][-1] == pytest.approx(accuracy, abs=0.01)


def score(model, params, batch_stats, images):
    """The literal share of images that have the largest logit at their label."""
    variables = {"params": params, "batch_stats": batch_stats}
    inputs = Recipe.for_data(load("digits")).normalize(images.pixels)
    logits = model.apply(variables, inputs, train=False)
    return float(np.mean(logits.argmax(-1) == images.labels))


def test_equal_seeds_make_equal_runs_and_other_seeds_others():
    one, same, other = (train("clip + momentum", seed=seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(one.loss, same.loss)
    assert not np.array_equal(one.loss, other.loss)


def test_an_epoch_has_every_image_once():
    order = batches(10, 3, steps=7, seed=0)
    assert order.shape == (7, 3)
    for epoch in (order[:3], order[3:6]):
        assert len(set(epoch.ravel().tolist())) == 9
    assert not np.array_equal(order[:3], order[3:6])
    np.testing.assert_array_equal(batches(10, 3, steps=2, seed=0), order[:2])


def test_batchnorm_is_scored_by_its_running_statistics():
    model = PlainNet(width=2, depth=4, norm="batch")
    task, test = task_of(model), load("digits").splits["test"]
    params, state = task.init(jax.random.key(0))
    found = jax.jit(task.gradient)(params, state, jax.random.key(1), 0)
    before, after = (jax.tree.leaves(each.batch_stats) for each in (state, found.state))
    assert all((a != b).any() for a, b in zip(after, before, strict=True))
    # By the share over all, though it is taken in parts that are filled up.
    held_out = in_parts(load("digits"), "test", 250)
    accuracy = jax.jit(task.score)(params, found.state, held_out)["accuracy"]
    first = Images(*(array[:250] for array in test))
    expected = score(model, params, found.state.batch_stats, first)
    assert float(accuracy) == pytest.approx(expected)


def test_scores_that_are_not_finite_are_wrong():
    task = task_of(TINY)
    params, state = task.init(jax.random.key(0))
    lost = jax.tree.map(lambda leaf: leaf * np.nan, params)
    held_out = in_parts(load("digits"), "test")
    assert jax.jit(task.score)(lost, state, held_out)["accuracy"] == 0


def test_kernels_come_in_the_order_of_the_layers():
    grads = {
        f"Conv_{i}": {"kernel": np.full((1, 2), i), "bias": np.ones(3)}
        for i in range(12)
    }
    found = kernels(grads)
    assert list(found) == [f"Conv_{i}/kernel" for i in range(12)]
    assert [leaf[0, 0] for leaf in found.values()] == list(range(12))


# The suite


def test_rates_follow_the_gradients_scale_under_momentum_alone():
    for base, expected in (("momentum", (1e-3, 1e-2)), ("AdamW", (0.1, 1.0))):
        groups = vision._groups(
            "smoke",
            "ResNet-20",
            2,
            base=base,
            methods=("ZNorm",),
            rates=(0.1, 1.0),
        )
        ((entry,),) = groups
        assert isinstance(entry, Entry)
        assert entry.learning_rates == expected

"""Trains one network from one seed and keeps its curves.

The gradient is compiled once for a model and a data set, whatever the arm; the update
once for a model, an optimizer and an arm, whatever the learning rate. On a CPU a
`lax.scan` over steps takes twice the time of a loop in Python that calls the two.
"""

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.pinn.train import record_steps
from benchmarks.vision.arms import ARMS
from benchmarks.vision.data import Data, Images
from stablegrad_optax import prediction_grad_std, value_and_grad_with_prediction_std

PyTree = Any
WARM_UP = 0.05  # of all steps: the learning rate rises linearly, then a half cosine
CHUNK = 200  # images that are scored at a time


class Variables(NamedTuple):
    """What a network computes with."""

    params: PyTree
    batch_stats: PyTree  # empty without BatchNorm


class Gradient(NamedTuple):
    """Of one batch."""

    loss: jax.Array  # f[]
    grads: PyTree
    batch_stats: PyTree  # after the batch
    prediction_std: jax.Array  # f[], of dL/dy per example


@dataclass(frozen=True)
class Curves:
    """What became of a training, at some of its steps.

    Attributes:
        steps: i[records], updates done.
        accuracy: f[records], share of the images of the chosen split.
        loss: f[records], mean cross-entropy of the last batch.
        grad_std: f[records, kernels], of every kernel's gradient before the arm's
            transformation, from the input on.
        ms_per_step: wall-clock in the fastest stretch between records, without the
            scoring: compilation and other work on the machine only add.
    """

    steps: np.ndarray
    accuracy: np.ndarray
    loss: np.ndarray
    grad_std: np.ndarray
    ms_per_step: float


def train(
    model: nn.Module,
    data: Data,
    arm: str,
    *,
    optimizer: str = "momentum",
    learning_rate: float = 0.01,
    seed: int = 0,
    steps: int = 200,
    batch: int = 32,
    split: Literal["validation", "test"] = "test",
    num_scored: int | None = None,
    records: int = 6,
    on_record: Callable[[int], None] = lambda step: None,
) -> Curves:
    """Train `model`, whose initial weights and batches `seed` sets.

    Args:
        model: one of `benchmarks.vision.models`, or alike.
        data: as `benchmarks.vision.data.load` gives it.
        arm: a name of `ARMS`.
        optimizer: a name of `OPTIMIZERS`.
        learning_rate: the highest, after the warm-up.
        seed: equal seeds have equal weights and batches in every arm.
        steps: number of updates.
        batch: images in each.
        split: which images the accuracy is of.
        num_scored: of them, at most; None: all.
        records: about how many evenly spaced steps are recorded, and half as many
            early ones.
        on_record: called with the number of updates done; what it raises ends this.
    """
    key_weights, key_batches = jax.random.split(jax.random.key(seed))
    variables = start(model, data, key_weights)
    setup = (optimizer, arm, steps)
    opt_state = init_optimizer(*setup, variables.params)
    recipe, images = Recipe.of(data), _on_device(data)
    scored = Images(*(array[:num_scored] for array in data.splits[split]))
    order = _batches(len(images.labels), batch, seed)
    gradient = partial(compute_gradient, model, recipe)
    curves, ms_per_step, done = [], [], 0
    for stop in record_steps(steps, early=records // 2, even=records).tolist():
        begin = time.perf_counter()
        for step in range(done, stop):
            key = jax.random.fold_in(key_batches, step)
            found = gradient(variables, images, next(order), key)
            params, opt_state = update(
                *setup, learning_rate, variables.params, opt_state, found
            )
            variables = Variables(params, found.batch_stats)
        jax.block_until_ready(variables)
        ms_per_step.append(1e3 * (time.perf_counter() - begin) / (stop - done))
        done = stop
        accuracy = score(model, recipe, variables, scored)
        loss, stds = jax.device_get((found.loss, kernel_stds(found.grads)))
        curves.append((stop, accuracy, loss, np.stack(stds)))
        on_record(stop)
    return Curves(*map(np.array, zip(*curves, strict=True)), min(ms_per_step))


class Recipe(NamedTuple):
    """How images become inputs; static, so that programs depend on it."""

    mean: tuple[float, ...]  # of each channel; a pixel's largest value is 1
    std: tuple[float, ...]
    padding: int
    flip: bool

    @classmethod
    @cache
    def of(cls, data: Data) -> "Recipe":
        channels = np.moveaxis(data.splits["train"].pixels, -1, 0)
        mean = tuple(float(channel.mean()) / 255 for channel in channels)
        std = tuple(float(channel.std()) / 255 for channel in channels)
        return cls(mean, std, data.padding, data.flip)

    def normalize(self, pixels: jax.Array) -> jax.Array:
        """Inputs of mean 0 and variance 1 over the training images, by channel."""
        mean, std = (np.array(x, np.float32) for x in (self.mean, self.std))
        return (pixels.astype(jnp.float32) / 255 - mean) / std

    def augment(self, images: jax.Array, key: jax.Array) -> jax.Array:
        """Each image shifted, with zeros beyond its edges, and mirrored, at random."""
        key_shift, key_flip = jax.random.split(key)
        if self.padding:
            height, width = images.shape[1:3]
            border = [(0, 0), *[(self.padding,) * 2] * 2, (0, 0)]
            shifts = jax.random.randint(
                key_shift, (len(images), 2), 0, 2 * self.padding + 1
            )

            def crop(image: jax.Array, shift: jax.Array) -> jax.Array:
                corner = (*shift, 0)
                return jax.lax.dynamic_slice(
                    image, corner, (height, width, image.shape[-1])
                )

            images = jax.vmap(crop)(jnp.pad(images, border), shifts)
        if self.flip:
            mirrored = jax.random.bernoulli(key_flip, shape=(len(images), 1, 1, 1))
            images = jnp.where(mirrored, images[:, :, ::-1], images)
        return images


def start(model: nn.Module, data: Data, key: jax.Array) -> Variables:
    """Initial weights; running means 0 and variances 1."""
    shape = data.splits["train"].pixels.shape[1:]
    variables = _init(model, shape, key)
    return Variables(variables["params"], variables.get("batch_stats", {}))


@partial(jax.jit, static_argnums=(0, 1))
def _init(model: nn.Module, shape: tuple[int, ...], key: jax.Array) -> PyTree:
    return model.init(key, jnp.zeros((1, *shape)))


@partial(jax.jit, static_argnums=(0, 1))
def compute_gradient(
    model: nn.Module,
    recipe: Recipe,
    variables: Variables,
    images: Images,
    indices: np.ndarray,
    key: jax.Array,
) -> Gradient:
    """At the training images of these indices i[batch], augmented by `key`."""

    def predict(params: PyTree, pixels: jax.Array) -> tuple[jax.Array, PyTree]:
        return model.apply(
            {"params": params, "batch_stats": variables.batch_stats},
            pixels,
            train=True,
            mutable=["batch_stats"],
        )

    def mean_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()

    inputs = recipe.augment(recipe.normalize(images.pixels[indices]), key)
    (loss, updated), grads, std = value_and_grad_with_prediction_std(
        predict, mean_loss, has_aux=True, per_example=True
    )(variables.params, inputs, images.labels[indices])
    return Gradient(loss, grads, updated.get("batch_stats", {}), std)


def schedule(steps: int, rate: float | jax.Array) -> optax.Schedule:
    """Linear from 0 for the warm-up, then a half cosine to 0."""
    warm_up = max(1, round(WARM_UP * steps))
    unit = optax.warmup_cosine_decay_schedule(0.0, 1.0, warm_up, max(steps, 2))
    # The first update, of count 0, would be none: count from 1.
    return lambda count: rate * unit(count + 1)


def _transformation(
    optimizer: str, arm: str, steps: int, rate: float | jax.Array
) -> optax.GradientTransformationExtraArgs:
    return ARMS[arm](optimizer, schedule(steps, rate))


@partial(jax.jit, static_argnums=(0, 1, 2))
def init_optimizer(
    optimizer: str, arm: str, steps: int, params: PyTree
) -> optax.OptState:
    return _transformation(optimizer, arm, steps, 0.0).init(params)


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(4, 5))
def update(
    optimizer: str,
    arm: str,
    steps: int,
    rate: float | jax.Array,
    params: PyTree,
    opt_state: optax.OptState,
    gradient: Gradient,
) -> tuple[PyTree, optax.OptState]:
    """One step of the arm; the old parameters and state are given up."""
    tx = _transformation(optimizer, arm, steps, rate)
    updates, opt_state = tx.update(
        gradient.grads,
        opt_state,
        params,
        prediction_std=gradient.prediction_std,
    )
    return optax.apply_updates(params, updates), opt_state


def score(
    model: nn.Module, recipe: Recipe, variables: Variables, images: Images
) -> float:
    """Share of images whose label has the largest logit, by running statistics.

    An image with a logit that is not finite counts as wrong.
    """
    num_correct = 0
    for begin in range(0, len(images.labels), CHUNK):
        pixels, labels = (array[begin : begin + CHUNK] for array in images)
        missing = CHUNK - len(labels)  # one shape, one program
        pixels = np.pad(pixels, [(0, missing), *[(0, 0)] * 3])
        labels = np.pad(labels, (0, missing), constant_values=-1)
        num_correct += int(_num_correct(model, recipe, variables, pixels, labels))
    return num_correct / len(images.labels)


@partial(jax.jit, static_argnums=(0, 1))
def _num_correct(
    model: nn.Module,
    recipe: Recipe,
    variables: Variables,
    pixels: np.ndarray,
    labels: np.ndarray,
) -> jax.Array:
    logits = model.apply(variables._asdict(), recipe.normalize(pixels), train=False)
    is_finite = jnp.isfinite(logits).all(-1)
    return jnp.sum((logits.argmax(-1) == labels) & is_finite)


@jax.jit
def kernel_stds(grads: PyTree) -> list[jax.Array]:
    """The std f[] of every kernel's gradient, in the order in which they were made."""
    kernels = {
        jax.tree_util.keystr(path): g
        for path, g in jax.tree.leaves_with_path(grads)
        if g.ndim > 1
    }
    # Pools one leaf alone: a std that no square takes out of single precision.
    return [
        prediction_grad_std(kernels[name]) for name in sorted(kernels, key=_natural)
    ]


def _natural(name: str) -> list[str | int]:
    """Sorts Conv_2 before Conv_10."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if part.isdigit() else part for part in parts]


@cache  # one copy for all runs
def _on_device(data: Data) -> Images:
    return jax.device_put(data.splits["train"])


def _batches(num_images: int, batch: int, seed: int) -> Iterator[np.ndarray]:
    """Indices i32[batch], each image once an epoch; what is left of one is dropped."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(num_images).astype(np.int32)
        yield from order[: num_images // batch * batch].reshape(-1, batch)

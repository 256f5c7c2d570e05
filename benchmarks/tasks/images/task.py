"""A network that learns to classify images: the gradient, its probe, the accuracy."""

from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.lib.task import Gradient
from benchmarks.tasks.images.data import Data, Images, Split
from stablegrad_optax import value_and_grad_with_prediction_std

PyTree = Any
STATIC = {"static": True}
CHUNK = 200  # images that are scored at a time


class Recipe(NamedTuple):
    """How images become inputs; static, so that programs depend on it."""

    mean: tuple[float, ...]  # of each channel; a pixel's largest value is 1
    std: tuple[float, ...]
    padding: int
    flip: bool

    @classmethod
    @cache
    def for_data(cls, data: Data) -> "Recipe":
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


class State(NamedTuple):
    """The state of a run."""

    batch_stats: PyTree  # empty without BatchNorm
    order: jax.Array  # i32[steps, batch], the images of each batch


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Classifier:
    """A network and the images it is trained on.

    Its probe, "prediction", is the standard deviation of dL/d(logits) per example.

    Attributes:
        images: to train on.
        model: of `benchmarks.tasks.images.models`, or alike.
        recipe: of the images.
        batch: images in each.
        steps: number of batches.
    """

    images: Images
    model: nn.Module = field(metadata=STATIC)
    recipe: Recipe = field(metadata=STATIC)
    batch: int = field(metadata=STATIC)
    steps: int = field(metadata=STATIC)

    def init(self, key: jax.Array) -> tuple[PyTree, State]:
        """Initial weights; running means 0 and variances 1."""
        shape = self.images.pixels.shape[1:]
        variables = _init(self.model, shape, jax.random.split(key)[0])
        seed = int(jax.random.key_data(key)[-1])
        order = batches(len(self.images.labels), self.batch, self.steps, seed)
        return variables["params"], State(variables.get("batch_stats", {}), order)

    def gradient(
        self, params: PyTree, state: State, key: jax.Array, step: jax.Array
    ) -> Gradient:
        """Takes the images of the step's batch, augmented by (key, step)."""

        def predict(params: PyTree, pixels: jax.Array) -> tuple[jax.Array, PyTree]:
            return self.model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                pixels,
                train=True,
                mutable=["batch_stats"],
            )

        chosen, key = state.order[step], jax.random.fold_in(key, step)
        pixels = self.recipe.normalize(self.images.pixels[chosen])
        (loss, updated), grads, std = value_and_grad_with_prediction_std(
            predict, cross_entropy, has_aux=True, per_example=True
        )(params, self.recipe.augment(pixels, key), self.images.labels[chosen])
        state = State(updated.get("batch_stats", {}), state.order)
        return Gradient(loss, grads, {"prediction": std}, state)

    def score(
        self, params: PyTree, state: State, held_out: Images
    ) -> dict[str, jax.Array]:
        """Share of images whose label has the largest logit, by running statistics.

        An image with a logit that is not finite counts as wrong, one of label -1 not at
        all; `held_out` is in parts of equal size.
        """
        variables = {"params": params, "batch_stats": state.batch_stats}

        def num_correct(part: Images) -> jax.Array:
            pixels = self.recipe.normalize(part.pixels)
            logits = self.model.apply(variables, pixels, train=False)
            is_finite = jnp.isfinite(logits).all(-1)
            return jnp.sum((logits.argmax(-1) == part.labels) & is_finite)

        correct = jax.lax.map(num_correct, held_out).sum()
        return {"accuracy": correct / jnp.sum(held_out.labels >= 0)}


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean()


@partial(jax.jit, static_argnums=(0, 1))
def _init(model: nn.Module, shape: tuple[int, ...], key: jax.Array) -> PyTree:
    return model.init(key, jnp.zeros((1, *shape)))


def batches(num_images: int, batch: int, steps: int, seed: int) -> np.ndarray:
    """Indices i32[steps, batch], each once an epoch; what is left of one is dropped."""
    rng = np.random.default_rng(seed)
    in_epoch = num_images // batch
    epochs = [
        rng.permutation(num_images)[: in_epoch * batch].reshape(in_epoch, batch)
        for _ in range(-(-steps // in_epoch))
    ]
    return np.concatenate(epochs)[:steps].astype(np.int32)


@cache  # one copy for all runs
def on_device(data: Data) -> Images:
    """The images to train on."""
    return jax.device_put(data.splits["train"])


@cache
def in_parts(data: Data, split: Split, num_scored: int | None = None) -> Images:
    """Images to score on, so many at the most, as `Classifier.score` takes them."""
    pixels, labels = (array[:num_scored] for array in data.splits[split])
    missing = -len(labels) % CHUNK
    pixels = np.pad(pixels, [(0, missing), *[(0, 0)] * 3])
    labels = np.pad(labels, (0, missing), constant_values=-1)
    return jax.device_put(
        Images(pixels.reshape(-1, CHUNK, *pixels.shape[1:]), labels.reshape(-1, CHUNK))
    )

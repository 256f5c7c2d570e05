"""Digits whose training may be disturbed."""

from dataclasses import dataclass, field
from functools import cache

import jax
import jax.numpy as jnp

from benchmarks.tasks.images.data import Split, load
from benchmarks.tasks.images.task import Recipe, cross_entropy, on_device
from benchmarks.tasks.supervised import STATIC, HeldOut, Supervised


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Digits(Supervised):
    """The error is the share of wrong images; chance is not enough, 1.5 times it is."""

    recipe: Recipe = field(metadata=STATIC)
    failure_error = 1 - 0.15

    def sample(self, key: jax.Array, batch: int) -> tuple[jax.Array, jax.Array]:
        chosen = jax.random.randint(key, (batch,), 0, len(self.train.labels))
        pixels = self.recipe.normalize(self.train.pixels[chosen])
        return pixels, self.train.labels[chosen]

    def loss(self, predictions: jax.Array, targets: jax.Array) -> jax.Array:
        return cross_entropy(predictions, targets)

    def judge(self, predictions: jax.Array, targets: jax.Array) -> jax.Array:
        is_right = predictions.argmax(-1) == targets
        return jnp.mean(is_right & jnp.isfinite(predictions).all(-1))

    def error(self, judged: jax.Array, baseline: jax.Array) -> jax.Array:
        return baseline - judged


def pieces() -> dict:
    """`train` and `recipe` of `Digits`."""
    data = load("digits")
    return {"train": on_device(data), "recipe": Recipe.for_data(data)}


@cache
def held_out(split: Split) -> HeldOut:
    images = load("digits").splits[split]
    recipe = Recipe.for_data(load("digits"))
    return HeldOut(recipe.normalize(images.pixels), images.labels)

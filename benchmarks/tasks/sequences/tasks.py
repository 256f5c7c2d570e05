"""The next byte of a text, the next values of a series: sampling, loss and error."""

from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.tasks.sequences.data import Split, series, text, windows
from benchmarks.tasks.supervised import HeldOut, Supervised

NUM_HELD_OUT = 64  # examples that score a language model; series: of each


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Language(Supervised):
    """The next byte of Python's standard library, `train` as u8[n].

    The error is bits per byte over those of the bytes' frequencies in training, which
    ignore the context: a run fails if it has learned no more.
    """

    def sample(self, key: jax.Array, batch: int) -> tuple[jax.Array, jax.Array]:
        context = self.model.context
        begins = jax.random.randint(key, (batch, 1), 0, len(self.train) - context)
        stretches = self.train[begins + np.arange(context + 1)].astype(jnp.int32)
        return stretches[:, :-1], stretches[:, 1:]

    def loss(self, predictions: jax.Array, targets: jax.Array) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(predictions, targets)
        return losses.mean()

    def judge(self, predictions: jax.Array, targets: jax.Array) -> jax.Array:
        """Bits per byte."""
        return self.loss(predictions, targets) / np.log(2)


@cache
def language_train() -> jax.Array:
    return jax.device_put(text()["train"])


@cache
def language_held_out(split: Split, context: int) -> HeldOut:
    """Stretches evenly spaced over the text."""
    part = text()[split]
    begins = np.linspace(0, len(part) - context - 1, NUM_HELD_OUT).astype(int)
    stretches = part[begins[:, None] + np.arange(context + 1)].astype(np.int32)
    share = np.bincount(text()["train"], minlength=256) + 1.0
    bits = -np.log2(share / share.sum())
    inputs, targets = stretches[:, :-1], stretches[:, 1:]
    return HeldOut(inputs, targets, bits[targets].mean())


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Forecast(Supervised):
    """The next values of three series, each as often as the others.

    `train` has the pasts and futures of each. The error is the root mean square error
    over that of the window's mean: a run fails if it is no better.
    """

    def sample(self, key: jax.Array, batch: int) -> tuple[jax.Array, jax.Array]:
        key_which, key_where = jax.random.split(key)
        share = jax.random.uniform(key_where, (batch,))
        split_series = [
            jax.tree.map(lambda x: x[(share * len(x)).astype(int)], one)
            for one in self.train
        ]
        which = jax.random.randint(key_which, (batch,), 0, len(self.train))
        past, future = (
            jnp.stack(parts)[which, np.arange(batch)]
            for parts in zip(*split_series, strict=True)
        )
        return past, future

    def loss(self, predictions: jax.Array, targets: jax.Array) -> jax.Array:
        return jnp.mean((predictions - targets) ** 2)

    def judge(self, predictions: jax.Array, targets: jax.Array) -> jax.Array:
        """RMSE over the series' range."""
        return jnp.sqrt(self.loss(predictions, targets))


@cache
def forecast_train(context: int, horizon: int) -> list[tuple[jax.Array, jax.Array]]:
    cut = [windows(values, context, horizon) for values in series().values()]
    return jax.device_put([series["train"] for series in cut])


@cache
def forecast_held_out(split: Split, context: int, horizon: int) -> HeldOut:
    """So many windows of a series as the shortest test part has at least."""
    parts = []
    for values in series().values():
        past, future = windows(values, context, horizon)[split]
        chosen = np.linspace(0, len(past) - 1, NUM_HELD_OUT).astype(int)
        parts.append((past[chosen], future[chosen]))
    past, future = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    mean_error = np.sqrt(np.mean((future - past.mean(1, keepdims=True)) ** 2))
    return HeldOut(past, future, float(mean_error))

"""What is trained: a model, its data, its loss and its score."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.spikes.data import Split, series, text, windows
from benchmarks.spikes.models import Blocks, Decoder, Forecaster, Numbers
from benchmarks.vision.data import load
from benchmarks.vision.models import MODELS
from benchmarks.vision.train import Recipe

PyTree = Any
Size = Literal["tiny", "cpu", "million", "gpu"]
HELD_OUT = 64  # examples that score a language model; series: of each


class Task(ABC):
    """A model and what it is trained on.

    Attributes:
        model: from inputs [batch, ...] to predictions.
        train: arrays that `sample` draws from.
        held_out: inputs and targets that are never trained on: those for validation
            choose learning rates, those for test are reported.
        failure_error: a run has failed if its error is not below it.
        score_name: what the score is, with its unit.
    """

    model: nn.Module
    train: PyTree
    held_out: dict[Split, tuple[np.ndarray, np.ndarray]]
    failure_error: float = 1.0
    score_name: str

    @abstractmethod
    def sample(
        self, train: PyTree, key: jax.Array, batch: int
    ) -> tuple[jax.Array, jax.Array]:
        """Inputs and targets of a batch."""

    @abstractmethod
    def loss(self, predictions: jax.Array, targets: jax.Array) -> jax.Array:
        """f[], a mean over examples."""

    @abstractmethod
    def score(self, predictions: jax.Array, targets: jax.Array) -> jax.Array:
        """f[], what the task is usually judged by."""

    @abstractmethod
    def error(self, score: float, split: Split) -> float:
        """The score as an error, the lower the better; 1 is what knowing nothing has.

        Not a number where the score is not.
        """


class Language(Task):
    """The next byte of Python's standard library.

    The error is bits per byte over those of the bytes' frequencies in training, which
    ignore the context: a run fails if it has learned no more.
    """

    score_name = "bits per byte"

    def __init__(self, numbers: Numbers, width: int, depth: int, context: int):
        blocks = Blocks(width, depth, heads=4, numbers=numbers)
        self.model = Decoder(blocks, context)
        self._context = context
        parts = text()
        self.train = jax.device_put(parts["train"])
        self.held_out = {
            split: self._spread(parts[split]) for split in ("validation", "test")
        }
        share = np.bincount(parts["train"], minlength=256) + 1.0
        bits = -np.log2(share / share.sum())
        self._baseline = {s: bits[y].mean() for s, (_, y) in self.held_out.items()}

    def _spread(self, part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Stretches evenly spaced over the text."""
        begins = np.linspace(0, len(part) - self._context - 1, HELD_OUT).astype(int)
        stretches = part[begins[:, None] + np.arange(self._context + 1)]
        return stretches[:, :-1].astype(np.int32), stretches[:, 1:].astype(np.int32)

    def sample(
        self, train: jax.Array, key: jax.Array, batch: int
    ) -> tuple[jax.Array, jax.Array]:
        last = len(train) - self._context
        begins = jax.random.randint(key, (batch, 1), 0, last)
        stretches = train[begins + np.arange(self._context + 1)].astype(jnp.int32)
        return stretches[:, :-1], stretches[:, 1:]

    def loss(self, predictions: jax.Array, targets: jax.Array) -> jax.Array:
        return _cross_entropy(predictions, targets)

    def score(self, predictions: jax.Array, targets: jax.Array) -> jax.Array:
        return _cross_entropy(predictions, targets) / np.log(2)

    def error(self, score: float, split: Split) -> float:
        return score / self._baseline[split]


class Forecast(Task):
    """The next values of three series, each as often as the others.

    The error is the root mean square error over that of the window's mean: a run fails
    if it is no better.
    """

    score_name = "RMSE over the series' range"

    def __init__(
        self, numbers: Numbers, width: int, depth: int, context: int, horizon: int
    ):
        blocks = Blocks(width, depth, heads=4, numbers=numbers)
        self.model = Forecaster(blocks, patch=4, horizon=horizon)
        cut = [windows(values, context, horizon) for values in series().values()]
        self.train = jax.device_put([of_series["train"] for of_series in cut])
        self.held_out = {
            split: _joined([_thinned(of_series[split]) for of_series in cut])
            for split in ("validation", "test")
        }
        self._baseline = {
            split: float(np.sqrt(np.mean((future - past.mean(1, keepdims=True)) ** 2)))
            for split, (past, future) in self.held_out.items()
        }

    def sample(
        self, train: PyTree, key: jax.Array, batch: int
    ) -> tuple[jax.Array, jax.Array]:
        key_which, key_where = jax.random.split(key)
        share = jax.random.uniform(key_where, (batch,))
        of_each = [
            jax.tree.map(lambda x: x[(share * len(x)).astype(int)], one)
            for one in train
        ]
        which = jax.random.randint(key_which, (batch,), 0, len(train))
        past, future = (
            jnp.stack(parts)[which, np.arange(batch)]
            for parts in zip(*of_each, strict=True)
        )
        return past, future

    def loss(self, predictions: jax.Array, targets: jax.Array) -> jax.Array:
        return jnp.mean((predictions - targets) ** 2)

    def score(self, predictions: jax.Array, targets: jax.Array) -> jax.Array:
        return jnp.sqrt(self.loss(predictions, targets))

    def error(self, score: float, split: Split) -> float:
        return score / self._baseline[split]


class Digits(Task):
    """ResNet-20 without BatchNorm on the digits of `benchmarks.vision`.

    The error is the share of wrong images; a run fails as it does there, if its
    accuracy is not above 1.5 times chance.
    """

    score_name = "accuracy"

    def __init__(self, width: int):
        data = load("digits")
        self._recipe = Recipe.of(data)
        self.model = MODELS["ResNet-20"](width=width, norm="none", num_classes=10)
        self.train = jax.device_put(data.splits["train"])
        self.held_out = {
            split: (
                np.asarray(self._recipe.normalize(data.splits[split].pixels)),
                data.splits[split].labels,
            )
            for split in ("validation", "test")
        }
        self.failure_error = 1 - data.failure_accuracy

    def sample(
        self, train: PyTree, key: jax.Array, batch: int
    ) -> tuple[jax.Array, jax.Array]:
        chosen = jax.random.randint(key, (batch,), 0, len(train.labels))
        return self._recipe.normalize(train.pixels[chosen]), train.labels[chosen]

    def loss(self, predictions: jax.Array, targets: jax.Array) -> jax.Array:
        return _cross_entropy(predictions, targets)

    def score(self, predictions: jax.Array, targets: jax.Array) -> jax.Array:
        is_right = predictions.argmax(-1) == targets
        return jnp.mean(is_right & jnp.isfinite(predictions).all(-1))

    def error(self, score: float, split: Split) -> float:
        del split
        return 1 - score


def _cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return losses.mean()


def _thinned(arrays: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """So many windows of a series as the shortest test part has at least."""
    past, future = arrays
    chosen = np.linspace(0, len(past) - 1, HELD_OUT).astype(int)
    return past[chosen], future[chosen]


def _joined(
    parts: list[tuple[np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray]:
    past, future = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return past, future


# The decoder of size "gpu" has 4.9 million parameters, "million" 1.3 million, "cpu" 43
# thousand: what two busy cores can train some hundreds of times.
_LANGUAGE: dict[Size, tuple[int, int, int]] = {  # width, depth, context
    "tiny": (8, 1, 8),
    "cpu": (32, 2, 32),
    "million": (128, 6, 64),
    "gpu": (256, 6, 256),
}
_FORECAST: dict[Size, tuple[int, int, int, int]] = {  # width, depth, context, horizon
    "tiny": (8, 1, 16, 4),
    "cpu": (16, 2, 32, 8),
    "gpu": (128, 3, 64, 16),
}
_DIGITS: dict[Size, int] = {"tiny": 2, "cpu": 4, "gpu": 16}  # width

# name in the results -> what makes it
TASKS: dict[str, Callable[[Size, Numbers], Task]] = {
    "lm": lambda size, numbers: Language(numbers, *_LANGUAGE[size]),
    "forecast": lambda size, numbers: Forecast(numbers, *_FORECAST[size]),
    "resnet20": lambda size, numbers: Digits(_DIGITS[size]),
}


@cache  # one object for each: programs are compiled for an object
def task_of(name: str, size: Size, numbers: Numbers) -> Task:
    """A task; resnet20 is in float32 alone.

    Raises:
        ValueError: for numbers that the task does not have.
    """
    if name == "resnet20" and numbers != "float32":
        raise ValueError(f"resnet20 is in float32 alone; got {numbers}.")
    return TASKS[name](size, numbers)

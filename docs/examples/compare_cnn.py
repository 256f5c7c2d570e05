"""Compares optimizers of an nnx CNN without normalization on scikit-learn's digits."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from stablegrad_optax import Comparison, compare_optimizers, default_optimizers


class CNN(nnx.Module):
    """Six convolutions of eight channels, He's initializer."""

    def __init__(self, rngs):
        he = nnx.initializers.he_normal()
        sizes = [1] + [8] * 6
        self.convs = nnx.List(
            [
                nnx.Conv(n, m, (3, 3), kernel_init=he, rngs=rngs)
                for n, m in itertools.pairwise(sizes)
            ]
        )
        self.out = nnx.Linear(8, 10, rngs=rngs)

    def __call__(self, x):
        """Images f[n, 8, 8, 1] -> logits f[n, 10]."""
        for conv in self.convs:
            x = nnx.relu(conv(x))
        return self.out(x.mean((1, 2)))


graphdef, _, rest = nnx.split(CNN(nnx.Rngs(0)), nnx.Param, ...)
images, labels = load_digits(return_X_y=True)
images = ((images - images.mean()) / images.std()).astype(np.float32)
x_train, x_test, y_train, y_test = map(
    jnp.asarray,
    train_test_split(
        images.reshape(-1, 8, 8, 1), labels, test_size=500, random_state=0
    ),
)


def init(key):
    """The parameters alone."""
    return nnx.state(CNN(nnx.Rngs(key)), nnx.Param)


def predict(params, x):
    """The model's output."""
    return nnx.merge(graphdef, params, rest, copy=True)(x)


def sample(key):
    """Thirty-two images."""
    rows = jax.random.randint(key, (32,), 0, len(x_train))
    return x_train[rows], y_train[rows]


def loss_fn(params, batch):
    """The mean cross-entropy."""
    x, y = batch
    logits = predict(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def score(params):
    """The share of test images that are misread."""
    return jnp.mean(predict(params, x_test).argmax(-1) != y_test)


def kernels_as_matrices(params):
    """Says which axes of kernels (height, width, in, out) Muon orthogonalizes."""

    def numbers(leaf):
        if leaf.ndim < 2:
            return None
        axes = tuple(range(leaf.ndim - 1))
        return optax.contrib.MuonDimensionNumbers(axes, leaf.ndim - 1)

    return jax.tree.map(numbers, params)


def run(**settings) -> Comparison:
    """Compares the default optimizers but SOAP; ``settings`` replace the defaults."""
    optimizers = default_optimizers(kernels_as_matrices)
    defaults = {
        "optimizers": {n: o for n, o in optimizers.items() if "SOAP" not in n},
        "steps": 120,
        "num_seeds": 7,
        "num_tuning_seeds": 2,
        "score": score,
        "failure_score": 0.8,  # a guess has 0.9
        "parallel": 8,
        "key": jax.random.key(0),
    }
    return compare_optimizers(loss_fn, init, sample, **(defaults | settings))


if __name__ == "__main__":
    print(run())

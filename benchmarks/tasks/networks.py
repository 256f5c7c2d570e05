"""Small networks of many kinds, from healthy to hopeless, and their training data.

Errors are relative: 1 is the error of the mean of the targets, or of a guess. A module
whose name starts with `stack_` holds many layers.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from benchmarks.tasks.functions import FunctionTask

PyTree = Any
Array = jax.Array
BATCH = 32

he = nn.initializers.he_normal()
lecun = nn.initializers.lecun_normal()


# Digits: images as vectors, as images, as sequences of rows or of pixels.


@cache
def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training images f[n, 8, 8], their labels, test images and theirs."""
    images, labels = load_digits(return_X_y=True)
    images = ((images - images.mean()) / images.std()).astype(np.float32)
    return train_test_split(
        images.reshape(-1, 8, 8),
        labels,
        test_size=500,
        random_state=0,
        stratify=labels,
    )


def classifier(
    model: nn.Module,
    view: Callable[[Array], Array] = lambda images: images.reshape(len(images), -1),
    scale: float = 1.0,
    batch_size: int = BATCH,
) -> FunctionTask:
    """Classifies digits; the loss is multiplied by `scale`."""
    x_train, x_test, y_train, y_test = digits()

    def sample(key: Array) -> tuple[Array, Array]:
        rows = jax.random.randint(key, (batch_size,), 0, len(x_train))
        return jnp.asarray(x_train)[rows], jnp.asarray(y_train)[rows]

    def predict(params: PyTree, images: Array) -> Array:
        return model.apply(params, view(images), mutable="batch_stats")[0]

    def loss(params: PyTree, batch: tuple[Array, Array]) -> Array:
        logits = predict(params, batch[0])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
        return scale * losses.mean()

    def error(params: PyTree) -> Array:
        logits = predict(params, jnp.asarray(x_test))
        return jnp.mean(logits.argmax(-1) != y_test) / 0.9  # a guess has 0.9

    def init(key: Array) -> PyTree:
        variables = model.init(key, view(jnp.asarray(x_train[:2])))
        return {"params": variables["params"]}

    return FunctionTask(init, loss, sample, error)


class MLP(nn.Module):
    depth: int
    act: Callable[[Array], Array] = nn.relu
    kernel_init: Any = he
    bias_init: Any = nn.initializers.zeros
    residual: bool = False
    norm: bool = False
    width: int = 32
    out: int = 10

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dense = partial(nn.Dense, kernel_init=self.kernel_init)
        x = dense(self.width, bias_init=self.bias_init)(x)
        for _ in range(self.depth - 2):
            y = nn.LayerNorm()(x) if self.norm else x
            y = self.act(dense(self.width, bias_init=self.bias_init)(y))
            x = x + y if self.residual else y
        return nn.Dense(self.out)(x)


def stack(block: type[nn.Module], length: int) -> Any:
    """As many blocks as one scan: what is compiled does not grow with them."""
    return nn.scan(
        block, variable_axes={"params": 0}, split_rngs={"params": True}, length=length
    )


def convolve(x: Array, kernel: Array, *_: Any, **__: Any) -> Array:
    """Images f[n, h, w, c], kernel f[3, 3, c, m]: a product of matrices.

    XLA's convolution on a CPU is very slow for many kernels side by side.
    """
    h, w = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    patches = [padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]
    return jnp.concatenate(patches, -1) @ kernel.reshape(-1, kernel.shape[-1])


Conv = partial(nn.Conv, features=8, kernel_size=(3, 3), conv_general_dilated=convolve)


class Convolution(nn.Module):
    kernel_init: Any
    norm: bool
    residual: bool

    @nn.compact
    def __call__(self, x: Array, _: None) -> tuple[Array, None]:
        y = Conv(kernel_init=self.kernel_init)(x)
        y = nn.relu(nn.GroupNorm(4)(y) if self.norm else y)
        return x + y if self.residual else y, None


class CNN(nn.Module):
    depth: int
    kernel_init: Any = he
    norm: bool = False
    residual: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        block = self.kernel_init, self.norm, self.residual
        half = self.depth // 2
        x = Conv(kernel_init=self.kernel_init)(x)
        x, _ = stack(Convolution, half)(*block, name="stack_0")(x, None)
        x = nn.avg_pool(x, (2, 2), (2, 2))
        rest = self.depth - 1 - half
        x, _ = stack(Convolution, rest)(*block, name="stack_1")(x, None)
        return nn.Dense(10)(x.mean((1, 2)))


class ResidualBlock(nn.Module):
    """Two convolutions next to a projection, as in Flax's ImageNet example."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        conv = partial(Conv, features=self.features, use_bias=False)
        dense = partial(nn.Dense, self.features, use_bias=False)
        norm = partial(nn.BatchNorm, use_running_average=False)
        y = conv()(x)[:, :: self.stride, :: self.stride]
        y = conv()(nn.relu(norm()(y)))
        y = norm(scale_init=nn.initializers.zeros)(y)
        if x.shape != y.shape:
            x = norm()(dense()(x[:, :: self.stride, :: self.stride]))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Uses the statistics of each batch, also of that of all test images."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = Conv(use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=False)(x))
        for features, stride in ((8, 1), (16, 2), (32, 2)):
            x = ResidualBlock(features, stride)(x)
        return nn.Dense(10)(x.mean((1, 2)))


class Block(nn.Module):
    norm: str
    width: int
    kernel_init: Any = lecun

    @nn.compact
    def __call__(self, x: Array, _: None) -> tuple[Array, None]:
        x = self.around(x, nn.MultiHeadAttention(2, kernel_init=self.kernel_init))
        dense = partial(nn.Dense, kernel_init=self.kernel_init)
        layers = [dense(2 * self.width), nn.gelu, dense(self.width)]
        return self.around(x, nn.Sequential(layers)), None

    def around(self, x: Array, layer: nn.Module) -> Array:
        if self.norm == "before":
            return x + layer(nn.LayerNorm()(x))
        x = x + layer(x)
        return nn.LayerNorm()(x) if self.norm == "after" else x


class Transformer(nn.Module):
    depth: int
    norm: str = "before"  # or "after", or "none"
    vocabulary: int = 0  # 0: of real vectors
    kernel_init: Any = lecun

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = 16
        block = self.norm, width, self.kernel_init
        embed = nn.Embed(self.vocabulary, width) if self.vocabulary else nn.Dense(width)
        x = embed(x)
        place = nn.initializers.normal(0.02)
        x = x + self.param("place", place, (x.shape[1], width))
        x, _ = stack(Block, self.depth)(*block, name="stack_0")(x, None)
        x = nn.LayerNorm()(x) if self.norm == "before" else x
        return nn.Dense(10)(x.mean(1))


class Recurrent(nn.Module):
    cell: nn.Module

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.Dense(10)(nn.RNN(self.cell)(x)[:, -1])


def rows(images: Array) -> Array:
    return images


def pixels(images: Array) -> Array:
    return images.reshape(len(images), 64, 1)


def maps(images: Array) -> Array:
    return images[..., None]


def words(images: Array) -> Array:
    """Each row of an image as one of 2048 words, most of them seldom met."""
    bits = (images > 0).astype(int) @ (2 ** jnp.arange(8))
    return bits + 256 * jnp.arange(8)


# A physics-informed network: u_xx + u_yy = f on the unit square, zero on its boundary.


def poisson(depth: int, gain: float | None, width: int = 32) -> FunctionTask:
    """Uses tanh; hidden weights are N(0, gain^2/fan_in), or uniform as in PyTorch."""

    def layer(key: Array, n_in: int, n_out: int, stack: tuple[int, ...] = ()) -> PyTree:
        w, b = jax.random.split(key)
        if gain is None:
            limit = n_in**-0.5
            draw = partial(jax.random.uniform, minval=-limit, maxval=limit)
            return {
                "kernel": draw(w, (*stack, n_in, n_out)),
                "bias": draw(b, (*stack, n_out)),
            }
        std = (gain if n_out > 1 else 1) * n_in**-0.5
        return {
            "kernel": std * jax.random.normal(w, (*stack, n_in, n_out)),
            "bias": jnp.zeros((*stack, n_out)),
        }

    def init(key: Array) -> PyTree:
        first, hidden, last = jax.random.split(key, 3)
        return {
            "first": layer(first, 2, width),
            "stack_0": layer(hidden, width, width, (depth - 2,)),
            "last": layer(last, width, 1),
        }

    def field(params: PyTree, x: Array) -> Array:
        def step(x: Array, layer: PyTree) -> tuple[Array, None]:
            return jnp.tanh(x @ layer["kernel"] + layer["bias"]), None

        x, _ = step(x, params["first"])
        x, _ = jax.lax.scan(step, x, params["stack_0"])
        return (x @ params["last"]["kernel"] + params["last"]["bias"])[0]

    def exact(x: Array) -> Array:
        return jnp.prod(jnp.sin(jnp.pi * x), axis=-1)

    def sample(key: Array) -> tuple[Array, Array]:
        inner, side, place = jax.random.split(key, 3)
        edge = jax.random.uniform(side, (16, 2))
        edge = edge.at[jnp.arange(16), jnp.arange(16) % 2].set(
            jax.random.bernoulli(place, shape=(16,)).astype(float)
        )
        return jax.random.uniform(inner, (BATCH, 2)), edge

    def loss(params: PyTree, batch: tuple[Array, Array]) -> Array:
        def second(x: Array, axis: Array) -> Array:
            def first(x: Array) -> Array:
                return jax.jvp(partial(field, params), (x,), (axis,))[1]

            return jax.jvp(first, (x,), (axis,))[1]

        def residual(x: Array) -> Array:
            laplacian = jnp.sum(jax.vmap(partial(second, x))(jnp.eye(2)))
            return laplacian + 2 * jnp.pi**2 * exact(x)

        inner, edge = batch
        on_edge = jax.vmap(partial(field, params))(edge)
        return jnp.mean(jax.vmap(residual)(inner) ** 2) + 100 * jnp.mean(on_edge**2)

    side = jnp.linspace(0, 1, 21)
    grid = jnp.stack(jnp.meshgrid(side, side), -1).reshape(-1, 2)

    def error(params: PyTree) -> Array:
        difference = jax.vmap(partial(field, params))(grid) - exact(grid)
        return jnp.linalg.norm(difference) / jnp.linalg.norm(exact(grid))

    return FunctionTask(init, loss, sample, error)


def ensemble(dead: bool) -> FunctionTask:
    """Trains five stacked members of depth 6; the last may have no gradient."""
    one = classifier(MLP(6))

    def init(key: Array) -> PyTree:
        params = jax.vmap(one.draw)(jax.random.split(key, 5))
        keep = jnp.arange(5) < (4 if dead else 5)
        return {
            "stack_0": jax.tree.map(
                lambda x: x * keep.reshape((-1,) + (1,) * (x.ndim - 1)), params
            )
        }

    def loss(params: PyTree, batch: Any) -> Array:
        return jnp.mean(jax.vmap(one.loss, (0, None))(params["stack_0"], batch))

    def error(params: PyTree) -> Array:
        return jnp.mean(jax.vmap(one.error)(params["stack_0"])[: 4 if dead else 5])

    return FunctionTask(init, loss, one.sample, error)


def _uniform() -> Any:
    return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _small_bias(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    return jax.random.uniform(key, shape, dtype, -(32**-0.5), 32**-0.5)


def _times(gain: float) -> Any:
    return nn.initializers.variance_scaling(2 * gain**2, "fan_in", "normal")


mlp = classifier
cnn = partial(classifier, view=maps, batch_size=16)
transformer = partial(classifier, view=rows, batch_size=16)
recurrent = classifier
torch = {"kernel_init": _uniform(), "bias_init": _small_bias}

# A step of a convolutional net or a transformer takes far longer than the others'.
STEPS = {"CNN": 100, "ResNet": 100, "transformer": 100}
NETWORKS: dict[str, Callable[[], FunctionTask]] = {
    "MLP 4": lambda: mlp(MLP(4)),
    "MLP 12": lambda: mlp(MLP(12)),
    "MLP 24": lambda: mlp(MLP(24)),
    "MLP 12, loss times 1e5": lambda: mlp(MLP(12), scale=1e5),
    "MLP 12, loss times 1e-6": lambda: mlp(MLP(12), scale=1e-6),
    "MLP 12, LeCun": lambda: mlp(MLP(12, kernel_init=lecun)),
    "MLP 24, LeCun": lambda: mlp(MLP(24, kernel_init=lecun)),
    "MLP 12, twice He": lambda: mlp(MLP(12, kernel_init=_times(2))),
    "MLP 24, tanh, LeCun": lambda: mlp(MLP(24, nn.tanh, lecun)),
    "MLP 12, tanh, Equinox": lambda: mlp(MLP(12, nn.tanh, **torch)),
    "MLP 20, tanh, Equinox": lambda: mlp(MLP(20, nn.tanh, **torch)),
    "MLP 12, Equinox": lambda: mlp(MLP(12, **torch)),
    "MLP 24, residual": lambda: mlp(MLP(24, residual=True)),
    "MLP 24, residual, LayerNorm": lambda: mlp(MLP(24, residual=True, norm=True)),
    "CNN 4": lambda: cnn(CNN(4)),
    "CNN 4, GroupNorm": lambda: cnn(CNN(4, norm=True)),
    "CNN 12": lambda: cnn(CNN(12)),
    "CNN 12, GroupNorm": lambda: cnn(CNN(12, norm=True)),
    "CNN 16, LeCun": lambda: cnn(CNN(16, kernel_init=lecun)),
    "CNN 16, residual": lambda: cnn(CNN(16, residual=True)),
    "CNN 16, residual, GroupNorm": lambda: cnn(CNN(16, norm=True, residual=True)),
    "transformer 2": lambda: transformer(Transformer(2)),
    "transformer 6": lambda: transformer(Transformer(6)),
    "transformer 6, norm after": lambda: transformer(Transformer(6, "after")),
    "transformer 6, no norm": lambda: transformer(Transformer(6, "none")),
    "transformer 2, words": lambda: transformer(
        Transformer(2, vocabulary=2048), view=words
    ),
    "LSTM, 8 steps": lambda: recurrent(Recurrent(nn.OptimizedLSTMCell(32)), rows),
    "GRU, 64 steps": lambda: recurrent(Recurrent(nn.GRUCell(32)), pixels),
    "tanh RNN, 8 steps": lambda: recurrent(Recurrent(nn.SimpleCell(32)), rows),
    "tanh RNN, 64 steps": lambda: recurrent(Recurrent(nn.SimpleCell(32)), pixels),
    "GRU, 8 steps": lambda: recurrent(Recurrent(nn.GRUCell(32)), rows),
    "MLP 24, Equinox": lambda: mlp(MLP(24, **torch)),
    "MLP 24, gelu, LeCun": lambda: mlp(MLP(24, nn.gelu, lecun)),
    "MLP 50, tanh, Equinox": lambda: mlp(MLP(50, nn.tanh, **torch)),
    "ResNet 8, Flax's example": lambda: cnn(ResNet()),
    "transformer 2, Flax's example": lambda: transformer(
        Transformer(2, vocabulary=2048, kernel_init=nn.initializers.xavier_uniform()),
        view=words,
    ),
    "five MLPs": lambda: ensemble(dead=False),
    "five MLPs, one dead": lambda: ensemble(dead=True),
    "Poisson 4": lambda: poisson(4, 1.0),
    "Poisson 16": lambda: poisson(16, 1.0),
    "Poisson 16, gain 5/3": lambda: poisson(16, 5 / 3),
    "Poisson 32, gain 5/3": lambda: poisson(32, 5 / 3),
    "Poisson 16, gain 1/2": lambda: poisson(16, 0.5),
    "Poisson 12, Equinox": lambda: poisson(12, None),
    "Poisson 20, Equinox": lambda: poisson(20, None),
    "Poisson 32, Equinox": lambda: poisson(32, None),
    "Poisson 50, Equinox": lambda: poisson(50, None),
}


def steps(name: str) -> int:
    """Returns how long a network is trained."""
    return STEPS.get(name.split(" ")[0], 200)


@cache  # one object for each: programs are compiled for an object
def network(name: str) -> FunctionTask:
    """Returns the task with a name of `NETWORKS`."""
    return NETWORKS[name]()

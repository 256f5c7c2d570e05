"""Convolutional networks with BatchNorm or without, and nothing else changed.

Without BatchNorm a convolution has a bias in place of BatchNorm's shift. Dropout and
stochastic depth of the published networks are left out. All take f[batch, h, w, c] and
give f[batch, classes].
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

Norm = Literal["batch", "none"]


class Conv(nn.Module):
    """A convolution, then BatchNorm or nothing.

    Attributes:
        channels: of the output.
        size: of the square kernel.
        strides: in both directions.
        groups: of channels that are convolved apart.
        gain: the initial weights are N(0, 2 gain^2 / fan-in).
        epsilon: of BatchNorm.
        bias: whether there is one without BatchNorm.
    """

    norm: Norm
    channels: int
    size: int = 3
    strides: int = 1
    groups: int = 1
    gain: float = 1.0
    epsilon: float = 1e-5
    bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Conv(
            self.channels,
            (self.size, self.size),
            self.strides,
            feature_group_count=self.groups,
            use_bias=self.bias and self.norm == "none",
            kernel_init=nn.initializers.variance_scaling(
                2 * self.gain**2, "fan_in", "truncated_normal"
            ),
        )(x)
        if self.norm == "none":
            return x
        return nn.BatchNorm(not train, momentum=0.9, epsilon=self.epsilon)(x)


class ResNet(nn.Module):
    """The networks of He et al. 2016 for CIFAR.

    Depth 20 has 0.27 million parameters, depth 56 0.85 million. Their shortcuts have
    none.

    Attributes:
        depth: 6 n + 2, with n blocks in each of three stages.
        width: channels of the first stage, doubled in each of the others.
        norm: "batch" or "none".
        num_classes: number of outputs.
    """

    depth: int = 20
    width: int = 16
    norm: Norm = "batch"
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = True) -> jax.Array:
        if self.depth % 6 != 2:
            raise ValueError(f"depth must be 6 n + 2; got {self.depth}.")
        x = nn.relu(Conv(self.norm, self.width)(x, train))
        for stage in range(3):
            channels = self.width * 2**stage
            for block in range((self.depth - 2) // 6):
                strides = 2 if stage and not block else 1
                y = nn.relu(Conv(self.norm, channels, strides=strides)(x, train))
                y = Conv(self.norm, channels)(y, train)
                x = nn.relu(y + _shortcut(x, channels, strides))
        return nn.Dense(self.num_classes)(x.mean((1, 2)))


def _shortcut(x: jax.Array, channels: int, strides: int) -> jax.Array:
    """Every second pixel, and zeros for the channels that are new."""
    missing = channels - x.shape[-1]
    before = missing // 2
    padding = [(0, 0)] * 3 + [(before, missing - before)]
    return jnp.pad(x[:, ::strides, ::strides], padding)


class ResNet50(nn.Module):
    """The bottleneck network of He et al. 2016, its stride in the 3x3 convolutions.

    With width 64 and 1000 classes it has 25.56 million parameters.
    """

    width: int = 64
    norm: Norm = "batch"
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = True) -> jax.Array:
        conv = partial(Conv, self.norm)
        x = nn.relu(conv(self.width, 7, strides=2)(x, train))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, num_blocks in enumerate((3, 4, 6, 3)):
            inner = self.width * 2**stage
            for block in range(num_blocks):
                strides = 2 if stage and not block else 1
                y = nn.relu(conv(inner, 1)(x, train))
                y = nn.relu(conv(inner, strides=strides)(y, train))
                y = conv(4 * inner, 1)(y, train)
                if not block:
                    x = conv(4 * inner, 1, strides=strides)(x, train)
                x = nn.relu(x + y)
        return nn.Dense(self.num_classes)(x.mean((1, 2)))


class VGG16(nn.Module):
    """Configuration D of Simonyan and Zisserman 2015, with the head for ImageNet.

    With width 64, images of 224 pixels and no BatchNorm: 138.36 million parameters for
    1000 classes, 134.30 million for 10. The head's hidden layers have 64 width units.
    """

    width: int = 64
    norm: Norm = "batch"
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = True) -> jax.Array:
        for factor, num_layers in ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3)):
            for _ in range(num_layers):
                x = nn.relu(Conv(self.norm, factor * self.width)(x, train))
            # Images of less than 32 pixels end as one pixel.
            x = nn.max_pool(x, (2, 2), (2, 2), "SAME")
        x = x.reshape(len(x), -1)
        for _ in range(2):
            dense = nn.Dense(64 * self.width, kernel_init=nn.initializers.he_normal())
            x = nn.relu(dense(x))
        return nn.Dense(self.num_classes)(x)


# Of each stage: blocks, channels, stride, expansion, squeeze-and-excite.
_EFFICIENT_STAGES = (
    (2, 24, 1, 1, False),
    (4, 48, 2, 4, False),
    (4, 64, 2, 4, False),
    (6, 128, 2, 4, True),
    (9, 160, 1, 6, True),
    (15, 256, 2, 6, True),
)


class EfficientNetV2S(nn.Module):
    """EfficientNetV2-S of Tan and Le 2021, squeeze-and-excite kept.

    With width 24 and 1000 classes it has 21.46 million parameters. The width is that of
    the stem; all others are in proportion.
    """

    width: int = 24
    norm: Norm = "batch"
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = True) -> jax.Array:
        conv = partial(Conv, self.norm, epsilon=1e-3)
        x = nn.silu(conv(self.width, strides=2)(x, train))
        for num_blocks, channels, strides, expansion, excite in _EFFICIENT_STAGES:
            for block in range(num_blocks):
                y = _expanded(
                    conv,
                    x,
                    train,
                    channels=self._scaled(channels),
                    strides=1 if block else strides,
                    expansion=expansion,
                    excite=excite,
                )
                x = x + y if block or y.shape == x.shape else y
        x = nn.silu(conv(self._scaled(1280), 1)(x, train))
        return nn.Dense(self.num_classes)(x.mean((1, 2)))

    def _scaled(self, channels: int) -> int:
        return round(channels * self.width / 24)


def _expanded(
    conv: Callable[..., Conv],
    x: jax.Array,
    train: bool,
    *,
    channels: int,
    strides: int,
    expansion: int,
    excite: bool,
) -> jax.Array:
    """The convolutions of one block; depthwise ones where it squeezes and excites."""
    inner = expansion * x.shape[-1]
    if excite:
        y = nn.silu(conv(inner, 1)(x, train))
        y = nn.silu(conv(inner, strides=strides, groups=inner)(y, train))
        y = y * _excitation(y, x.shape[-1] // 4)
        return conv(channels, 1)(y, train)
    if expansion == 1:
        return nn.silu(conv(channels, strides=strides)(x, train))
    y = nn.silu(conv(inner, strides=strides)(x, train))
    return conv(channels, 1)(y, train)


def _excitation(x: jax.Array, squeezed: int) -> jax.Array:
    """A factor for each channel of an image, f[batch, 1, 1, channels]."""
    means = x.mean((1, 2), keepdims=True)
    return nn.sigmoid(nn.Dense(x.shape[-1])(nn.silu(nn.Dense(squeezed)(means))))


class PlainNet(nn.Module):
    """Convolutions in a row, without shortcuts, and one dense layer.

    Attributes:
        width: channels of the first third, doubled in each of the others.
        norm: "batch" or "none".
        num_classes: number of outputs.
        depth: layers with weights.
        gain: of the convolutions' initial weights; below 1 signals and gradients fall.
        biases: whether convolutions without BatchNorm have them.
    """

    width: int = 16
    norm: Norm = "none"
    num_classes: int = 10
    depth: int = 24
    gain: float = 1.0
    biases: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = True) -> jax.Array:
        conv = partial(Conv, self.norm, gain=self.gain, bias=self.biases)
        stages = [3 * layer // (self.depth - 1) for layer in range(self.depth - 1)]
        for before, stage in zip([0, *stages], stages, strict=False):
            x = conv(self.width * 2**stage, strides=1 + stage - before)(x, train)
            x = nn.relu(x)
        return nn.Dense(self.num_classes)(x.mean((1, 2)))


# name in the results -> what makes it of width, norm and num_classes
MODELS: dict[str, Callable[..., nn.Module]] = {
    "ResNet-20": partial(ResNet, 20),
    "ResNet-56": partial(ResNet, 56),
    "ResNet-50": ResNet50,
    "VGG-16": VGG16,
    "EfficientNetV2-S": EfficientNetV2S,
    "plain-24, gain 0.75": partial(PlainNet, gain=0.75),
    "plain-24, gain 0.75, no conv biases": partial(PlainNet, gain=0.75, biases=False),
}

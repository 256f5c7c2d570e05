"""The parameter trees on which optimizers are timed: shapes alone."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.tasks.pinn.network import Network

Shapes = dict[str, dict[str, tuple[int, ...]]]  # layer -> leaf -> shape
Tree = dict[str, dict[str, jax.Array]]


def resnet50() -> Shapes:
    """ResNet-50 on ImageNet, with its BatchNorm scales and shifts."""
    shapes: Shapes = {}

    def conv(name: str, kernel: tuple[int, ...]) -> None:
        shapes[name] = {"kernel": kernel}
        shapes[f"{name}_norm"] = {"bias": kernel[-1:], "scale": kernel[-1:]}

    conv("stem", (7, 7, 3, 64))
    channels = 64
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for block in range(blocks):
            name = f"stage{stage}_block{block}"
            conv(f"{name}_conv0", (1, 1, channels, width))
            conv(f"{name}_conv1", (3, 3, width, width))
            conv(f"{name}_conv2", (1, 1, width, 4 * width))
            if not block:
                conv(f"{name}_shortcut", (1, 1, channels, 4 * width))
            channels = 4 * width
    shapes["head"] = {"kernel": (channels, 1000), "bias": (1000,)}
    return shapes


def gpt2() -> Shapes:
    """GPT-2 small: 12 blocks of width 768, the output tied to the embedding."""
    embeddings = {
        "tokens": {"embedding": (50257, 768)},
        "positions": {"embedding": (1024, 768)},
    }
    return embeddings | decoder(12)


def decoder(blocks: int = 6, width: int = 768) -> Shapes:
    """GPT-2's blocks and last norm; each array of 6 blocks fits into a TPU's VMEM."""
    norm = {"bias": (width,), "scale": (width,)}

    def dense(inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
        return {"kernel": (inputs, outputs), "bias": (outputs,)}

    shapes: Shapes = {}
    for block in range(blocks):
        shapes |= {
            f"block{block}_norm0": norm,
            f"block{block}_qkv": dense(width, 3 * width),
            f"block{block}_out": dense(width, width),
            f"block{block}_norm1": norm,
            f"block{block}_up": dense(width, 4 * width),
            f"block{block}_down": dense(4 * width, width),
        }
    return shapes | {"norm": norm}


def equal(num_leaves: int, shape: tuple[int, ...] = (32, 32)) -> Shapes:
    """So many layers of one weight each."""
    return {f"layer{i}": {"kernel": shape} for i in range(num_leaves)}


def pinn() -> Shapes:
    """The perceptron of the demo: depth 32, width 32."""
    params = jax.eval_shape(Network(32, 32).init, jax.random.key(0))
    return jax.tree.map(lambda leaf: leaf.shape, params)


# name -> title, shapes
TREES: dict[str, tuple[str, Callable[[], Shapes]]] = {
    "a": ("ResNet-50", resnet50),
    "b": ("GPT-2 small", gpt2),
    "c": ("2000 leaves of 1024", lambda: equal(2000)),
    "d": ("one leaf of 1e8", lambda: equal(1, (10_000, 10_000))),
    "e": ("PINN, depth 32", pinn),
    "f": ("400 leaves of 1024", lambda: equal(400)),
    "g": ("decoder, 6 layers", decoder),
}


def label(tree: str) -> str:
    """The tree's letter and title."""
    return f"({tree}) {TREES[tree][0]}"


def size(shapes: Shapes) -> tuple[int, int]:
    """Number of leaves and of elements."""
    leaves = [shape for layer in shapes.values() for shape in layer.values()]
    return len(leaves), sum(math.prod(shape) for shape in leaves)


def abstract(shapes: Shapes, dtype: jnp.dtype) -> Tree:
    """The tree as `jax.ShapeDtypeStruct`, for programs that are not run."""
    return _map(lambda shape: jax.ShapeDtypeStruct(shape, dtype), shapes)


def normal(shapes: Shapes, dtype: jnp.dtype, std: float = 0.01) -> Tree:
    """Normal numbers; equal shapes give equal trees."""
    rng = np.random.default_rng(0)

    def draw(shape: tuple[int, ...]) -> jax.Array:
        values = rng.standard_normal(shape, dtype=np.float32)
        return jnp.asarray(np.float32(std) * values, dtype)

    return _map(draw, shapes)


def _map(function: Callable[[tuple[int, ...]], jax.Array], shapes: Shapes) -> Tree:
    return {
        layer: {leaf: function(shape) for leaf, shape in leaves.items()}
        for layer, leaves in shapes.items()
    }

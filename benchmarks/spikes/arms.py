"""What is done to the gradient, and the optimizer after it: each with each."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax

from benchmarks.spikes.zclip import zclip
from benchmarks.vision.arms import predicted
from stablegrad_optax import gradient_stabilizer, stablegrad

Transformation = optax.GradientTransformation


def unit_norm() -> Transformation:
    """Every leaf over its norm; a zero leaf stays zero. It has no memory."""

    def normalize(g: jax.Array) -> jax.Array:
        norm = jnp.linalg.norm(g.astype(jnp.float32))
        return (g / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny)).astype(g.dtype)

    return optax.stateless_with_tree_map(lambda g, _: normalize(g))


OPTIMIZERS: dict[str, Callable[[optax.Schedule], Transformation]] = {
    "Adam": optax.adam,
    "AdamW": optax.adamw,
    # A memory of ten updates in place of a thousand: what costs nothing to try.
    "Adam b2=0.9": partial(optax.adam, b2=0.9),
    "AdamW b2=0.9": partial(optax.adamw, b2=0.9),
    "Lion": optax.lion,
}

# A further arm is one entry.
ARMS: dict[str, Callable[[], Transformation]] = {
    "none": optax.identity,
    "value clip 0.1": partial(optax.clip, 0.1),
    "norm clip 1": partial(optax.clip_by_global_norm, 1.0),
    "AGC 0.01": partial(optax.adaptive_grad_clip, 0.01),
    "ZClip": zclip,
    "GradientStabilizer": gradient_stabilizer,
    "GradientStabilizer, Algorithm 1": partial(
        gradient_stabilizer, bias_correction=False
    ),
    "GradientStabilizer, max_norm_ratio 2": partial(
        gradient_stabilizer, max_norm_ratio=2.0
    ),
    "StableGrad, constant 1": stablegrad,
    "StableGrad, prediction, limit 2": partial(predicted, max_reference_growth=2.0),
    "unit norm of each leaf": unit_norm,
    "constant factor 30": partial(optax.scale, 30.0),
}


def transformation(
    arm: str, optimizer: str, rate: optax.Schedule, weight_decay: float = 0.0
) -> optax.GradientTransformationExtraArgs:
    """The whole; its `update` takes `prediction_std`, f[], as well.

    Args:
        arm: a name of `ARMS`.
        optimizer: a name of `OPTIMIZERS`.
        rate: of learning.
        weight_decay: times the weights is added to what the arm makes of the
            gradient, before the optimizer: not the decoupled decay of AdamW and Lion.
    """
    parts = [ARMS[arm](), OPTIMIZERS[optimizer](rate)]
    if weight_decay:
        parts.insert(1, optax.add_decayed_weights(weight_decay))
    return optax.chain(*parts)

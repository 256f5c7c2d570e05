"""The optimizers whose steps are timed. A further arm is one entry of `ARMS`."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from stablegrad_optax import (
    clip_by_history,
    gradient_autoscaled_normalization,
    gradient_stabilizer,
    skip_spikes,
    stablegrad,
)

BASELINE = "adamw"
LEARNING_RATE = 1e-3


class Arm(NamedTuple):
    """A transformation and the optimizer after it."""

    before: Callable[[], optax.GradientTransformation] = optax.identity
    optimizer: Callable[[float], optax.GradientTransformation] = optax.adamw

    def parts(
        self,
    ) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
        return self.before(), self.optimizer(LEARNING_RATE)


def literal_std() -> optax.GradientTransformation:
    """Every leaf over its `jnp.std`, as one would write it down."""

    def scale(grad: jax.Array) -> jax.Array:
        std = jnp.std(grad.astype(jnp.float32))
        return (grad / (std + 1e-30)).astype(grad.dtype)

    return optax.stateless(lambda updates, params: jax.tree.map(scale, updates))


def one_read() -> optax.GradientTransformation:
    """Every leaf over its root mean square: the least that a statistic can cost."""

    def scale(grad: jax.Array) -> jax.Array:
        mean_square = jnp.mean(jnp.square(grad.astype(jnp.float32)))
        return (grad * jax.lax.rsqrt(mean_square)).astype(grad.dtype)

    return optax.stateless(lambda updates, params: jax.tree.map(scale, updates))


ARMS: dict[str, Arm] = {
    BASELINE: Arm(),
    "adamw again": Arm(),  # shows the noise
    "stablegrad": Arm(stablegrad),
    "gradient_stabilizer": Arm(gradient_stabilizer),
    "gradient_autoscaled_normalization": Arm(gradient_autoscaled_normalization),
    "clip_by_global_norm": Arm(lambda: optax.clip_by_global_norm(1.0)),
    "adaptive_grad_clip": Arm(lambda: optax.adaptive_grad_clip(0.01)),
    "jnp.std of each leaf": Arm(literal_std),
    "rms of each leaf": Arm(one_read),
    "scale_by_adam alone": Arm(optimizer=lambda rate: optax.scale_by_adam()),
}
# Remedies for spikes, which are compiled for other machines and not timed on this one:
# those that enclose the optimizer have no moments to lend.
REMEDIES: dict[str, Arm] = {
    "clip_by_history": Arm(clip_by_history),
    "skip_spikes": Arm(optimizer=lambda rate: skip_spikes(optax.adamw(rate))),
    "apply_if_finite": Arm(
        optimizer=lambda rate: optax.apply_if_finite(optax.adamw(rate), 5)
    ),
}
ALL_ARMS = ARMS | REMEDIES
OURS = ("stablegrad", "gradient_stabilizer", "gradient_autoscaled_normalization")
# (tree, dtype) -> what is left out there: XLA:CPU was stopped after ten minutes of
# compiling it.
LEFT_OUT = {("c", "bfloat16"): ("clip_by_global_norm",)}

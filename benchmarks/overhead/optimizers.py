"""The optimizers whose steps are measured; they are named as in `lib/optimizers.py`."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.lib.optimizers import METHODS, WRAPPERS, Optimizer

BASELINE = "AdamW"
AGAIN = "AdamW (again)"  # shows the noise
LEARNING_RATE = 1e-3


class Chain(NamedTuple):
    """A transformation and the optimizer that follows it, as factories."""

    before: Callable[[], optax.GradientTransformation] = optax.identity
    optimizer: Callable[[float], optax.GradientTransformation] = optax.adamw

    @classmethod
    def named(cls, name: str) -> "Chain":
        """Returns a method of the vocabulary, followed by AdamW."""
        method = Optimizer.named(name).method
        if method in WRAPPERS:
            wrapper = WRAPPERS[method]
            return cls(optimizer=lambda rate: wrapper(optax.adamw(rate)))
        return cls(METHODS[method])

    def parts(
        self,
    ) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
        return self.before(), self.optimizer(LEARNING_RATE)


def _std_per_array() -> optax.GradientTransformation:
    """Divides each array by its `jnp.std`, as one would write it down."""

    def scale(grad: jax.Array) -> jax.Array:
        std = jnp.std(grad.astype(jnp.float32))
        return (grad / (std + 1e-30)).astype(grad.dtype)

    return optax.stateless(lambda updates, params: jax.tree.map(scale, updates))


def _rms_per_array() -> optax.GradientTransformation:
    """Divides by the root mean square, the least that a statistic can cost."""

    def scale(grad: jax.Array) -> jax.Array:
        mean_square = jnp.mean(jnp.square(grad.astype(jnp.float32)))
        return (grad * jax.lax.rsqrt(mean_square)).astype(grad.dtype)

    return optax.stateless(lambda updates, params: jax.tree.map(scale, updates))


METHODS_OF_THE_PACKAGE = (
    "StableGrad + AdamW",
    "GradientStabilizer + AdamW",
    "autoscaled normalization + AdamW",
)
CLIP = "clip + AdamW"
_TIMED = (*METHODS_OF_THE_PACKAGE, CLIP, "AGC + AdamW")
TIMED: dict[str, Chain] = {
    BASELINE: Chain(),
    AGAIN: Chain(),
    **{name: Chain.named(name) for name in _TIMED},
    "jnp.std per array + AdamW": Chain(_std_per_array),
    "rms per array + AdamW": Chain(_rms_per_array),
    "scale_by_adam": Chain(optimizer=lambda rate: optax.scale_by_adam()),
}
# Remedies for spikes are compiled for other machines and not timed on this one: those
# that enclose the optimizer have no moments to lend.
_REMEDIES = ("clip by history + AdamW", "skip spikes + AdamW")
CHAINS: dict[str, Chain] = {
    **TIMED,
    **{name: Chain.named(name) for name in _REMEDIES},
    "apply_if_finite + AdamW": Chain(
        optimizer=lambda rate: optax.apply_if_finite(optax.adamw(rate), 5)
    ),
}
COMPILED = (BASELINE, *_TIMED, *_REMEDIES, "apply_if_finite + AdamW")
# (tree, dtype) -> what is left out: XLA:CPU did not compile it within ten minutes.
LEFT_OUT = {("c", "bfloat16"): (CLIP,)}

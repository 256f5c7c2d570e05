"""The optimizers that are compared. A further arm is one entry of `ARMS`."""

from collections.abc import Callable

import optax

from stablegrad_optax import stablegrad

# name -> learning rate schedule -> transformation
ARMS: dict[str, Callable[[optax.Schedule], optax.GradientTransformation]] = {
    "AdamW": optax.adamw,
    "AdamW b2=0.9": lambda rate: optax.adamw(rate, b2=0.9),
    "clip 1 + AdamW": lambda rate: optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate)
    ),
    "StableGrad + AdamW": lambda rate: optax.chain(stablegrad(), optax.adamw(rate)),
}

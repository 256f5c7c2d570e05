"""What is done to the gradient, and the optimizer after it: each with each."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import optax

from stablegrad_optax import (
    gradient_autoscaled_normalization,
    gradient_stabilizer,
    stablegrad,
)

Transformation = optax.GradientTransformation


@dataclass(frozen=True)
class Optimizer:
    """What follows the gradient's transformation.

    Attributes:
        make: learning rate schedule -> transformation.
        rates: the fixed set of learning rates that the tuning chooses from.
        scale_free: whether a constant factor of the gradient cancels in it.
    """

    make: Callable[[optax.Schedule], Transformation]
    rates: tuple[float, ...]
    scale_free: bool = True


@dataclass(frozen=True)
class Arm:
    """One way to treat the gradient before the optimizer.

    Attributes:
        before: makes it, if there is anything.
        rate_scale: what learning rates are multiplied by where the scale of the
            gradient matters: its inverse, when it is far from that of the other arms.
    """

    before: Callable[[], Transformation] | None = None
    rate_scale: float = 1.0

    def __call__(
        self, optimizer: str, rate: optax.Schedule
    ) -> optax.GradientTransformationExtraArgs:
        """The whole; its `update` takes `prediction_std`, f[] per example, as well."""
        tx = OPTIMIZERS[optimizer].make(rate)
        if self.before is not None:
            tx = optax.chain(self.before(), tx)
        return optax.with_extra_args_support(tx)

    def rates(self, optimizer: str, rates: tuple[float, ...]) -> tuple[float, ...]:
        """These learning rates in this arm's scale."""
        scale = 1.0 if OPTIMIZERS[optimizer].scale_free else self.rate_scale
        return tuple(float(f"{rate * scale:.3g}") for rate in rates)


def predicted(**options: Any) -> optax.GradientTransformationExtraArgs:
    """StableGrad with the paper's reference: the std of the prediction's gradient.

    It comes by another name than `prediction_grad_std`, which would override the
    constant reference of the other arms.

    Args:
        **options: of `stablegrad`.
    """
    inner = stablegrad(None, **options)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        prediction_std: jax.Array,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra_args
        return inner.update(updates, state, params, prediction_grad_std=prediction_std)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def z_score() -> Transformation:
    """ZNorm: every gradient of two axes or more less its mean, over its std."""

    def normalize(g: jax.Array) -> jax.Array:
        if g.ndim < 2:
            return g
        # A zero gradient stays zero; 1e-30 is far below any other.
        return (g - g.mean()) / (g.std() + 1e-30)

    return optax.stateless_with_tree_map(lambda g, _: normalize(g))


_ADAM_RATES = (3e-4, 1e-3, 3e-3)

OPTIMIZERS: dict[str, Optimizer] = {
    "momentum": Optimizer(
        partial(optax.sgd, momentum=0.9), (1e-3, 1e-2, 1e-1), scale_free=False
    ),
    "AdamW": Optimizer(optax.adamw, _ADAM_RATES),
    "AdamW b2=0.9": Optimizer(partial(optax.adamw, b2=0.9), _ADAM_RATES),
}

# The prediction's gradient per example starts near 0.3 for ten classes: 30 times the
# constant reference, which is what the literal one is at batch 32.
ARMS: dict[str, Arm] = {
    "none": Arm(),
    "StableGrad, constant 0.01": Arm(partial(stablegrad, 0.01)),
    "StableGrad, prediction": Arm(predicted, rate_scale=0.03),
    "StableGrad, prediction, limit 2": Arm(
        partial(predicted, max_reference_growth=2.0), rate_scale=0.03
    ),
    "StableGrad, weights only": Arm(partial(stablegrad, 0.01, scale_biases=False)),
    "clip 1": Arm(partial(optax.clip_by_global_norm, 1.0)),
    "AGC 0.01": Arm(partial(optax.adaptive_grad_clip, 0.01)),
    "GradientStabilizer": Arm(gradient_stabilizer),
    "GradientAutoscaled": Arm(gradient_autoscaled_normalization),
    "mean removal": Arm(partial(gradient_autoscaled_normalization, "none")),
    "z-score": Arm(z_score, rate_scale=0.01),
}

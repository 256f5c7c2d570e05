"""The optimizers that are compared. A further arm is one entry of `ARMS`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import optax

from benchmarks.pinn.gradient import PredictionGrads
from stablegrad_optax import (
    gradient_autoscaled_normalization,
    gradient_stabilizer,
    prediction_grad_std,
    stablegrad,
)

Transformation = optax.GradientTransformation


@dataclass(frozen=True)
class Optimizer:
    """What follows the gradient's transformation.

    Attributes:
        make: learning rate schedule -> transformation.
        rates: the learning rates that are tried, where an arm names no others.
    """

    make: Callable[[optax.Schedule], Transformation]
    rates: tuple[float, ...]


@dataclass(frozen=True)
class Arm:
    """One of the optimizers that are compared.

    Attributes:
        optimizer: a name of `OPTIMIZERS`.
        before: makes what is done to the gradient first, if anything.
        rates: in place of the optimizer's, where the scale of its input differs.
    """

    optimizer: str
    before: Callable[[], Transformation] | None = None
    rates: tuple[float, ...] | None = None

    def __call__(self, rate: optax.Schedule) -> optax.GradientTransformationExtraArgs:
        """The transformation; its `update` takes `prediction_grads` as well."""
        optimizer = OPTIMIZERS[self.optimizer].make(rate)
        if self.before is not None:
            optimizer = optax.chain(self.before(), optimizer)
        return optax.with_extra_args_support(optimizer)

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """The fixed set that the tuning chooses from."""
        return self.rates or OPTIMIZERS[self.optimizer].rates


def probed(
    prediction: Literal["field", "residuals"], **options: Any
) -> optax.GradientTransformationExtraArgs:
    """StableGrad with the paper's reference: the std of the prediction's gradient.

    Args:
        prediction: what the prediction is, a field of `PredictionGrads`.
        **options: of `stablegrad`.
    """
    inner = stablegrad(None, **options)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        prediction_grads: PredictionGrads,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra_args
        std = prediction_grad_std(getattr(prediction_grads, prediction))
        return inner.update(updates, state, params, prediction_grad_std=std)

    return optax.GradientTransformationExtraArgs(inner.init, update)


# Half decades, for plain momentum decades, up to where most arms fail in most cells.
_ADAM_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)

OPTIMIZERS: dict[str, Optimizer] = {
    "AdamW": Optimizer(optax.adamw, _ADAM_RATES),
    "AdamW b2=0.9": Optimizer(partial(optax.adamw, b2=0.9), _ADAM_RATES),
    "AdamW b2=0.99": Optimizer(partial(optax.adamw, b2=0.99), _ADAM_RATES),
    "Adam eps=1e-16": Optimizer(partial(optax.adam, eps=1e-16), _ADAM_RATES),
    "NovoGrad": Optimizer(optax.novograd, (3e-3, 1e-2, 3e-2, 1e-1)),
    "LAMB": Optimizer(optax.lamb, (1e-3, 3e-3, 1e-2, 3e-2)),
    "momentum": Optimizer(partial(optax.sgd, momentum=0.9), (1e-5, 1e-4, 1e-3)),
}

_clip = partial(optax.clip_by_global_norm, 1.0)

ARMS: dict[str, Arm] = {
    "AdamW": Arm("AdamW"),
    "AdamW b2=0.9": Arm("AdamW b2=0.9"),
    "Adam eps=1e-16": Arm("Adam eps=1e-16"),
    "clip 1 + AdamW": Arm("AdamW", _clip),
    "StableGrad + AdamW": Arm("AdamW", stablegrad),
    "StableGrad, probe on u": Arm("AdamW", partial(probed, "field")),
    "StableGrad, probe on residuals": Arm("AdamW", partial(probed, "residuals")),
    "StableGrad, residuals, limit 2": Arm(
        "AdamW", partial(probed, "residuals", max_reference_growth=2.0)
    ),
    "StableGrad, biases untouched": Arm(
        "AdamW", partial(stablegrad, scale_biases=False)
    ),
    "StableGrad + AdamW b2=0.9": Arm("AdamW b2=0.9", stablegrad),
    "StableGrad + AdamW b2=0.99": Arm("AdamW b2=0.99", stablegrad),
    "StableGrad b2=0.9, biases untouched": Arm(
        "AdamW b2=0.9", partial(stablegrad, scale_biases=False)
    ),
    "GradientStabilizer + AdamW": Arm("AdamW", gradient_stabilizer),
    "GradientAutoscaled + AdamW": Arm("AdamW", gradient_autoscaled_normalization),
    "mean removal + AdamW": Arm(
        "AdamW", partial(gradient_autoscaled_normalization, "none")
    ),
    "NovoGrad": Arm("NovoGrad"),
    "LAMB": Arm("LAMB"),
    "momentum": Arm("momentum"),
    "clip 1 + momentum": Arm("momentum", _clip, rates=(1e-3, 1e-2, 1e-1, 3e-1)),
    "StableGrad + momentum": Arm(
        "momentum", stablegrad, rates=(1e-5, 1e-4, 1e-3, 3e-3)
    ),
}

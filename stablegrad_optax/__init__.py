"""Control the scale of gradients between backpropagation and the optimizer."""

from stablegrad_optax._diagnostics import scale_factors
from stablegrad_optax._prediction import (
    prediction_grad_std,
    value_and_grad_with_prediction_std,
)
from stablegrad_optax._stablegrad import StableGradState, stablegrad

__all__ = [
    "StableGradState",
    "prediction_grad_std",
    "scale_factors",
    "stablegrad",
    "value_and_grad_with_prediction_std",
]

__version__ = "0.1.0"

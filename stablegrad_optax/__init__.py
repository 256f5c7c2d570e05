"""Control the scale of gradients between backpropagation and the optimizer."""

from stablegrad_optax._autoscaled import (
    GradientAutoscaledNormalizationState,
    gradient_autoscaled_normalization,
)
from stablegrad_optax._compare import compare_optimizers
from stablegrad_optax._comparison import Comparison
from stablegrad_optax._diagnostics import scale_factors
from stablegrad_optax._health import health
from stablegrad_optax._history import ClipByHistoryState, clip_by_history
from stablegrad_optax._initialize_weights import initialize_weights
from stablegrad_optax._initializers import activation_aware_normal
from stablegrad_optax._normalize import (
    NormalizeByLeafNormState,
    normalize_by_leaf_norm,
)
from stablegrad_optax._norms import layer_norms
from stablegrad_optax._optimizers import default_optimizers
from stablegrad_optax._prediction import (
    prediction_grad_std,
    value_and_grad_with_prediction_std,
)
from stablegrad_optax._report import gradient_report
from stablegrad_optax._report_history import History
from stablegrad_optax._report_measure import LeafReport
from stablegrad_optax._report_verdict import GradientReport
from stablegrad_optax._runs import OptimizerRuns
from stablegrad_optax._soap import scale_by_soap, soap
from stablegrad_optax._soap_update import SoapState
from stablegrad_optax._spikes import SkipSpikesState, skip_spikes
from stablegrad_optax._stabilizer import (
    GradientStabilizerState,
    gradient_stabilizer,
)
from stablegrad_optax._stablegrad import StableGradState, stablegrad

__all__ = [
    "ClipByHistoryState",
    "Comparison",
    "GradientAutoscaledNormalizationState",
    "GradientReport",
    "GradientStabilizerState",
    "History",
    "LeafReport",
    "NormalizeByLeafNormState",
    "OptimizerRuns",
    "SkipSpikesState",
    "SoapState",
    "StableGradState",
    "activation_aware_normal",
    "clip_by_history",
    "compare_optimizers",
    "default_optimizers",
    "gradient_autoscaled_normalization",
    "gradient_report",
    "gradient_stabilizer",
    "health",
    "initialize_weights",
    "layer_norms",
    "normalize_by_leaf_norm",
    "prediction_grad_std",
    "scale_by_soap",
    "scale_factors",
    "skip_spikes",
    "soap",
    "stablegrad",
    "value_and_grad_with_prediction_std",
]

__version__ = "0.3.0"

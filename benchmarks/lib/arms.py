"""The arms that are compared: "Treatment | Optimizer", of one vocabulary in all suites.

A treatment is what is done to the gradient before the optimizer. A further arm is one
entry of `TREATMENTS` or of `OPTIMIZERS`; every pair of them can be named in a suite.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import jax
import optax
from optax import contrib

from benchmarks.lib import treatments
from stablegrad_optax import (
    clip_by_history,
    gradient_autoscaled_normalization,
    gradient_stabilizer,
    skip_spikes,
    soap,
    stablegrad,
)

Transformation = optax.GradientTransformation
SEPARATOR = " | "


@dataclass(frozen=True)
class Optimizer:
    """What follows the treatment.

    Attributes:
        make: learning rate schedule -> transformation.
        rates: the learning rates to choose from, where a suite names no others.
        scale_free: whether a constant factor of the gradient cancels in it.
        warm_up: whether the rate rises over the first steps, whatever the suite's
            schedule.
    """

    make: Callable[[optax.Schedule], Transformation]
    rates: tuple[float, ...]
    scale_free: bool = True
    warm_up: bool = False


def _is_kernel(path: jax.tree_util.KeyPath, leaf: jax.Array) -> bool:
    """What Muon orthogonalizes; the rest, biases and embeddings, goes to its Adam."""
    return leaf.ndim >= 2 and jax.tree_util.keystr(path[-1:], simple=True) == "kernel"


def _kernels(params: optax.Params) -> Any:
    """Kernels, as matrices of all axes but the last."""

    def of_leaf(path: jax.tree_util.KeyPath, leaf: jax.Array) -> Any:
        if not _is_kernel(path, leaf):
            return None
        last = leaf.ndim - 1
        return contrib.MuonDimensionNumbers(tuple(range(last)), last)

    return jax.tree.map_with_path(of_leaf, params)


_muon = partial(contrib.muon, muon_weight_dimension_numbers=_kernels)
_soap = partial(soap, weight_dimension_numbers=_kernels)

_SOAP_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)

# Half decades, for plain momentum decades, up to where most arms fail in most cells.
_ADAM_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
_MUON_RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)

OPTIMIZERS: dict[str, Optimizer] = {
    "Adam": Optimizer(optax.adam, _ADAM_RATES),
    "AdamW": Optimizer(optax.adamw, _ADAM_RATES),
    # A memory of ten updates in place of a thousand: what costs nothing to try.
    "Adam b2=0.9": Optimizer(partial(optax.adam, b2=0.9), _ADAM_RATES),
    "AdamW b2=0.9": Optimizer(partial(optax.adamw, b2=0.9), _ADAM_RATES),
    "AdamW b2=0.99": Optimizer(partial(optax.adamw, b2=0.99), _ADAM_RATES),
    "Nadam b2=0.9": Optimizer(partial(optax.nadam, b2=0.9), _ADAM_RATES),
    "Adam eps=1e-16": Optimizer(partial(optax.adam, eps=1e-16), _ADAM_RATES),
    "AdamW warm-up": Optimizer(optax.adamw, _ADAM_RATES, warm_up=True),
    "Lion": Optimizer(optax.lion, (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)),
    "NovoGrad": Optimizer(optax.novograd, (3e-3, 1e-2, 3e-2, 1e-1)),
    "LAMB": Optimizer(optax.lamb, (1e-3, 3e-3, 1e-2, 3e-2)),
    "momentum": Optimizer(
        partial(optax.sgd, momentum=0.9), (1e-5, 1e-4, 1e-3), scale_free=False
    ),
    "Muon": Optimizer(_muon, _MUON_RATES),
    "Muon b2=0.9": Optimizer(partial(_muon, adam_b2=0.9), _MUON_RATES),
    "Muon warm-up": Optimizer(_muon, _MUON_RATES, warm_up=True),
    "Muon eps=1e-30": Optimizer(partial(_muon, eps=1e-30), _MUON_RATES),
    # As released: its eps is absolute.
    "SOAP": Optimizer(partial(_soap, relative_eps=False), _SOAP_RATES),
    "SOAP relative eps": Optimizer(_soap, _SOAP_RATES),
}

TREATMENTS: dict[str, Callable[[], Transformation]] = {
    "none": optax.identity,
    "value clip 0.1": partial(optax.clip, 0.1),
    "clip 0.5": partial(optax.clip_by_global_norm, 0.5),  # what PPO is trained with
    "clip 1": partial(optax.clip_by_global_norm, 1.0),
    "AGC 0.01": partial(optax.adaptive_grad_clip, 0.01),
    "ZClip": treatments.zclip,
    "unit norm": treatments.unit_norm,
    "unit norm by leaf": treatments.unit_norm_by_leaf,
    "StableGrad": stablegrad,
    "StableGrad 0.01": partial(stablegrad, 0.01),
    "StableGrad field": partial(treatments.probed, "field"),
    "StableGrad residuals": partial(treatments.probed, "residuals"),
    "StableGrad residuals, limit 2": partial(
        treatments.probed, "residuals", max_reference_growth=2.0
    ),
    "StableGrad prediction": partial(treatments.probed, "prediction"),
    "StableGrad prediction, limit 2": partial(
        treatments.probed, "prediction", max_reference_growth=2.0
    ),
    "StableGrad, biases untouched": partial(stablegrad, scale_biases=False),
    "StableGrad 0.01, biases untouched": partial(stablegrad, 0.01, scale_biases=False),
    "GradientStabilizer": gradient_stabilizer,
    "GradientStabilizer, Algorithm 1": partial(
        gradient_stabilizer, bias_correction=False
    ),
    "GradientStabilizer, max_norm_ratio 2": partial(
        gradient_stabilizer, max_norm_ratio=2.0
    ),
    "GradientStabilizer .7 .9": partial(gradient_stabilizer, 0.7, 0.9, eps=1e-8),
    "clip by history": clip_by_history,
    "skip spikes": optax.identity,
    "GradientAutoscaled": gradient_autoscaled_normalization,
    "mean removal": partial(gradient_autoscaled_normalization, "none"),
    "z-score": treatments.z_score,
    # Which part of Muon needs a scale control: its matrices or its Adam?
    **{
        f"{name} on {part}": partial(treatments.on_part, make, is_part)
        for name, make in (
            ("clip 1", partial(optax.clip_by_global_norm, 1.0)),
            ("StableGrad", stablegrad),
        )
        for part, is_part in (
            ("matrices", _is_kernel),
            ("biases", lambda *leaf: not _is_kernel(*leaf)),
        )
    },
    "constant factor 30": partial(optax.scale, 30.0),
}

# Of the treatments those that enclose the optimizer.
WRAPPERS: dict[str, Callable[[Transformation], Transformation]] = {
    "skip spikes": skip_spikes,
}


@dataclass(frozen=True)
class Arm:
    """A treatment and the optimizer behind it."""

    treatment: str
    optimizer: str

    @classmethod
    def of(cls, name: str) -> "Arm":
        """The arm that `name`, "Treatment | Optimizer", is of.

        Raises:
            ValueError: if it is none.
        """
        treatment, _, optimizer = name.partition(SEPARATOR)
        if treatment not in TREATMENTS or optimizer not in OPTIMIZERS:
            raise ValueError(
                f"an arm is a treatment of {', '.join(TREATMENTS)}, then {SEPARATOR!r} "
                f"and an optimizer of {', '.join(OPTIMIZERS)}; got {name!r}"
            )
        return cls(treatment, optimizer)

    @property
    def name(self) -> str:
        return f"{self.treatment}{SEPARATOR}{self.optimizer}"

    @property
    def rates(self) -> tuple[float, ...]:
        return OPTIMIZERS[self.optimizer].rates

    def __call__(
        self, rate: optax.Schedule, weight_decay: float = 0.0
    ) -> optax.GradientTransformationExtraArgs:
        """The transformation; its `update` takes a task's `probes` and loss as well.

        Args:
            rate: of learning.
            weight_decay: times the weights is added to what the treatment makes of the
                gradient, before the optimizer: not the decoupled decay of AdamW.
        """
        parts = [TREATMENTS[self.treatment](), OPTIMIZERS[self.optimizer].make(rate)]
        if weight_decay:
            parts.insert(1, optax.add_decayed_weights(weight_decay))
        tx = optax.chain(*parts)
        return WRAPPERS[self.treatment](tx) if self.treatment in WRAPPERS else tx


def pairs(treatments: Iterable[str], optimizers: Iterable[str]) -> tuple[str, ...]:
    """The arms of each of the treatments with each of the optimizers."""
    return tuple(Arm(*pair).name for pair in product(treatments, optimizers))


def in_order(
    columns: Iterable[Mapping[str, object]], first: Iterable[str] = ()
) -> list[str]:
    """The arms, or treatments, that some column has: `first`, then as in the lists."""
    return among(columns, [*first, *TREATMENTS, *pairs(TREATMENTS, OPTIMIZERS)])


def among(columns: Iterable[Mapping[str, object]], names: Iterable[str]) -> list[str]:
    """Those of the names, in their order, that some column has."""
    there = {name for column in columns for name in column}
    return [name for name in dict.fromkeys(names) if name in there]

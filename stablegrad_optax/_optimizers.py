"""Default optimizers, their learning rates, and the order of their complexity."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optax

from stablegrad_optax._checks import require_number
from stablegrad_optax._normalize import normalize_by_leaf_norm
from stablegrad_optax._soap import soap
from stablegrad_optax._stablegrad import stablegrad

Factory = Callable[[optax.Schedule], optax.GradientTransformation]
Rates = Sequence[float] | Mapping[str, Sequence[float]]

# The simplest comes first. A name that is not listed counts as the most complex.
_LEARNING_RATES = {
    "SGD": (1e-2, 3e-2, 1e-1, 3e-1),
    "momentum": (3e-3, 1e-2, 3e-2, 1e-1),
    "Lion": (3e-5, 1e-4, 3e-4, 1e-3),
    "Adam": (3e-4, 1e-3, 3e-3, 1e-2),
    "AdamW": (3e-4, 1e-3, 3e-3, 1e-2),
    "Muon": (3e-3, 1e-2, 3e-2, 1e-1),
    "SOAP": (1e-3, 3e-3, 1e-2, 3e-2),
}
_TRANSFORMATIONS = ("clip", "normalize per array", "StableGrad")


@dataclass(frozen=True)
class Chain:
    """Chains a transformation of the gradient and an optimizer.

    ``compare_optimizers`` compiles the two separately, so that all chains with the same
    optimizer, or with the same transformation, use one program for it.
    """

    transformation: Factory
    optimizer: Factory

    def __call__(self, learning_rate: optax.Schedule) -> optax.GradientTransformation:
        """Returns the two as one Optax transformation."""
        return optax.chain(
            self.transformation(learning_rate), self.optimizer(learning_rate)
        )


def default_optimizers(
    muon_weight_dimension_numbers: Any = None,
) -> dict[str, Factory]:
    """Returns the optimizers that :func:`compare_optimizers` tries by default.

    They are AdamW, ``optax.contrib.muon`` and :func:`soap`, each alone and after a
    transformation of the gradient. AdamW is also tried with ``b2=0.9``. All other
    arguments have their default values. Add your own as in
    ``{**default_optimizers(), "Lion": optax.lion}``.

    Args:
      muon_weight_dimension_numbers: The argument of ``optax.contrib.muon`` with this
        name. By default, Muon orthogonalizes **only arrays with two axes and gives all
        others to Adam**. Pass it if your network has convolutions, attention kernels
        with three axes, or stacked layers, as docs/compare.md shows.

    Returns:
      A dict of functions, each of which takes the learning rate and returns an
      ``optax.GradientTransformation``.

    Examples:
      >>> from stablegrad_optax import default_optimizers
      >>> for name in default_optimizers():
      ...     print(name)
      AdamW
      AdamW (b2=0.9)
      clip + AdamW
      clip + AdamW (b2=0.9)
      StableGrad + AdamW (b2=0.9)
      Muon
      clip + Muon
      normalize per array + Muon
      StableGrad + Muon
      SOAP
      normalize per array + SOAP
    """
    adamw: Factory = optax.adamw
    adamw_b2: Factory = functools.partial(optax.adamw, b2=0.9)
    muon: Factory = functools.partial(
        optax.contrib.muon, muon_weight_dimension_numbers=muon_weight_dimension_numbers
    )

    def clip(learning_rate: optax.Schedule) -> optax.GradientTransformation:
        del learning_rate
        return optax.clip_by_global_norm(1.0)

    def normalize(learning_rate: optax.Schedule) -> optax.GradientTransformation:
        del learning_rate
        return normalize_by_leaf_norm()

    def scale(learning_rate: optax.Schedule) -> optax.GradientTransformation:
        del learning_rate
        return stablegrad()

    return {
        "AdamW": adamw,
        "AdamW (b2=0.9)": adamw_b2,
        "clip + AdamW": Chain(clip, adamw),
        "clip + AdamW (b2=0.9)": Chain(clip, adamw_b2),
        "StableGrad + AdamW (b2=0.9)": Chain(scale, adamw_b2),
        "Muon": muon,
        "clip + Muon": Chain(clip, muon),
        "normalize per array + Muon": Chain(normalize, muon),
        "StableGrad + Muon": Chain(scale, muon),
        "SOAP": soap,
        "normalize per array + SOAP": Chain(normalize, soap),
    }


def complexity(name: str) -> tuple[Any, ...]:
    """Returns a sort key that is smaller for simpler optimizers.

    It compares the optimizer first, then the number and the kinds of the
    transformations in front, then whether an argument differs from its default.
    """
    *transformations, optimizer = (_base_name(part) for part in name.split(" + "))
    return (
        _position(optimizer, _LEARNING_RATES),
        len(transformations),
        [_position(part, _TRANSFORMATIONS) for part in transformations],
        "(" in name,
    )


def learning_rates_by_name(
    names: Sequence[str], learning_rates: Rates | None
) -> dict[str, list[float]]:
    """Returns the ascending learning rates to try for each optimizer."""
    given = learning_rates
    if isinstance(given, Mapping):
        unknown = sorted(map(str, set(given) - set(names)))
        if unknown:
            raise ValueError(
                f"The keys of learning_rates must be names of optimizers, {list(names)}"
                f"; got {', '.join(unknown)}."
            )
        return {
            name: _check(given[name]) if name in given else _default_rates(name)
            for name in names
        }
    if given is not None:
        return dict.fromkeys(names, _check(given))
    return {name: _default_rates(name) for name in names}


def next_rate(rates: Sequence[float], chosen: int) -> float | None:
    """Returns one more rate to try, or None if the best is not at an end of several.

    It continues the steps of the list: 1e-4 comes before 3e-4, 1e-3, 3e-3.
    """
    if len(rates) < 2 or chosen not in (0, len(rates) - 1):
        return None
    ordered = rates if chosen else rates[::-1]
    last, before, third = ordered[-1], ordered[-2], ordered[max(-3, -len(ordered))]
    rate = last**2 / before if len(ordered) == 2 else before * (last / third)
    return _in_float32(float(f"{rate:.6g}"))


def _in_float32(rate: float) -> float | None:
    info = np.finfo(np.float32)
    return rate if float(info.tiny) <= rate <= float(info.max) else None


def _default_rates(name: str) -> list[float]:
    optimizer = _base_name(name.split(" + ")[-1]).lower()
    by_name = {key.lower(): rates for key, rates in _LEARNING_RATES.items()}
    return list(by_name.get(optimizer, _LEARNING_RATES["Adam"]))


def _base_name(part: str) -> str:
    return part.split("(")[0].strip()


def _position(name: str, names: Mapping[str, Any] | Sequence[str]) -> int:
    lower = [other.lower() for other in names]
    return lower.index(name.lower()) if name.lower() in lower else len(lower)


def _check(learning_rates: Sequence[float]) -> list[float]:
    if np.ndim(learning_rates) != 1:
        raise ValueError(
            f"learning_rates must be a sequence of numbers; got {learning_rates!r}."
        )
    rates = sorted({float(rate) for rate in learning_rates})
    for rate in rates:  # the smallest rate is a normal number of float32
        require_number("learning_rates", rate, at_least=float(np.finfo("f4").tiny))
    if not rates:
        raise ValueError("learning_rates must have at least one; got none.")
    return rates

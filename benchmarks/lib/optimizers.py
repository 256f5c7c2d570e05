"""The optimizers that are compared, with one vocabulary for all suites.

An optimizer is a chain with a name such as "clip + Muon": a method, which changes the
gradient, and a base, which is an optimizer of Optax or of the package. A base alone has
the name of the base. Every pair of an entry of `METHODS` and an entry of `BASES` can be
named in a suite.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from benchmarks.lib import methods, optax_optimizers
from stablegrad_optax import (
    clip_by_history,
    gradient_autoscaled_normalization,
    gradient_stabilizer,
    normalize_by_leaf_norm,
    skip_spikes,
    soap,
)

Transformation = optax.GradientTransformation
SEPARATOR = " + "
NONE = "none"  # the method of a base that stands alone


@dataclass(frozen=True)
class Base:
    """An optimizer that takes what a method makes of the gradient.

    Attributes:
        make: Learning rate schedule -> transformation.
        rates: The learning rates to choose from, where a suite names no others.
        scale_free: Whether a constant factor of the gradient cancels in it.
        warm_up: Whether the learning rate rises over the first steps, whatever the
            suite's schedule is.
    """

    make: Callable[[optax.Schedule], Transformation]
    rates: tuple[float, ...]
    scale_free: bool = True
    warm_up: bool = False


def _is_kernel(path: jax.tree_util.KeyPath, leaf: jax.Array) -> bool:
    """Says what Muon orthogonalizes; biases and embeddings go to its Adam."""
    return leaf.ndim >= 2 and jax.tree_util.keystr(path[-1:], simple=True) == "kernel"


def _kernels(params: optax.Params) -> Any:
    """Takes kernels as matrices of all axes but the last; stacked layers each alone."""

    def numbers(path: jax.tree_util.KeyPath, leaf: jax.Array, is_stack: int) -> Any:
        if not _is_kernel(path, leaf):
            return None
        last = leaf.ndim - 1
        return contrib.MuonDimensionNumbers(tuple(range(is_stack, last)), last)

    return jax.tree.map_with_path(numbers, params, methods.stacked_by_name(params))


_adam, _adamw = optax.adam, optax.adamw
_muon = partial(contrib.muon, muon_weight_dimension_numbers=_kernels)
# The eps of the released code, which is not relative to the size of the gradient.
absolute_soap = partial(soap, weight_dimension_numbers=_kernels, relative_eps=False)


def range_safe_muon(
    learning_rate: optax.ScalarOrSchedule, eps: float = 1e-16
) -> Transformation:
    """Runs Muon, whose matrices are divided by their largest entry before the norm.

    No square underflows then, and `eps` of the norm is relative. The momentum is that
    of `optax.trace`, without the bias correction of `optax.contrib.muon`: the two
    optimizers agree on the first step and after about 100.

    Args:
        learning_rate: A number or a schedule.
        eps: Of Adam, which has all arrays that are not kernels.
    """

    def unit(matrix: jax.Array, _: Any) -> jax.Array:
        largest = jnp.max(jnp.abs(matrix))
        return matrix / jnp.where(largest > 0, largest, 1)

    matrices = optax.chain(
        optax.trace(0.95, nesterov=True),
        optax.stateless_with_tree_map(unit),
        _muon(learning_rate, beta=0.0, nesterov=False),
    )
    rest = optax.adamw(learning_rate, eps=eps, weight_decay=0.0, nesterov=True)
    return optax.partition(
        {True: matrices, False: rest},
        lambda params: jax.tree.map_with_path(_is_kernel, params),
    )


# The rates are a factor of about 3 apart (Muon 2, momentum 10) and reach up to where
# most optimizers fail on most problems.
_ADAM_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
_MUON_RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
_SOAP_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)

BASES: dict[str, Base] = {
    "Adam": Base(_adam, _ADAM_RATES),
    "AdamW": Base(_adamw, _ADAM_RATES),
    # A memory of ten updates instead of a thousand, which costs nothing to try.
    "Adam (b2=0.9)": Base(partial(_adam, b2=0.9), _ADAM_RATES),
    "AdamW (b2=0.9)": Base(partial(_adamw, b2=0.9), _ADAM_RATES),
    "AdamW (b2=0.99)": Base(partial(_adamw, b2=0.99), _ADAM_RATES),
    "Nadam (b2=0.9)": Base(partial(optax.nadam, b2=0.9), _ADAM_RATES),
    "Adam (eps=1e-16)": Base(partial(_adam, eps=1e-16), _ADAM_RATES),
    "AdamW (eps=1e-16)": Base(partial(_adamw, eps=1e-16), _ADAM_RATES),
    "AdamW (warm-up)": Base(_adamw, _ADAM_RATES, warm_up=True),
    "AdamW (b2=0.9, eps=1e-16)": Base(partial(_adamw, b2=0.9, eps=1e-16), _ADAM_RATES),
    "Lion": Base(optax.lion, (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)),
    "NovoGrad": Base(optax.novograd, (3e-3, 1e-2, 3e-2, 1e-1)),
    "LAMB": Base(optax.lamb, (1e-3, 3e-3, 1e-2, 3e-2)),
    "LARS": Base(optax.lars, (1e-1, 1.0, 1e1, 1e2)),
    "momentum": Base(
        partial(optax.sgd, momentum=0.9), (1e-5, 1e-4, 1e-3), scale_free=False
    ),
    "Muon": Base(_muon, _MUON_RATES),
    "Muon (b2=0.9)": Base(partial(_muon, adam_b2=0.9), _MUON_RATES),
    "Muon (warm-up)": Base(_muon, _MUON_RATES, warm_up=True),
    "Muon (eps=1e-16)": Base(partial(_muon, eps=1e-16), _MUON_RATES),
    "Muon (eps=1e-30)": Base(partial(_muon, eps=1e-30), _MUON_RATES),
    "range-safe Muon": Base(range_safe_muon, _MUON_RATES),
    # Stored runs have the absolute eps of the released code.
    "SOAP": Base(absolute_soap, _SOAP_RATES),
    "SOAP (relative eps)": Base(partial(absolute_soap, relative_eps=True), _SOAP_RATES),
    "SOAP (eps=1e-16)": Base(partial(absolute_soap, eps=1e-16), _SOAP_RATES),
    # The option `normalize_grads` of the released code.
    "SOAP (normalize_updates)": Base(
        partial(absolute_soap, normalize_updates=True), _SOAP_RATES
    ),
    # All of Optax, in the spelling of Optax, for the suite `optimizers`.
    **{
        f"optax.{name}": Base(factory, (1e-3, 1e-2, 1e-1, 1.0))
        for name, factory in optax_optimizers.factories().items()
    },
}

_clip = partial(optax.clip_by_global_norm, 1.0)
_stablegrad = methods.stablegrad_by_name
METHODS: dict[str, Callable[[], Transformation]] = {
    NONE: optax.identity,
    "clip values at 0.1": partial(optax.clip, 0.1),
    "clip at 0.5": partial(optax.clip_by_global_norm, 0.5),  # as in PPO's recipe
    "clip": _clip,
    "AGC": partial(optax.adaptive_grad_clip, 0.01),
    "ZClip": methods.zclip,
    "normalize all arrays together": methods.normalize_globally,
    "normalize per array": normalize_by_leaf_norm,
    "StableGrad": _stablegrad,
    "StableGrad (reference_std=0.01)": partial(_stablegrad, 0.01),
    **{
        f"StableGrad (reference: {probe}{limit})": partial(
            methods.stablegrad_by_probe, probe, **options
        )
        for probe in ("field", "residuals", "prediction")
        for limit, options in (
            ("", {}),
            (", max_reference_growth=2", {"max_reference_growth": 2.0}),
        )
    },
    "StableGrad (scale_biases=False)": partial(_stablegrad, scale_biases=False),
    "StableGrad (reference_std=0.01, scale_biases=False)": partial(
        _stablegrad, 0.01, scale_biases=False
    ),
    "GradientStabilizer": gradient_stabilizer,
    "GradientStabilizer (bias_correction=False)": partial(
        gradient_stabilizer, bias_correction=False
    ),
    "GradientStabilizer (max_norm_ratio=2)": partial(
        gradient_stabilizer, max_norm_ratio=2.0
    ),
    "GradientStabilizer (0.7, 0.9)": partial(gradient_stabilizer, 0.7, 0.9, eps=1e-8),
    "clip by history": clip_by_history,
    "skip spikes": optax.identity,
    "autoscaled normalization": gradient_autoscaled_normalization,
    "mean removal": partial(gradient_autoscaled_normalization, "none"),
    "ZNorm": methods.znorm,
    # These ask which part of Muon needs scale control: its matrices or its Adam.
    **{
        f"{name} on {part}": partial(methods.on_part, make, is_part)
        for name, make in (("clip", _clip), ("StableGrad", _stablegrad))
        for part, is_part in (
            ("matrices", _is_kernel),
            ("biases", lambda *leaf: not _is_kernel(*leaf)),
        )
    },
    "scale by 30": partial(optax.scale, 30.0),
}

# The methods that enclose the base instead of standing before it.
WRAPPERS: dict[str, Callable[[Transformation], Transformation]] = {
    "skip spikes": skip_spikes,
}


@dataclass(frozen=True)
class Optimizer:
    """A method and the base that follows it; both are names."""

    method: str
    base: str

    @classmethod
    def named(cls, name: str) -> "Optimizer":
        """Returns the optimizer with a name such as "clip + Muon" or "Muon".

        Raises:
            ValueError: If no optimizer has this name.
        """
        method, _, base = name.rpartition(SEPARATOR)
        method = method or NONE
        if method not in METHODS or base not in BASES:
            raise ValueError(
                f"an optimizer is one of {', '.join(BASES)}, or a method of "
                f"{', '.join(METHODS)}, then {SEPARATOR!r} and one of the former; got "
                f"{name!r}"
            )
        return cls(method, base)

    @property
    def name(self) -> str:
        return (
            self.base if self.method == NONE else f"{self.method}{SEPARATOR}{self.base}"
        )

    @property
    def rates(self) -> tuple[float, ...]:
        return BASES[self.base].rates

    def __call__(
        self, rate: optax.Schedule, weight_decay: float = 0.0
    ) -> optax.GradientTransformationExtraArgs:
        """Returns the transformation; `update` takes a task's `probes` and its loss.

        Args:
            rate: The learning rate.
            weight_decay: This number times the weights is added to the gradient after
                the method and before the base. It is not AdamW's decoupled decay.
        """
        parts = [METHODS[self.method](), BASES[self.base].make(rate)]
        if weight_decay:
            parts.insert(1, optax.add_decayed_weights(weight_decay))
        tx = optax.chain(*parts)
        return WRAPPERS[self.method](tx) if self.method in WRAPPERS else tx


def chains(methods: Iterable[str], bases: Iterable[str]) -> tuple[str, ...]:
    """Returns the names of each method with each base."""
    return tuple(Optimizer(*pair).name for pair in product(methods, bases))


def in_order(names: Iterable[str]) -> list[str]:
    """Sorts names of optimizers as `BASES` and, for equal bases, as `METHODS`."""
    places = {name: place for place, name in enumerate((*BASES, *METHODS))}

    def place(name: str) -> tuple[int, int]:
        optimizer = Optimizer.named(name)
        return places[optimizer.base], places[optimizer.method]

    return sorted(set(names), key=place)

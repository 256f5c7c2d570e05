"""Reads the factors of the first steps of a training run."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike
from numpy.typing import NDArray

from stablegrad_optax._leaves import Leaf
from stablegrad_optax._report_measure import LeafReport, weights_with_gradient

UNBALANCED_RATIO = 1e3  # a larger ratio between the stds of weights is unbalanced

Steps = NDArray[np.float64]  # one number for each step


@dataclasses.dataclass(frozen=True)
class History:
    """Holds what the first steps of a training run add to the gradient of one.

    Attributes:
      steps: How many there are.
      drift: The largest factor by which a weight's spread fell from its maximum over
        the steps to the last tenth of them (the median there); NaN if the history says
        nothing of the weights.
      drifted: The name of that weight.
      drift_step: The step at which its spread was largest.
      std_ratio: The largest over the smallest spread of a weight in that last tenth.
      unbalanced_step: The step from which on the ratio stayed above 1e3, None if it
        ends below.
      unbalanced: The weight with the smallest spread at that step.
      nonfinite_steps: At how many steps the gradient was not finite.
      nonfinite_step: The first of them, or None.
      nonfinite: The first array that was not finite then.
      is_complete: Whether the history speaks of every weight that has a gradient. If
        not, the ratio of the gradient itself counts as well.
    """

    steps: int
    drift: float
    drifted: str
    drift_step: int | None
    std_ratio: float
    unbalanced_step: int | None
    unbalanced: str
    nonfinite_steps: int
    nonfinite_step: int | None
    nonfinite: str
    is_complete: bool


def read_history(
    history: Mapping[str, ArrayLike],
    leaves: Sequence[Leaf],
    rows: Sequence[LeafReport],
) -> History:
    """Reads the spreads of the first steps, which are the reciprocals of the factors.

    A factor of exactly 1 says nothing about the scale, because ``stablegrad`` leaves a
    gradient of zero as it is. A gradient that is not finite has a factor of 0 or NaN.
    """
    series = _series(history, leaves, rows)
    bad = np.array([~np.isfinite(x) | (x == 0) for _, x, _ in series])
    nonfinite_step = int(bad.any(0).argmax()) if bad.any() else None
    first_bad = 0 if nonfinite_step is None else int(bad[:, nonfinite_step].argmax())

    weights = {row.name for row in weights_with_gradient(rows)}
    spreads: dict[str, Steps] = {}
    seen: set[str] = set()
    for (name, factors, names), is_bad in zip(series, bad, strict=True):
        is_known = ~is_bad & (factors != 1)
        if is_known.any() and weights & names:
            spreads[name] = np.where(is_known, 1 / np.where(is_bad, 1, factors), np.nan)
            seen |= names
    last = {name: _last_tenth(spread) for name, spread in spreads.items()}
    drifts = {name: float(np.nanmax(x)) / last[name] for name, x in spreads.items()}
    drifted = max(drifts, key=lambda name: drifts[name], default="")
    std_ratio = max(last.values()) / min(last.values()) if last else math.nan
    unbalanced_step, unbalanced = _unbalanced_since(spreads, std_ratio)
    return History(
        steps=bad.shape[1],
        drift=drifts.get(drifted, math.nan),
        drifted=drifted,
        drift_step=int(np.nanargmax(spreads[drifted])) if drifted else None,
        std_ratio=std_ratio,
        unbalanced_step=unbalanced_step,
        unbalanced=unbalanced,
        nonfinite_steps=int(bad.any(0).sum()),
        nonfinite_step=nonfinite_step,
        nonfinite="" if nonfinite_step is None else series[first_bad].name,
        is_complete=bool(weights) and weights <= seen,
    )


class _Series(NamedTuple):
    """Holds the factors of an array, or of a slice of it, over the steps."""

    name: str
    factors: Steps
    rows: set[str]  # the names of the report's rows that the factors scale


def _series(
    history: Mapping[str, ArrayLike],
    leaves: Sequence[Leaf],
    rows: Sequence[LeafReport],
) -> list[_Series]:
    if not isinstance(history, Mapping):
        raise ValueError(
            "history must be a dict of factors, as scale_factors returns it; got a "
            f"{type(history).__name__}."
        )
    history = {name or "grads": factors for name, factors in history.items()}
    names: dict[str, list[str]] = {}
    remaining = iter(rows)
    for leaf in leaves:
        names[leaf.name or "grads"] = [
            next(remaining).name for _ in range(leaf.num_slices)
        ]
    unknown = [name for name in history if name not in names]
    if unknown or not history:
        raise ValueError(
            "history must be scale_factors of a scan's states, named as the leaves of "
            f"grads; got {', '.join(map(repr, unknown)) or 'no leaf'}."
        )
    series: list[_Series] = []
    for name, factors in history.items():
        array = _factors(name, factors)
        if series and len(array) != len(series[0].factors):
            raise ValueError(
                "history must hold the same steps of every leaf; got "
                f"{len(array)} for '{name}' and {len(series[0].factors)} for "
                f"'{series[0].name}'."
            )
        if array.ndim == 1:
            series.append(_Series(name, array, set(names[name])))
            continue
        if array.shape[1] != len(names[name]):
            raise ValueError(
                f"history must hold f[steps] or f[steps, {len(names[name])}] for "
                f"'{name}'; got shape {array.shape}. Pass the num_stacked_axes of the "
                "optimizer."
            )
        series += [
            _Series(row, column, {row})
            for row, column in zip(names[name], array.T, strict=True)
        ]
    return series


def _factors(name: str, factors: ArrayLike) -> Steps:
    try:
        array = np.asarray(factors, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"history must hold numbers; got {factors!r} for '{name}'."
        ) from error
    if array.ndim not in (1, 2) or len(array) < 2:
        raise ValueError(
            "history must hold f[steps] or f[steps, slices], of two steps at "
            f"least; got shape {array.shape} for '{name}'."
        )
    if (array < 0).any():
        raise ValueError(
            f"history must hold factors of at least 0; got {array.min():g} for "
            f"'{name}'."
        )
    return array


def _last_tenth(spread: Steps) -> float:
    known = spread[~np.isnan(spread)]
    return float(np.median(known[-max(len(known) // 10, 1) :]))


def _unbalanced_since(
    spreads: Mapping[str, Steps], std_ratio: float
) -> tuple[int | None, str]:
    """Finds the step after the last balanced one, and the smallest weight there."""
    if not std_ratio > UNBALANCED_RATIO:
        return None, ""
    known = np.array(list(spreads.values()))
    largest = np.where(np.isnan(known), -np.inf, known).max(0)
    smallest = np.where(np.isnan(known), np.inf, known).min(0)
    balanced = np.flatnonzero(~(largest > UNBALANCED_RATIO * smallest))
    step = int(balanced[-1]) + 1 if balanced.size else 0
    step = min(step, known.shape[1] - 1)
    at_step = np.where(np.isnan(known[:, step]), np.inf, known[:, step])
    return step, list(spreads)[int(at_step.argmin())]

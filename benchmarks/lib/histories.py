"""Single runs of several trainings, one record after the other, for a look at them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

import stablegrad_optax
from benchmarks.lib.train import Moment, Training, curves_of, kernels, moments


@dataclass(frozen=True)
class History:
    """One run.

    Attributes:
        steps: i[records], updates done.
        scores: name -> f[records].
        stds: kernel -> f[records], of its gradient before the arm acts.
        scaled: the same times the arm's factors; empty for an arm without a method of
            the package.
        ms_per_step: as in `Curves`.
        params: after the last step.
    """

    steps: np.ndarray
    scores: Mapping[str, np.ndarray]
    stds: Mapping[str, np.ndarray]
    scaled: Mapping[str, np.ndarray]
    ms_per_step: float
    params: Any


def train_together(
    trainings: Mapping[str, Training],
    *,
    rate: float,
    seed: int,
    on_record: Callable[[dict[str, Moment]], None] = lambda record: None,
) -> dict[str, History]:
    """Train one run of each, in turn between records: all have equal records.

    Args:
        trainings: by the name of the arm, or another.
        rate: of learning, the highest.
        seed: of the weights and of the batches.
        on_record: called with every record as soon as it is there.
    """
    runs = [moments([training], [rate], [seed]) for training in trainings.values()]
    records, factors = [], []
    for of_step in zip(*runs, strict=True):
        record = dict(zip(trainings, of_step, strict=True))
        on_record(record)
        factors.append({name: _factors(moment) for name, moment in record.items()})
        params = {name: moment.params for name, moment in record.items()}
        records.append(record)
    return {
        name: _history(
            [record[name] for record in records],
            [of_step[name] for of_step in factors],
            jax.tree.map(lambda leaf: leaf[0], params[name]),
        )
        for name in trainings
    }


def _factors(moment: Moment) -> dict[str, float]:
    """Leaf -> what the arm multiplied it by."""
    params = jax.tree.map(lambda leaf: leaf[0], moment.params)
    try:
        factors = stablegrad_optax.scale_factors(moment.opt_states, params)
    except ValueError:  # an arm without one of the package's methods has none
        return {}
    return {name: float(factor[0]) for name, factor in factors.items()}


def _history(
    records: list[Moment], factors: list[dict[str, float]], params: Any
) -> History:
    (curves,) = curves_of(records)
    stds = dict(zip(kernels(params), curves.stds.T, strict=True))
    scaled = {}
    if factors[0]:
        # A leaf that is not a weight, of one element say, has no factor.
        scaled = {
            name: std * [of_step.get(name, 1.0) for of_step in factors]
            for name, std in stds.items()
        }
    return History(
        curves.steps, curves.scores, stds, scaled, curves.ms_per_step, params
    )

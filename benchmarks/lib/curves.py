"""The curves of runs, and histories of single runs for a closer look."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax

import stablegrad_optax
from benchmarks.lib.runs import Phase, Record, Run, Settings
from benchmarks.lib.train import Moment, Training, moments, per_layer


@dataclass(frozen=True)
class Curves:
    """One run at some of its steps.

    Attributes:
        steps: i[records], the updates done.
        scores: Name -> f[records].
        loss: f[records], of the last batch.
        stds: f[records, kernels], in the order of `Moment.stds`.
        ms_per_step: The wall-clock time of the batch over its number of runs, in the
            fastest stretch between records: compilation and other work on the machine
            only add to it.
        num_params: The number of weights.
        num_skipped: How many updates the optimizer did not take.
    """

    steps: np.ndarray
    scores: Mapping[str, np.ndarray]
    loss: np.ndarray
    stds: np.ndarray
    ms_per_step: float
    num_params: int
    num_skipped: int = 0


def train_batch(
    training_for: Callable[[Settings, Phase], Training],
    keep: Callable[[Run, Curves], Record],
    runs: Sequence[Run],
    tick: Callable[[], None],
) -> list[Record]:
    """Trains runs that differ in initial weights, learning rate and seed alone.

    Args:
        training_for: `Suite.training`.
        keep: `Suite.keep`.
        runs: Equal seeds have equal weights and batches with any optimizer.
        tick: Called at every record; what it raises ends the training.
    """
    trainings = [training_for(run.settings, run.phase) for run in runs]
    size = trainings[0].side_by_side
    records: list[Record] = []
    for begin in range(0, len(runs), size):
        batch = runs[begin : begin + size]
        steps = moments(
            trainings[begin : begin + size],
            [run.learning_rate for run in batch],
            [run.seed for run in batch],
        )
        curves = curves_of(steps, tick)
        records += [keep(run, c) for run, c in zip(batch, curves, strict=True)]
    return records


def curves_of(
    moments: Iterable[Moment], tick: Callable[[], None] = lambda: None
) -> list[Curves]:
    """Returns the curves of every run of a batch."""
    records, num_params, skipped = [], 0, None
    for moment in moments:
        leaves = jax.tree.leaves(moment.params)
        num_params = sum(leaf.size // len(leaf) for leaf in leaves)
        skipped = optax.tree.get(moment.opt_states, "num_skipped")
        skipped = None if skipped is None else np.asarray(skipped)
        records.append(moment._replace(params=None, opt_states=None))
        tick()
    return [
        Curves(
            steps=np.array([m.step for m in records]),
            scores={
                name: np.array([m.scores[name][run] for m in records])
                for name in records[0].scores
            },
            loss=np.array([m.loss[run] for m in records]),
            stds=np.stack([[std[run] for std in m.stds.values()] for m in records]),
            ms_per_step=min(m.ms_per_step for m in records),
            num_params=num_params,
            num_skipped=0 if skipped is None else int(skipped[run]),
        )
        for run in range(len(records[0].loss))
    ]


@dataclass(frozen=True)
class History:
    """One run.

    Attributes:
        steps: i[records], the updates done.
        scores: Name -> f[records].
        stds: Kernel -> f[records], the std of its gradient before the optimizer.
        scaled: The same times the factors of the method; empty for an optimizer without
            a method of the package.
        ms_per_step: As in `Curves`.
        params: The weights after the last step.
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
    """Trains one run of each, two at a time, and all of them up to each record.

    Args:
        trainings: Name -> training; all have the records of the first.
        rate: The highest learning rate.
        seed: Of the weights and of the batches.
        on_record: Called with every record as soon as it is there.
    """
    runs = [moments([training], [rate], [seed]) for training in trainings.values()]
    records, factors = [], []
    # One run of small matrices keeps one core busy; XLA releases Python's lock.
    with ThreadPoolExecutor(2) as pool:
        for _ in next(iter(trainings.values())).recorded:
            record = dict(zip(trainings, pool.map(next, runs), strict=True))
            on_record(record)
            factors.append({name: _factors(moment) for name, moment in record.items()})
            params = {name: moment.params for name, moment in record.items()}
            records.append(record)
    return {
        name: _history(
            [record[name] for record in records],
            [step[name] for step in factors],
            jax.tree.map(lambda leaf: leaf[0], params[name]),
        )
        for name in trainings
    }


def _factors(moment: Moment) -> dict[str, float]:
    """Returns array -> its factor; empty without a method of the package."""
    params = jax.tree.map(lambda leaf: leaf[0], moment.params)
    try:
        factors = stablegrad_optax.scale_factors(moment.opt_states, params)
    except ValueError:
        return {}
    return {name: float(factor[0]) for name, factor in per_layer(factors).items()}


def _history(
    records: list[Moment], factors: list[dict[str, float]], params: Any
) -> History:
    (curves,) = curves_of(records)
    stds = dict(zip(records[0].stds, curves.stds.T, strict=True))
    scaled = {}
    if factors[0]:
        # A leaf that is not a weight, of one element say, has no factor.
        scaled = {
            name: std * [step.get(name, 1.0) for step in factors]
            for name, std in stds.items()
        }
    return History(
        curves.steps, curves.scores, stds, scaled, curves.ms_per_step, params
    )

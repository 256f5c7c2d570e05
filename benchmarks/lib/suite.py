"""The declaration of a suite: problems, optimizers, rates, seeds, and what it keeps."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np

from benchmarks.lib.curves import Curves
from benchmarks.lib.optimizers import Optimizer
from benchmarks.lib.runs import (
    Phase,
    Record,
    Run,
    Settings,
    capped_error,
    finite,
    tuning_settings,
)
from benchmarks.lib.train import Training

# The tuning records of one optimizer on one problem -> the rate it is reported at.
Choice = Callable[[Iterable[Record]], float]


def lowest_median(tuned: Iterable[Record]) -> float:
    """Chooses the rate with the lowest median error over the tuning seeds.

    A failed run counts as an infinite error. Between rates whose medians are infinite
    the one with fewer failures wins, then the one with the lower mean error (1 at
    most), then the lower rate.
    """
    by_rate = _by_rate(tuned)
    return min(by_rate, key=lambda r: (_median(by_rate[r]), *_ties(by_rate, r)))


def lowest_worst(tuned: Iterable[Record]) -> float:
    """Chooses the rate whose worst tuning seed has the lowest error.

    A failed run counts as an infinite error. Between rates whose worst are equal the
    one with fewer failures wins, then the one with the lower mean error (1 at most).
    """
    by_rate = _by_rate(tuned)
    return _lowest_worst(by_rate, tuple(by_rate))


def lowest_worst_with_margin(tuned: Iterable[Record]) -> float:
    """Chooses the rate whose worst tuning seed is best, a step away from failures.

    A few tuning seeds do not see that the best rate is next to one at which some seeds
    fail. A rate is therefore taken only if neither this rate nor the next larger one
    failed on a tuning seed, so that the largest rate is never taken. If no such rate is
    left, all rates may be taken. Between equal rates the rules of `lowest_median` hold.
    """
    by_rate = _by_rate(tuned)
    rates = sorted(by_rate)
    fails = {rate: any(record["failed"] for record in by_rate[rate]) for rate in rates}
    safe = [rate for rate, larger in pairwise(rates) if not fails[rate] | fails[larger]]
    return _lowest_worst(by_rate, safe or rates)


def _lowest_worst(
    by_rate: Mapping[float, Sequence[Record]], rates: Sequence[float]
) -> float:
    return min(rates, key=lambda r: (max(_errors(by_rate[r])), *_ties(by_rate, r)))


def _by_rate(tuned: Iterable[Record]) -> dict[float, list[Record]]:
    by_rate: dict[float, list[Record]] = {}
    for record in tuned:
        by_rate.setdefault(record["learning_rate"], []).append(record)
    return by_rate


def _errors(records: Sequence[Record]) -> list[float]:
    return sorted(math.inf if r["failed"] else r["error"] for r in records)


def _ties(
    by_rate: Mapping[float, Sequence[Record]], rate: float
) -> tuple[int, float, float]:
    """Returns what decides between rates of equal error."""
    failures = sum(record["failed"] for record in by_rate[rate])
    capped = [capped_error(record) for record in by_rate[rate]]
    return failures, float(np.mean(capped)), rate


def _median(records: Sequence[Record]) -> float:
    """Is `np.median`, but half of infinity is infinity without a warning."""
    ordered = _errors(records)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


@dataclass(frozen=True)
class Protocol:
    """Says which seeds choose the learning rate, how, and which seeds are reported.

    Attributes:
        tuning_seeds: None where each optimizer has one learning rate.
        reported_seeds: Seeds that nothing was chosen on.
        choose: Chooses the rate. None: nothing is tuned, and every rate is reported
            with every seed, for curves of the error against the learning rate.
    """

    tuning_seeds: tuple[int, ...]
    reported_seeds: tuple[int, ...]
    choose: Choice | None = lowest_median


SMOKE = Protocol((0,), (100, 101, 102))  # of the presets that take seconds


@dataclass(frozen=True)
class Entry:
    """The runs of one optimizer on one problem.

    Attributes:
        settings: As in `Run`, of the reported runs; see `tuning_settings`.
        learning_rates: The set to choose from, or to report at each rate.
        cost: Of one reported run, in any unit that is the same for all entries.
    """

    settings: Settings
    learning_rates: tuple[float, ...]
    cost: float = 1.0

    def tuning(self, protocol: Protocol) -> list[Run]:
        if len(self.learning_rates) == 1 or protocol.choose is None:
            return []
        return [
            Run(tuning_settings(self.settings), rate, seed, "tuning")
            for rate in self.learning_rates
            for seed in protocol.tuning_seeds
        ]

    def reported(self, protocol: Protocol, tuned: Sequence[Record]) -> list[Run]:
        """Returns the reported runs, at the rate that the tuning records choose."""
        rates = self.learning_rates
        if len(rates) > 1 and protocol.choose is not None:
            rates = (protocol.choose(tuned),)
        return [
            Run(self.settings, rate, seed, "reported")
            for rate in rates
            for seed in protocol.reported_seeds
        ]

    def num_runs(self, protocol: Protocol) -> int:
        num_rates = 1 if protocol.choose else len(self.learning_rates)
        return len(self.tuning(protocol)) + num_rates * len(protocol.reported_seeds)

    @property
    def tuning_cost(self) -> float:
        """The cost of one run that tunes, which may be shorter."""
        shorter, whole = (
            s.get("steps", 1) for s in (tuning_settings(self.settings), self.settings)
        )
        return self.cost * shorter / whole

    def total_cost(self, protocol: Protocol) -> float:
        num_tuning = len(self.tuning(protocol))
        num_reported = self.num_runs(protocol) - num_tuning
        return self.tuning_cost * num_tuning + self.cost * num_reported


def problems(**values: Iterable[str | int]) -> list[Settings]:
    """Returns every combination of settings; the last one varies fastest."""
    return [
        dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())
    ]


def entries(
    preset: str,
    problems: Iterable[Settings],
    optimizers: Iterable[str],
    rates: Callable[[Optimizer], tuple[float, ...]] = lambda optimizer: optimizer.rates,
) -> list[list[Entry]]:
    """Returns every optimizer on every problem, each a group of its own.

    Args:
        preset: Its name.
        problems: The settings without the optimizer. `steps` is one of them, and
            `tuning_steps` may be another.
        optimizers: Their names.
        rates: Optimizer -> learning rates; by default those of its base.
    """
    return [
        [
            Entry(
                {"preset": preset, **problem, "optimizer": optimizer.name},
                rates(optimizer),
                # The work of a step grows with the number of kernels.
                problem["steps"] * (problem.get("depth", 0) + 1),
            )
        ]
        for problem in problems
        for optimizer in map(Optimizer.named, optimizers)
    ]


@dataclass(frozen=True)
class Preset:
    """A grid.

    Attributes:
        groups: Entries whose runs may be computed side by side, in the order in which
            they are computed.
        protocol: Its seeds.
        takes: About how long, and where, in a few words.
        about: What it is for.
        workers: How many groups are computed at a time, by default.
    """

    groups: Sequence[Sequence[Entry]]
    protocol: Protocol
    takes: str
    about: str
    workers: int = 1

    @property
    def entries(self) -> list[Entry]:
        return [entry for group in self.groups for entry in group]

    @property
    def num_runs(self) -> int:
        return sum(entry.num_runs(self.protocol) for entry in self.entries)


def keep_error(run: Run, curves: Curves, failure: float = 0.5) -> Record:
    """Keeps the score "error", which is relative, and its curve in reported runs.

    Args:
        run: Which run it is.
        curves: What became of it.
        failure: A run whose last error is above this, or not finite, has failed.
    """
    errors = curves.scores["error"].astype(float)
    record: Record = {
        "error": finite(errors[-1]),
        "failed": not errors[-1] <= failure,
        "ms_per_step": finite(curves.ms_per_step, digits=4),
    }
    if run.phase == "reported":
        record["curve"] = curve(curves, 3, error=errors)
    return record


def curve(curves: Curves, digits: int, **values: np.ndarray) -> Record:
    """Returns quantities by step, to so many digits; null where they are not finite."""
    return {
        "step": curves.steps.tolist(),
        **{
            name: [finite(float(value), digits) for value in quantity]
            for name, quantity in values.items()
        },
    }


@dataclass(frozen=True)
class Suite:
    """All that the engine needs of a suite.

    Attributes:
        name: Of the command, the results and the page.
        about: A line for `run --list`.
        presets: By name.
        training: (settings, phase) -> the training. It raises a ValueError, in one
            line, where data is missing.
        keep: (run, its curves) -> what its line holds next to the settings: `error`,
            `failed` and more.
        measure: Settings of a problem -> what is measured of it once, without training,
            in a line of its own; None: nothing is.
    """

    name: str
    about: str
    presets: Mapping[str, Preset]
    training: Callable[[Settings, Phase], Training]
    keep: Callable[[Run, Curves], Record] = keep_error
    measure: Callable[[Settings], Record] | None = None

    @property
    def problem(self) -> tuple[str, ...]:
        """The names of the settings that make a problem."""
        first = next(iter(self.presets.values())).entries[0]
        return tuple(n for n in first.settings if n not in ("preset", "optimizer"))

    def choice(self, preset: str) -> Choice | None:
        """Returns how the rates of a preset were chosen."""
        known = self.presets.get(preset)
        return lowest_median if known is None else known.protocol.choose

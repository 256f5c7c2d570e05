"""What a suite says: its cells, arms and seeds, how a rate is chosen, what it keeps."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from benchmarks.lib.arms import Arm
from benchmarks.lib.runs import Phase, Record, Run, Settings, capped_error
from benchmarks.lib.train import Curves, Training

# The records of an arm's tuning -> the rate it is reported at.
Choice = Callable[[Iterable[Record]], float]


def lowest_median(tuned: Iterable[Record]) -> float:
    """The rate with the lowest median error over tuning seeds, failures last.

    A failed run counts as an infinite error. Between rates whose medians are infinite
    the one with fewer failures wins, then the one with the lower mean error (1 at
    most); between equals the lowest rate.
    """
    by_rate = _by_rate(tuned)
    return min(
        by_rate, key=lambda rate: (_median(by_rate[rate]), *_rest(by_rate, rate))
    )


def lowest_worst_with_margin(tuned: Iterable[Record]) -> float:
    """The rate whose worst tuning seed is best, a step away from where seeds fail.

    The best rate often stands beside one at which some seeds fail, and so few tuning
    seeds as there are do not see that edge. A rate is therefore only taken if the next
    larger one of the set failed on no tuning seed; so the largest never is. Where
    nothing is left all rates may be taken; between equals `lowest_median`'s rules hold.
    """
    by_rate = _by_rate(tuned)
    rates = sorted(by_rate)
    safe = [
        rate
        for rate, larger in pairwise(rates)
        if not any(record["failed"] for record in by_rate[larger])
    ]
    return min(
        safe or rates,
        key=lambda rate: (max(_errors(by_rate[rate])), *_rest(by_rate, rate)),
    )


def _by_rate(tuned: Iterable[Record]) -> dict[float, list[Record]]:
    by_rate: dict[float, list[Record]] = {}
    for record in tuned:
        by_rate.setdefault(record["learning_rate"], []).append(record)
    return by_rate


def _errors(records: Sequence[Record]) -> list[float]:
    return sorted(math.inf if r["failed"] else r["error"] for r in records)


def _rest(
    by_rate: Mapping[float, Sequence[Record]], rate: float
) -> tuple[int, float, float]:
    """What decides between rates of equal error."""
    failures = sum(record["failed"] for record in by_rate[rate])
    capped = [capped_error(record) for record in by_rate[rate]]
    return failures, float(np.mean(capped)), rate


def _median(records: Sequence[Record]) -> float:
    """`np.median`, but half of infinity is infinity without a warning."""
    ordered = _errors(records)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


@dataclass(frozen=True)
class Protocol:
    """Which seeds choose the learning rate, how, and which are reported.

    Attributes:
        tuning_seeds: may be empty where one learning rate alone is given.
        reported_seeds: none of the former.
        choose: how the rate is chosen.
    """

    tuning_seeds: tuple[int, ...]
    reported_seeds: tuple[int, ...]
    choose: Choice = lowest_median


@dataclass(frozen=True)
class Entry:
    """The runs of one line of a table: one arm in one cell.

    Attributes:
        settings: as in `Run`.
        learning_rates: the fixed set to choose from.
        cost: of one run, in any unit that is the same for all entries.
    """

    settings: Settings
    learning_rates: tuple[float, ...]
    cost: float = 1.0

    def tuning(self, protocol: Protocol) -> list[Run]:
        if len(self.learning_rates) == 1:
            return []
        return [
            Run(self.settings, rate, seed, "tuning")
            for rate in self.learning_rates
            for seed in protocol.tuning_seeds
        ]

    def reported(self, protocol: Protocol, tuned: Sequence[Record]) -> list[Run]:
        """The fresh runs, at the rate that the records of `tuning` choose."""
        (rate,) = self.learning_rates[:1]
        if len(self.learning_rates) > 1:
            rate = protocol.choose(tuned)
        first, *_ = protocol.reported_seeds
        return [
            Run(self.settings, rate, seed, "reported", detailed=seed == first)
            for seed in protocol.reported_seeds
        ]

    def num_runs(self, protocol: Protocol) -> int:
        return len(self.tuning(protocol)) + len(protocol.reported_seeds)


def entries(
    preset: str,
    cell: Settings,
    arms: Iterable[str],
    rates: Callable[[Arm], tuple[float, ...]] = lambda arm: arm.rates,
    *,
    cost: float = 1.0,
) -> list[list[Entry]]:
    """Every arm in one cell, each a group of its own.

    Args:
        preset: its name.
        cell: what is trained, whatever the arm.
        arms: their names.
        rates: arm -> the learning rates to choose from; by default the optimizer's.
        cost: as in `Entry`.
    """
    return [
        [
            Entry(
                {"preset": preset, **cell, "optimizer": arm.optimizer, "arm": arm.name},
                rates(arm),
                cost,
            )
        ]
        for arm in map(Arm.of, arms)
    ]


@dataclass(frozen=True)
class Preset:
    """A grid.

    Attributes:
        groups: entries whose runs may be computed side by side, in the order in which
            they are computed.
        protocol: its seeds.
        takes: about how long, and where, in a few words.
        about: what it is for.
        workers: groups computed at a time, by default.
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


@dataclass(frozen=True)
class Suite:
    """All that the engine needs of a suite.

    Attributes:
        name: of the command, the results and the page.
        about: a line for `run --list`.
        presets: by name.
        training: (settings, phase) -> what is trained. It raises a ValueError, in one
            line, where data is missing.
        keep: (run, its curves) -> what its line holds beside the settings: `error`,
            `failed` and more.
        timed: cells whose training step `time` measures: the settings of every arm, the
            one that the others are compared with first.
    """

    name: str
    about: str
    presets: Mapping[str, Preset]
    training: Callable[[Settings, Phase], Training]
    keep: Callable[[Run, Curves], Record]
    timed: tuple[tuple[Settings, ...], ...] = ()

    def choice(self, preset: str) -> Choice:
        """How the rates of a preset's lines were chosen."""
        known = self.presets.get(preset)
        return lowest_median if known is None else known.protocol.choose

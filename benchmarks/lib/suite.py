"""What a suite says: its cells, arms and seeds, how a rate is chosen, what it keeps."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np

from benchmarks.lib.arms import Arm
from benchmarks.lib.runs import (
    Phase,
    Record,
    Run,
    Settings,
    capped_error,
    finite,
    of_tuning,
)
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


def lowest_worst(tuned: Iterable[Record]) -> float:
    """The rate whose worst tuning seed is best.

    A failed run counts as an infinite error; between rates whose worst are equal the
    one with fewer failures wins, then the one with the lower mean error (1 at most).
    """
    by_rate = _by_rate(tuned)
    return _lowest_worst(by_rate, tuple(by_rate))


def lowest_worst_with_margin(tuned: Iterable[Record]) -> float:
    """The rate whose worst tuning seed is best, a step away from where seeds fail.

    The best rate often stands beside one at which some seeds fail, and so few tuning
    seeds as there are do not see that edge. A rate is therefore only taken if neither
    it nor the next larger one of the set failed on a tuning seed; so the largest never
    is. Where nothing is left all rates may be taken; between equals `lowest_median`'s
    rules hold.
    """
    by_rate = _by_rate(tuned)
    rates = sorted(by_rate)
    fails = {rate: any(record["failed"] for record in by_rate[rate]) for rate in rates}
    safe = [rate for rate, larger in pairwise(rates) if not fails[rate] | fails[larger]]
    return _lowest_worst(by_rate, safe or rates)


def _lowest_worst(
    by_rate: Mapping[float, Sequence[Record]], rates: Sequence[float]
) -> float:
    return min(
        rates, key=lambda rate: (max(_errors(by_rate[rate])), *_rest(by_rate, rate))
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


SMOKE = Protocol((0,), (100, 101, 102))  # of the presets that take seconds


@dataclass(frozen=True)
class Entry:
    """The runs of one line of a table: one arm in one cell.

    Attributes:
        settings: as in `Run`, of the reported runs; see `of_tuning`.
        learning_rates: the fixed set to choose from.
        cost: of one reported run, in any unit that is the same for all entries.
    """

    settings: Settings
    learning_rates: tuple[float, ...]
    cost: float = 1.0

    def tuning(self, protocol: Protocol) -> list[Run]:
        if len(self.learning_rates) == 1:
            return []
        return [
            Run(of_tuning(self.settings), rate, seed, "tuning")
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

    @property
    def tuning_cost(self) -> float:
        """Of one run that tunes, which may be shorter."""
        shorter, whole = (
            s.get("steps", 1) for s in (of_tuning(self.settings), self.settings)
        )
        return self.cost * shorter / whole

    def total_cost(self, protocol: Protocol) -> float:
        num_reported = len(protocol.reported_seeds)
        num_tuning = self.num_runs(protocol) - num_reported
        return self.tuning_cost * num_tuning + self.cost * num_reported


def cells(**values: Iterable[str | int]) -> list[Settings]:
    """Every combination of settings; the last one varies fastest."""
    return [
        dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())
    ]


def entries(
    preset: str,
    cells: Iterable[Settings],
    arms: Iterable[str],
    rates: Callable[[Arm], tuple[float, ...]] = lambda arm: arm.rates,
) -> list[list[Entry]]:
    """Every arm in every cell, each a group of its own; a run costs its steps.

    Args:
        preset: its name.
        cells: what is trained, whatever the arm; `steps` is one of the settings,
            `tuning_steps` may be another.
        arms: their names.
        rates: arm -> the learning rates to choose from; by default the optimizer's.
    """
    return [
        [
            Entry(
                {"preset": preset, **cell, "optimizer": arm.optimizer, "arm": arm.name},
                rates(arm),
                # A step's work grows with the number of kernels.
                cell["steps"] * (cell.get("depth", 0) + 1),
            )
        ]
        for cell in cells
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


def keep_error(run: Run, curves: Curves, failure: float = 0.5) -> Record:
    """The score "error", relative, and its curve in reported runs.

    `layers`, of the first of these, is log10 of the std of each kernel's gradient.

    Args:
        run: whose.
        curves: its.
        failure: a run whose last error is above it, or not finite, has failed.
    """
    errors = curves.scores["error"].astype(float)
    record: Record = {
        "error": finite(errors[-1]),
        "failed": not errors[-1] <= failure,
        "ms_per_step": finite(curves.ms_per_step, digits=4),
    }
    if run.phase == "reported":
        record["curve"] = curve(curves, 3, error=errors)
    if run.detailed:
        record["layers"] = rounded(curves.exponents)
    return record


def curve(curves: Curves, digits: int, **values: np.ndarray) -> Record:
    """Quantities by step, to so many digits; null where they are not finite."""
    return {
        "step": curves.steps.tolist(),
        **{
            name: [finite(float(value), digits) for value in of_step]
            for name, of_step in values.items()
        },
    }


def rounded(exponents: np.ndarray) -> list[list[float | None]]:
    return [[finite(e) for e in row] for row in exponents.round(1).tolist()]


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
            `failed` and more; by default the score "error", failed above 0.5.
        timed: cells whose training step `time` measures: the settings of every arm, the
            one that the others are compared with first.
    """

    name: str
    about: str
    presets: Mapping[str, Preset]
    training: Callable[[Settings, Phase], Training]
    keep: Callable[[Run, Curves], Record] = keep_error
    timed: tuple[tuple[Settings, ...], ...] = ()

    @property
    def cell(self) -> tuple[str, ...]:
        """The settings that say what is trained, whatever the arm."""
        first = next(iter(self.presets.values())).entries[0]
        return tuple(
            name
            for name in first.settings
            if name not in ("preset", "optimizer", "arm")
        )

    def choice(self, preset: str) -> Choice:
        """How the rates of a preset's lines were chosen."""
        known = self.presets.get(preset)
        return lowest_median if known is None else known.protocol.choose

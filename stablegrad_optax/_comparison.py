"""What the runs of several optimizers say: which rate, who is best, who is level."""

import dataclasses
import math
import textwrap
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]

_LEVEL = 0.05  # the chance, over all pairs together, of telling apart what is alike
_NAME_WIDTH = 24  # the table then fits 80 columns


@dataclasses.dataclass(frozen=True)
class OptimizerRuns:
    """The runs of one optimizer; a part of :class:`Comparison`.

    Attributes:
      name: The optimizer's.
      learning_rate: The chosen one.
      rate_at_edge: Whether it is the smallest or the largest of several that were
        tried: the best may lie beyond.
      scores: f[seeds], of the fresh seeds, infinite where a run failed.
      curves: f[seeds, steps], the training losses of these runs.
      tuning: f[rates, tuning seeds], the scores that chose the rate, in the order of
        the rates, infinite where a run failed; no rows for a single rate.
      ms_per_step: Wall time of a step divided by the runs that took it side by side,
        compilation left out.
      is_level: Whether the seeds do not tell it apart from the best.
    """

    name: str
    learning_rate: float
    rate_at_edge: bool
    scores: Floats
    curves: Floats
    tuning: Floats
    ms_per_step: float
    is_level: bool = False

    @property
    def num_failed(self) -> int:
        """How many of the fresh runs failed."""
        return int(np.sum(np.isinf(self.scores)))

    @property
    def median(self) -> float:
        """The median score, a failure counting as infinite."""
        return _median(self.scores)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What :func:`compare_optimizers` returns; ``print`` it to read it.

    Attributes:
      runs: One :class:`OptimizerRuns` for each optimizer, the best first: by the mean
        rank of its runs among all runs, in which a failure is last.
      order: The names as they were given.
    """

    runs: tuple[OptimizerRuns, ...]
    order: tuple[str, ...]

    @property
    def best(self) -> OptimizerRuns:
        """The optimizer with the lowest mean rank; ``level`` says who is as good."""
        return self.runs[0]

    @property
    def level(self) -> tuple[str, ...]:
        """Those that the seeds do not tell apart from the best, in the order given."""
        level = {runs.name for runs in self.runs if runs.is_level}
        return tuple(name for name in self.order if name in level)

    @property
    def curves(self) -> dict[str, Floats]:
        """The training losses f[seeds, steps] at each optimizer's rate, by name."""
        return {runs.name: runs.curves for runs in self.runs}

    def __getitem__(self, name: str) -> OptimizerRuns:
        """The runs of one optimizer."""
        return {runs.name: runs for runs in self.runs}[name]

    def __str__(self) -> str:
        lines = textwrap.wrap(self._summary(), 80)
        header = ("optimizer", "", "rate", "median", "lowest", "highest", "failed")
        rows = [(*header, "ms/step"), *map(_row, self.runs)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = [
            "  ".join(
                [f"{row[0].ljust(widths[0])} {row[1] or ' '} {row[2].rjust(widths[2])}"]
                + [cell.rjust(w) for cell, w in zip(row[3:], widths[3:], strict=True)]
            )
            for row in rows
        ]
        notes = ["=  level with the best"] if len(self.level) > 1 else []
        if any(runs.rate_at_edge for runs in self.runs):
            notes.append("*  at the end of the rates that were tried: try further ones")
        return "\n".join([*lines, "", *table, *notes])

    def _summary(self) -> str:
        num_runs = len(self.best.scores)
        if self.best.num_failed == num_runs:
            return (
                f"Every run failed, with each of {len(self.runs)} optimizers: lower "
                "learning rates, or a loss that can be trained, come first."
            )
        if len(self.runs) == 1:
            return f"{self.best.name}, {num_runs} seeds."
        if smallest_p_value(num_runs) * _num_pairs(len(self.runs)) >= _LEVEL:
            return (
                f"{self.best.name} has the best runs, but {num_runs} seeds are too few "
                f"to tell {len(self.runs)} optimizers apart: "
                f"{_enough_seeds(len(self.runs))} are needed at least."
            )
        if len(self.level) == 1:
            return (
                f"{self.best.name} did best: {num_runs} seeds tell it apart from each "
                "of the others."
            )
        others = [name for name in self.level if name != self.best.name]
        return (
            f"{self.best.name} has the best runs, and {num_runs} seeds do not tell it "
            f"apart from {', '.join(others)}. The first of these that was named, "
            f"{self.level[0]}, will do."
        )


def _row(runs: OptimizerRuns) -> tuple[str, ...]:
    finite = runs.scores[np.isfinite(runs.scores)]
    name, half = runs.name, _NAME_WIDTH // 2
    if len(name) > _NAME_WIDTH:
        name = f"{name[: half - 2]}...{name[1 - half :]}"
    return (
        name,
        "=" if runs.is_level else " ",
        f"{runs.learning_rate:.2g}{'*' if runs.rate_at_edge else ' '}",
        f"{runs.median:.3g}",
        *(f"{edge(finite):.2g}" if finite.size else "-" for edge in (np.min, np.max)),
        f"{runs.num_failed}/{len(runs.scores)}",
        f"{runs.ms_per_step:.2g}",
    )


def compare(runs: Sequence[OptimizerRuns]) -> Comparison:
    """Orders the optimizers and marks those that are level with the best."""
    ranks = _ranks(np.concatenate([of.scores for of in runs]))
    mean_ranks = [float(np.mean(part)) for part in np.split(ranks, len(runs))]
    ordered = [runs[i] for i in np.argsort(mean_ranks, kind="stable")]
    # The best was chosen after looking: every pair counts.
    limit = _LEVEL / max(_num_pairs(len(runs)), 1)
    return Comparison(
        tuple(
            dataclasses.replace(
                of, is_level=rank_test(ordered[0].scores, of.scores) >= limit
            )
            for of in ordered
        ),
        tuple(of.name for of in runs),
    )


def choose_rate(scores: Floats) -> int:
    """The position of the rate to take, from scores f[rates, seeds], rates ascending.

    Fewest failures; then a margin: no failure at the next larger rate, for the best
    rate often stands beside a cliff; then the lowest worst score; then the lowest mean
    rank, for rates of which every seed has a failure; then the smaller rate.
    """
    failures = np.isinf(scores).sum(axis=1)
    # The largest has no next one, and stands for itself.
    beyond = np.append(failures[1:], failures[-1]) > 0
    ranks = _ranks(scores.reshape(-1)).reshape(scores.shape).mean(axis=1)

    def key(i: int) -> tuple[float, ...]:
        return failures[i], beyond[i], scores[i].max(), ranks[i], i

    return min(range(len(scores)), key=key)


def rank_test(first: Floats, second: Floats) -> float:
    """The two-sided p-value of Mann and Whitney's test, exact, with ties.

    The share of all ways to part the pooled ranks into two groups of these sizes whose
    rank sum lies as far from its mean as the observed one.
    """
    doubled = np.rint(2 * _ranks(np.concatenate([first, second]))).astype(int)
    total, size = int(doubled.sum()), len(first)
    # ways[k, s]: how many subsets of k ranks have the doubled sum s.
    ways = np.zeros((size + 1, total + 1))
    ways[0, 0] = 1
    for rank in doubled:
        ways[1:, rank:] += ways[:-1, : total + 1 - rank]
    count = ways[-1]
    mean = total * size / len(doubled)
    distance = np.abs(np.arange(total + 1) - mean)
    observed = abs(int(doubled[:size].sum()) - mean)
    return float(count[distance >= observed - 1e-9].sum() / count.sum())


def smallest_p_value(num_runs: int) -> float:
    """What :func:`rank_test` gives where all of one's runs are better."""
    return 2 / math.comb(2 * num_runs, num_runs)


def _enough_seeds(num_optimizers: int) -> int:
    limit = _LEVEL / _num_pairs(num_optimizers)
    return next(n for n in range(1, 100) if smallest_p_value(n) < limit)


def _num_pairs(number: int) -> int:
    return math.comb(number, 2)


def _ranks(values: Floats) -> Floats:
    """Ranks from 1, the mean of theirs for values that are equal."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def _median(values: Floats) -> float:
    """`np.median`, but half of infinity is infinity without a warning."""
    ordered = np.sort(values)
    low, high = ordered[(len(values) - 1) // 2], ordered[len(values) // 2]
    return float(low if low == high else (low + high) / 2)

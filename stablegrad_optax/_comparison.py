"""Result of a comparison: the runs, the recommendation and the table."""

import dataclasses
import math
import textwrap
from collections.abc import Sequence

import numpy as np

from stablegrad_optax._optimizers import complexity
from stablegrad_optax._ranking import (
    Floats,
    fewest_seeds,
    limit,
    rank_test,
    seeds_to_decide,
)
from stablegrad_optax._runs import OptimizerRuns

_CLOSE = 1.25  # a simpler optimizer is recommended up to this ratio of medians
_MOST_SEEDS = 100  # a larger number of seeds is not named
_NAME_WIDTH = 27  # the table then fits 80 columns


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Holds what :func:`compare_optimizers` measured; ``print`` it to read it.

    Attributes:
      runs: One :class:`OptimizerRuns` per optimizer, ordered by the median score and,
        if medians are equal, by the number of failed runs.
      unfinished: The names of the optimizers that an interruption left out.
    """

    runs: tuple[OptimizerRuns, ...]
    unfinished: tuple[str, ...] = ()

    @property
    def best(self) -> OptimizerRuns:
        """The optimizer with the lowest median."""
        return self.runs[0]

    @property
    def level(self) -> tuple[str, ...]:
        """The best optimizer and those that the seeds do not distinguish from it."""
        return tuple(runs.name for runs in self.runs if runs.is_level)

    @property
    def recommended(self) -> OptimizerRuns:
        """The simplest optimizer that is close to the best one.

        The seeds do not distinguish it from the best, its median is within a factor of
        1.25 of the best, and it does not fail more often. AdamW is simpler than Muon,
        and Muon than SOAP. With one optimizer, fewer transformations are simpler, of
        which clipping is simpler than normalizing and normalizing than StableGrad.
        Optimizers with other names count as the most complex.
        """
        close = [runs for runs in self.runs if runs.is_level and self._is_close(runs)]
        return min(close, key=lambda runs: complexity(runs.name))

    @property
    def undecided(self) -> tuple[str, ...]:
        """The simpler optimizers that more seeds might show to be as good or worse."""
        simplest = complexity(self.recommended.name)
        return tuple(
            runs.name
            for runs in self.runs
            if runs.is_level and complexity(runs.name) < simplest
        )

    @property
    def curves(self) -> dict[str, Floats]:
        """The training losses f[seeds, steps] at each optimizer's rate, by name."""
        return {runs.name: runs.curves for runs in self.runs}

    def __getitem__(self, name: str) -> OptimizerRuns:
        """Returns the runs of one optimizer."""
        return {runs.name: runs for runs in self.runs}[name]

    def __str__(self) -> str:
        header = ("optimizer", "", "rate", "median", "lowest", "highest", "failed")
        rows = [(*header, "ms"), *map(_row, self.runs)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = [
            "  ".join(
                [f"{row[0].ljust(widths[0])} {row[1] or ' '} {row[2].rjust(widths[2])}"]
                + [cell.rjust(w) for cell, w in zip(row[3:], widths[3:], strict=True)]
            )
            for row in rows
        ]
        return "\n".join([*_wrap(self._summary()), "", *table, *self._notes()])

    def _is_close(self, runs: OptimizerRuns) -> bool:
        best = self.best.median
        bound = best * _CLOSE if best > 0 else best / _CLOSE
        return runs.median <= bound and runs.num_failed <= self.best.num_failed

    def _summary(self) -> str:
        text = self._verdict()
        if self.unfinished:
            text = (
                "This comparison is incomplete. It was interrupted before these "
                f"optimizers were finished: {', '.join(self.unfinished)}. {text}"
            )
        return text

    def _verdict(self) -> str:
        best, num_seeds = self.best, len(self.best.scores)
        if best.num_failed == num_seeds:
            return (
                "Every run of every optimizer failed. Try lower learning rates, and "
                "check that the loss can be trained."
            )
        if len(self.runs) == 1:
            return f"{best.name} was trained on {num_seeds} seeds."
        if num_seeds < fewest_seeds(len(self.runs)):
            too_few = few_seeds(len(self.runs), num_seeds)
            return f"{best.name} has the lowest median. {too_few}"
        if len(self.level) == 1:
            return (
                f"{best.name} did best. {num_seeds} seeds distinguish it from every "
                "other optimizer."
            )
        chosen = self.recommended
        if chosen is not best:
            text = (
                f"Use {chosen.name}. It is the simplest optimizer whose median is "
                f"within a factor of {_CLOSE:g} of the lowest one, of {best.name}, and "
                "which does not fail more often."
            )
        elif self.undecided:
            text = f"{best.name} has the lowest median."
        else:
            text = (
                f"Use {best.name}. It has the lowest median, and the optimizers that "
                f"{num_seeds} seeds do not distinguish from it are not simpler."
            )
        return f"{text} {self._open_question()}".strip()

    def _open_question(self) -> str:
        if not self.undecided:
            return ""
        needed = ", ".join(f"{name} ({self._needed(name)})" for name in self.undecided)
        return (
            f"These {len(self.best.scores)} seeds do not decide whether a simpler "
            f"optimizer is worse. About so many might: {needed}."
        )

    def _needed(self, name: str) -> str:
        scores = self.best.scores, self[name].scores
        number = seeds_to_decide(*scores, len(self.runs))
        return f"{number}" if number <= _MOST_SEEDS else f"more than {_MOST_SEEDS}"

    def _notes(self) -> list[str]:
        notes = []
        if len(self.level) > 1:
            notes.append("=  not distinguishable from the first row")
        if any(runs.rate_at_edge for runs in self.runs):
            notes.append(
                "*  the smallest or largest rate that was tried; try further ones"
            )
        added = {runs.added_rate for runs in self.runs} - {None}
        if added:
            rates = ", ".join(f"{rate:.2g}" for rate in sorted(filter(None, added)))
            notes += _wrap(
                "Where the best of the given rates was at an end of the list, one more "
                f"was tried: {rates}."
            )
        return [*notes, "ms  milliseconds per step and run, without compilation"]


def few_seeds(num_optimizers: int, num_seeds: int) -> str:
    """Says that the test cannot distinguish the optimizers, whatever the scores."""
    return (
        f"{num_seeds} seeds cannot distinguish {num_optimizers} optimizers; use "
        f"num_seeds={fewest_seeds(num_optimizers)} or more."
    )


def compare(
    runs: Sequence[OptimizerRuns], unfinished: Sequence[str] = ()
) -> Comparison:
    """Orders the optimizers and marks those that do not differ from the best."""

    def key(one: OptimizerRuns) -> tuple[float, int, float]:
        finite = one.scores[np.isfinite(one.scores)]
        return one.median, one.num_failed, finite.mean() if finite.size else math.inf

    ordered = sorted(runs, key=key)
    # The best optimizer is known only after the scores, so that every pair counts.
    bound = limit(len(runs))
    marked = [
        dataclasses.replace(
            one, is_level=rank_test(ordered[0].scores, one.scores) >= bound
        )
        for one in ordered
    ]
    return Comparison(tuple(marked), tuple(unfinished))


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


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, 80, break_on_hyphens=False)

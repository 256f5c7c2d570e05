"""What choosing one arm everywhere costs, and one arm against another."""

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.lib import noise
from benchmarks.lib.summary import Cell, Scores, failure_p, floor, solvable
from benchmarks.lib.tables import markdown_table, ranged


@dataclass(frozen=True)
class Regret:
    """What choosing one arm everywhere costs against the best arm of each cell.

    A failure in a cell is a failure of any of its runs. Cells in which every arm
    failed say nothing about the choice and are left out.

    Attributes:
        arm: its name.
        costs: its median error beside the lowest median error of any arm, by cell:
            their ratio, or as `compare` says.
        failed: the cells in which it failed though another arm did not.
        num_failed_runs: in all cells that are not left out.
        num_runs: likewise.
        resampled: the costs of seeds drawn with replacement, f[resamples] by cell.
        failure_p: of its failures and those of the first arm of the list, in the cells
            that both were run in.
        level: whether no more than noise is between it and the first, likewise.
    """

    arm: str
    costs: Mapping[Cell, float]
    failed: tuple[Cell, ...]
    num_failed_runs: int
    num_runs: int
    resampled: Mapping[Cell, np.ndarray]
    failure_p: float = 1.0
    level: bool = True

    @property
    def worst(self) -> float:
        return max(self.costs.values())

    @property
    def median(self) -> float:
        return float(np.median(list(self.costs.values())))

    def worst_interval(
        self, cells: Iterable[Cell] | None = None
    ) -> tuple[float, float]:
        """The bootstrap interval of `worst`, of all cells or of these.

        Noise only raises a maximum: it may lie above it.
        """
        chosen = self.resampled if cells is None else cells
        return noise.interval(np.max([self.resampled[c] for c in chosen], axis=0))

    @property
    def median_interval(self) -> tuple[float, float]:
        return noise.interval(np.median(list(self.resampled.values()), axis=0))


def regret(table: Scores, compare: noise.Compare = operator.truediv) -> list[Regret]:
    """The regret of every arm, the best first: fewest failed cells, least worst cost.

    Arms that were run in fewer cells come behind: less was asked of them.

    Args:
        table: an arm that misses some cells is compared in the others.
        compare: (median error, the lowest of the cell) -> what the choice costs there.
    """
    table = solvable(table)
    rng = np.random.default_rng(0)
    costs: dict[str, dict[Cell, float]] = {}
    resampled: dict[str, dict[Cell, np.ndarray]] = {}
    for cell, arms in table.items():
        best = min(score.median for score in arms.values())
        medians = {a: noise.resampled(s.errors, rng=rng) for a, s in arms.items()}
        lowest = np.min(list(medians.values()), axis=0)
        for arm, score in arms.items():
            costs.setdefault(arm, {})[cell] = compare(score.median, best)
            resampled.setdefault(arm, {})[cell] = compare(medians[arm], lowest)
    regrets = []
    for arm, of_arm in costs.items():
        of_cells = {cell: table[cell][arm] for cell in of_arm}
        regrets.append(
            Regret(
                arm,
                of_arm,
                tuple(cell for cell, score in of_cells.items() if not score.solved),
                sum(score.num_failed for score in of_cells.values()),
                sum(score.num_runs for score in of_cells.values()),
                resampled[arm],
            )
        )
    regrets.sort(key=lambda r: (-len(r.costs), len(r.failed), r.worst))
    return [_beside(regrets[0], r, table) for r in regrets]


def _beside(first: Regret, other: Regret, table: Scores) -> Regret:
    """`other`, compared with `first` in the cells that have both."""
    both = [cell for cell in other.costs if cell in first.costs]
    if not both:
        return replace(other, level=False)

    p = failure_p((table[cell][first.arm], table[cell][other.arm]) for cell in both)
    meets = noise.meet(first.worst_interval(both), other.worst_interval(both))
    return replace(other, failure_p=p, level=meets and p > 1 - noise.CONFIDENCE)


def regret_table(
    table: Scores,
    cells: str,
    *,
    compare: noise.Compare = operator.truediv,
    cost: str = "the median error over that of the cell's best arm",
    digits: int = 2,
) -> str:
    """Markdown: what choosing one arm in all cells costs, and what of it is noise.

    Args:
        table: of scores, as for `regret`.
        cells: their name.
        compare: as for `regret`.
        cost: what its costs are.
        digits: of them, after the point.
    """
    regrets = regret(table, compare)
    if not regrets:
        return f"None of the {cells} is finished in which any arm never failed.\n"

    def spread(value: float, interval: tuple[float, float], *, bold: bool) -> str:
        return ranged(value, interval, f".{digits}f", bold=bold)

    rows = [
        [
            r.arm,
            str(len(r.costs)),
            str(len(r.failed)),
            f"{r.num_failed_runs} of {r.num_runs}",
            f"{r.failure_p:.2g}",
            spread(r.worst, r.worst_interval(), bold=r.level),
            spread(r.median, r.median_interval, bold=False),
        ]
        for r in regrets
    ]
    head = [
        "arm",
        "cells it was run in",
        "of them failed in though another arm did not",
        "failed runs",
        "Fisher's p against the first row's",
        "cost in the worst cell",
        "in the median cell",
    ]
    whole = solvable(table)
    return (
        f"Regret over the {len(whole)} {cells} in which at least one arm never failed; "
        f"the cost is {cost}. Arms of fewer cells stand below and are compared in "
        "those alone. In brackets: the 95 % bootstrap interval over seeds; that of a "
        "maximum may lie above it. Bold: level with the first row; in the cells of "
        "both the intervals meet and p, of each cell compared in itself, is above 0.05 "
        "(not corrected for the number of arms)."
        f"{_floors(whole, compare, digits)}"
        f"\n\n{markdown_table(head, rows)}"
    )


def _floors(table: Scores, compare: noise.Compare, digits: int) -> str:
    """A sentence on the noise floors of the cells."""
    found = [floor(arms, compare=compare) for arms in table.values()]
    middles, highs = np.array([f[1:] for f in found if f] or [(np.nan,) * 2]).T
    if np.isnan(middles).all():
        return ""
    return (
        " Noise floor: if the arms that are level with a cell's best were equal, the "
        "middle one of them would still seem to cost "
        f"{np.median(middles):.{digits}f} in the median cell and "
        f"{highs.max():.{digits}f} (95 %) in the noisiest."
    )


def versus_table(table: Scores, pairs: Iterable[tuple[str, str]]) -> str:
    """Markdown: one arm against another, in the solvable cells that have both.

    In brackets is the bootstrap interval over seeds; where it holds 1 the errors do not
    tell the arms apart. The last column is the probability, if both arms failed equally
    often in each cell, of numbers of failed runs at least so far apart (`failure_p`).

    Args:
        table: of all cells.
        pairs: of arms; those of which no cell has both are left out.
    """
    rows = []
    for pair in pairs:
        both = [
            (arms[pair[0]], arms[pair[1]])
            for arms in solvable(table).values()
            if arms.keys() >= set(pair)
        ]
        if not both:
            continue
        ratios = np.array([ours.median / theirs.median for ours, theirs in both])
        rng = np.random.default_rng(0)
        resampled = [
            np.divide(*(noise.resampled(score.errors, rng=rng) for score in of_cell))
            for of_cell in both
        ]
        interval = noise.interval(np.median(resampled, axis=0))
        failed = np.sum([[s.num_failed for s in of_cell] for of_cell in both], axis=0)
        runs = np.sum([[s.num_runs for s in of_cell] for of_cell in both], axis=0)
        rows.append(
            [
                *pair,
                f"{np.sum(ratios < 1)} of {len(ratios)}",
                ranged(float(np.median(ratios)), interval, ".2f", bold=False),
                f"{failed[0]} of {runs[0]} against {failed[1]} of {runs[1]}",
                f"{failure_p(both):.2g}",
            ]
        )
    head = [
        "one arm",
        "against",
        "cells in which its error is lower",
        "median ratio of the errors",
        "failed runs",
        "Fisher's p",
    ]
    return markdown_table(head, rows, num_names=2) if rows else ""

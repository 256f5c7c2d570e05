"""The runs of one optimizer in a comparison."""

import dataclasses

import numpy as np

from stablegrad_optax._ranking import Floats, median


@dataclasses.dataclass(frozen=True, repr=False)
class OptimizerRuns:
    """Holds the runs of one optimizer; it is a part of :class:`Comparison`.

    Attributes:
      name: The name of the optimizer.
      learning_rate: The chosen learning rate.
      learning_rates: All learning rates that were tried, ascending.
      added_rate: The one of them that was tried in addition to the given ones, because
        the best of those was the smallest or the largest; otherwise None.
      scores: The score of each fresh seed, f[seeds]; infinite where a run failed.
      curves: The training losses of these runs, f[seeds, steps].
      tuning: The scores that chose the learning rate, f[rates, tuning seeds]; infinite
        where a run failed. It has no rows if there was a single rate.
      ms_per_step: The wall time of a step divided by the number of runs that took it
        side by side, without compilation.
      is_level: Whether the seeds do not distinguish it from the best optimizer.
    """

    name: str
    learning_rate: float
    learning_rates: tuple[float, ...]
    added_rate: float | None
    scores: Floats
    curves: Floats
    tuning: Floats
    ms_per_step: float
    is_level: bool = False

    @property
    def rate_at_edge(self) -> bool:
        """True if the best rate may lie beyond those that were tried."""
        ends = self.learning_rates[0], self.learning_rates[-1]
        return len(self.learning_rates) > 1 and self.learning_rate in ends

    @property
    def num_failed(self) -> int:
        """The number of fresh runs that failed."""
        return int(np.sum(np.isinf(self.scores)))

    @property
    def median(self) -> float:
        """The median score, in which a failed run counts as infinite."""
        return median(self.scores)

    def __repr__(self) -> str:
        return (
            f"OptimizerRuns({self.name!r}, learning_rate={self.learning_rate:.2g}, "
            f"median={self.median:.3g}, failed={self.num_failed}/{len(self.scores)})"
        )

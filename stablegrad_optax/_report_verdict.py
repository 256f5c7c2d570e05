"""GradientReport, and the rules by which it judges."""

import dataclasses
import math

from stablegrad_optax import _report_remedies as table
from stablegrad_optax import _report_text as text
from stablegrad_optax._report_history import UNBALANCED_RATIO, History
from stablegrad_optax._report_measure import LeafReport, weights_with_gradient

# The limits of the verdicts. `python -m benchmarks.calibration` trains networks of
# several kinds to test them.
_LARGE_STD = 1e3
_VANISHING_STD = 1e-12
_MOSTLY = 0.5  # the share of non-zero entries below Adam's eps
_SOME = 0.1  # the share of a leaf's entries below the eps from which it is worth a try
_DRIFT = 1e3
_OF_ONE_SCALE = ("vanishing", "mostly below Adam's eps")
_ALIKE = 100  # a smaller ratio between layers is explained by the loss's scale

_STATISTICS = ("std", "rms", "mean_to_std", "below_adam_eps", "zero", "nonfinite")
_OVERALL = ("max_std", "min_std", "std_ratio", "below_adam_eps", "zero", "nonfinite")
_HISTORY = ("steps", "drift", "std_ratio", "nonfinite_steps")


def judge(
    *,
    max_std: float,
    std_ratio: float,
    below_adam_eps: float,
    zero: float,
    num_dead: int,
    drift: float | None = None,
) -> str:
    """Returns the gravest verdict that fits these statistics of a finite gradient.

    With the first steps, ``drift`` is theirs and ``std_ratio`` that of their end.
    """
    if max_std < _VANISHING_STD:
        return "vanishing"
    if below_adam_eps > _MOSTLY * (1 - zero):
        return "mostly below Adam's eps"
    if drift is not None and drift > _DRIFT:
        return "exploding at initialization"
    if std_ratio > UNBALANCED_RATIO:
        return "unbalanced between layers"
    if drift is None and max_std > _LARGE_STD:
        return "large"
    return "dead weights" if num_dead else "no trouble seen"


@dataclasses.dataclass(frozen=True)
class GradientReport:
    """Holds what :func:`gradient_report` measured; ``print`` it to read it.

    Attributes:
      leaves: The statistics of each leaf or slice, in the order of the tree.
      adam_eps: The eps of Adam that they were compared with.
      muon_eps: The eps of Muon that they were compared with.
      looks_stacked: Names of leaves that seem to stack layers along their first axis.
      history: What the first steps say, if they were given.
    """

    leaves: tuple[LeafReport, ...]
    adam_eps: float
    muon_eps: float
    looks_stacked: tuple[str, ...] = ()
    history: History | None = None

    @property
    def largest(self) -> LeafReport | None:
        """The weight with the largest spread; None if all gradients are zero."""
        return max(self._measured, key=lambda leaf: leaf.spread, default=None)

    @property
    def smallest(self) -> LeafReport | None:
        """The weight with the smallest spread above zero."""
        return min(self._measured, key=lambda leaf: leaf.spread, default=None)

    @property
    def max_std(self) -> float:
        """The largest spread of a weight; 0 if all gradients are zero."""
        return self.largest.spread if self.largest else 0.0

    @property
    def min_std(self) -> float:
        """The smallest spread of a weight above zero, or 0."""
        return self.smallest.spread if self.smallest else 0.0

    @property
    def std_ratio(self) -> float:
        """max_std / min_std; NaN if all gradients are zero."""
        return self.max_std / self.min_std if self.min_std else math.nan

    @property
    def below_adam_eps(self) -> float:
        """The share of all entries with 0 < abs(g) < adam_eps, rounding left out."""
        return self._share("below_adam_eps")

    @property
    def below_muon_eps(self) -> int:
        """How many matrices have a norm below the eps of Muon."""
        return sum(leaf.below_muon_eps for leaf in self._counted)

    @property
    def zero(self) -> float:
        """The share of all entries that are zero, rounding left out."""
        return self._share("zero")

    @property
    def nonfinite(self) -> float:
        """The share of all entries that are infinite or NaN."""
        return self._share("nonfinite")

    @property
    def _counted(self) -> list[LeafReport]:
        return [leaf for leaf in self.leaves if not leaf.is_rounding]

    @property
    def _measured(self) -> list[LeafReport]:
        return weights_with_gradient(self.leaves)

    def _share(self, statistic: str) -> float:
        sizes = [math.prod(leaf.shape) for leaf in self._counted]
        counts = [
            getattr(leaf, statistic) * size
            for leaf, size in zip(self._counted, sizes, strict=True)
        ]
        return sum(counts) / max(sum(sizes), 1)

    @property
    def verdict(self) -> str:
        """One of the verdicts of :func:`gradient_report`, the gravest that fits."""
        history = self.history
        if self.nonfinite > 0 or (history and history.nonfinite_steps):
            return "non-finite"
        alone = self._judge(self.std_ratio)
        if history is None:
            return alone
        later = self._judge(history.std_ratio, drift=history.drift)
        if history.is_complete:
            return later
        return min(alone, later, key=table.VERDICTS.index)

    def _judge(self, std_ratio: float, drift: float | None = None) -> str:
        return judge(
            max_std=self.max_std,
            std_ratio=std_ratio,
            below_adam_eps=self.below_adam_eps,
            zero=self.zero,
            num_dead=sum(leaf.is_dead for leaf in self.leaves),
            drift=drift,
        )

    @property
    def trouble_step(self) -> int | None:
        """The step of ``history`` at which the trouble of the verdict began."""
        return self._trouble[0]

    @property
    def trouble_array(self) -> str:
        """The array in which it began; empty if no ``history`` tells."""
        return self._trouble[1]

    @property
    def _trouble(self) -> tuple[int | None, str]:
        history = self.history
        if history is None:
            return None, ""
        return {
            "non-finite": (history.nonfinite_step, history.nonfinite),
            "exploding at initialization": (history.drift_step, history.drifted),
            "unbalanced between layers": (
                history.unbalanced_step,
                history.unbalanced,
            ),
        }.get(self.verdict, (None, ""))

    @property
    def remedy(self) -> str:
        """Lists what to try, in the order of cost."""
        is_below = self.below_muon_eps > 0 or any(
            leaf.below_adam_eps > _SOME for leaf in self._counted
        )
        eps = max(self.adam_eps, self.muon_eps)
        in_reach = self.max_std > table.EPS_REACH
        eps_helps = is_below and in_reach and eps > table.SMALL_EPS
        advice = table.advice(self.verdict, eps_helps=eps_helps)
        smallest = self.smallest
        if not is_below or smallest is None or smallest.spread > table.EPS_REACH:
            return advice
        return (
            f"{advice} An eps of 1e-16 reaches gradients down to about 1e-17; "
            f"{smallest.name} has {smallest.spread:.0e}, and only a factor per layer "
            "moves it."
        )

    def to_dict(self) -> dict[str, float | str]:
        """Returns a flat dict of numbers and strings, for JSON and loggers.

        Returns:
          ``"path/to/kernel/std"`` and so on for each leaf and statistic; over all of
          them ``"verdict"``, ``"max_std"``, ``"min_std"``, ``"std_ratio"``,
          ``"below_adam_eps"``, ``"below_muon_eps"``, ``"zero"`` and ``"nonfinite"``;
          with a history ``"history/drift"`` and so on, and ``"trouble_step"`` and
          ``"trouble_array"`` if it shows trouble. Numbers that are not finite are left
          out, because JSON has none.
        """
        numbers = {
            f"{leaf.name}/{statistic}": float(getattr(leaf, statistic))
            for leaf in self.leaves
            for statistic in _STATISTICS
        }
        numbers |= {name: float(getattr(self, name)) for name in _OVERALL}
        numbers["below_muon_eps"] = float(self.below_muon_eps)
        if self.history is not None:
            numbers |= {
                f"history/{name}": float(getattr(self.history, name))
                for name in _HISTORY
            }
        names = {"verdict": self.verdict}
        if self.trouble_step is not None:
            numbers["trouble_step"] = float(self.trouble_step)
            names["trouble_array"] = self.trouble_array
        return names | {name: x for name, x in numbers.items() if math.isfinite(x)}

    def __str__(self) -> str:
        evidence = text.evidence(
            self.smallest,
            self.largest,
            below_adam_eps=self.below_adam_eps,
            zero=self.zero,
            nonfinite=self.nonfinite,
        )
        if self.verdict in _OF_ONE_SCALE and self.std_ratio < _ALIKE:
            evidence += (
                " All layers are alike: the scale of the loss alone would explain it."
            )
        parts = {"Evidence": evidence}
        if self.history is not None:
            parts[f"First {self.history.steps} steps"] = text.first_steps(self.history)
        parts |= text.notes(self.leaves, self.looks_stacked, self.muon_eps)
        parts["Remedy"] = self.remedy
        title = f"Gradients: {self.verdict} ({len(self.leaves)} leaves)."
        return "\n".join([title, *text.paragraphs(parts), "", *text.table(self.leaves)])

"""See whether a network's gradients need treatment before treating them."""

import dataclasses
import math
import textwrap
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from stablegrad_optax._checks import require_number
from stablegrad_optax._leaves import Leaf, describe, is_weight_by_default

PyTree = Any

# The lines that the verdicts draw. All are orders of magnitude, between what was
# measured on small deep PINNs that train and on such that do not.
#
# Largest std of a weight's gradient: 3 to 30 at healthy starts (a loss term weighted
# by 100 included), 100 at a slightly expanding one of depth 4 that trains; 1e5 to 1e9
# where AdamW fails from depth 16 on.
_EXPLODING_STD = 1e3
# The same: 1e-8 to 1e-16 where nothing or next to nothing trains; at 1e-8 Adam with
# another eps still sees something, at 1e-16 no optimizer solved the problem.
_VANISHING_STD = 1e-12
# Largest over smallest std: 7 to 12 for Glorot and LeCun even at depth 50, up to 70 at
# exploding starts; 2.6e4 for Equinox's and PyTorch's default at depth 20.
_UNBALANCED_RATIO = 1e3
# Share of the non-zero entries below Adam's eps: 0 to 0.04 where AdamW trains (Equinox,
# depth 20), 0.39 where it begins to fail (depth 32), 0.65 and more where gradients
# vanish.
_MOSTLY = 0.5

_REMEDIES = {
    "healthy": (
        "None is called for: plain AdamW trains from such a start. Adam with b2=0.9, "
        "or clipping, may still lower its error."
    ),
    "exploding": (
        "Cheap, try first: optax.clip_by_global_norm(1.0), or Adam with b2=0.9. Where "
        "these fail (some seeds at depth 50): stablegrad() before Adam with b2=0.9."
    ),
    "vanishing": (
        "Initialize at a larger scale: activation_aware_normal, or Glorot. Clipping "
        "cannot help, it only shrinks; stablegrad() before the optimizer got such a "
        "start unstuck but did not solve the problem."
    ),
    "unbalanced between layers": (
        "Cheap, try first: a Glorot initializer or activation_aware_normal, Adam with "
        "b2=0.9 (plain AdamW at a rate of 1e-3 trained as well up to depth 20). Where "
        "these fail: stablegrad() before the optimizer, with b2=0.9. Clipping did not "
        "help."
    ),
    "mostly below Adam's eps": (
        "Cheap, try first: Adam with eps=1e-16 or b2=0.9. Where these fail: "
        "stablegrad() before the optimizer. Clipping did not help."
    ),
    "non-finite": (
        "Find its cause in the loss or the model, or lower the learning rate; no "
        "transformation repairs such a gradient. optax.apply_if_finite skips the step."
    ),
}

_TABLE_ROWS = 20  # a longer table shows its two ends alone


@dataclasses.dataclass(frozen=True, slots=True)
class LeafReport:
    """The statistics of one leaf of a gradient, over its finite entries.

    Attributes:
      name: The path of the leaf, "path/to/kernel".
      shape: Its shape.
      is_weight: Whether its std counts in the ratio over layers: ndim >= 2, size > 1.
      std: The standard deviation about the mean; of complex entries, of their modulus
        about the complex mean.
      rms: The root mean square.
      mean_to_std: abs(mean) / std; infinite for a constant leaf, 0 for a zero leaf.
      below_adam_eps: The share of entries with 0 < abs(g) < adam_eps.
      zero: The share of entries that are exactly zero.
      nonfinite: The share of entries that are infinite or NaN.
    """

    name: str
    shape: tuple[int, ...]
    is_weight: bool
    std: float
    rms: float
    mean_to_std: float
    below_adam_eps: float
    zero: float
    nonfinite: float

    @property
    def spread(self) -> float:
        """The std, floored at rms / 10: what ``stablegrad`` divides by."""
        return max(self.std, self.rms / 10)


@dataclasses.dataclass(frozen=True)
class GradientReport:
    """What :func:`gradient_report` returns; ``print`` it to read it.

    Attributes:
      leaves: The statistics of each leaf, in the order of the tree.
      adam_eps: The eps that they were compared with.
    """

    leaves: tuple[LeafReport, ...]
    adam_eps: float

    @property
    def _spreads(self) -> list[float]:
        """Of the weights; a zero gradient (a dead branch) is no imbalance."""
        weights = [leaf for leaf in self.leaves if leaf.is_weight]
        return [leaf.spread for leaf in weights or self.leaves if leaf.spread > 0]

    @property
    def max_std(self) -> float:
        """The largest spread of a weight; 0 if all gradients are zero."""
        return max(self._spreads, default=0.0)

    @property
    def min_std(self) -> float:
        """The smallest spread of a weight, those of zero gradients left out."""
        return min(self._spreads, default=0.0)

    @property
    def std_ratio(self) -> float:
        """max_std / min_std; NaN if all gradients are zero."""
        return self.max_std / self.min_std if self.min_std else math.nan

    @property
    def below_adam_eps(self) -> float:
        """The share of all entries with 0 < abs(g) < adam_eps."""
        return self._share("below_adam_eps")

    @property
    def zero(self) -> float:
        """The share of all entries that are zero."""
        return self._share("zero")

    @property
    def nonfinite(self) -> float:
        """The share of all entries that are infinite or NaN."""
        return self._share("nonfinite")

    def _share(self, statistic: str) -> float:
        sizes = [math.prod(leaf.shape) for leaf in self.leaves]
        counts = [
            getattr(leaf, statistic) * size
            for leaf, size in zip(self.leaves, sizes, strict=True)
        ]
        return sum(counts) / max(sum(sizes), 1)

    @property
    def verdict(self) -> str:
        """One of the six verdicts of :func:`gradient_report`, the gravest that fits."""
        if self.nonfinite > 0:
            return "non-finite"
        if self.max_std > _EXPLODING_STD:
            return "exploding"
        if self.max_std < _VANISHING_STD:
            return "vanishing"
        if self.below_adam_eps > _MOSTLY * (1 - self.zero):
            return "mostly below Adam's eps"
        if self.std_ratio > _UNBALANCED_RATIO:
            return "unbalanced between layers"
        return "healthy"

    @property
    def remedy(self) -> str:
        """What helped such networks in our measurements, the cheap things first."""
        return _REMEDIES[self.verdict]

    def to_dict(self) -> dict[str, float]:
        """The report as a flat dict of Python floats, ready for any logger.

        Returns:
          ``"path/to/kernel/std"`` and so on for each leaf and statistic, and
          ``"max_std"``, ``"min_std"``, ``"std_ratio"``, ``"below_adam_eps"``,
          ``"zero"``, ``"nonfinite"`` over all of them.
        """
        return {
            **{
                f"{leaf.name}/{statistic}": getattr(leaf, statistic)
                for leaf in self.leaves
                for statistic in _STATISTICS
            },
            **{statistic: getattr(self, statistic) for statistic in _OVERALL},
        }

    def __str__(self) -> str:
        evidence = (
            f"std of weight gradients {self.min_std:.1e} to {self.max_std:.1e}, "
            f"max/min {self.std_ratio:.1e}; {_percent(self.below_adam_eps)} of entries "
            f"below Adam's eps, {_percent(self.zero)} zero, "
            f"{_percent(self.nonfinite)} non-finite"
        )
        head = [f"Gradients: {self.verdict} ({len(self.leaves)} leaves)."]
        for title, text in ("Evidence", f"{evidence}."), ("Remedy", self.remedy):
            head += textwrap.wrap(f"{title}: {text}", 80, subsequent_indent="  ")
        return "\n".join([*head, "", *_table(self.leaves)])


_STATISTICS = ("std", "rms", "mean_to_std", "below_adam_eps", "zero", "nonfinite")
_OVERALL = ("max_std", "min_std", "std_ratio", "below_adam_eps", "zero", "nonfinite")


def gradient_report(grads: PyTree, *, adam_eps: float = 1e-8) -> GradientReport:
    """Measures a gradient leaf by leaf and says whether it needs treatment.

    ``print(gradient_report(grads))`` opens with one of six verdicts, the gravest that
    fits, followed by what helped such networks in this project's measurements:

    ==========================  ====================================================
    verdict                     when
    ==========================  ====================================================
    non-finite                  any entry is infinite or NaN
    exploding                   the largest std of a weight is above 1e3
    vanishing                   the largest std of a weight is below 1e-12
    mostly below Adam's eps     more than half of the non-zero entries are
    unbalanced between layers   max/min of the weights' stds is above 1e3
    healthy                     none of these
    ==========================  ====================================================

    The lines are orders of magnitude between what was measured on small deep networks
    that train and on such that do not (at healthy starts stds from 3 to 30 and a
    ratio of 7 to 12, at depth 50 too). They presume a loss of order one: a constant
    factor of 1e6 on the loss changes all but the ratio, and Adam does not mind it. A
    weight is a leaf with ndim >= 2 and size > 1, and its std is floored at a tenth of
    its rms, as :func:`~stablegrad_optax.stablegrad` floors it; weights whose gradient
    is exactly zero are left out. It is this project's tool and not part of a published
    method.

    Look at the gradient of one step at the start, and again when training stalls. It
    runs outside ``jit``, on the host, in float64, and takes some seconds for 100
    million entries.

    Args:
      grads: A pytree of gradients: of linen, nnx or Equinox models or any other;
        sharded arrays too. Leaves that are not floating, and ``None``, do not count:
        put ``None`` for biases with two axes, such as those of Flax's attention, of
        which the keys' has a gradient of rounding alone and makes any such model look
        unbalanced. A leaf that stacks layers counts as one.
      adam_eps: The eps of the Adam that the gradients are meant for: entries far below
        it do not move their parameters. 1e-8 is Optax's default.

    Returns:
      A :class:`GradientReport`: ``str`` of it is a table (the two ends, by rms, of a
      tree of more than 20 leaves), ``verdict``, ``remedy``, ``leaves`` and the
      statistics over all leaves are attributes, ``to_dict()`` is made for loggers.

    Raises:
      ValueError: If ``grads`` has no floating leaf; inside ``jit``; for arrays that
        other processes hold in part (gather them with
        ``jax.experimental.multihost_utils.process_allgather`` first); if ``adam_eps``
        is negative or not finite.

    Examples:
      >>> import jax.numpy as jnp
      >>> from stablegrad_optax import gradient_report
      >>> kernel = jnp.array([[1.0, -1.0], [1.0, -1.0]])
      >>> grads = {"first": {"kernel": 1e-5 * kernel}, "last": {"kernel": kernel}}
      >>> report = gradient_report(grads)
      >>> print(report)
      Gradients: unbalanced between layers (2 leaves).
      Evidence: std of weight gradients 1.0e-05 to 1.0e+00, max/min 1.0e+05; 0% of
        entries below Adam's eps, 0% zero, 0% non-finite.
      Remedy: Cheap, try first: a Glorot initializer or activation_aware_normal, Adam
        with b2=0.9 (plain AdamW at a rate of 1e-3 trained as well up to depth 20).
        Where these fail: stablegrad() before the optimizer, with b2=0.9. Clipping did
        not help.
      <BLANKLINE>
      leaf          shape      std      rms  |mean|/std  <eps  zero  non-finite
      first/kernel   2, 2  1.0e-05  1.0e-05           0    0%    0%          0%
      last/kernel    2, 2  1.0e+00  1.0e+00           0    0%    0%          0%
      >>> report.to_dict()["last/kernel/std"]
      1.0
    """
    require_number("adam_eps", adam_eps, at_least=0)
    floating = jax.tree.map(lambda leaf: leaf if _is_floating(leaf) else None, grads)
    leaves = describe(floating)
    if not leaves:
        raise ValueError(
            "grads must have a floating leaf; got "
            f"{len(jax.tree.leaves(grads))} others."
        )
    arrays = _fetch(jax.tree.leaves(floating))
    return GradientReport(
        tuple(
            _measure(leaf, array, float(adam_eps))
            for leaf, array in zip(leaves, arrays, strict=True)
        ),
        float(adam_eps),
    )


def _is_floating(leaf: Any) -> bool:
    return bool(jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.inexact))


def _fetch(leaves: list[Any]) -> list[NDArray[Any]]:
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        raise ValueError("grads must have values: call gradient_report outside jit.")
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
    if not all(array.is_fully_addressable for array in arrays):
        raise ValueError(
            "grads must be held by this process in full; gather them first with "
            "jax.experimental.multihost_utils.process_allgather(grads, tiled=True)."
        )
    return [np.asarray(leaf) for leaf in jax.device_get(leaves)]


def _measure(leaf: Leaf, array: NDArray[Any], adam_eps: float) -> LeafReport:
    wide = np.complex128 if np.iscomplexobj(array) else np.float64
    values = array.reshape(-1).astype(wide)
    finite = np.isfinite(values)
    if not finite.all():
        values = values[finite]
    magnitude = np.abs(values)
    zero = values.size - int(np.count_nonzero(magnitude))
    below = max(int(np.count_nonzero(magnitude < adam_eps)) - zero, 0)
    # Squares of what is at most 1 neither over- nor underflow, in float64 leaves too.
    unit, count = float(magnitude.max(initial=0)) or 1.0, values.size or 1
    values /= unit
    mean = values.sum() / count
    values -= mean
    std, offset = math.sqrt(np.vdot(values, values).real / count), float(abs(mean))
    size = array.size or 1
    return LeafReport(
        name=leaf.name or "grads",
        shape=leaf.shape,
        is_weight=is_weight_by_default(leaf),
        std=unit * std,
        rms=unit * math.hypot(std, offset),
        mean_to_std=offset / std if std else math.inf if offset else 0.0,
        below_adam_eps=below / size,
        zero=zero / size,
        nonfinite=(array.size - values.size) / size,
    )


def _table(leaves: tuple[LeafReport, ...]) -> list[str]:
    header = ("leaf", "shape", "std", "rms", "|mean|/std", "<eps", "zero", "non-finite")
    shown, left_out = list(leaves), 0
    if len(leaves) > _TABLE_ROWS:
        shown.sort(key=lambda leaf: (leaf.nonfinite, leaf.rms), reverse=True)
        half = _TABLE_ROWS // 2
        shown, left_out = shown[:half] + shown[-half:], len(leaves) - 2 * half
    rows = [header, *map(_row, shown)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
        )
        for row in rows
    ]
    if left_out:
        lines.insert(
            1 + _TABLE_ROWS // 2, f"... {left_out:,} leaves between, by std ..."
        )
    return lines


def _row(leaf: LeafReport) -> tuple[str, ...]:
    return (
        leaf.name,
        ", ".join(map(str, leaf.shape)),
        f"{leaf.std:.1e}",
        f"{leaf.rms:.1e}",
        f"{leaf.mean_to_std:.2g}",
        *map(_percent, (leaf.below_adam_eps, leaf.zero, leaf.nonfinite)),
    )


def _percent(share: float) -> str:
    """Whole percents; what is not nothing never reads 0%, nor what is not all 100%."""
    if 0 < share < 0.01:
        return "<1%"
    return ">99%" if 0.99 < share < 1 else f"{share:.0%}"

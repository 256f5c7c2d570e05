"""See whether a network's gradients need treatment before treating them."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.typing import ArrayLike

from stablegrad_optax import _report_text
from stablegrad_optax._checks import require_number
from stablegrad_optax._leaves import (
    NumStackedAxes,
    Selection,
    describe,
    select_weights,
)
from stablegrad_optax._report_measure import (
    History,
    LeafReport,
    fetch,
    is_floating,
    looks_stacked,
    mark_rounding,
    measure,
    read_history,
)

PyTree = Any

# The lines that the verdicts draw, set on deep PINNs and kept after `python -m
# benchmarks.calibration` trained 37 networks of six kinds: false alarms in 5 of 31 and
# misses in 3 of 6, with the first steps as history 0 of 31 and 2 of 6.
_UNBALANCED_RATIO = 1e3
_LARGE_STD = 1e3
_VANISHING_STD = 1e-12
_MOSTLY = 0.5  # of the non-zero entries, below Adam's eps
_DRIFT = 1e3


@dataclasses.dataclass(frozen=True)
class GradientReport:
    """What :func:`gradient_report` returns; ``print`` it to read it.

    Attributes:
      leaves: The statistics of each leaf or slice, in the order of the tree.
      adam_eps: The eps that they were compared with.
      looks_stacked: Names of leaves that seem to stack layers along their first axis.
      history: Of the first steps, if it was given.
    """

    leaves: tuple[LeafReport, ...]
    adam_eps: float
    looks_stacked: tuple[str, ...] = ()
    history: History | None = None

    @property
    def largest(self) -> LeafReport | None:
        """The weight with the largest spread; None if all gradients are zero."""
        return max(self._measured, key=lambda leaf: leaf.spread, default=None)

    @property
    def smallest(self) -> LeafReport | None:
        """That with the smallest, those of zero gradients left out."""
        return min(self._measured, key=lambda leaf: leaf.spread, default=None)

    @property
    def max_std(self) -> float:
        """The largest spread of a weight; 0 if all gradients are zero."""
        return self.largest.spread if self.largest else 0.0

    @property
    def min_std(self) -> float:
        """The smallest spread of a weight, those of zero gradients left out."""
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
        """The weights; a zero gradient (a dead branch) is no imbalance."""
        counted = self._counted
        weights = [leaf for leaf in counted if leaf.is_weight]
        return [leaf for leaf in weights or counted if leaf.spread > 0]

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
        if self.nonfinite > 0:
            return "non-finite"
        history = self.history
        return judge(
            max_std=self.max_std,
            std_ratio=self.std_ratio if history is None else history.std_ratio,
            below_adam_eps=self.below_adam_eps,
            zero=self.zero,
            num_dead=sum(leaf.is_dead for leaf in self.leaves),
            drift=None if history is None else history.drift,
        )

    @property
    def remedy(self) -> str:
        """What helped such networks in our measurements, the cheap things first."""
        return _report_text.REMEDIES[self.verdict]

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
        return _report_text.render(self)


def judge(
    *,
    max_std: float,
    std_ratio: float,
    below_adam_eps: float,
    zero: float,
    num_dead: int,
    drift: float | None = None,
) -> str:
    """The verdict that these statistics of a finite gradient have, the gravest first.

    With the first steps, ``drift`` is theirs and ``std_ratio`` that of their end.
    """
    if max_std < _VANISHING_STD:
        return "vanishing"
    if below_adam_eps > _MOSTLY * (1 - zero):
        return "mostly below Adam's eps"
    if drift is not None and drift > _DRIFT:
        return "exploding start"
    if std_ratio > _UNBALANCED_RATIO:
        return "unbalanced between layers"
    if drift is None and max_std > _LARGE_STD:
        return "large"
    return "dead weights" if num_dead else "no trouble seen"


_STATISTICS = ("std", "rms", "mean_to_std", "below_adam_eps", "zero", "nonfinite")
_OVERALL = ("max_std", "min_std", "std_ratio", "below_adam_eps", "zero", "nonfinite")


def gradient_report(
    grads: PyTree,
    *,
    mask: Selection | None = None,
    num_stacked_axes: NumStackedAxes | None = None,
    adam_eps: float = 1e-8,
    history: Mapping[str, ArrayLike] | None = None,
) -> GradientReport:
    """Measures a gradient leaf by leaf and says whether it needs treatment.

    ``print(gradient_report(grads))`` opens with a verdict, the gravest that fits,
    followed by its evidence and by what helped such networks in this project's
    measurements:

    =========================  =====================================================
    verdict                    when
    =========================  =====================================================
    non-finite                 any entry is infinite or NaN
    vanishing                  the largest std of a weight is below 1e-12
    mostly below Adam's eps    more than half of the non-zero entries are
    exploding start            with ``history``: a weight's std fell by more than 1e3
    unbalanced between layers  max/min of the weights' stds is above 1e3; with
                               ``history``, at its end
    large                      the largest std is above 1e3, and no ``history`` says
                               whether it stays there
    dead weights               a weight has no gradient at all
    no trouble seen            none of these
    =========================  =====================================================

    **One gradient does not know the scale of its loss.** Adam does not mind a constant
    factor, and the ratio between layers has none in it; a loss times 1e5 is "large",
    and so is an exploding start, after which Adam's second moment is filled for
    1 / (1 - b2) steps. What tells them apart is how the gradient goes on: run a hundred
    steps with :func:`~stablegrad_optax.stablegrad` in the optimizer and hand over its
    factors as ``history``, see the example.

    **No verdict is a promise.** ``python -m benchmarks.calibration`` trained 37 small
    networks, MLPs, CNNs, transformers, recurrent nets, ensembles and PINNs, and asked
    whether a clip or ``stablegrad``, both with b2 = 0.9, helps AdamW. The verdict of
    the first gradient saw trouble in 5 of 31 where neither did (false alarms) and none
    in 3 of 6 where one did (misses); with ``history``, in 0 of 31 and in 2 of 6. The
    lines above are orders of magnitude. What does help on a network of yours
    :func:`~stablegrad_optax.compare_optimizers` finds out.

    Leaves with nothing but rounding in them, such as the bias of an attention's keys,
    which the softmax cancels, are named and count nowhere: those below 16 epsilons of
    their dtype beside the kernel that they stand with. Also named are leaves of which
    most rows are zero (embeddings) and leaves that look as if they stacked layers. A
    weight's std is floored at a tenth of its rms, as ``stablegrad`` floors it. It is
    this project's tool and not part of a published method.

    It runs outside ``jit``, on the host, in float64, and takes some seconds for 100
    million entries.

    Args:
      grads: A pytree of gradients: of linen, nnx or Equinox models or any other;
        sharded arrays too. Leaves that are not floating, and ``None``, do not count.
      mask: Which leaves are weights, whose stds make the ratio: a pytree of bools that
        is the gradient's tree or a prefix of it, or a function that makes one from the
        tree. Default: floating leaves with at least two axes and two elements whose own
        name is not ``bias``.
      num_stacked_axes: How many leading axes of each leaf index separate layers, as for
        :func:`~stablegrad_optax.stablegrad`. The report then has a row for each slice.
        Default: none.
      adam_eps: The eps of the Adam that the gradients are meant for: entries far below
        it do not move their parameters. 1e-8 is Optax's default.
      history: :func:`~stablegrad_optax.scale_factors` of the stacked states of a
        ``jax.lax.scan`` over the first steps, f[steps] or f[steps, slices] a leaf, with
        ``stablegrad`` of a constant reference in the optimizer: their reciprocals are
        the spreads, up to one factor.

    Returns:
      A :class:`GradientReport`: ``str`` of it is a table (the two ends, by std, of more
      than 20 rows), ``verdict``, ``remedy``, ``leaves`` and the statistics over all
      leaves are attributes, ``to_dict()`` is made for loggers.

    Raises:
      ValueError: If ``grads`` has no floating leaf or no values (inside ``jit``,
        ``jax.ShapeDtypeStruct``); for arrays that other processes hold in part (gather
        them with ``jax.experimental.multihost_utils.process_allgather`` first); if
        ``adam_eps`` is negative or not finite; for a ``mask``, ``num_stacked_axes`` or
        ``history`` that do not fit the tree.

    Examples:
      >>> import jax.numpy as jnp
      >>> from stablegrad_optax import gradient_report
      >>> kernel = jnp.array([[1.0, -1.0], [1.0, -1.0]])
      >>> grads = {"first": {"kernel": 1e-5 * kernel}, "last": {"kernel": kernel}}
      >>> report = gradient_report(grads)
      >>> print(report)
      Gradients: unbalanced between layers (2 leaves).
      Evidence: std of weight gradients 1.0e-05 (first/kernel) to 1.0e+00
        (last/kernel), max/min 1.0e+05; 0% of entries below Adam's eps, 0% zero, 0%
        non-finite.
      Remedy: Cheap, try first: a Glorot initializer or activation_aware_normal, Adam
        with b2=0.9. Where these fail: stablegrad() before the optimizer, with b2=0.9.
        Clipping shrinks all layers alike. compare_optimizers tries all.
      <BLANKLINE>
      leaf          shape      std  |mean|/std  <eps  zero
      first/kernel   2, 2  1.0e-05           0    0%    0%
      last/kernel    2, 2  1.0e+00           0    0%    0%
      >>> report.to_dict()["last/kernel/std"]
      1.0

      The first hundred steps of a training, with ``tx = optax.chain(stablegrad(),
      optax.adamw(1e-3))``::

          def step(carry, batch):
              params, state = carry
              updates, state = tx.update(grad_fn(params, batch), state, params)
              return (optax.apply_updates(params, updates), state), state


          _, states = jax.lax.scan(step, (params, tx.init(params)), batches)
          print(gradient_report(grads, history=scale_factors(states, params)))
    """
    require_number("adam_eps", adam_eps, at_least=0)
    floating = jax.tree.map(lambda leaf: leaf if is_floating(leaf) else None, grads)
    leaves = describe(floating, num_stacked_axes)
    if not leaves:
        raise ValueError(
            "grads must have a floating leaf; got "
            f"{len(jax.tree.leaves(grads))} others."
        )
    weights = {leaf.position for leaf in select_weights(mask, floating, leaves)}
    arrays = fetch(jax.tree.leaves(floating))
    rows = [
        measure(leaf, array, float(adam_eps), i in weights)
        for i, (leaf, array) in enumerate(zip(leaves, arrays, strict=True))
    ]
    rows = mark_rounding(leaves, rows, arrays)
    report = GradientReport(
        tuple(row for of_leaf in rows for row in of_leaf),
        float(adam_eps),
        looks_stacked(leaves, arrays),
    )
    if history is None:
        return report
    return dataclasses.replace(report, history=read_history(history, leaves, rows))

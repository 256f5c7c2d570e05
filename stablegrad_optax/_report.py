"""gradient_report: tells whether the scale of a network's gradients is a problem."""

from collections.abc import Mapping
from typing import Any

import jax
from jax.typing import ArrayLike

from stablegrad_optax._checks import renamed, require_number
from stablegrad_optax._leaves import (
    NumStackedAxes,
    Selection,
    describe,
    select_weights,
)
from stablegrad_optax._report_history import read_history
from stablegrad_optax._report_measure import (
    fetch,
    is_floating,
    looks_stacked,
    mark_rounding,
    measure,
)
from stablegrad_optax._report_verdict import GradientReport

PyTree = Any


@renamed(stacked_axes="num_stacked_axes", mask="weights")
def gradient_report(
    grads: PyTree,
    *,
    weights: Selection | None = None,
    num_stacked_axes: NumStackedAxes | None = None,
    adam_eps: float = 1e-8,
    muon_eps: float = 1e-8,
    history: Mapping[str, ArrayLike] | None = None,
) -> GradientReport:
    """Measures each array of a gradient and tells whether its scale is a problem.

    ``print(gradient_report(grads))`` shows the gravest verdict that fits, its evidence,
    what to try in the order of cost, and a table of all arrays:

    ===========================  ===================================================
    verdict                      when
    ===========================  ===================================================
    non-finite                   any entry, or any step of ``history``, is not finite
    vanishing                    the largest std of a weight is below 1e-12
    mostly below Adam's eps      more than half of the non-zero entries are
    exploding at initialization  with ``history``: a weight's std fell by more than
                                 1e3
    unbalanced between layers    max/min of the weights' stds is above 1e3; with
                                 ``history``, at its end
    large                        the largest std is above 1e3, and no ``history`` says
                                 whether it stays there
    dead weights                 a weight has no gradient at all
    no trouble seen              none of these
    ===========================  ===================================================

    One gradient does not show whether it is large because of the unit of the loss or
    because it explodes at initialization. Pass the first steps as ``history`` to
    distinguish the two. No verdict is a promise, and :func:`compare_optimizers` tries
    the remedies on your network. The report runs outside ``jit``, on the host.

    Args:
      grads: Gradients of any pytree; sharded arrays too. Leaves that are not floating,
        and ``None``, do not count.
      weights: Which leaves are weights, whose stds make the ratio: a pytree of bools, a
        prefix of one, or a function of the tree that returns one. Default: floating
        leaves with two axes and two elements or more whose name is not ``bias``.
      num_stacked_axes: How many leading axes of each leaf index separate layers, as for
        :func:`stablegrad`. The report then has a row per layer. Default: none.
      adam_eps: The eps of your Adam. Entries far below it do not move their parameters.
      muon_eps: The eps of your Muon. Matrices whose norm is below move less.
      history: :func:`scale_factors` of the first steps, f[steps] or f[steps, slices]
        per leaf, of ``stablegrad`` with a constant reference in the optimizer. Weights
        that it does not speak of are judged by ``grads``.

    Returns:
      A :class:`GradientReport`. ``verdict``, ``remedy``, ``trouble_step`` and
      ``trouble_array`` are attributes; ``to_dict()`` is for loggers and JSON.

    Raises:
      ValueError: If ``grads`` has no floating leaf or no values (as inside ``jit``), or
        if other processes hold a part of it; if an eps is negative or not finite; for a
        ``weights``, ``num_stacked_axes`` or ``history`` that does not fit the tree.

    Examples:
      >>> import jax.numpy as jnp
      >>> from stablegrad_optax import gradient_report
      >>> kernel = jnp.array([[1.0, -1.0], [1.0, -1.0]])
      >>> grads = {"first": {"kernel": 1e-5 * kernel}, "last": {"kernel": kernel}}
      >>> report = gradient_report(grads)
      >>> report.verdict, report.to_dict()["last/kernel/std"]
      ('unbalanced between layers', 1.0)

      A history from a Python loop over the first hundred steps, with ``stablegrad()``
      in the optimizer::

          steps = []
          for batch in first_batches:
              params, opt_state = train_step(params, opt_state, batch)
              steps.append(scale_factors(opt_state, params))
          history = {name: [step[name] for step in steps] for name in steps[0]}
          print(gradient_report(grads, history=history))
    """
    require_number("adam_eps", adam_eps, at_least=0)
    require_number("muon_eps", muon_eps, at_least=0)
    floating = jax.tree.map(lambda leaf: leaf if is_floating(leaf) else None, grads)
    leaves = describe(floating, num_stacked_axes)
    if not leaves:
        raise ValueError(
            "grads must have a floating leaf; got "
            f"{len(jax.tree.leaves(grads))} others."
        )
    selected = {leaf.position for leaf in select_weights(weights, floating, leaves)}
    arrays = fetch(jax.tree.leaves(floating))
    measured = [
        measure(leaf, array, i in selected, adam_eps=adam_eps, muon_eps=muon_eps)
        for i, (leaf, array) in enumerate(zip(leaves, arrays, strict=True))
    ]
    marked = mark_rounding(leaves, measured, arrays)
    rows = tuple(row for leaf_rows in marked for row in leaf_rows)
    return GradientReport(
        leaves=rows,
        adam_eps=float(adam_eps),
        muon_eps=float(muon_eps),
        looks_stacked=looks_stacked(leaves, arrays),
        history=None if history is None else read_history(history, leaves, rows),
    )

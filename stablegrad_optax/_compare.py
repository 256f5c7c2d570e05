"""Which optimizer trains a network best: a trial of several in one call."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from stablegrad_optax._checks import require_count, require_number
from stablegrad_optax._comparison import (
    Comparison,
    Floats,
    OptimizerRuns,
    choose_rate,
    compare,
)
from stablegrad_optax._stabilizer import gradient_stabilizer
from stablegrad_optax._stablegrad import stablegrad
from stablegrad_optax._trials import Factory, Problem, Scores, Trainer

PyTree = Any


def default_optimizers(
    muon_weight_dimension_numbers: Any = None,
) -> dict[str, Factory]:
    """The remedies that :func:`compare_optimizers` tries, the cheap ones first.

    AdamW alone, with ``b2=0.9``, behind ``optax.clip_by_global_norm(1.0)``, with both,
    and behind :func:`stablegrad` with ``b2=0.9``; ``optax.contrib.muon`` alone, behind
    the clip, behind each leaf's unit norm, ``gradient_stabilizer(0, 0, eps=0)``, and
    behind :func:`stablegrad`. All else is Optax's default. Add your own:
    ``{**default_optimizers(), "Lion": optax.lion}``.

    Args:
      muon_weight_dimension_numbers: What ``optax.contrib.muon`` takes under this name.
        Its default, and ours, orthogonalizes **leaves of two axes alone and gives all
        others to Adam**: a CNN's kernels, Flax's attention kernels (features, heads,
        head size) and stacked layers are then trained by Adam, and "Muon" says
        nothing about Muon there. For Flax's convolutions::

            def of_cnn(params):
                def numbers(leaf):
                    if leaf.ndim < 2:
                        return None
                    axes = tuple(range(leaf.ndim - 1))
                    return optax.contrib.MuonDimensionNumbers(axes, leaf.ndim - 1)

                return jax.tree.map(numbers, params)

        (Equinox's have their output axis first: ``(tuple(range(1, leaf.ndim)), 0)``).
        Two-axis leaves that are no matrices, embeddings and biases of attention, it
        orthogonalizes too unless their number is ``None``.

    Returns:
      ``{name: learning rate -> optax.GradientTransformation}``.

    Examples:
      >>> from stablegrad_optax import default_optimizers
      >>> for name in default_optimizers():
      ...     print(name)
      AdamW
      AdamW b2=.9
      clip + AdamW
      clip + AdamW b2=.9
      StableGrad + AdamW b2=.9
      Muon
      clip + Muon
      unit norm by leaf + Muon
      StableGrad + Muon
    """
    adamw = optax.adamw
    quick = functools.partial(optax.adamw, b2=0.9)
    muon = functools.partial(
        optax.contrib.muon, muon_weight_dimension_numbers=muon_weight_dimension_numbers
    )
    clip = functools.partial(optax.clip_by_global_norm, 1.0)
    unit_norm = functools.partial(gradient_stabilizer, 0, 0, eps=0)

    def behind(first: Callable[[], Any], optimizer: Factory) -> Factory:
        return lambda rate: optax.chain(first(), optimizer(rate))

    return {
        "AdamW": adamw,
        "AdamW b2=.9": quick,
        "clip + AdamW": behind(clip, adamw),
        "clip + AdamW b2=.9": behind(clip, quick),
        "StableGrad + AdamW b2=.9": behind(stablegrad, quick),
        "Muon": muon,
        "clip + Muon": behind(clip, muon),
        "unit norm by leaf + Muon": behind(unit_norm, muon),
        "StableGrad + Muon": behind(stablegrad, muon),
    }


def compare_optimizers(
    loss_fn: Callable[[PyTree, Any], jax.Array],
    init: Callable[[jax.Array], PyTree],
    sample: Callable[[jax.Array], Any] | PyTree,
    optimizers: Mapping[str, Factory] | None = None,
    *,
    learning_rates: Sequence[float] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    steps: int,
    num_seeds: int = 8,
    num_tuning_seeds: int = 3,
    score: Callable[[PyTree], jax.Array] | None = None,
    failure_score: float | None = None,
    key: jax.Array,
    parallel: int = 8,
    callback: Callable[[int, int, str], None] | None = None,
) -> Comparison:
    """Trains your own network with several optimizers and says which did best.

    Each optimizer is run at each learning rate on ``num_tuning_seeds`` seeds, and at
    the rate that they choose on ``num_seeds`` fresh ones. A seed gives all optimizers
    and rates the same initial parameters and the same batches. Learning rates decay to
    0 by a cosine.

    The rate is the one with the lowest *worst* score among those with a margin, at
    which no tuning seed fails and none at the next larger rate either: the best rate of
    a deep network often stands beside a cliff. Optimizers are ordered by the mean rank
    of their fresh runs, failures last, and those are called **level** with the first
    that Mann and Whitney's rank test does not tell apart from it: exact, two-sided, at
    5 % over all pairs of optimizers together (Bonferroni), so that of optimizers that
    are all alike one is singled out in at most one trial of twenty. Eight optimizers
    need seven seeds at least. Of those that are level take the simplest.

    A run **failed** if its score or its parameters are not finite at the end, or if its
    score is not below ``failure_score``. It does not stop the others.

    It is this project's tool and not part of a published method. Everything runs inside
    ``jit``, on one device, ``parallel`` runs side by side by ``jax.vmap``; each
    optimizer is compiled once. The same key and arguments give the same result on one
    machine, the times apart.

    Args:
      loss_fn: ``loss_fn(params, batch) -> f[]``, to be minimized.
      init: ``init(key) -> params``, a pytree of floating arrays; what a model holds
        beside them ``loss_fn`` closes over, see the examples.
      sample: ``sample(key) -> batch``, called anew for each step; or a pytree that is
        not callable: the whole data, handed to every step.
      optimizers: ``{name: learning rate -> optax.GradientTransformation}``, the simple
        ones first. The rate is a traced scalar; the updates are multiplied by the
        cosine afterwards, so that a factory may warm up by a schedule of its own
        (``optax.warmup_constant_schedule``; ``warmup_cosine_decay_schedule`` tests its
        peak in Python and takes no traced rate).
        ``update`` is given ``value``, ``grad`` and ``value_fn`` as extra arguments.
        Default: :func:`default_optimizers`; **its Muon treats leaves of two axes alone,
        no convolution kernels**.
      learning_rates: Those to try. A result marks a choice at either end of them.
      steps: How many a run has.
      num_seeds: How many fresh runs each optimizer has.
      num_tuning_seeds: How many each of its learning rates has.
      score: ``score(params) -> f[]``, the lower the better (an error, not an accuracy),
        called once at the end. Default: the mean loss of 8 fresh batches, the same for
        all runs, or the loss of the whole data.
      failure_score: Runs with a score that is not below it failed; with ``inf`` those
        alone whose score or parameters are not finite. Default: the score of the run's
        own initial parameters, where that is a number.
      key: A key of ``jax.random``.
      parallel: How many runs are trained side by side: each needs the memory of one.
      callback: ``callback(done, total, optimizer)`` after each group of runs, with the
        numbers of runs so far and in all.

    Returns:
      A :class:`Comparison`: ``str`` of it is a table, ``best``, ``level`` and
      ``runs`` hold its entries, ``curves`` the losses f[seeds, steps] of each optimizer
      for a plot.

    Raises:
      ValueError: If the loss or the score is no real scalar; if the loss or its
        gradient is not finite at the initial parameters of any seed, so that no rate
        can help; if ``params`` holds anything but floating arrays; for numbers out of
        range.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from stablegrad_optax import compare_optimizers
      >>> def init(key):
      ...     return {"kernel": jax.random.normal(key, (3, 1)), "bias": jnp.zeros(1)}
      >>> def sample(key):
      ...     x = jax.random.normal(key, (16, 3))
      ...     return x, x.sum(1, keepdims=True)
      >>> def loss_fn(params, batch):
      ...     x, y = batch
      ...     return jnp.mean((x @ params["kernel"] + params["bias"] - y) ** 2)
      >>> result = compare_optimizers(
      ...     loss_fn,
      ...     init,
      ...     sample,
      ...     {"SGD": optax.sgd, "Adam": optax.adam},
      ...     learning_rates=[1e-3, 1e-2, 1e-1],
      ...     steps=50,
      ...     num_seeds=5,
      ...     key=jax.random.key(0),
      ... )
      >>> result.best.name, result.best.learning_rate, result.level
      ('SGD', 0.1, ('SGD',))
      >>> result.curves["SGD"].shape
      (5, 50)

      Flax linen: ``init = lambda key: model.init(key, x)["params"]``, and ``loss_fn``
      calls ``model.apply({"params": params}, x)``. Equinox, with ``make(key)`` the
      model::

          static = eqx.partition(make(jax.random.key(0)), eqx.is_inexact_array)[1]
          init = lambda key: eqx.filter(make(key), eqx.is_inexact_array)
          loss_fn = lambda params, batch: my_loss(eqx.combine(params, static), batch)

      Flax nnx, with ``make(rngs)`` the model::

          graphdef, _, rest = nnx.split(make(nnx.Rngs(0)), nnx.Param, ...)
          init = lambda key: nnx.state(make(nnx.Rngs(key)), nnx.Param)
          loss_fn = lambda params, batch: my_loss(
              nnx.merge(graphdef, params, rest, copy=True), batch
          )

      What a model updates beside its parameters, the running statistics of batch
      normalization, say, stays as it was: let it normalize by the batch.
    """
    optimizers = default_optimizers() if optimizers is None else optimizers
    _check_optimizers(optimizers)
    rates = _check_rates(learning_rates)
    for name, number in {
        "steps": steps,
        "num_seeds": num_seeds,
        "num_tuning_seeds": num_tuning_seeds,
        "parallel": parallel,
    }.items():
        require_count(name, number)
    if failure_score is not None and failure_score != np.inf:
        require_number("failure_score", failure_score)
    if not isinstance(key, jax.Array):
        raise ValueError(f"key must be a key of jax.random; got {key!r}.")

    problem = Problem(loss_fn, init, sample, score, failure_score, steps)
    problem.require_finite_start(jax.random.split(key, num_tuning_seeds))
    is_tuned = len(rates) > 1
    grid = [(rate, seed) for rate in rates for seed in range(num_tuning_seeds)]
    grid = grid if is_tuned else []
    width = min(parallel, max(len(grid), num_seeds))
    trainers = [
        Trainer(name, factory, problem, key, width)
        for name, factory in optimizers.items()
    ]
    done, total = 0, (len(grid) + num_seeds) * len(trainers)

    def train(
        trainer: Trainer, runs: Sequence[tuple[float, int]]
    ) -> tuple[Scores, Floats]:
        def tick(count: int) -> None:
            nonlocal done
            done += count
            if callback is not None:
                callback(done, total, trainer.name)

        return trainer(runs, tick)

    results = []
    for trainer in trainers:
        chosen, tuning = 0, np.zeros((0, num_tuning_seeds), np.float64)
        if is_tuned:
            tuning = train(trainer, grid)[0].reshape(len(rates), num_tuning_seeds)
            chosen = choose_rate(tuning)
        fresh = range(num_tuning_seeds, num_tuning_seeds + num_seeds)
        scores, curves = train(trainer, [(rates[chosen], seed) for seed in fresh])
        results.append(
            OptimizerRuns(
                name=trainer.name,
                learning_rate=rates[chosen],
                rate_at_edge=is_tuned and chosen in (0, len(rates) - 1),
                scores=scores,
                curves=curves,
                tuning=tuning,
                ms_per_step=trainer.ms_per_step,
            )
        )
    return compare(results)


def _check_rates(learning_rates: Sequence[float]) -> list[float]:
    if np.ndim(learning_rates) != 1:
        raise ValueError(
            f"learning_rates must be a sequence of numbers; got {learning_rates!r}."
        )
    rates = sorted({float(rate) for rate in learning_rates})
    for rate in rates:  # in float32
        require_number("learning_rates", rate, at_least=float(np.finfo("f4").tiny))
    if not rates:
        raise ValueError("learning_rates must have at least one; got none.")
    return rates


def _check_optimizers(optimizers: Mapping[str, Factory]) -> None:
    if not isinstance(optimizers, Mapping) or not optimizers:
        raise ValueError(
            "optimizers must be a dict of at least one "
            f"{{name: learning rate -> optimizer}}; got {optimizers!r}."
        )
    for name, factory in optimizers.items():
        if not isinstance(name, str):
            raise ValueError(f"The names of optimizers must be strings; got {name!r}.")
        if not callable(factory):
            raise ValueError(
                f"optimizers[{name!r}] must be a function of the learning rate that "
                f"returns an optax.GradientTransformation; got {factory!r}."
            )

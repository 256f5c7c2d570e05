"""Comparison of several optimizers on one's own network, in one call."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from stablegrad_optax._checks import require_count, require_number
from stablegrad_optax._comparison import Comparison, compare, few_seeds
from stablegrad_optax._optimizers import (
    Factory,
    Rates,
    default_optimizers,
    learning_rates_by_name,
    next_rate,
)
from stablegrad_optax._progress import Progress
from stablegrad_optax._ranking import choose_rate, fewest_seeds
from stablegrad_optax._runs import OptimizerRuns
from stablegrad_optax._training import Trainer
from stablegrad_optax._trials import Problem, Programs

PyTree = Any
Tick = Callable[[int], None]


def compare_optimizers(
    loss_fn: Callable[[PyTree, Any], jax.Array],
    init: Callable[[jax.Array], PyTree],
    sample: Callable[[jax.Array], Any] | PyTree,
    optimizers: Mapping[str, Factory] | None = None,
    *,
    learning_rates: Rates | None = None,
    steps: int,
    num_seeds: int = 8,
    num_tuning_seeds: int = 3,
    score: Callable[[PyTree], jax.Array] | None = None,
    failure_score: float | None = None,
    key: jax.Array,
    parallel: int = 8,
    progress: bool | None = None,
    callback: Callable[[int, int, str], None] | None = None,
) -> Comparison:
    """Trains your network with several optimizers and recommends one.

    Each optimizer is trained at each learning rate on ``num_tuning_seeds`` seeds, and
    at the best rate on ``num_seeds`` fresh ones. A seed gives all optimizers the same
    initial parameters and batches. The learning rate decays to 0 by a cosine. Scores
    are compared by an exact Mann-Whitney test at 5 % over all pairs of optimizers. See
    :attr:`Comparison.recommended` for the rule of the recommendation.

    A run **failed** if its score or its parameters are not finite at the end, or if its
    score is not below ``failure_score``. Press Ctrl-C to stop, or raise
    ``KeyboardInterrupt`` in ``callback``: the finished optimizers are returned.

    Args:
      loss_fn: ``loss_fn(params, batch) -> f[]``, to be minimized.
      init: ``init(key) -> params``, a pytree of floating arrays.
      sample: ``sample(key) -> batch``, which is called at each step, or a pytree that
        is not callable: the whole data, which each step receives.
      optimizers: ``{name: learning rate -> optax.GradientTransformation}``. The
        learning rate is a schedule, ``optax.cosine_decay_schedule(rate, steps)``, whose
        ``rate`` is traced. Where a function needs a number, ``learning_rate(0)`` is the
        rate at the start. Default: :func:`default_optimizers`.
      learning_rates: The peak rates to try: one list, or a dict with lists for some of
        the optimizers. If the best one is the first or the last, one more is tried
        beyond it. Default: four rates for the kind of optimizer, by its name.
      steps: The number of steps of a run.
      num_seeds: The number of fresh runs of each optimizer.
      num_tuning_seeds: The number of runs at each learning rate.
      score: ``score(params) -> f[]``, lower is better, called once at the end. Default:
        the mean loss of 8 fresh batches, or the loss of the whole data.
      failure_score: A run failed if its score is not below this number. With ``inf``
        only a run that is not finite failed. Default: the score of the run's initial
        parameters.
      key: A key of ``jax.random``.
      parallel: How many runs are trained side by side. Lower it to save memory.
      progress: Whether to print the progress and the time left. Default: in a terminal
        or a notebook.
      callback: ``callback(done, total, optimizer)`` after each group of runs, with
        numbers of runs.

    Returns:
      A :class:`Comparison`. Print it to see a table.

    Raises:
      ValueError: If the loss or the score is not a real scalar; if the loss or its
        gradient is not finite at the initial parameters of any seed; if ``init`` or
        ``sample`` draws random numbers without its key; if ``params`` has leaves that
        are not floating arrays; if an argument is out of range.

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
      ...     key=jax.random.key(0),
      ... )
      >>> result.recommended.name
      'SGD'
    """
    optimizers = default_optimizers() if optimizers is None else optimizers
    _check_optimizers(optimizers)
    rates = learning_rates_by_name(list(optimizers), learning_rates)
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
    if len(optimizers) > 1 and num_seeds < fewest_seeds(len(optimizers)):
        warnings.warn(few_seeds(len(optimizers), num_seeds), stacklevel=2)

    num_tuning = {
        name: num_tuning_seeds * len(rates[name]) if len(rates[name]) > 1 else 0
        for name in optimizers
    }
    width = min(parallel, max(num_seeds, *num_tuning.values()))
    report = Progress(progress, sum(num_tuning.values()) + num_seeds * len(optimizers))
    report.start(
        f"{len(optimizers)} optimizers, {report.total} runs of {steps} steps, {width} "
        "side by side. Compilation comes first."
    )
    problem = Problem(loss_fn, init, sample, score, failure_score, steps)
    problem.require_randomness_of_keys(key, num_seeds)
    programs = Programs(problem, key, width)
    programs.require_finite_gradients(range(num_tuning_seeds))
    stages: dict[Any, Any] = {}
    trainers = [
        Trainer(name, factory, programs, stages) for name, factory in optimizers.items()
    ]
    stages.clear()  # each program is freed after the last optimizer that uses it

    def tick(count: int) -> None:
        report.update(count, trainer.name)
        if callback is not None:
            callback(report.done, report.total, trainer.name)

    results: list[OptimizerRuns] = []
    try:
        while trainers:
            trainer = trainers.pop(0)
            seeds = num_tuning_seeds, num_seeds
            results.append(
                _tune_and_train(trainer, rates[trainer.name], seeds, report, tick)
            )
    except KeyboardInterrupt:
        if not results:
            raise
    finally:
        report.close()
    finished = [runs.name for runs in results]
    return compare(results, [name for name in optimizers if name not in finished])


def _tune_and_train(
    trainer: Trainer,
    rates: list[float],
    num_seeds: tuple[int, int],
    report: Progress,
    tick: Tick,
) -> OptimizerRuns:
    """Chooses the learning rate, then trains the fresh seeds with it."""
    num_tuning, num_fresh = num_seeds

    def tune(rates: Sequence[float]) -> np.ndarray:
        runs = [(rate, seed) for rate in rates for seed in range(num_tuning)]
        return trainer(runs, tick)[0].reshape(len(rates), num_tuning)

    chosen, added, tuning = 0, None, np.zeros((0, num_tuning))
    if len(rates) > 1:
        tuning = tune(rates)
        chosen = choose_rate(tuning)
        added = next_rate(rates, chosen)
    if added is not None:
        report.total += num_tuning
        rates = sorted([*rates, added])
        tuning = np.insert(tuning, rates.index(added), tune([added]), axis=0)
        chosen = choose_rate(tuning)
    fresh = range(num_tuning, num_tuning + num_fresh)
    scores, curves = trainer([(rates[chosen], seed) for seed in fresh], tick)
    return OptimizerRuns(
        name=trainer.name,
        learning_rate=rates[chosen],
        learning_rates=tuple(rates),
        added_rate=added,
        scores=scores,
        curves=curves,
        tuning=tuning,
        ms_per_step=trainer.ms_per_step,
    )


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

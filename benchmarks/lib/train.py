"""The training loop of every suite: runs of one arm on one task, side by side.

Learning rates, seeds and initial weights are values, not programs: a batch may mix
them. The gradient is compiled once for a task, whatever the arm; the update once for a
rule and a shape, whatever the task. A loop in Python joins the two: for deep networks a
program that held both would cost the gradient's compilation, 5 to 10 s, once for every
arm, and on a CPU a `lax.scan` over the steps of a convolutional net takes twice the
time. A task of short steps, such as PPO's, has all those between two records in one
program.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.lib.arms import OPTIMIZERS, Arm
from benchmarks.lib.runs import Phase, Record, Run, Settings
from stablegrad_optax import prediction_grad_std

PyTree = Any
WARM_UP = 0.05  # of all steps


class Gradient(NamedTuple):
    """Of one batch."""

    loss: jax.Array  # f[]
    grads: PyTree
    probes: Mapping[str, jax.Array]  # prediction -> f[], the std of dL/d(prediction)
    state: PyTree  # after the batch


class Task(Protocol):
    """What is trained; no optimizer, no loop, no file.

    A pytree: its arrays are arguments of the programs, which are compiled once for
    equal shapes and equal other fields.
    """

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        """Weights, by `jax.random.split(key)[0]`, and what else a run carries along."""

    def gradient(
        self, params: PyTree, state: PyTree, key: jax.Array, step: jax.Array
    ) -> Gradient:
        """Of the batch that `key`, the other half of `init`'s, gives `step`, from 0."""

    def score(
        self, params: PyTree, state: PyTree, held_out: PyTree
    ) -> dict[str, jax.Array]:
        """Name -> f[], on examples that are not trained on."""


@dataclass(frozen=True)
class Rule:
    """The update: all that its program depends on.

    Attributes:
        arm: of `benchmarks.lib.arms`.
        steps: number of updates.
        warm_up: whether the rate rises first, for 5 % of the steps; it falls to 0 along
            a half cosine.
        weight_decay: added to the gradient, see `Arm.__call__`.
        skip_nonfinite: whether an update whose gradient is not finite is left out, as
            loss scaling needs.
    """

    arm: Arm
    steps: int
    warm_up: bool = False
    weight_decay: float = 0.0
    skip_nonfinite: bool = False

    @classmethod
    def of(cls, settings: Settings, **others: Any) -> "Rule":
        """By the `arm` and the `steps` of a run's settings."""
        return cls(Arm.of(settings["arm"]), settings["steps"], **others)

    def __call__(
        self, rate: float | jax.Array
    ) -> optax.GradientTransformationExtraArgs:
        """The transformation with this highest rate."""
        warm_up = self.warm_up or OPTIMIZERS[self.arm.optimizer].warm_up
        tx = self.arm(schedule(self.steps, rate, warm_up=warm_up), self.weight_decay)
        if self.skip_nonfinite:
            tx = optax.apply_if_finite(tx, max_consecutive_errors=self.steps)
        return tx


def schedule(steps: int, rate: float | jax.Array, *, warm_up: bool) -> optax.Schedule:
    """From the rate, or linearly from 0 up to it, then a half cosine to 0."""
    if not warm_up:
        return optax.cosine_decay_schedule(rate, steps)
    num_rising = max(1, round(WARM_UP * steps))
    unit = optax.warmup_cosine_decay_schedule(0.0, 1.0, num_rising, max(steps, 2))
    # The first update, of count 0, would be none: count from 1.
    return lambda count: rate * unit(count + 1)


@dataclass(frozen=True, eq=False)
class Training:
    """A task and how it is trained.

    Attributes:
        task: what.
        rule: the update.
        recorded: after which numbers of updates there is a record, increasing, the last
            one among them.
        held_out: what `Task.score` is handed.
        side_by_side: whether the runs of a batch are computed together; else in turn.
        in_one_program: whether the updates up to a record are one program; else two
            each, in a loop in Python.
    """

    task: Task
    rule: Rule
    recorded: Sequence[int]
    held_out: PyTree = None
    side_by_side: bool = True
    in_one_program: bool = False


class Moment(NamedTuple):
    """A batch after some updates; gradients and loss are the last one's.

    `params` and `opt_states`, leaves [runs, ...], are given up when training goes on.
    """

    step: int
    params: PyTree
    opt_states: optax.OptState
    scores: dict[str, np.ndarray]  # f[runs]
    loss: np.ndarray  # f[runs]
    stds: np.ndarray  # f[runs, kernels], of each kernel's gradient before the arm acts
    ms_per_step: float  # of one run, since the record before, without the scoring


@dataclass(frozen=True)
class Curves:
    """What became of one run, at some of its steps.

    Attributes:
        steps: i[records], updates done.
        scores: name -> f[records].
        loss: f[records], of the last batch.
        stds: f[records, kernels], as in `Moment`.
        ms_per_step: wall-clock of the batch over its number of runs, in the fastest
            stretch between records: compilation and other work on the machine only add.
        num_params: number of weights.
        num_skipped: updates that the arm did not take.
    """

    steps: np.ndarray
    scores: Mapping[str, np.ndarray]
    loss: np.ndarray
    stds: np.ndarray
    ms_per_step: float
    num_params: int
    num_skipped: int = 0

    @property
    def exponents(self) -> np.ndarray:
        """log10 of `stds`, f64; not finite where a gradient vanished."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.log10(self.stds.astype(float))


def train_batch(
    training_of: Callable[[Settings, Phase], Training],
    keep: Callable[[Run, Curves], Record],
    runs: Sequence[Run],
    tick: Callable[[], None],
) -> list[Record]:
    """Train runs that differ in initial weights, learning rate and seed alone.

    Args:
        training_of: as in `Suite`.
        keep: as in `Suite`.
        runs: equal seeds have equal weights and batches in any arm.
        tick: called at every record; what it raises ends the training.
    """
    trainings = [training_of(run.settings, run.phase) for run in runs]
    size = len(runs) if trainings[0].side_by_side else 1
    records: list[Record] = []
    for begin in range(0, len(runs), size):
        batch = runs[begin : begin + size]
        curves = curves_of(
            moments(
                trainings[begin : begin + size],
                [run.learning_rate for run in batch],
                [run.seed for run in batch],
            ),
            tick,
        )
        records += [keep(run, c) for run, c in zip(batch, curves, strict=True)]
    return records


def curves_of(
    moments: Iterable[Moment], tick: Callable[[], None] = lambda: None
) -> list[Curves]:
    """The curves of every run of a batch."""
    of_batch, num_params, skipped = [], 0, None
    for moment in moments:
        leaves = jax.tree.leaves(moment.params)
        num_params = sum(leaf.size // len(leaf) for leaf in leaves)
        skipped = optax.tree.get(moment.opt_states, "num_skipped")
        skipped = None if skipped is None else np.asarray(skipped)
        of_batch.append(moment._replace(params=None, opt_states=None))
        tick()
    return [
        Curves(
            steps=np.array([m.step for m in of_batch]),
            scores={
                name: np.array([m.scores[name][run] for m in of_batch])
                for name in of_batch[0].scores
            },
            loss=np.array([m.loss[run] for m in of_batch]),
            stds=np.stack([m.stds[run] for m in of_batch]),
            ms_per_step=min(m.ms_per_step for m in of_batch),
            num_params=num_params,
            num_skipped=0 if skipped is None else int(skipped[run]),
        )
        for run in range(len(of_batch[0].loss))
    ]


def moments(
    trainings: Sequence[Training], rates: Sequence[float], seeds: Sequence[int]
) -> Iterator[Moment]:
    """Train runs side by side, and stop at every record; arguments as of `Batch`."""
    batch = Batch(trainings, rates, seeds)
    for stop in trainings[0].recorded:
        begin, done = time.perf_counter(), batch.step
        batch.advance(stop)
        seconds = time.perf_counter() - begin
        yield batch.moment(1e3 * seconds / (stop - done) / len(seeds))


class _Carried(NamedTuple):
    """From one step of the runs to the next; leaves [runs, ...]."""

    params: PyTree
    opt_states: optax.OptState
    states: PyTree


class Batch:
    """Runs side by side.

    Args:
        trainings: one a run; all but `Task.init` is the first one's.
        rates: the highest of each run.
        seeds: of each run's weights and batches.
    """

    def __init__(
        self,
        trainings: Sequence[Training],
        rates: Sequence[float],
        seeds: Sequence[int],
    ):
        self.step = 0  # updates done
        self._training = trainings[0]
        roots = [jax.random.key(seed) for seed in seeds]
        params, states = _stack(
            t.task.init(key) for t, key in zip(trainings, roots, strict=True)
        )
        self._keys = jnp.stack([jax.random.split(key)[1] for key in roots])
        self._rates = jnp.array(rates, jnp.float32)
        opt_states = _init(self._training.rule, self._rates, params)
        self._carried = _Carried(params, opt_states, states)
        self._found: Gradient | None = None  # of the last step

    def advance(self, stop: int) -> None:
        """Train until so many updates are done, and wait for them."""
        task, rule = self._training.task, self._training.rule
        runs = task, rule, self._rates, self._keys
        begin = self.step
        if self._training.in_one_program:
            # The last one leaves its gradient for `moment`.
            begin = max(self.step, stop - 1)
            bounds = np.int32(self.step), np.int32(begin)
            self._carried = _steps(*runs, self._carried, *bounds)
        for step in range(begin, stop):
            self._carried, self._found = _step(*runs, self._carried, np.int32(step))
        self.step = stop
        jax.block_until_ready(self._carried.params)

    def moment(self, ms_per_step: float) -> Moment:
        """What a record is made of."""
        task, held_out = self._training.task, self._training.held_out
        params, opt_states, states = self._carried
        measured = _measure(task, params, states, held_out, self._found.grads)
        scores, stds, loss = jax.device_get((*measured, self._found.loss))
        return Moment(self.step, params, opt_states, scores, loss, stds, ms_per_step)


def _stack(trees: Iterable[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@jax.jit
def _gradient(
    task: Task, params: PyTree, states: PyTree, keys: jax.Array, step: jax.Array
) -> Gradient:
    """The gradients of step `step`, each run at its own batch."""
    return jax.vmap(task.gradient, (0, 0, 0, None))(params, states, keys, step)


@partial(jax.jit, static_argnums=0)
def _init(rule: Rule, rates: jax.Array, params: PyTree) -> optax.OptState:
    return jax.vmap(lambda rate, p: rule(rate).init(p))(rates, params)


@partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def _update(
    rule: Rule,
    rates: jax.Array,
    params: PyTree,
    opt_states: optax.OptState,
    grads: PyTree,
    probes: Mapping[str, jax.Array],
    losses: jax.Array,
) -> tuple[PyTree, optax.OptState]:
    """One step of every run; the old parameters and states are given up."""

    def of_run(
        rate: jax.Array,
        params: PyTree,
        opt_state: optax.OptState,
        grads: PyTree,
        probes: Mapping[str, jax.Array],
        loss: jax.Array,
    ) -> tuple[PyTree, optax.OptState]:
        updates, opt_state = rule(rate).update(
            grads, opt_state, params, probes=probes, value=loss
        )
        return optax.apply_updates(params, updates), opt_state

    return jax.vmap(of_run)(rates, params, opt_states, grads, probes, losses)


def _step(
    task: Task,
    rule: Rule,
    rates: jax.Array,
    keys: jax.Array,
    carried: _Carried,
    step: jax.Array,
) -> tuple[_Carried, Gradient]:
    """Step `step` of every run, in two programs."""
    params, opt_states, states = carried
    found = _gradient(task, params, states, keys, step)
    params, opt_states = _update(
        rule, rates, params, opt_states, found.grads, found.probes, found.loss
    )
    return _Carried(params, opt_states, found.state), found


@partial(jax.jit, static_argnums=1, donate_argnums=4)
def _steps(
    task: Task,
    rule: Rule,
    rates: jax.Array,
    keys: jax.Array,
    carried: _Carried,
    begin: jax.Array,
    stop: jax.Array,
) -> _Carried:
    """The steps from `begin` up to `stop`, in one; what is carried is given up."""
    return jax.lax.fori_loop(
        begin,
        stop,
        lambda step, carried: _step(task, rule, rates, keys, carried, step)[0],
        carried,
    )


@jax.jit
def _measure(
    task: Task, params: PyTree, states: PyTree, held_out: PyTree, grads: PyTree
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Scores f[runs], and the std of each kernel's gradient f[runs, kernels]."""
    scores = jax.lax.map(  # one run at a time: scoring takes more memory than training
        lambda run: task.score(*run, held_out), (params, states)
    )
    # Pools one leaf alone: a std that no square takes out of single precision.
    stds = [jax.vmap(prediction_grad_std)(g) for g in kernels(grads, axes=3).values()]
    return scores, jnp.stack(stds, -1)


def kernels(tree: PyTree, *, axes: int = 2) -> dict[str, jax.Array]:
    """The leaves of so many axes or more, in the order of their layers."""
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
        if leaf.ndim >= axes
    }
    return {name: found[name] for name in sorted(found, key=_natural)}


def _natural(name: str) -> list[str | int]:
    """Sorts dense_2 before dense_10."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if part.isdigit() else part for part in parts]


def record_steps(steps: int, *, early: int = 24, even: int = 60) -> list[int]:
    """When to record: dense at the start, where scales move by orders of magnitude."""
    at = np.concatenate(
        [np.geomspace(1, steps, early), np.linspace(0, steps, even + 1)[1:]]
    )
    return np.unique(np.ceil(at - 1e-6)).astype(int).tolist()

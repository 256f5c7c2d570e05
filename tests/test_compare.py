"""The trial of several optimizers: its runs, its choices and what it says of them."""

import gc
import io
import re
import sys
import warnings
import weakref

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy import stats

from stablegrad_optax import compare_optimizers, default_optimizers
from stablegrad_optax._comparison import Comparison, compare
from stablegrad_optax._optimizers import (
    complexity,
    learning_rates_by_name,
    next_rate,
)
from stablegrad_optax._ranking import choose_rate, rank_test, seeds_to_decide
from stablegrad_optax._runs import OptimizerRuns
from stablegrad_optax._training import Stage

KEY = jax.random.key(0)
ADAM = {"Adam": optax.adam}


def init(key):
    return {"kernel": jax.random.normal(key, (3, 1)), "bias": jnp.zeros(1)}


def sample(key):
    x = jax.random.normal(key, (16, 3))
    return x, jnp.sum(x, axis=1, keepdims=True)


def predict(params, x):
    return x @ params["kernel"] + params["bias"]


def loss_fn(params, batch):
    x, y = batch
    return jnp.mean((predict(params, x) - y) ** 2)


def trial(optimizers=ADAM, **kwargs):
    arguments = {
        "loss_fn": loss_fn,
        "init": init,
        "sample": sample,
        "learning_rates": [0.03, 0.1],
        "steps": 20,
        "num_seeds": 4,
        "key": KEY,
    }
    arguments |= kwargs
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".* seeds cannot distinguish")
        return compare_optimizers(optimizers=optimizers, **arguments)


# Its runs.


def test_a_run_is_the_plain_loop_with_optax_own_schedule():
    steps, rate, data = 30, 0.05, sample(jax.random.key(1))
    start = init(jax.random.key(2))
    tx = optax.adamw(optax.cosine_decay_schedule(rate, steps))
    params, state, losses = start, tx.init(start), []
    for _ in range(steps):
        loss, grads = jax.value_and_grad(loss_fn)(params, data)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(loss)

    result = trial(
        {"AdamW": optax.adamw},
        init=lambda key: start,
        sample=data,
        learning_rates=[rate],
        steps=steps,
        num_seeds=1,
    )
    # Float32, in another order of operations.
    np.testing.assert_allclose(result.curves["AdamW"], [losses], rtol=1e-4)
    np.testing.assert_allclose(result.best.scores, [loss_fn(params, data)], rtol=1e-4)
    assert result.best.tuning.shape == (0, 3)  # a single rate needs none


def test_the_key_decides_and_nothing_else():
    first, again, alone = trial(), trial(), trial(parallel=1)
    other = trial(key=jax.random.key(1))
    np.testing.assert_array_equal(first.best.scores, again.best.scores)
    np.testing.assert_array_equal(first.best.curves, again.best.curves)
    # Side by side or not: rounding alone.
    np.testing.assert_allclose(first.best.scores, alone.best.scores, rtol=1e-3)
    np.testing.assert_allclose(first.best.tuning, alone.best.tuning, rtol=1e-3)
    assert np.all(first.best.scores != other.best.scores)
    old_style = trial(key=jax.random.PRNGKey(0))
    assert old_style.best.scores.shape == (4,)


def test_all_optimizers_meet_the_same_starts_and_batches():
    result = trial({"one": optax.sgd, "two": optax.sgd, "three": optax.adam})
    one, two, three = (result[name] for name in ("one", "two", "three"))
    np.testing.assert_array_equal(one.curves, two.curves)
    np.testing.assert_array_equal(one.curves[:, 0], three.curves[:, 0])
    assert len(set(one.curves[:, 0].tolist())) == 4  # each seed its own
    assert {"one", "two"} <= set(result.level) or not {"one", "two"} & set(result.level)


def test_fresh_seeds_are_not_those_that_chose():
    result = trial(learning_rates=[0.1, 0.2], num_seeds=3, num_tuning_seeds=3)
    rates = result.best.learning_rates
    chosen = result.best.tuning[rates.index(result.best.learning_rate)]
    assert not set(chosen.tolist()) & set(result.best.scores.tolist())


def test_a_score_of_ones_own():
    def score(params):
        return jnp.sum(jnp.abs(params["kernel"] - 1.0))

    result = trial(score=score, steps=300, learning_rates=[0.1])
    assert result.best.median < 0.01


def test_runs_that_are_not_finite_fail_and_do_not_stop_the_others():
    result = trial({"SGD": optax.sgd}, learning_rates=[0.001, 0.01, 0.1, 1e6], steps=60)
    assert np.all(np.isinf(result.best.tuning[-1]))
    # 0.1 is next to a rate that diverges.
    assert result.best.learning_rate == 0.01
    assert result.best.num_failed == 0

    everywhere = trial({"SGD": optax.sgd}, learning_rates=[1e6, 1e7], steps=60)
    assert everywhere.best.num_failed == 4
    assert "Every run of every optimizer failed" in words(everywhere)
    assert everywhere.best.median == np.inf


def test_a_run_failed_that_is_no_better_than_its_start_or_than_is_asked():
    stands_still = {"none": lambda rate: optax.set_to_zero()}
    assert trial(stands_still).best.num_failed == 4
    assert trial(stands_still, failure_score=np.inf).best.num_failed == 0
    asked = trial(failure_score=1e-12)
    assert asked.best.num_failed == 4


def test_a_score_that_is_no_number_at_the_start_fails_no_run():
    def score(params):  # 0 / 0 where the bias starts
        return jnp.sum(params["bias"]) / jnp.sum(jnp.abs(params["bias"]))

    assert np.isfinite(trial(score=score).best.scores).all()


def test_optimizers_of_multi_steps_are_taken():
    factories = {"every 2": lambda rate: optax.MultiSteps(optax.adam(rate), 2)}
    assert np.isfinite(trial(factories).best.scores).all()


def test_finite_scores_of_parameters_that_are_not_finite_are_failures():
    result = trial(
        {"SGD": optax.sgd}, learning_rates=[1e30], score=lambda params: jnp.array(-1.0)
    )
    assert result.best.num_failed == 4


def test_update_is_given_what_line_searches_ask_for():
    def search(rate):
        return optax.chain(
            optax.sgd(rate),
            optax.scale_by_backtracking_linesearch(max_backtracking_steps=5),
        )

    result = trial(
        {"line search": search, "Polyak": lambda rate: optax.polyak_sgd(rate(0))}
    )
    assert all(runs.num_failed == 0 for runs in result.runs)


def test_progress():
    told = []
    trial(
        {"one": optax.sgd, "two": optax.sgd},
        num_tuning_seeds=2,
        parallel=3,
        learning_rates=[0.001, 0.01, 0.1, 1e6],  # the best one is not at an end
        callback=lambda *args: told.append(args),
    )
    # Four rates with two seeds each and four fresh seeds, three at a time.
    counts = [3, 6, 8, 11, 12]
    assert told == [(n, 24, "one") for n in counts] + [
        (12 + n, 24, "two") for n in counts
    ]


# Its choices.


@pytest.mark.parametrize(
    ("scores", "rate"),
    [
        ([[3, 3], [1, 1], [2, 2]], 1),
        ([[3, 3], [1, 4], [2, 2]], 2),  # the worst seed decides
        ([[3, 3], [1, 1], [2, np.inf]], 0),  # no margin at 1
        ([[3, np.inf], [1, 1], [2, np.inf]], 1),  # none has one: fewest failures
        ([[np.inf, np.inf], [1, np.inf], [2, np.inf]], 1),
        ([[np.inf, np.inf], [np.inf, np.inf]], 0),
        ([[1, 1], [1, 1]], 0),
    ],
)
def test_the_rate_is_chosen_by_its_worst_seed_and_with_a_margin(scores, rate):
    assert choose_rate(np.array(scores, float)) == rate


def test_rank_test_is_scipys():
    rng = np.random.default_rng(0)
    for n in (3, 8, 20):
        a, b = rng.normal(0, 1, n), rng.normal(0.7, 1, n)
        exact = stats.mannwhitneyu(a, b, method="exact").pvalue
        assert rank_test(a, b) == pytest.approx(exact, rel=1e-9)


def test_rank_test_with_ties_and_failures_counts_every_partition():
    a = np.array([1.0, 2.0, 2.0, np.inf, 1.0])
    b = np.array([2.0, 3.0, np.inf, np.inf, 3.0])
    ranks = stats.rankdata(np.concatenate([a, b]))
    exact = stats.permutation_test(
        (ranks[:5], ranks[5:]),
        lambda x, y, axis: np.sum(x, axis=axis),
        vectorized=True,
        n_resamples=np.inf,
        alternative="two-sided",
    ).pvalue
    assert rank_test(a, b) == pytest.approx(exact, rel=1e-9)
    assert rank_test(a, a) == 1


def words(result):
    return " ".join(str(result).split())


def runs_of(name, scores, **kwargs):
    scores = np.asarray(scores, float)
    given = {
        "learning_rate": 1e-3,
        "learning_rates": (1e-3,),
        "added_rate": None,
        "curves": np.ones((len(scores), 2)),
        "tuning": np.zeros((0, 3)),
        "ms_per_step": 1.0,
    }
    return OptimizerRuns(name, scores=scores, **(given | kwargs))


def test_it_crowns_no_noise():
    rng = np.random.default_rng(0)
    crowned = 0
    for _ in range(300):
        arms = [runs_of(str(i), rng.normal(size=8)) for i in range(8)]
        crowned += len(compare(arms).level) < 8
    # Bonferroni's bound is 0.05; 300 trials add two standard deviations of 0.0126.
    assert crowned / 300 <= 0.075


def test_it_tells_apart_what_differs():
    rng = np.random.default_rng(1)
    arms = [runs_of(str(i), rng.normal(size=8) + 5 * (i > 1)) for i in range(8)]
    result = compare(arms)
    assert set(result.level) == {"0", "1"}
    alone = compare([runs_of("a", range(8)), runs_of("b", range(10, 18))])
    assert alone.level == ("a",)
    assert "a did best. 8 seeds distinguish it from every other" in words(alone)


def test_failures_are_last():
    result = compare(
        [
            runs_of("lucky", [0.1, 0.1, 0.1, np.inf, np.inf, np.inf, np.inf]),
            runs_of("steady", [1.0] * 7),
        ]
    )
    assert result.best.name == "steady"
    assert result["lucky"].num_failed == 4


def test_few_seeds_are_called_few():
    arms = [runs_of(str(i), np.arange(5) + 10 * i) for i in range(8)]
    result = compare(arms)
    assert len(result.level) == 8
    message = "5 seeds cannot distinguish 8 optimizers; use num_seeds=7"
    assert message in words(result)


# What it prints.


def test_a_printout_fits_80_columns():
    arms = [
        runs_of(
            f"{name} before an optimizer of a long name",
            [1.23456e-5, 123456.0, np.inf],
            learning_rate=3.16e-4,
            learning_rates=(3.16e-4, 1e-3),
            added_rate=3.16e-4,
            ms_per_step=12.345,
        )
        for name in ("clip", "StableGrad", "none")
    ]
    text = str(compare(arms))
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "clip before... a long name" in text
    assert "*  the smallest or largest rate" in text
    default = [runs_of(name, range(8)) for name in default_optimizers()]
    text = str(compare(default))
    assert all(len(line) <= 80 for line in text.splitlines())
    assert all(name in text for name in default_optimizers())


# Its recommendation.


def test_a_simpler_optimizer_is_recommended_if_it_is_close():
    plain = runs_of("AdamW", np.arange(8) + 10.5)
    other = runs_of("Muon", np.arange(8) + 10.0)
    for runs in ([plain, other], [other, plain]):  # the order of the dict says nothing
        result = compare(runs)
        assert isinstance(result, Comparison)
        assert result.best.name == "Muon"
        assert result.level == ("Muon", "AdamW")
        assert result.recommended.name == "AdamW"
        assert words(result).startswith("Use AdamW. It is the simplest")
        assert result.undecided == ()


def test_lack_of_power_is_not_equality():
    """Two medians that differ by a third, and scores that overlap."""
    wide = [0.27, 0.4, 0.6, 0.74, 0.76, 0.85, 0.9, 0.92]
    narrow = [0.56, 0.562, 0.565, 0.566, 0.568, 0.57, 0.58, 0.59]
    result = compare([runs_of("AdamW", wide), runs_of("clip + AdamW", narrow)])
    assert result.best.name == result.recommended.name == "clip + AdamW"
    assert result.undecided == ("AdamW",)
    assert "8 seeds do not decide whether a simpler optimizer is worse" in words(result)
    assert re.search(r"might: AdamW \(\d+\)", words(result))


def test_an_optimizer_that_fails_more_often_is_not_recommended():
    often = [1.0] * 6 + [np.inf] * 2
    result = compare([runs_of("AdamW", often), runs_of("Muon", np.arange(8) / 99 + 1)])
    # AdamW has the lower median, and Muon is not simpler.
    assert result.recommended.name == "AdamW"
    result = compare([runs_of("SGD", often), runs_of("Muon", [0.9, 1.2] * 4)])
    assert result.best.name == "SGD"
    result = compare([runs_of("SGD", often), runs_of("Muon", [0.9] * 5 + [1.1] * 3)])
    assert (result.best.name, result.recommended.name) == ("Muon", "Muon")
    assert result.undecided == ("SGD",)


def test_negative_scores_have_a_tolerance_too():
    result = compare([runs_of("AdamW", [-0.9] * 8), runs_of("Muon", [-1.0, -0.8] * 4)])
    assert result.recommended.name == "AdamW"
    result = compare([runs_of("AdamW", [-0.5] * 8), runs_of("Muon", [-1.0, -0.4] * 4)])
    assert result.recommended.name == "Muon"


def test_the_order_of_complexity():
    names = [*default_optimizers(), "StableGrad + SOAP", "my own"]
    assert sorted(reversed(names), key=complexity) == names
    assert complexity("SGD") < complexity("momentum") < complexity("Adam")


def test_rows_are_ordered_by_what_is_printed():
    rng = np.random.default_rng(0)
    arms = [runs_of(str(i), rng.exponential(size=8)) for i in range(6)]
    arms.append(runs_of("fails", [np.inf] * 5 + [0.0] * 3))
    result = compare(arms)
    printed = [float(line.split()[-5]) for line in table(result)]
    assert printed == sorted(printed)


def table(result):
    lines = str(result).split("\n\n", 1)[1].splitlines()
    return lines[1 : 1 + len(result.runs)]


def test_so_many_seeds_do_decide():
    """The test finds the difference four times in five with the estimated number."""
    rng = np.random.default_rng(0)
    first, second = rng.normal(0, 1, 4000), rng.normal(1, 1, 4000)
    num = seeds_to_decide(first, second, 2)
    # The larger sample sets a lower bound on the estimate, so Noether's formula is
    # taken at a small one with the same probability, 0.76.
    assert num == 4001
    quantiles = np.linspace(-1.6, 1.6, 9)
    num = seeds_to_decide(quantiles, quantiles + 1, 2)
    hits = sum(
        stats.mannwhitneyu(rng.normal(0, 1, num), rng.normal(1, 1, num)).pvalue < 0.05
        for _ in range(400)
    )
    assert 0.65 < hits / 400 < 0.95
    assert seeds_to_decide(second[:9], first[:9], 2) == np.inf


def test_a_short_repr():
    text = repr(runs_of("Muon", [1.0, np.inf, 2.0]))
    assert text == "OptimizerRuns('Muon', learning_rate=0.001, median=2, failed=1/3)"
    assert len(repr(trial())) < 300


# Its learning rates.


def test_rates_by_optimizer():
    names = ["clip + Muon", "AdamW (b2=0.9)", "mine"]
    default = learning_rates_by_name(names, None)
    assert max(default["clip + Muon"]) > max(default["mine"])
    assert default["mine"] == default["AdamW (b2=0.9)"]
    some = learning_rates_by_name(names, {"mine": [1.0, 0.1]})
    assert some == default | {"mine": [0.1, 1.0]}
    assert learning_rates_by_name(names, [0.5]) == {name: [0.5] for name in names}
    with pytest.raises(ValueError, match=r"keys of learning_rates.*'mine'.*got other"):
        learning_rates_by_name(names, {"other": [1.0]})


@pytest.mark.parametrize(
    ("rates", "chosen", "added"),
    [
        ([3e-4, 1e-3, 3e-3], 0, 1e-4),
        ([3e-4, 1e-3, 3e-3], 2, 1e-2),
        ([3e-4, 1e-3, 3e-3], 1, None),
        ([0.1, 0.2], 1, 0.4),
        ([0.1, 0.2], 0, 0.05),
        ([0.1], 0, None),
        ([1.0, 1e38], 1, None),  # it is not a number in float32
    ],
)
def test_one_more_rate_beyond_the_end(rates, chosen, added):
    assert next_rate(rates, chosen) == added


def test_one_more_rate_is_tried_and_reported():
    result = trial({"SGD": optax.sgd}, learning_rates=[1e-3, 1e-2], steps=30)
    assert result.best.learning_rates == (1e-3, 1e-2, 0.1)
    assert result.best.added_rate == result.best.learning_rate == 0.1
    assert result.best.tuning.shape == (3, 3)
    assert "one more was tried: 0.1." in words(result)


# The schedule, the compilation, the interruption.


def plain_loop(tx, evaluate, steps, batches, params):
    state = tx.init(params)

    @jax.jit
    def step(params, state, batch):
        grads = jax.grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for batch in batches[:steps]:
        params, state = step(params, state, batch)
    return loss_fn(evaluate(state, params), batches[0])


def sam(rate):
    towards = optax.chain(optax.contrib.normalize(), optax.sgd(0.5))
    return optax.contrib.sam(optax.sgd(rate), towards, sync_period=2)


def free(rate):
    return optax.contrib.schedule_free_adamw(rate)


def injected(rate):
    return optax.inject_hyperparams(optax.adam)(learning_rate=rate)


@pytest.mark.parametrize(
    "factory",
    [sam, optax.contrib.madgrad, optax.contrib.cocob, optax.fromage, free, injected],
)
def test_the_schedule_is_that_of_the_optimizer(factory):
    """The score is that of a plain loop with Optax's cosine as the learning rate."""
    steps, rate = 61, 0.1  # an odd number: SAM ends between its two points
    data, start = sample(jax.random.key(1)), init(jax.random.key(2))

    def evaluate(state, params):
        if factory is free:
            return optax.contrib.schedule_free_eval_params(state, params)
        return state.cache if factory is sam else params

    schedule = optax.cosine_decay_schedule(rate, steps)
    expected = plain_loop(factory(schedule), evaluate, steps, [data] * steps, start)
    result = trial(
        {"it": factory},
        init=lambda key: start,
        sample=data,
        learning_rates=[rate],
        steps=steps,
        num_seeds=1,
    )
    # Float32, in another order of operations.
    np.testing.assert_allclose(result.best.scores[0], expected, rtol=1e-3)


def test_sam_reaches_its_minimum():
    """Its updates lead back from the adversarial point, so they must not decay."""
    result = compare_optimizers(
        lambda params, x: jnp.mean((x @ (params["w"] - 1)) ** 2),
        lambda key: {"w": jax.random.normal(key, (8, 1))},
        lambda key: jax.random.normal(key, (16, 8)),
        {"SAM": sam},
        learning_rates=[0.1],
        steps=400,
        num_seeds=4,
        key=KEY,
    )
    assert result.best.median < 0.01


def test_what_cannot_be_judged_is_refused_by_name():
    def partly(rate):
        return optax.masked(free(rate), {"kernel": True, "bias": False})

    with pytest.raises(ValueError, match="cannot judge schedule_free") as caught:
        trial({"partly": partly})
    assert any("'partly'" in note for note in caught.value.__notes__)


def test_a_learning_rate_is_a_schedule_that_knows_its_number():
    def factory(rate):
        assert callable(rate)
        return optax.sgd(rate(0))  # no decay

    result = trial({"constant": factory, "cosine": optax.sgd}, learning_rates=[0.1])
    assert np.all(result["constant"].curves[:, 2] != result["cosine"].curves[:, 2])

    with pytest.raises(TypeError) as caught:
        trial({"SGD": lambda rate: optax.sgd(0.1 * rate)})
    assert any("rate(0)" in note for note in caught.value.__notes__)


def test_an_update_that_names_value_receives_it():
    def update(updates, state, params=None, *, value=None):
        factor = 0 if value is None else -0.01 * value
        return jax.tree.map(lambda x: x * factor, updates), state

    tx = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)
    result = trial({"it": lambda rate: tx}, learning_rates=[0.1], sample=sample(KEY))
    assert np.all(np.diff(result["it"].curves, axis=1) != 0)


def test_a_chain_is_trained_as_optax_chains_it():
    chain = default_optimizers()["clip + AdamW (b2=0.9)"]
    result = trial({"two programs": chain, "one": lambda rate: chain(rate)})
    # The same operations in two programs, whose rounding differs.
    np.testing.assert_allclose(
        result["two programs"].curves, result["one"].curves, rtol=1e-3
    )


def test_the_gradient_is_traced_once_and_each_part_of_a_chain_once(monkeypatch):
    traces, stages = [], []

    def counted(params, batch):
        traces.append(1)
        return loss_fn(params, batch)

    class CountedStage(Stage):
        def __init__(self, factory, programs, **kwargs):
            stages.append(factory)
            super().__init__(factory, programs, **kwargs)

    monkeypatch.setattr("stablegrad_optax._training.Stage", CountedStage)
    trial(default_optimizers(), loss_fn=counted, learning_rates=[0.01], steps=2)
    # One trace for the gradient and one for the score.
    assert len(traces) == 2
    # AdamW twice and Muon; clipping, normalizing, and StableGrad.
    assert len(stages) == 7


def test_nothing_stays_alive():
    class Data:
        def __init__(self):
            self.x = jax.random.normal(KEY, (1000, 3))

    data = Data()
    array = weakref.ref(data.x)
    alive = weakref.ref(data)

    def draw(key, data=data):
        x = data.x[jax.random.randint(key, (16,), 0, 1000)]
        return x, jnp.sum(x, axis=1, keepdims=True)

    optimizers = {"Adam": optax.adam, "polyak": lambda rate: optax.polyak_sgd(rate(0))}
    trial(optimizers, sample=draw)
    del data, draw
    gc.collect()
    assert alive() is None
    assert array() is None


@pytest.mark.parametrize("name", ["init", "sample"])
@pytest.mark.parametrize("compiled", [False, True])
def test_random_numbers_of_numpy_are_refused(name, compiled):
    rng = np.random.default_rng(0)
    functions = {
        "init": lambda key: init(key) | {"bias": jnp.asarray(rng.normal(size=1), "f4")},
        "sample": lambda key: (sample(key)[0] + rng.normal(), sample(key)[1]),
    }
    function = jax.jit(functions[name]) if compiled else functions[name]
    with pytest.raises(ValueError, match=f"{name} must depend on its key alone.*NumPy"):
        trial(**{name: function})


def test_something_must_be_random():
    data, start = sample(KEY), init(KEY)
    with pytest.raises(ValueError, match="init or sample must depend on its key"):
        trial(init=lambda key: start, sample=data)
    assert trial(sample=data).best.num_failed == 0
    assert trial(init=lambda key: start).best.num_failed == 0


def test_an_interruption_keeps_what_is_finished():
    def stop(done, total, name):
        if name == "two":
            raise KeyboardInterrupt

    optimizers = {"one": optax.sgd, "two": optax.adam, "three": optax.lion}
    result = trial(optimizers, callback=stop)
    assert [runs.name for runs in result.runs] == ["one"]
    assert result.unfinished == ("two", "three")
    assert "incomplete" in words(result)
    assert "two, three" in words(result)
    with pytest.raises(KeyboardInterrupt):
        trial({"two": optax.adam}, callback=stop)


def test_progress_is_printed_at_once_and_with_the_time_left(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    trial({"one": optax.sgd, "two": optax.sgd}, learning_rates=[0.1], progress=True)
    first, rest = stream.getvalue().split("\n", 1)
    assert first.startswith("2 optimizers, 8 runs of 20 steps, 4 side by side.")
    assert rest.startswith("\r4 of 8 runs, about ")
    assert "left (one)" in rest
    assert "8 of 8 runs" in rest
    stream.truncate(0)
    trial()  # not a terminal
    assert stream.getvalue().strip("\0") == ""
    stream.isatty = lambda: True
    trial()
    assert "runs of 20 steps" in stream.getvalue()


def test_too_few_seeds_are_reported_before_training():
    def never(key):
        raise RuntimeError("training has begun")

    with (
        pytest.warns(UserWarning, match="4 seeds cannot distinguish 11 optimizers"),
        pytest.raises(RuntimeError),
    ):
        compare_optimizers(loss_fn, never, sample, steps=9, num_seeds=4, key=KEY)


# What users bring along.


def linen():
    model = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(1)])

    def init(key):
        return model.init(key, jnp.ones((1, 3)))["params"]

    return init, lambda params, x: model.apply({"params": params}, x)


def equinox():
    def make(key):
        return eqx.nn.MLP(3, 1, 8, 1, jnp.tanh, key=key)

    static = eqx.partition(make(jax.random.key(0)), eqx.is_inexact_array)[1]

    def init(key):
        return eqx.filter(make(key), eqx.is_inexact_array)

    return init, lambda params, x: jax.vmap(eqx.combine(params, static))(x)


def flax_nnx():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(3, 8, rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.out = nnx.Linear(8, 1, rngs=rngs)

        def __call__(self, x):
            return self.out(jnp.tanh(self.norm(self.hidden(x))))

    graphdef, _, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)

    def init(key):
        return nnx.state(Model(nnx.Rngs(key)), nnx.Param)

    return init, lambda params, x: nnx.merge(graphdef, params, rest, copy=True)(x)


@pytest.mark.parametrize(
    "library", [linen, equinox, pytest.param(flax_nnx, marks=pytest.mark.slow)]
)
def test_recipes(library):
    init, predict = library()

    def loss_fn(params, batch):
        x, y = batch
        return jnp.mean((predict(params, x) - y) ** 2)

    chosen = ("StableGrad + AdamW (b2=0.9)", "StableGrad + Muon")
    optimizers = {name: default_optimizers()[name] for name in chosen}
    result = trial(optimizers, init=init, loss_fn=loss_fn, steps=50)
    for runs in result.runs:
        assert runs.num_failed == 0
        assert np.all(runs.curves[:, -1] < runs.curves[:, 0])


def test_muon_leaves_kernels_of_more_axes_to_adam_by_default():
    """And orthogonalizes them where it is told how."""
    kernel = jax.random.normal(KEY, (3, 3, 2, 4))

    def kernels_as_matrices(params):
        def numbers(leaf):
            axes = tuple(range(leaf.ndim - 1))
            return optax.contrib.MuonDimensionNumbers(axes, leaf.ndim - 1)

        return jax.tree.map(numbers, params)

    def singular_values(optimizers):
        tx = optimizers["Muon"](1.0)
        update, _ = tx.update({"w": kernel}, tx.init({"w": kernel}), {"w": kernel})
        return np.linalg.svd(update["w"].reshape(-1, 4), compute_uv=False)

    plain = singular_values(default_optimizers())
    told = singular_values(default_optimizers(kernels_as_matrices))
    assert told.max() / told.min() < 1.8  # five steps of Newton and Schulz: 0.7 to 1.2
    assert plain.max() / plain.min() > 1.8


# What can be wrong with it.


def test_bad_losses():
    with pytest.raises(
        ValueError, match=r"loss_fn must return a real scalar.*\(16, 1\)"
    ):
        trial(loss_fn=lambda params, batch: predict(params, batch[0]))
    with pytest.raises(ValueError, match="loss_fn must return a real scalar"):
        trial(loss_fn=lambda params, batch: (loss_fn(params, batch), 0))
    with pytest.raises(ValueError, match="score must return a real scalar"):
        trial(score=lambda params: params["kernel"])
    with pytest.raises(ValueError, match=r"must be finite.*nan on each of 3 seeds"):
        trial(loss_fn=lambda params, batch: loss_fn(params, batch) * jnp.nan)

    def kink(params, batch):
        return loss_fn(params, batch) + jnp.sum(jnp.sqrt(0 * params["bias"]))

    with pytest.raises(ValueError, match=r"gradient of loss_fn.*in leaf 'bias'"):
        trial(loss_fn=kink)


def test_bad_parameters():
    def with_count(key):
        return {**init(key), "count": jnp.zeros((), int)}

    with pytest.raises(ValueError, match=r"floating arrays alone; got int32.*'count'"):
        trial(init=with_count)
    with pytest.raises(ValueError, match=r"floating arrays alone.*'act'"):
        trial(init=lambda key: {**init(key), "act": jnp.tanh})
    with pytest.raises(ValueError, match="got no leaves"):
        trial(init=lambda key: {})


def test_bad_arguments():
    for name in ("steps", "num_seeds", "num_tuning_seeds", "parallel"):
        for value in (0, 1.5, True):
            with pytest.raises(ValueError, match=f"{name} must be an integer"):
                trial(**{name: value})
    for rates in ([0.0], [-1.0, 1.0], [np.nan], [1e-50], 1e-2, "1e-2"):
        with pytest.raises(ValueError, match="learning_rates must be"):
            trial(learning_rates=rates)
    with pytest.raises(ValueError, match="learning_rates must have"):
        trial(learning_rates=[])
    for optimizers in ({}, [optax.adam], optax.adam(1e-3)):
        with pytest.raises(ValueError, match="optimizers must be a dict"):
            trial(optimizers)
    with pytest.raises(ValueError, match=r"optimizers\['Adam'\] must be a function"):
        trial({"Adam": optax.adam(1e-3)})
    with pytest.raises(ValueError, match="function of the learning rate that"):
        trial({"odd": lambda rate: 3})
    with pytest.raises(ValueError, match="names of optimizers must be strings; got 1"):
        trial({1: optax.adam})
    with pytest.raises(ValueError, match="key must be a key"):
        trial(key=0)


def test_an_error_names_its_optimizer():
    def broken(rate):
        raise RuntimeError("no such thing")

    with pytest.raises(RuntimeError) as caught:
        trial({"Adam": optax.adam, "broken": broken})
    assert any("The optimizer was 'broken'" in x for x in caught.value.__notes__)

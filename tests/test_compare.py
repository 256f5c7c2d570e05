"""The trial of several optimizers: its runs, its choices and what it says of them."""

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
from stablegrad_optax._comparison import (
    Comparison,
    OptimizerRuns,
    choose_rate,
    compare,
    rank_test,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

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
    return compare_optimizers(optimizers=optimizers, **(arguments | kwargs))


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
        num_seeds=2,
    )
    # Float32, in another order of operations.
    np.testing.assert_allclose(result.curves["AdamW"], [losses] * 2, rtol=1e-4)
    np.testing.assert_allclose(
        result.best.scores, [loss_fn(params, data)] * 2, rtol=1e-4
    )
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
    chosen = result.best.tuning[[0.1, 0.2].index(result.best.learning_rate)]
    assert not set(chosen.tolist()) & set(result.best.scores.tolist())


def test_a_score_of_ones_own():
    def score(params):
        return jnp.sum(jnp.abs(params["kernel"] - 1.0))

    result = trial(score=score, steps=300, learning_rates=[0.1])
    assert result.best.median < 0.01


def test_runs_that_are_not_finite_fail_and_do_not_stop_the_others():
    result = trial(
        {"SGD": optax.sgd}, learning_rates=[0.01, 0.1, 1e6], steps=60, num_seeds=3
    )
    assert np.all(np.isinf(result.best.tuning[-1]))
    # 0.1 beside the cliff has no margin.
    assert result.best.learning_rate == 0.01
    assert result.best.num_failed == 0

    everywhere = trial({"SGD": optax.sgd}, learning_rates=[1e6, 1e7], steps=60)
    assert everywhere.best.num_failed == 4
    assert "Every run failed" in str(everywhere)
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

    result = trial({"line search": search, "Polyak": optax.polyak_sgd})
    assert all(runs.num_failed == 0 for runs in result.runs)


def test_progress():
    told = []
    trial(
        {"one": optax.sgd, "two": optax.sgd},
        num_tuning_seeds=2,
        parallel=3,
        callback=lambda *args: told.append(args),
    )
    # 2 rates x 2 seeds and 4 fresh ones, three at a time.
    counts = [3, 4, 7, 8]
    assert told == [(n, 16, "one") for n in counts] + [
        (8 + n, 16, "two") for n in counts
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


def runs_of(name, scores, **kwargs):
    scores = np.asarray(scores, float)
    given = {
        "learning_rate": 1e-3,
        "rate_at_edge": False,
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
    assert "do not tell" in str(result)
    alone = compare([runs_of("a", range(8)), runs_of("b", range(10, 18))])
    assert alone.level == ("a",)
    assert "a did best: 8 seeds tell it apart" in str(alone)


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
    text = " ".join(str(result).split())
    assert "5 seeds are too few to tell 8 optimizers apart: 7 are needed" in text


# What it prints.


def test_a_printout_fits_80_columns():
    arms = [
        runs_of(
            f"{name} before an optimizer of a long name",
            [1.23456e-5, 123456.0, np.inf],
            learning_rate=3.16e-4,
            rate_at_edge=True,
            ms_per_step=12.345,
        )
        for name in ("clip", "StableGrad", "none")
    ]
    text = str(compare(arms))
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "clip befor...a long name" in text
    assert "*  at the end of the rates" in text
    default = [runs_of(name, range(8)) for name in default_optimizers()]
    text = str(compare(default))
    assert all(len(line) <= 80 for line in text.splitlines())
    assert all(name in text for name in default_optimizers())


def test_the_simplest_of_the_level_ones_is_named():
    arms = [runs_of("plain", np.arange(8) + 0.5), runs_of("fancy", range(8))]
    result = compare(arms)
    assert isinstance(result, Comparison)
    assert result.best.name == "fancy"
    assert result.level == ("plain", "fancy")
    assert "The first of these that was named, plain, will do." in " ".join(
        str(result).split()
    )


# What users bring along.


def of_linen():
    model = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(1)])

    def init(key):
        return model.init(key, jnp.ones((1, 3)))["params"]

    return init, lambda params, x: model.apply({"params": params}, x)


def of_equinox():
    def make(key):
        return eqx.nn.MLP(3, 1, 8, 1, jnp.tanh, key=key)

    static = eqx.partition(make(jax.random.key(0)), eqx.is_inexact_array)[1]

    def init(key):
        return eqx.filter(make(key), eqx.is_inexact_array)

    return init, lambda params, x: jax.vmap(eqx.combine(params, static))(x)


def of_nnx():
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
    "library", [of_linen, of_equinox, pytest.param(of_nnx, marks=pytest.mark.slow)]
)
def test_recipes(library):
    init, predict = library()

    def loss_fn(params, batch):
        x, y = batch
        return jnp.mean((predict(params, x) - y) ** 2)

    chosen = ("StableGrad + AdamW b2=.9", "StableGrad + Muon")
    optimizers = {name: default_optimizers()[name] for name in chosen}
    result = trial(optimizers, init=init, loss_fn=loss_fn, steps=50)
    for runs in result.runs:
        assert runs.num_failed == 0
        assert np.all(runs.curves[:, -1] < runs.curves[:, 0])


def test_muon_leaves_kernels_of_more_axes_to_adam_by_default():
    """And orthogonalizes them where it is told how."""
    kernel = jax.random.normal(KEY, (3, 3, 2, 4))

    def of_cnn(params):
        def numbers(leaf):
            axes = tuple(range(leaf.ndim - 1))
            return optax.contrib.MuonDimensionNumbers(axes, leaf.ndim - 1)

        return jax.tree.map(numbers, params)

    def singular_values(optimizers):
        tx = optimizers["Muon"](1.0)
        update, _ = tx.update({"w": kernel}, tx.init({"w": kernel}), {"w": kernel})
        return np.linalg.svd(update["w"].reshape(-1, 4), compute_uv=False)

    plain = singular_values(default_optimizers())
    told = singular_values(default_optimizers(of_cnn))
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
    assert "While optimizer 'broken' was tried." in caught.value.__notes__

"""The comparison of initializers: its network, its equations, its page."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.lib.curves import train_together
from benchmarks.lib.optimizers import Optimizer
from benchmarks.lib.train import Rule, Training
from benchmarks.report.scores import Score
from benchmarks.suites import initializers, initializers_page
from benchmarks.tasks.pinn.ansatz import derivatives_of
from benchmarks.tasks.pinn.network import Network
from benchmarks.tasks.pinn.problems import PROBLEMS
from benchmarks.tasks.pinn.scanned import Scanned
from benchmarks.tasks.pinn.task import Pinn, evaluation

SOLUTIONS = {
    "wave": lambda p: jnp.sin(jnp.pi * p[..., 0]) * jnp.cos(jnp.pi * p[..., 1]),
    "reaction-diffusion": lambda p: (
        jax.nn.sigmoid(10 / 3 * p[..., 1] - (400 / 6) ** 0.5 * p[..., 0]) ** 2
    ),
}


@pytest.mark.parametrize("name", SOLUTIONS)
def test_the_solution_fulfils_every_term(name):
    problem = PROBLEMS[name]()
    points = problem.sample(jax.random.key(0))
    for term in problem.terms:
        x = points[term.name]
        residual = term.residual(x, derivatives_of(SOLUTIONS[name], x, term.second))
        # Second derivatives of order 100 in float32.
        np.testing.assert_allclose(residual, 0, atol=1e-3)
    axes = problem.axes()
    grid = jnp.stack(jnp.meshgrid(*axes, indexing="ij"), -1)
    np.testing.assert_allclose(
        SOLUTIONS[name](grid), problem.solution(*axes), atol=1e-5
    )


@pytest.mark.parametrize("second", [None, (), ((1.0, 0.5),)])
def test_stacked_layers_are_the_same_network(second):
    key, points = jax.random.key(0), jax.random.uniform(jax.random.key(1), (5, 2))
    plain, scanned = Network(6, 8), Scanned(6, 8)
    expected = plain.derivatives(plain.init(key), points, second)
    got = scanned.derivatives(scanned.init(key), points, second)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4), got, expected
    )


def test_a_history_has_stacked_layers_one_by_one():
    """Muon and StableGrad train them as they train separate layers."""
    problem = PROBLEMS["poisson"]()
    histories = train_together(
        {
            type(network).__name__: Training(
                Pinn(problem, network),
                Rule(Optimizer.named("StableGrad + Muon"), 3),
                [1, 3],
                evaluation(problem),
            )
            for network in (Network(11, 4), Scanned(11, 4))
        },
        rate=1e-3,
        seed=0,
    )
    plain, stacked = histories["Network"], histories["Scanned"]
    for expected, got in ((plain.stds, stacked.stds), (plain.scaled, stacked.scaled)):
        assert len(got) == 12  # "dense_10" comes after "dense_9"
        # Two programs round differently, and three steps of Muon enlarge that.
        np.testing.assert_allclose(
            list(got.values()), list(expected.values()), rtol=1e-3
        )


def test_initializers_share_a_program_and_draw_with_their_gains():
    made = initializers.initializers("tanh")
    networks = [
        initializers.Initialized(50, initializer="uniform", weights=w)
        for w in made.values()
    ]
    assert len(set(networks)) == 1
    gains = (3**-0.5, 1, 2**0.5, 1, 1.891)
    for (name, network), gain in zip(
        zip(made, networks, strict=True), gains, strict=True
    ):
        params = network.init(jax.random.key(0))
        std = params["layer_1_stack_"]["kernel"].std()
        # 48 layers of 1024 weights: 1 % is three standard errors.
        np.testing.assert_allclose(std * 32**0.5, gain, rtol=0.01)
        np.testing.assert_allclose(initializers.gain("tanh", name), gain, rtol=0.01)
    assert not params["layer_1_stack_"]["bias"].any()
    assert list(initializers.initializers("gelu")) == [
        name for name in made if "gradient" not in name
    ]


def line(activation, initializer, depth, equation, verdict, loss_ratio):
    problem = activation, depth, equation, initializer, 500
    return dict(
        zip(initializers_page.PAGE.problem, problem, strict=True),
        verdict=verdict,
        loss_ratio=loss_ratio,
    )


def test_the_page_names_what_meets_all_three_criteria():
    healthy = "no trouble seen"
    measured = [
        line("tanh", "Glorot", 8, "poisson", healthy, 2.0),
        line("tanh", "Glorot", 8, "wave", healthy, 99.0),
        line("tanh", "He", 8, "poisson", healthy, 101.0),
        line("tanh", "Equinox's default", 8, "poisson", "vanishing", 1.0),
        line("sin", "Glorot", 8, "poisson", healthy, 1.0),
        line("sin", "He", 8, "poisson", healthy, None),
        line("sin", "preserve='signal'", 8, "poisson", healthy, 1.0),
    ]

    def problem(record):
        return tuple(record[name] for name in initializers_page.PAGE.problem)

    def score(*failed):
        return Score(tuple({"error": 0.1, "failed": f} for f in failed))

    table = {problem(record): {"Adam": score(False, False)} for record in measured}
    table[problem(measured[4])] = {"Adam": score(False, True)}
    del table[problem(measured[6])]
    text = initializers_page.ending(measured, {"cpu": table})
    assert "| tanh | 8 | Glorot | none |" in text
    assert "| sin | 8 | none | preserve='signal' |" in text
    assert "| Glorot | 1 | 8 | 2/2 | 99 | 0/4 | 0.1 | yes |" in text
    assert "| Glorot | 1 | 8 | 1/1 | 1 | 1/2 | 0.1 | no |" in text
    assert "| preserve='signal' | 1.18 | 8 | 1/1 | 1 | - | - | not trained |" in text

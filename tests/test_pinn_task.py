"""A PINN's gradient in parts and its probes; batches of runs of the training loop."""

import jax
import numpy as np
import pytest

from benchmarks.lib.curves import train_batch, train_together
from benchmarks.lib.optimizers import Optimizer
from benchmarks.lib.runs import Run
from benchmarks.lib.train import Rule, Training, record_steps
from benchmarks.suites import pinn
from benchmarks.tasks.pinn.network import Network
from benchmarks.tasks.pinn.problems import PROBLEMS
from benchmarks.tasks.pinn.task import Pinn, evaluation
from stablegrad_optax import prediction_grad_std, value_and_grad_with_prediction_std

SETTINGS = {
    "equation": "poisson",
    "depth": 10,  # "dense_10" sorts before "dense_2"
    "width": 8,
    "activation": "tanh",
    "init": "normal 5/3",
    "steps": 12,
    "optimizer": "StableGrad (reference: residuals) + AdamW",
}


@pytest.fixture(scope="module")
def small():
    """A problem, a network, weights, points and what their gradient is."""
    task = Pinn(PROBLEMS["burgers"](), Network(2, 8))
    params = task.network.init(jax.random.key(0))
    points = task.problem.sample(jax.random.key(1))
    found = jax.jit(task.gradient_at)(params, points)
    return task.problem, task.network, params, points, found


def test_the_gradient_in_parts_is_the_gradient_of_the_loss(small):
    problem, network, params, points, found = small

    def loss(params):
        def evaluate(points, second):
            return network.derivatives(params, points, second)

        return problem.loss(evaluate, points)

    expected, expected_grads = jax.jit(jax.value_and_grad(loss))(params)
    value, grads, _, _ = found
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        grads,
        expected_grads,
    )


def test_the_field_probe_is_the_gradient_of_an_additive_probe(small):
    problem, network, params, points, found = small

    def loss(probes):
        fields = problem.fields(
            lambda points, second: network.derivatives(params, points, second), points
        )
        fields = {
            term: field._replace(value=field.value + probes[term])
            for term, field in fields.items()
        }
        return problem.weigh(problem.residuals(fields, points))

    zeros = {term: jax.numpy.zeros(len(at)) for term, at in points.items()}
    expected = prediction_grad_std(jax.jit(jax.grad(loss))(zeros))
    assert float(found.probes["field"]) == pytest.approx(float(expected), rel=1e-4)


def test_the_residual_probe_is_the_packages_recipe(small):
    problem, network, params, points, found = small

    def residuals(params, points):
        def evaluate(points, second):
            return network.derivatives(params, points, second)

        return problem.residuals(problem.fields(evaluate, points), points)

    recipe = value_and_grad_with_prediction_std(residuals, problem.weigh)
    _, _, expected = jax.jit(recipe)(params, points)
    assert float(found.probes["residuals"]) == pytest.approx(float(expected))


def test_poissons_interior_does_not_depend_on_u_itself():
    """Its field probe is that of the boundary's 32 points and of 64 zeros."""
    task = Pinn(PROBLEMS["poisson"](), Network(1, 4))
    params = task.network.init(jax.random.key(0))
    points = task.problem.sample(jax.random.key(1))
    u = task.network.apply(params, points["boundary"])
    expected = np.concatenate([2 * 100 * u / 32, np.zeros(64)]).std()
    found = jax.jit(task.gradient_at)(params, points).probes["field"]
    assert float(found) == pytest.approx(expected, rel=1e-4)


# Batches


def test_runs_side_by_side_are_those_of_one_alone():
    """Two programs for one training: their rounding differs, little else may."""
    two = [Run(SETTINGS, 1e-3, seed, "reported") for seed in (3, 4)]
    ticks = []
    records = train_batch(
        pinn.training, pinn.SUITE.keep, two, lambda: ticks.append(None)
    )
    name, problem = SETTINGS["optimizer"], PROBLEMS["poisson"]()
    for run, record in zip(two, records, strict=True):
        training = Training(
            Pinn(problem, Network(10, 8)),
            Rule(Optimizer.named(name), 12),
            record_steps(12),
            evaluation(problem),
        )
        history = train_together({name: training}, rate=1e-3, seed=run.seed)[name]
        error = history.scores["error"][-1]
        assert record["error"] == pytest.approx(error, rel=1e-3)
        assert record["failed"] == (error > 0.5)
        assert record["ms_per_step"] > 0
        assert record["curve"]["step"][-1] == 12
        assert record["curve"]["error"][-1] == pytest.approx(error, rel=1e-2)
    assert len(ticks) == len(records[0]["curve"]["step"])
    assert list(history.stds) == [f"dense_{i}/kernel" for i in range(11)]


def test_initial_weights_and_rates_may_be_mixed_in_a_batch():
    both = [
        Run({**SETTINGS, "init": init}, rate, 3, "tuning")
        for init, rate in (("uniform", 1e-3), ("glorot", 3e-3))
    ]
    together = train_batch(pinn.training, pinn.SUITE.keep, both, lambda: None)
    for run, record in zip(both, together, strict=True):
        # Of the same shape, so that nothing is compiled anew.
        alone, _ = train_batch(pinn.training, pinn.SUITE.keep, [run, run], lambda: None)
        assert record["error"] == pytest.approx(alone["error"], rel=1e-5)
        assert "curve" not in record


def test_optimizers_start_alike_and_record_gradients_before_and_after_scaling():
    problem = PROBLEMS["poisson"]()
    names = ("AdamW", "StableGrad + AdamW")
    trainings = {
        name: Training(
            Pinn(problem, Network(2, 8)),
            Rule(Optimizer.named(name), 12),
            record_steps(12),
            evaluation(problem),
        )
        for name in names
    }
    plain, scaled = train_together(trainings, rate=1e-3, seed=0).values()
    assert not plain.scaled
    assert list(scaled.scaled) == [f"dense_{layer}/kernel" for layer in range(3)]
    for kernel, std in plain.stds.items():
        # The gradient of the first step is that of the same weights on the same points.
        assert std[0] == pytest.approx(scaled.stds[kernel][0], rel=1e-5)
    # The factor is 1 / max(std, rms / 10): 1 after it unless the mean exceeds ten
    # standard deviations.
    for std in scaled.scaled.values():
        np.testing.assert_allclose(std, 1, rtol=1e-4)


def test_a_program_is_compiled_for_the_shape_of_a_network_alone():
    tasks = [
        pinn.training({**SETTINGS, "init": init}, "tuning").task for init in pinn.INITS
    ]
    assert len({jax.tree.structure(task) for task in tasks}) == 1
    first, other = (task.init(jax.random.key(0))[0] for task in tasks[:2])
    assert not np.array_equal(first["dense_1"]["kernel"], other["dense_1"]["kernel"])


@pytest.mark.parametrize("steps", [1, 2, 7, 60, 1500])
def test_records_end_with_the_last_step(steps):
    at = record_steps(steps)
    assert at[0] == 1
    assert at[-1] == steps
    assert np.all(np.diff(at) > 0)

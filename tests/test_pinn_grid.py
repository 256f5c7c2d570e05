"""The PINN grid: its arms, its batches, its command from end to end."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.pinn import __main__ as command
from benchmarks.pinn import batch
from benchmarks.pinn.arms import ARMS, OPTIMIZERS
from benchmarks.pinn.gradient import value_and_grads
from benchmarks.pinn.network import Network
from benchmarks.pinn.presets import PRESETS
from benchmarks.pinn.problems import PROBLEMS
from benchmarks.pinn.train import Cell, train
from benchmarks.runs import Run
from stablegrad_optax import prediction_grad_std, value_and_grad_with_prediction_std

SETTINGS = {
    "problem": "poisson",
    "depth": 2,
    "width": 8,
    "activation": "tanh",
    "init": "normal 5/3",
    "steps": 12,
}
TWO_ARMS = ("AdamW", "StableGrad, probe on residuals")


@pytest.fixture(scope="module")
def small():
    """A problem, a network, weights, points and what their gradient is."""
    problem, network = PROBLEMS["burgers"](), Network(2, 8)
    params = network.init(jax.random.key(0))
    points = problem.sample(jax.random.key(1))
    gradient = jax.jit(value_and_grads, static_argnums=(0, 1))
    return problem, network, params, points, gradient(problem, network, params, points)


def test_the_gradient_in_parts_is_the_gradient_of_the_loss(small):
    problem, network, params, points, (value, grads, prediction_grads) = small

    def loss(params, probe=0.0):
        def evaluate(points, second):
            u = network.derivatives(params, points, second)
            return u._replace(value=u.value + probe)

        return problem.loss(evaluate, points)

    expected, expected_grads = jax.jit(jax.value_and_grad(loss))(params)
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        grads,
        expected_grads,
    )
    # One probe on u everywhere has the sum of all entries as its derivative.
    total = sum(grad.sum() for grad in prediction_grads.field.values())
    slope = jax.jit(jax.grad(loss, 1))(params, 0.0)
    assert float(total) == pytest.approx(float(slope), rel=1e-4)


def test_the_residual_probe_is_the_packages_recipe(small):
    problem, network, params, points, (_, _, prediction_grads) = small

    def residuals(params, points):
        def evaluate(points, second):
            return network.derivatives(params, points, second)

        return problem.residuals(problem.fields(evaluate, points), points)

    recipe = value_and_grad_with_prediction_std(residuals, problem.weigh)
    _, _, expected = jax.jit(recipe)(params, points)
    std = prediction_grad_std(prediction_grads.residuals)
    assert float(std) == pytest.approx(float(expected))


def test_poissons_interior_does_not_depend_on_u_itself():
    problem, network = PROBLEMS["poisson"](), Network(1, 4)
    params = network.init(jax.random.key(0))
    points = problem.sample(jax.random.key(1))
    _, _, prediction_grads = value_and_grads(problem, network, params, points)
    assert not prediction_grads.field["equation"].any()
    assert prediction_grads.field["boundary"].all()


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_makes_a_finite_first_step(arm, small):
    _, _, params, _, (_, grads, prediction_grads) = small
    assert len(ARMS[arm].learning_rates) == 3
    assert ARMS[arm].optimizer in OPTIMIZERS
    tx = ARMS[arm](lambda count: 1e-3)

    def step(params, grads, prediction_grads):
        return tx.update(
            grads, tx.init(params), params, prediction_grads=prediction_grads
        )

    updates, _ = jax.jit(step)(params, grads, prediction_grads)
    for update in jax.tree.leaves(updates):
        assert jnp.isfinite(update).all()
    assert any(update.any() for update in jax.tree.leaves(updates))


@pytest.mark.parametrize("arm", TWO_ARMS)
def test_a_batch_does_what_train_does(arm):
    """Two programs for one training: their rounding differs, little else may."""
    runs = [
        Run({**SETTINGS, "arm": arm}, 1e-3, seed, "reported", detailed=seed == 4)
        for seed in (3, 4)
    ]
    ticks = []
    records = batch.train_batch(runs, lambda: ticks.append(None))
    cell = Cell(PROBLEMS["poisson"](), Network(2, 8), (arm,), 1e-3, 12)
    for run, record in zip(runs, records, strict=True):
        _, history = train(cell, run.seed)
        error = history.error[arm][-1]
        assert record["error"] == pytest.approx(error, rel=1e-3)
        assert record["failed"] == (error > 0.5)
        assert record["ms_per_step"] > 0
        assert record["curve"]["step"][-1] == 12
        assert record["curve"]["error"][-1] == pytest.approx(error, rel=1e-2)
    assert len(ticks) == len(records[0]["curve"]["step"])
    assert "layers" not in records[0]
    layers = np.array(records[1]["layers"])
    assert layers.shape == (len(ticks), 3)
    for layer in range(3):
        std = history.grad_std[arm][f"dense_{layer}/kernel"][-1]
        assert layers[-1, layer] == pytest.approx(np.log10(std), abs=0.06)


def test_initializers_and_rates_may_be_mixed_in_a_batch():
    both = [
        Run({**SETTINGS, "init": init, "arm": "AdamW"}, rate, 3, "tuning")
        for init, rate in (("uniform", 1e-3), ("glorot", 3e-3))
    ]
    together = batch.train_batch(both, lambda: None)
    for run, record in zip(both, together, strict=True):
        # Of the same shape, so that nothing is compiled anew.
        alone, _ = batch.train_batch([run, run], lambda: None)
        assert record["error"] == pytest.approx(alone["error"], rel=1e-5)
        assert "curve" not in record


def test_presets_are_what_the_help_says():
    cpu = PRESETS["cpu"]
    cells = {dataclasses.replace(cell) for cell in cpu.cells}
    assert len(cells) == len(cpu.cells) == 27
    assert len({len(group) for group in cpu.groups("cpu")}) == 1
    for preset in PRESETS.values():
        seeds = preset.protocol
        assert not set(seeds.tuning_seeds) & set(seeds.reported_seeds)
        assert set(preset.arms) <= set(ARMS)
    assert len(cpu.protocol.reported_seeds) >= 5
    assert {len(group) for group in PRESETS["gpu"].groups("gpu")} == {6}
    (question,) = {
        len(entry.learning_rates)
        for group in PRESETS["twenty-seeds"].groups("twenty-seeds")
        for entry in group
    }
    assert question == 1


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--preset", "huge"], "smoke"),
        (["--minutes", "0"], "--minutes must be above 0, got 0"),
        (["--workers", "0"], "--workers must be at least 1, got 0"),
    ],
)
def test_a_wrong_value_is_refused_in_one_line(args, words, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(args)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line

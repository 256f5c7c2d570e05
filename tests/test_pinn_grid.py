"""The PINN grid: its arms, its batches, its command from end to end."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import report, runs
from benchmarks.pinn import __main__ as command
from benchmarks.pinn import batch
from benchmarks.pinn.arms import ARMS, OPTIMIZERS
from benchmarks.pinn.gradient import PredictionGrads, value_and_grads
from benchmarks.pinn.network import Network
from benchmarks.pinn.presets import PRESETS
from benchmarks.pinn.problems import PROBLEMS
from benchmarks.pinn.train import Cell, train
from benchmarks.runs import Run
from stablegrad_optax import prediction_grad_std, value_and_grad_with_prediction_std

pytestmark = pytest.mark.usefixtures("quick_compilation")

SETTINGS = {
    "problem": "poisson",
    "depth": 2,
    "width": 8,
    "activation": "tanh",
    "init": "normal 5/3",
    "steps": 12,
}
ARM = "StableGrad, probe on residuals"


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

    @jax.jit
    def field_grads(key):
        points = problem.sample(key)
        return value_and_grads(problem, network, network.init(key), points)[2].field

    of_u = field_grads(jax.random.key(0))
    assert not of_u["equation"].any()
    assert of_u["boundary"].all()


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_makes_a_finite_first_step(arm):
    rates = ARMS[arm].learning_rates
    assert len(rates) >= 3
    assert list(rates) == sorted(set(rates))
    assert rates[-1] > 10 * rates[0]  # one decade ended below the best of shallow nets
    assert ARMS[arm].optimizer in OPTIMIZERS
    tx = ARMS[arm](lambda count: 1e-3)
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
    grads = {"kernel": jnp.arange(6.0).reshape(3, 2), "bias": jnp.array([1e4, -1e-4])}
    prediction = {"equation": jnp.array([1.0, 2.0]), "boundary": jnp.array([-5.0])}

    @jax.jit
    def step(params, grads, prediction_grads):
        return tx.update(
            grads, tx.init(params), params, prediction_grads=prediction_grads
        )

    updates, _ = step(params, grads, PredictionGrads(prediction, prediction))
    for update in jax.tree.leaves(updates):
        assert jnp.isfinite(update).all()
        assert update.any()


def test_a_batch_does_what_train_does():
    """Two programs for one training: their rounding differs, little else may."""
    settings = {
        **SETTINGS,
        "depth": 10,
        "arm": ARM,
    }  # "dense_10" sorts before "dense_2"
    two = [Run(settings, 1e-3, seed, "reported", detailed=seed == 4) for seed in (3, 4)]
    ticks = []
    records = batch.train_batch(two, lambda: ticks.append(None))
    cell = Cell(PROBLEMS["poisson"](), Network(10, 8), (ARM,), 1e-3, 12)
    for run, record in zip(two, records, strict=True):
        _, history = train(cell, run.seed)
        error = history.error[ARM][-1]
        assert record["error"] == pytest.approx(error, rel=1e-3)
        assert record["failed"] == (error > 0.5)
        assert record["ms_per_step"] > 0
        assert record["curve"]["step"][-1] == 12
        assert record["curve"]["error"][-1] == pytest.approx(error, rel=1e-2)
    assert len(ticks) == len(records[0]["curve"]["step"])
    assert "layers" not in records[0]
    layers = np.array(records[1]["layers"])
    assert layers.shape == (len(ticks), 11)
    assert list(history.grad_std[ARM]) == [f"dense_{i}/kernel" for i in range(11)]
    for layer in range(11):
        std = history.grad_std[ARM][f"dense_{layer}/kernel"][-1]
        assert layers[-1, layer] == pytest.approx(np.log10(std), abs=0.06)


def test_initializers_and_rates_may_be_mixed_in_a_batch():
    both = [
        Run({**SETTINGS, "init": init, "arm": ARM}, rate, 3, "tuning")
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
    assert len(cells) == len(cpu.cells) == 25
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


def test_smoke_runs_resumes_and_reports(tmp_path, capsys, monkeypatch):
    path = tmp_path / "pinn.jsonl"
    args = ["--preset", "smoke", "--results", str(path)]
    assert command.main(args) == 0
    records = runs.read(path)
    preset = PRESETS["smoke"]
    num_rates = [len(ARMS[arm].learning_rates) for arm in preset.arms]
    num_runs = 2 * sum(rates + 3 for rates in num_rates)
    assert len(records) == num_runs
    keys = (
        "problem depth width activation init optimizer arm learning_rate seed steps "
        "error failed ms_per_step device jax date phase"
    )
    assert set(keys.split()) <= records[0].keys()
    for cell in preset.cells:
        for arm in preset.arms:
            reported = [
                r
                for r in records
                if (r["init"], r["arm"], r["phase"]) == (cell.init, arm, "reported")
            ]
            assert [r["seed"] for r in reported] == [100, 101, 102]
            assert len({r["learning_rate"] for r in reported}) == 1
            assert ["layers" in r for r in reported] == [True, False, False]

    def refuse(*args):
        raise AssertionError("nothing is left to compute")

    monkeypatch.setattr(command, "train_batch", refuse)
    assert command.main(args) == 0
    assert runs.read(path) == records
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert last_line.startswith(f"{num_runs} of {num_runs} runs")

    assert report.main(["pinn", "--results", str(path)]) == 0
    names = sorted(file.name for file in tmp_path.iterdir())
    figures = [f"pinn_smoke_{name}.png" for name in ("curves", "depth", "layers")]
    assert set(figures) <= set(names)
    text = (tmp_path / "pinn.md").read_text()
    for word in (*preset.arms, "reported seeds 100 to 102", "jax", *figures):
        assert word in text

"""The demo's code path with few steps, its refusals, and, slowly, its claim."""

import os
import re

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.io
from rich.console import Console

import stablegrad_optax
from benchmarks import demo, figures
from benchmarks.pinn.network import Network
from benchmarks.pinn.problems import PROBLEMS
from benchmarks.pinn.references import cole_hopf
from benchmarks.pinn.train import Cell, advance, record_steps, start, train

pytestmark = pytest.mark.usefixtures("quick_compilation")

# One object for the tests that train it: its program is compiled once.
TWO_ARMS = Cell(
    PROBLEMS["poisson"](), Network(2, 8), ("AdamW", "StableGrad + AdamW"), 1e-3, 12
)
SMALL = ["--depth", "2", "--width", "4", "--steps", "5"]


def test_a_short_run_prints_every_arm_and_saves_a_figure(tmp_path, capsys):
    path = tmp_path / "made" / "figure.png"
    assert demo.main([*SMALL, "--output", str(path)]) == 0
    printed = capsys.readouterr().out
    for arm in demo.ARMS:
        assert re.search(rf"{re.escape(arm)} .*(failed|solved)", printed)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert os.listdir(path.parent) == ["figure.png"]


def test_burgers_scores_against_cole_hopf_and_a_file(tmp_path, capsys):
    x, t = np.linspace(-1, 1, 30), np.linspace(0, 0.9, 20)
    reference, path = tmp_path / "burgers.mat", tmp_path / "figure.svg"
    scipy.io.savemat(reference, {"x": x, "t": t, "usol": cole_hopf(x, t)})
    options = demo.Options(
        problem="burgers", reference=reference, depth=2, width=4, steps=5, output=path
    )
    for row in demo.run(options, demo.check(options), Console()):
        assert row.error == pytest.approx(row.error_to_file, abs=1e-5)
    assert "they agree" in capsys.readouterr().out
    assert path.exists()


def test_help_names_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        demo.main(["--help"])
    assert not stop.value.code
    printed = capsys.readouterr().out
    for option in ("problem", "reference", "depth", "width", "gain", "steps", "seed"):
        assert f"--{option}" in printed
    assert "--learning-rate" in printed
    assert "--output" in printed
    assert "(default: 0.001)" in printed


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def test_stopping_it_says_so_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "train", interrupt)
    assert demo.main([*SMALL, "--output", str(tmp_path / "figure.png")]) == 130
    assert capsys.readouterr().out.splitlines()[-1].startswith("Stopped")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("where", ["Figure.savefig", "os.replace"])
def test_a_figure_is_whole_or_what_was_there_before(where, tmp_path, monkeypatch):
    path = tmp_path / "figure.png"
    path.write_text("what was there before")
    with monkeypatch.context() as patch:
        patch.setattr(f"benchmarks.figures.{where}", interrupt)
        with pytest.raises(KeyboardInterrupt):
            figures.save(figures.plt.figure(), path)
    assert os.listdir(tmp_path) == ["figure.png"]
    assert path.read_text() == "what was there before"
    figures.save(figures.plt.figure(), path)
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("steps", [1, 2, 7, 60, 1500])
def test_records_end_with_the_last_step(steps):
    at = record_steps(steps)
    assert at[0] == 1
    assert at[-1] == steps
    assert np.all(np.diff(at) > 0)


def test_arms_start_alike_and_train_independently():
    cell = TWO_ARMS
    key = jax.random.key(0)
    begin = start(cell, key)
    for leaf in jax.tree.leaves(begin.params):
        np.testing.assert_array_equal(leaf[0], leaf[1])
    both = advance(cell, begin, key, (0, 12), (0, 2))
    alone = advance(cell, begin, key, (0, 12), (1, 2))
    for side, single, initial in zip(
        *map(jax.tree.leaves, (both.params, alone.params, begin.params)), strict=True
    ):
        np.testing.assert_array_equal(side[1], single[1])
        np.testing.assert_array_equal(single[0], initial[0])


def test_records_hold_the_gradients_before_and_after_scaling():
    _, history = train(TWO_ARMS, seed=0)
    assert list(history.scaled_std) == ["StableGrad + AdamW"]
    assert list(history.scaled_std["StableGrad + AdamW"]) == [
        f"dense_{layer}/kernel" for layer in range(3)
    ]
    for kernel, std in history.grad_std["AdamW"].items():
        # The gradient of the first step is that of the same weights on the same points.
        first = history.grad_std["StableGrad + AdamW"][kernel][0]
        assert std[0] == pytest.approx(first, rel=1e-5)
    # The factor is 1 / max(std, rms / 10): 1 after it unless the mean exceeds ten
    # standard deviations.
    for std in history.scaled_std["StableGrad + AdamW"].values():
        np.testing.assert_allclose(std, 1, rtol=1e-4)


@pytest.mark.slow
def test_adamw_fails_where_stablegrad_solves():
    """Depth 32, gain 5/3, seed 0: the demo's own run, two of its arms."""
    arms = ("AdamW", "StableGrad + AdamW")
    cell = Cell(PROBLEMS["poisson"](), Network(32, 32, gain=5 / 3), arms, 1e-3, 1500)
    _, history = train(cell, seed=0)
    assert history.error["AdamW"][-1] > 0.5
    assert history.error["StableGrad + AdamW"][-1] < 0.1


def test_a_history_of_factors_is_one_heat_map():
    """From the stacked states of a scan to a drawn layer x step map in one call."""
    params = {f"dense_{i}": {"kernel": jnp.ones((2, 2))} for i in range(3)}
    grads = jax.tree.map(lambda p: p * jnp.array([1.0, -1.0]), params)
    tx = stablegrad_optax.stablegrad()

    def step(state, size):
        scaled = jax.tree.map(lambda g: g * size, grads)
        _, state = tx.update(scaled, state)
        return state, state

    sizes = jnp.array([1.0, 10.0, 100.0])
    _, states = jax.lax.scan(step, tx.init(params), sizes)
    history = stablegrad_optax.scale_factors(states, params)
    _, ax = plt.subplots()
    mesh = figures.heat_map(ax, np.arange(1, 4), history, limit=2)
    # The factor undoes the size of the gradient, in every layer alike.
    np.testing.assert_allclose(mesh.get_array(), [[0, -1, -2]] * 3, atol=1e-6)
    plt.close()

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
from benchmarks import demo
from benchmarks.report import figures
from benchmarks.tasks.pinn.references import cole_hopf, read_burgers

SMALL = ["--depth", "2", "--width", "4", "--steps", "5"]


def test_a_short_run_prints_every_optimizer_and_saves_a_figure(tmp_path, capsys):
    path = tmp_path / "made" / "figure.png"
    assert demo.main([*SMALL, "--output", str(path)]) == 0
    printed = capsys.readouterr().out
    for name, times in {**dict.fromkeys(demo.OPTIMIZERS, 2), demo.REMEDY: 1}.items():
        lines = re.findall(
            rf"^.   {re.escape(name)}  +\W.*(?:failed|solved)", printed, re.M
        )
        assert len(lines) == times
    assert path.read_bytes().startswith(b"\x89PNG")
    assert os.listdir(path.parent) == ["figure.png"]


@pytest.mark.slow
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
    assert "(default: 0.002)" in printed


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def test_stopping_it_says_so_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "train_together", interrupt)
    assert demo.main([*SMALL, "--output", str(tmp_path / "figure.png")]) == 130
    assert capsys.readouterr().out.splitlines()[-1].startswith("Stopped")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("where", ["Figure.savefig", "os.replace"])
def test_a_figure_is_whole_or_what_was_there_before(where, tmp_path, monkeypatch):
    path = tmp_path / "figure.png"
    path.write_text("what was there before")
    with monkeypatch.context() as patch:
        patch.setattr(f"benchmarks.report.figures.{where}", interrupt)
        with pytest.raises(KeyboardInterrupt):
            figures.save(figures.plt.figure(), path)
    assert os.listdir(tmp_path) == ["figure.png"]
    assert path.read_text() == "what was there before"
    figures.save(figures.plt.figure(), path)
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_width_of_1_is_drawn(tmp_path):
    """Its inner kernels have one entry: no spread, and no factor."""
    path = tmp_path / "figure.png"
    assert (
        demo.main(["--width", "1", *SMALL[:2], *SMALL[4:], "--output", str(path)]) == 0
    )
    assert path.exists()


def test_a_reference_that_is_no_number_is_refused(tmp_path):
    x, t = np.linspace(-1, 1, 5), np.linspace(0, 1, 4)
    path, values = tmp_path / "burgers.mat", np.zeros((5, 4))
    values[2, 1] = np.nan
    scipy.io.savemat(path, {"x": x, "t": t, "usol": values})
    with pytest.raises(ValueError, match="x, t and usol must be finite numbers"):
        read_burgers(path)


def test_an_output_that_cannot_be_written_is_refused_before_the_training(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(demo, "run", interrupt)  # it is not reached
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for output in ("file/figure.png", "folder.png"):
        with pytest.raises(SystemExit) as stop:
            demo.main(["--output", str(tmp_path / output)])
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "--output cannot be written" in line


@pytest.mark.slow
def test_the_demo_shows_what_its_page_says(tmp_path):
    """The demo as it is, depth 50, seed 0."""
    options = demo.Options(output=tmp_path / "figure.png")
    rows = demo.run(options, None, Console(quiet=True))
    deep, in_unit = (
        {row.optimizer: row.error for row in rows if row.half == half}
        for half in dict.fromkeys(row.half for row in rows)
    )
    assert all(deep[name] > 0.5 for name in ("AdamW", "Muon", "clip + Muon"))
    assert deep[demo.REMEDY] < deep[demo.SHOWN] < 0.5
    assert in_unit["AdamW"] > 0.5
    assert 10 * in_unit[demo.SHOWN] < min(in_unit["Muon"], in_unit["clip + Muon"])


def test_a_history_of_factors_is_one_heat_map():
    """One call draws a layer x step map of the stacked states of a scan."""
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

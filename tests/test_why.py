"""The experiments behind the page on causes, at the smallest sizes."""

import numpy as np
import pytest

from benchmarks.why import __main__ as why
from benchmarks.why import experiments, page


def test_eps_stops_adam_where_the_gradient_is_below_it():
    """Adam's update is g / (|g| + eps): 1e-4 of the usual one at 1e-4 of eps."""
    scales = np.array([1e-12, 1e-5, 1.0])
    small, large, usual = experiments.update_sizes("AdamW", scales)
    # The mean of the gradient's entries differs from its root mean square.
    assert small == pytest.approx(1e-4 * usual, rel=0.5)
    assert large == pytest.approx(usual, rel=0.01)
    scaled = experiments.update_sizes("StableGrad + AdamW", scales)
    np.testing.assert_allclose(scaled, scaled[-1], rtol=1e-5)
    # The spread of the gradient, and so the weight of each step, varies by 5 %.
    assert scaled[-1] == pytest.approx(usual, rel=0.05)


def test_root_mean_squares_stay_in_range():
    assert experiments.rms(np.float32([3e-30, 4e-30])) == pytest.approx(
        12.5**0.5 * 1e-30
    )
    assert experiments.rms(np.zeros(3, np.float32)) == 0


def test_adam_remembers_a_giant_gradient_and_scaling_forgets_it():
    """The square of 1e4 with b2=0.9 is 1 again after log(1e8) / log(1 / 0.9) steps."""
    deviation = experiments.deviations("AdamW (b2=0.9)", 300)
    assert 100 < experiments.memory(deviation) < np.log(1e8) / np.log(1 / 0.9)
    deviation = experiments.deviations("StableGrad + AdamW (b2=0.9)", 20)
    assert experiments.memory(deviation) == 0
    assert deviation.max() < 1e-3


def test_memory_is_the_last_step_above_the_limit():
    assert experiments.memory(np.array([0.1, 0.9, 0.2, 0.6, 0.4])) == 4
    assert experiments.memory(np.array([0.1, 0.2])) == 0
    assert experiments.memory(np.array([np.nan, 0.2])) == 1


def test_layers_stand_still_below_eps():
    """No layer moves if eps is far above its gradient; every one does after scaling."""
    columns = {"large eps": (1e3, False), "scaled": (1e-8, True)}
    found = experiments.layers("AdamW", columns, depth=3, width=8, steps=3)
    assert found["large eps"].update.max() < page.MOVES
    assert found["scaled"].update[-1].min() > page.MOVES
    assert found["scaled"].gradient.shape == (3, 4)


@pytest.mark.slow
def test_the_command_writes_a_page_and_three_figures(tmp_path, capsys):
    assert why.main(["--quick", "--output", str(tmp_path)]) == 0
    names = ["why.md", "why_layers.png", "why_memory.png", "why_scale.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    text = (tmp_path / "why.md").read_text()
    assert all(name in text for name in names[1:])
    assert "| range-safe Muon |" in text
    assert "StableGrad + AdamW" in text
    assert "seed 0" in text
    assert "why.md" in capsys.readouterr().out

"""The comparison of initializers: its network, its equations, its page."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import initializers
from benchmarks.tasks.pinn.ansatz import derivatives_of
from benchmarks.tasks.pinn.network import Network

pytestmark = pytest.mark.usefixtures("quick_compilation")

SOLUTIONS = {
    "wave": lambda p: jnp.sin(jnp.pi * p[..., 0]) * jnp.cos(jnp.pi * p[..., 1]),
    "reaction-diffusion": lambda p: (
        jax.nn.sigmoid(10 / 3 * p[..., 1] - (400 / 6) ** 0.5 * p[..., 0]) ** 2
    ),
}


@pytest.mark.parametrize("name", SOLUTIONS)
def test_the_solution_fulfils_every_term(name):
    problem = initializers.EQUATIONS[name]()
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
    plain, scanned = Network(6, 8), initializers.Scanned(6, 8)
    expected = plain.derivatives(plain.init(key), points, second)
    got = scanned.derivatives(scanned.init(key), points, second)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4), got, expected
    )


def test_it_resumes_and_writes_its_page(tmp_path, monkeypatch, capsys):
    path = tmp_path / "initializers.jsonl"
    monkeypatch.setattr(initializers, "FUNCTIONS", ("tanh", "gelu"))
    monkeypatch.setattr(initializers, "DEPTHS", (4,))
    monkeypatch.setattr(initializers, "STEPS", 2)
    poisson = {"Poisson": initializers.EQUATIONS["Poisson"]}
    monkeypatch.setattr(initializers, "EQUATIONS", poisson)
    assert initializers.main(["--results", str(path)]) == 0
    lines = path.read_text()
    assert len(lines.splitlines()) == 5 + 4  # gelu has no gain for the gradient
    page = path.with_suffix(".md").read_text()
    assert "| tanh | 4 | no initializer |" in page  # two steps train nothing
    assert "| Glorot | 4 | 1/1 |" in page
    monkeypatch.setattr(initializers, "measure", None)  # nothing is measured again
    assert initializers.main(["--results", str(path)]) == 0
    assert path.read_text() == lines

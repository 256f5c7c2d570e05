"""The problems' solutions solve them, and the computed references are accurate."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.io
from reference_data import reference_file

from benchmarks.tasks.pinn.ansatz import Derivatives, SecondOrder
from benchmarks.tasks.pinn.network import Network
from benchmarks.tasks.pinn.problems import PROBLEMS, relative_l2
from benchmarks.tasks.pinn.references import allen_cahn, cole_hopf, read_burgers
from benchmarks.tasks.pinn.task import Pinn

EXACT = {
    "poisson": lambda x: jnp.sin(jnp.pi * x[0]) * jnp.sin(jnp.pi * x[1]),
    "helmholtz_1_4": lambda x: jnp.sin(jnp.pi * x[0]) * jnp.sin(4 * jnp.pi * x[1]),
    "helmholtz_4_4": lambda x: jnp.sin(4 * jnp.pi * x[0]) * jnp.sin(4 * jnp.pi * x[1]),
    "wave, exact start and ends": lambda x: (
        jnp.sin(jnp.pi * x[0]) * jnp.cos(2 * jnp.pi * x[1])
        + 0.5 * jnp.sin(4 * jnp.pi * x[0]) * jnp.cos(8 * jnp.pi * x[1])
    ),
    "wave": lambda x: jnp.sin(jnp.pi * x[0]) * jnp.cos(jnp.pi * x[1]),
    "reaction-diffusion": lambda x: (
        (1 + jnp.exp((400 / 6) ** 0.5 * x[0] - 10 / 3 * x[1])) ** -2.0
    ),
}
EXACT |= {
    name: EXACT[name.split(",")[0]]
    for name in PROBLEMS
    if name.startswith(("poisson,", "helmholtz_1_4,", "helmholtz_4_4,"))
}


def by_autodiff(u, points: jax.Array, second: SecondOrder | None) -> Derivatives:
    """Computes `Network.derivatives` of any function, without a network."""
    flat = points.reshape(-1, points.shape[-1])
    gradient = jax.vmap(jax.grad(u))(flat).T
    curvature = jax.vmap(lambda x: jnp.diag(jax.hessian(u)(x)))(flat).T
    rows = jnp.asarray(second or (), points.dtype).reshape(-1, points.shape[-1])
    return Derivatives(
        jax.vmap(u)(flat).reshape(points.shape[:-1]),
        gradient.reshape(-1, *points.shape[:-1]),
        (rows @ curvature).reshape(-1, *points.shape[:-1]),
    )


@pytest.mark.parametrize("name", EXACT)
def test_the_exact_solution_has_no_residual_and_is_what_errors_are_taken_against(name):
    problem = PROBLEMS[name]()
    points = problem.sample(jax.random.key(0))

    @jax.jit
    def residuals_and_loss(points):
        evaluate = partial(by_autodiff, EXACT[name])
        residuals = {
            term.name: term.residual(at, evaluate(at, term.second))
            for term in problem.terms
            for at in [points[term.name]]
        }
        return residuals, problem.loss(evaluate, points)

    residuals, loss = residuals_and_loss(points)
    # Second derivatives reach 32 pi^2 = 316, float32 rounds them to 4e-5 or so;
    # sin(4 pi) in float32 is within 1e-6 of 0. The wave's phases, up to 8 pi, are
    # rounded to 2e-6: 6e-4 of the 316.
    bound = 1e-3 if name.startswith("wave") else 5e-4
    for residual in residuals.values():
        assert jnp.abs(residual).max() < bound
    assert loss < 1e-6 * problem.terms[0].weight

    x, y = problem.axes()
    on_grid = jax.jit(jax.vmap(jax.vmap(EXACT[name])))(
        np.stack(np.meshgrid(x, y, indexing="ij"), -1)
    )
    np.testing.assert_allclose(problem.solution(x, y), on_grid, atol=2e-6)


def test_a_wrong_solution_has_a_residual():
    problem = PROBLEMS["poisson"]()
    points = problem.sample(jax.random.key(0))
    # Half the solution: the mean square of half the source, pi^4 mean(u^2) ~ 24.
    half = partial(by_autodiff, lambda x: 0.5 * EXACT["poisson"](x))
    loss = jax.jit(lambda points: problem.loss(half, points))(points)
    assert 5 < loss < 60


def test_burgers_and_allen_cahn_residuals_are_their_equations():
    """The function is u = x^2 t^3, with derivatives by hand."""
    x, t = jnp.array([0.3, -0.7]), jnp.array([0.5, 0.9])
    points = jnp.stack([x, t], -1)
    u, u_t, u_x, u_xx = x**2 * t**3, 3 * x**2 * t**2, 2 * x * t**3, 2 * t**3
    expected = {
        "burgers": u_t + u * u_x - 0.01 / np.pi * u_xx,
        "allen_cahn": u_t - 1e-4 * u_xx - 5 * (u - u**3),
    }
    expected["burgers, 128 points"] = expected["burgers"]
    late = jnp.exp(-5 * t)
    expected["allen_cahn, periodic, exact start"] = late * expected["allen_cahn"]
    for name, residual in expected.items():
        term = PROBLEMS[name]().terms[0]
        derivatives = Derivatives(u, jnp.stack([u_x, u_t]), u_xx[None])
        np.testing.assert_allclose(
            term.residual(points, derivatives), residual, rtol=1e-5
        )
        assert term.second == ((1.0, 0.0),)


@pytest.mark.parametrize("name", PROBLEMS)
def test_points_lie_where_their_term_holds(name):
    problem = PROBLEMS[name]()
    points = problem.sample(jax.random.key(3))
    low, high = np.asarray(problem.domain).T
    for at in points.values():
        assert np.all((at >= low) & (at <= high))
    if problem.ansatz is not None:
        assert list(points) == ["equation"], "all conditions are built in"
        return
    ends = points["boundary"][..., 0, None] == np.asarray(problem.domain[0])
    if name.startswith(("poisson", "helmholtz")):
        on_y = points["boundary"][..., 1, None] == np.asarray(problem.domain[1])
        ends = np.concatenate([ends, on_y], -1)
    assert np.all(ends.any(-1))
    assert np.all(ends.reshape(-1, ends.shape[-1]).any(0)), "every face is drawn"
    if "initial" in points:
        assert np.all(points["initial"][..., 1] == 0)


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_network_has_a_finite_loss(name):
    task = task_of(name)
    params, _ = task.init(jax.random.key(0))
    points = task.problem.sample(jax.random.key(1))
    assert 0 < jax.jit(task.gradient_at)(params, points).loss < jnp.inf


def task_of(name):
    problem = PROBLEMS[name]()
    return Pinn(problem, Network(1, 4, embedding=problem.embedding))


@pytest.mark.parametrize("seed", [0, 1])
def test_built_in_conditions_hold_whatever_the_weights(seed):
    task = task_of("allen_cahn, periodic, exact start")
    params, _ = task.init(jax.random.key(seed))
    x, t = jnp.linspace(-1, 1, 41), jnp.linspace(0, 1, 41)
    start = task.derivatives(params, points_of(x, 0), None).value
    np.testing.assert_array_equal(start, x**2 * jnp.cos(jnp.pi * x))
    left, right = (task.derivatives(params, points_of(x, t), ()) for x in (-1, 1))
    # Phases up to 10 pi are rounded to 2e-6.
    np.testing.assert_allclose(left.value, right.value, atol=1e-5)
    # The initial value's slope jumps from 2 to -2, and fades; all else has none.
    jump = right.gradient - left.gradient
    np.testing.assert_allclose(jump, [-4 * jnp.exp(-10 * t), 0 * t], atol=1e-4)

    task = task_of("wave, exact start and ends")
    params, _ = task.init(jax.random.key(seed))
    x = jnp.linspace(0, 1, 41)
    start = task.derivatives(params, points_of(x, 0), ())
    expected = jnp.sin(jnp.pi * x) + 0.5 * jnp.sin(4 * jnp.pi * x)
    np.testing.assert_array_equal(start.value, expected)
    np.testing.assert_array_equal(start.gradient[1], 0)
    for end in (0, 1):
        u = task.derivatives(params, points_of(end, t), None).value
        np.testing.assert_allclose(u, 0, atol=1e-6)  # sin(4 pi) in float32


def points_of(x, t):
    return jnp.stack(jnp.broadcast_arrays(jnp.float32(x), jnp.float32(t)), -1)


def test_the_network_moves_what_is_not_built_in():
    for name in ("allen_cahn, periodic, exact start", "wave, exact start and ends"):
        task = task_of(name)
        fields = [
            task.derivatives(
                task.init(jax.random.key(seed))[0], points_of(0.3, 0.7), None
            )
            for seed in (0, 1)
        ]
        assert abs(fields[0].value - fields[1].value) > 0.01


@pytest.mark.parametrize("name", ["burgers", "allen_cahn"])
def test_the_reference_fulfils_the_initial_condition(name):
    problem = PROBLEMS[name]()
    x = problem.axes()[0]
    u = problem.solution(x, np.array([0.0, 0.1]))[:, 0]
    initial = next(term for term in problem.terms if term.name == "initial")
    at = jnp.stack([x, jnp.zeros_like(x)], -1)
    # Exact on the grid; sin and cos of float32 arguments are good to 1e-6.
    assert jnp.abs(initial.residual(at, Derivatives(jnp.asarray(u)))).max() < 2e-6


def test_cole_hopf_agrees_with_a_finer_quadrature_and_keeps_its_symmetry():
    x, t = np.linspace(-1, 1, 101), np.linspace(0, 1, 21)
    u = cole_hopf(x, t)
    assert np.abs(u - cole_hopf(x, t, spacing=0.03)).max() < 1e-12
    np.testing.assert_allclose(u, -u[::-1], atol=1e-12)
    np.testing.assert_allclose(u[[0, -1]], 0, atol=1e-12)


def test_cole_hopf_fulfils_burgers_equation():
    """Sixth-order differences are taken off the shock and in it."""
    x, t, h = np.array([-0.6, -0.02, 0.005, 0.4]), np.array([0.2, 0.5, 0.9]), 2e-4
    first = np.array([-1, 9, -45, 0, 45, -9, 1]) / (60 * h)
    second = np.array([2, -27, 270, -490, 270, -27, 2]) / (180 * h**2)
    shifts = h * np.arange(-3, 4)
    along_x = np.stack([cole_hopf(x + s, t) for s in shifts])
    along_t = np.stack([cole_hopf(x, t + s) for s in shifts])
    u_x, u_xx = np.tensordot(first, along_x, 1), np.tensordot(second, along_x, 1)
    u_t = np.tensordot(first, along_t, 1)
    residual = u_t + along_x[3] * u_x - 0.01 / np.pi * u_xx
    # The terms reach 40; in the shock, 0.01 wide, the differences are good to
    # (h / 0.01)^6 of that.
    assert np.abs(residual).max() < 1e-6


def test_cole_hopf_agrees_with_the_published_file():
    file = read_burgers(reference_file("raissi_pinns/burgers_shock.mat"))
    # The file itself is 2.9e-12 from the integral.
    assert relative_l2(cole_hopf(file.x, file.t), file.values) < 1e-11


def test_allen_cahn_converges():
    x, t = np.linspace(-1, 1, 64), np.linspace(0, 1, 5)
    u = allen_cahn(x, t)
    assert relative_l2(u, allen_cahn(x, t, tolerance=1e-12)) < 1e-8
    # Spectral, but for the kink of the initial value at +-1.
    assert relative_l2(u, allen_cahn(x, t, modes=1024)) < 5e-5
    np.testing.assert_allclose(u[0], u[-1], atol=1e-12)


def test_allen_cahn_agrees_with_the_published_file():
    file = scipy.io.loadmat(reference_file("jaxpi2_ref/allen_cahn.mat"))
    u = allen_cahn(file["x"].ravel(), file["t"].ravel())
    assert relative_l2(u, file["usol"].T) < 1e-4


@pytest.mark.parametrize("content", [None, b"no MATLAB file", {"x": np.zeros(3)}])
def test_a_file_that_is_no_reference_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "reference.mat"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        scipy.io.savemat(path, content)
    with pytest.raises(ValueError, match=r"reference\.mat") as raised:
        read_burgers(path)
    assert "\n" not in str(raised.value)

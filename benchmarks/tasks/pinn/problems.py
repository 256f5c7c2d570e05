"""Boundary value problems: what a network must fulfil, and what it is scored against.

All quantities are dimensionless. A problem's loss is

    L = sum over terms of  weight * mean(residual^2)

over points drawn anew from `sample`. A residual is built from `Derivatives` alone, so
it serves a network and an exact solution alike.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from benchmarks.tasks.pinn.ansatz import (
    Ansatz,
    Derivatives,
    Function,
    SecondOrder,
    fourier_features,
    identity,
)
from benchmarks.tasks.pinn.references import (
    ALLEN_CAHN_DIFFUSION,
    BURGERS_VISCOSITY,
    allen_cahn,
    cole_hopf,
)

Interval = tuple[float, float]


@dataclass(frozen=True)
class Term:
    """One condition on the solution.

    Attributes:
        name: "equation", "boundary" or "initial".
        weight: of this term's mean square in the loss.
        sample: key -> points f[..., inputs].
        second: which derivatives `residual` reads, as in `Network.derivatives`.
        residual: (points, derivatives at the points) -> f[...], 0 for the solution.
    """

    name: str
    weight: float
    sample: Callable[[jax.Array], jax.Array]
    second: SecondOrder | None
    residual: Callable[[jax.Array, Derivatives], jax.Array]


@dataclass(frozen=True)
class Problem:
    """A boundary value problem on a rectangle.

    Attributes:
        name: its key in `PROBLEMS`.
        equation: in plain text, for titles.
        inputs: the names of the two coordinates.
        domain: one interval for each input.
        terms: the conditions that make up the loss.
        solution: (axis of input 0, axis of input 1) -> f64[n0, n1], exact or a
            reference computed in this project.
        grid_shape: the number of points, ends included, that the error is taken over.
        embedding: of a point, for the network's first layer.
        ansatz: how the solution is built on the network; None where it is the network.
    """

    name: str
    equation: str
    inputs: tuple[str, str]
    domain: tuple[Interval, Interval]
    terms: tuple[Term, ...]
    solution: Callable[[np.ndarray, np.ndarray], np.ndarray]
    grid_shape: tuple[int, int]
    embedding: Function = identity
    ansatz: Ansatz | None = None

    def sample(self, key: jax.Array) -> dict[str, jax.Array]:
        """Points for each term, by its name."""
        keys = jax.random.split(key, len(self.terms))
        return {
            term.name: term.sample(k) for term, k in zip(self.terms, keys, strict=True)
        }

    def loss(
        self,
        evaluate: Callable[[jax.Array, SecondOrder | None], Derivatives],
        points: dict[str, jax.Array],
    ) -> jax.Array:
        """The weighted mean squares at `points`, of the field behind `evaluate`."""
        return self.weigh(self.residuals(self.fields(evaluate, points), points))

    def fields(
        self,
        evaluate: Callable[[jax.Array, SecondOrder | None], Derivatives],
        points: dict[str, jax.Array],
    ) -> dict[str, Derivatives]:
        """Returns what each term reads of the field `evaluate`, at its points."""
        return {
            term.name: evaluate(points[term.name], term.second) for term in self.terms
        }

    def residuals(
        self, fields: dict[str, Derivatives], points: dict[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """Returns by how much each term is missed, f[...]."""
        return {
            term.name: term.residual(points[term.name], fields[term.name])
            for term in self.terms
        }

    def weigh(self, residuals: dict[str, jax.Array]) -> jax.Array:
        """The loss of these residuals."""
        total = jnp.float32(0)
        for term in self.terms:
            total += term.weight * jnp.mean(residuals[term.name] ** 2)
        return total

    def axes(self) -> tuple[np.ndarray, np.ndarray]:
        """The evaluation grid's axes, f64[n0] and f64[n1]."""
        first, second = (
            np.linspace(*interval, num)
            for interval, num in zip(self.domain, self.grid_shape, strict=True)
        )
        return first, second


def relative_l2(prediction: ArrayLike, solution: ArrayLike) -> ArrayLike:
    """`||prediction - solution|| / ||solution||` over the last two axes."""

    def norm(x: ArrayLike) -> ArrayLike:
        return (abs(x) ** 2).sum((-2, -1)) ** 0.5

    return norm(prediction - solution) / norm(solution)


def uniform(
    domain: tuple[Interval, ...], num_points: int
) -> Callable[[jax.Array], jax.Array]:
    """Points drawn evenly from a box; an interval (a, a) pins its coordinate."""
    low, high = np.asarray(domain, np.float32).T

    def sample(key: jax.Array) -> jax.Array:
        return jax.random.uniform(key, (num_points, len(low)), minval=low, maxval=high)

    return sample


def uniform_on_ends(
    domain: tuple[Interval, Interval], num_points: int, inputs: tuple[int, ...]
) -> Callable[[jax.Array], jax.Array]:
    """Points of a box with one coordinate, of `inputs`, at either end.

    Every one of these faces is drawn with the same probability.
    """
    ends = np.asarray(domain, np.float32)  # [input, low or high]
    # One draw gives the point and, in a last column, the face: each further call of
    # the generator would add to the compile time of every program that samples.
    draw = uniform((*domain, (0.0, 2.0 * len(inputs))), num_points)

    def sample(key: jax.Array) -> jax.Array:
        drawn = draw(key)
        points, face = drawn[:, :-1], drawn[:, -1].astype(jnp.int32)
        pinned = jnp.asarray(inputs)[face // 2]
        end = jnp.asarray(ends)[pinned, face % 2]
        is_pinned = jnp.arange(len(domain)) == pinned[:, None]
        return jnp.where(is_pinned, end[:, None], points)

    return sample


def _vanishes(_: jax.Array, u: Derivatives) -> jax.Array:
    return u.value


def _sine_product(
    name: str,
    waves: tuple[int, int],
    wavenumber: float,
    domain: tuple[Interval, Interval],
    *,
    num_points: int = 64,
    feature_stds: tuple[float, ...] = (),
) -> Problem:
    """Lap u + k^2 u = q with u = sin(a1 pi x) sin(a2 pi y), u = 0 on the boundary."""

    def source(points: jax.Array) -> jax.Array:
        u = jnp.prod(jnp.sin(jnp.pi * jnp.asarray(waves) * points), axis=-1)
        return (wavenumber**2 - np.pi**2 * sum(a**2 for a in waves)) * u

    def residual(points: jax.Array, u: Derivatives) -> jax.Array:
        return u.second[0] + wavenumber**2 * u.value - source(points)

    def solution(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.outer(np.sin(waves[0] * np.pi * x), np.sin(waves[1] * np.pi * y))

    laplacian = ((1.0, 1.0),)
    helmholtz = f" + {wavenumber**2:g} u" if wavenumber else ""
    return Problem(
        name=name,
        equation=f"Laplace(u){helmholtz} = q, u = sin({waves[0]} pi x) "
        f"sin({waves[1]} pi y)".replace("(1 pi", "(pi"),
        inputs=("x", "y"),
        domain=domain,
        terms=(
            Term("equation", 1.0, uniform(domain, num_points), laplacian, residual),
            Term(
                "boundary",
                100.0,
                uniform_on_ends(domain, num_points // 2, (0, 1)),
                None,
                _vanishes,
            ),
        ),
        solution=solution,
        grid_shape=(51, 51),
        embedding=_drawn_features(*feature_stds) if feature_stds else identity,
    )


def _drawn_waves(*stds: float) -> np.ndarray:
    """32 wave vectors, normal with these standard deviations; always the same ones."""
    return np.random.default_rng(0).standard_normal((32, len(stds))) * stds


def _drawn_features(*stds: float) -> Function:
    return fourier_features(_drawn_waves(*stds))


def _burgers(name: str, num_points: int = 64) -> Problem:
    """u_t + u u_x = (0.01 / pi) u_xx, u(x, 0) = -sin(pi x), u(-1, t) = u(1, t) = 0."""
    domain = ((-1.0, 1.0), (0.0, 1.0))
    start, half = (domain[0], (0.0, 0.0)), num_points // 2

    def residual(_: jax.Array, u: Derivatives) -> jax.Array:
        u_x, u_t = u.gradient
        return u_t + u.value * u_x - BURGERS_VISCOSITY * u.second[0]

    def initial(points: jax.Array, u: Derivatives) -> jax.Array:
        return u.value + jnp.sin(jnp.pi * points[..., 0])

    return Problem(
        name=name,
        equation="u_t + u u_x = (0.01 / pi) u_xx, u(x, 0) = -sin(pi x)",
        inputs=("x", "t"),
        domain=domain,
        terms=(
            Term("equation", 1.0, uniform(domain, num_points), ((1.0, 0.0),), residual),
            Term(
                "boundary", 100.0, uniform_on_ends(domain, half, (0,)), None, _vanishes
            ),
            Term("initial", 100.0, uniform(start, half), None, initial),
        ),
        solution=cole_hopf,
        grid_shape=(201, 41),
    )


def _allen_cahn() -> Problem:
    """u_t = 0.0001 u_xx + 5 (u - u^3), period 2 in x, u(x, 0) = x^2 cos(pi x)."""
    domain = ((-1.0, 1.0), (0.0, 1.0))
    at_any_time = uniform(((0.0, 0.0), domain[1]), 32)

    def residual(_: jax.Array, u: Derivatives) -> jax.Array:
        return (
            u.gradient[1]
            - ALLEN_CAHN_DIFFUSION * u.second[0]
            - 5 * (u.value - u.value**3)
        )

    def opposite(key: jax.Array) -> jax.Array:
        """Pairs f[n, 2, inputs]: both ends of x at one time."""
        times = at_any_time(key)
        return jnp.stack([times.at[:, 0].set(end) for end in domain[0]], axis=1)

    def periodic(_: jax.Array, u: Derivatives) -> jax.Array:
        jump = u.value[:, 1] - u.value[:, 0]
        jump_of_slope = u.gradient[0, :, 1] - u.gradient[0, :, 0]
        return jnp.stack([jump, jump_of_slope])

    def initial(points: jax.Array, u: Derivatives) -> jax.Array:
        x = points[..., 0]
        return u.value - x**2 * jnp.cos(jnp.pi * x)

    return Problem(
        name="allen_cahn",
        equation="u_t = 0.0001 u_xx + 5 (u - u^3), u(x, 0) = x^2 cos(pi x), periodic",
        inputs=("x", "t"),
        domain=domain,
        terms=(
            Term("equation", 1.0, uniform(domain, 64), ((1.0, 0.0),), residual),
            Term("boundary", 1.0, opposite, (), periodic),
            Term("initial", 100.0, uniform((domain[0], (0.0, 0.0)), 32), None, initial),
        ),
        solution=allen_cahn,
        # Every other node of the reference, which is not smooth at t = 0, x = +-1.
        grid_shape=(257, 41),
    )


def _allen_cahn_built_in() -> Problem:
    """Allen-Cahn with Fourier features of period 2 in x, and an exact initial value.

    The field is exp(-10 t) u(x, 0) + (1 - exp(-10 t)) N. The initial value has a kink
    at the ends of x, and only there: it must fade, as the solution's does (near -1 the
    reaction damps by exp(-10 t)), for no periodic N takes it away. The reaction also
    lets an error grow like exp(5 t): residuals are weighted by exp(-5 t).
    """
    problem = _allen_cahn()
    equation, *_ = problem.terms
    waves = _drawn_waves(4.0, 2.0)
    waves[:, 0] = np.pi * waves[:, 0].round()

    def weighted(points: jax.Array, u: Derivatives) -> jax.Array:
        return jnp.exp(-5 * points[..., 1]) * equation.residual(points, u)

    def start(points: jax.Array) -> jax.Array:
        x, t = points[..., 0], points[..., 1]
        return jnp.exp(-10 * t) * x**2 * jnp.cos(jnp.pi * x)

    def factor(points: jax.Array) -> jax.Array:
        return -jnp.expm1(-10 * points[..., 1])

    drawn = uniform(problem.domain, 128)
    return replace(
        problem,
        name="allen_cahn, periodic, exact start",
        terms=(replace(equation, sample=drawn, residual=weighted),),
        embedding=fourier_features(waves, coordinates=(1,)),
        ansatz=Ansatz(start, factor),
    )


def _wave() -> Problem:
    """u_tt = 4 u_xx with u and u_t known at t = 0, and u = 0 at x = 0 and 1, exactly.

    The field is u(x, 0) + (1 - exp(-72 t^2)) 4 x (1 - x) N. The factor of N is of
    second order in t at 0, so it leaves u_t alone, and 1 from t = 0.3 on: with t^2
    itself N would have to be a hundred times as large at 0 as at 1.
    """

    def residual(_: jax.Array, u: Derivatives) -> jax.Array:
        return u.second[0]

    def start(points: jax.Array) -> jax.Array:
        x = points[..., 0]
        return jnp.sin(jnp.pi * x) + 0.5 * jnp.sin(4 * jnp.pi * x)

    def factor(points: jax.Array) -> jax.Array:
        x, t = points[..., 0], points[..., 1]
        return -jnp.expm1(-72 * t**2) * 4 * x * (1 - x)

    def solution(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        low = np.outer(np.sin(np.pi * x), np.cos(2 * np.pi * t))
        return low + 0.5 * np.outer(np.sin(4 * np.pi * x), np.cos(8 * np.pi * t))

    return Problem(
        name="wave, exact start and ends",
        equation="u_tt = 4 u_xx, u(x, 0) = sin(pi x) + sin(4 pi x) / 2, u_t(x, 0) = 0",
        inputs=("x", "t"),
        domain=_UNIT,
        terms=(Term("equation", 1.0, uniform(_UNIT, 128), ((-4.0, 1.0),), residual),),
        solution=solution,
        grid_shape=(101, 101),
        embedding=_drawn_features(6.0, 12.0),
        ansatz=Ansatz(start, factor),
    )


def _plain_wave() -> Problem:
    """u_tt = u_xx on the unit square, u = sin(pi x) cos(pi t)."""

    def residual(_: jax.Array, u: Derivatives) -> jax.Array:
        return u.second[0]

    def initial(points: jax.Array, u: Derivatives) -> jax.Array:
        return jnp.stack([u.value - jnp.sin(jnp.pi * points[..., 0]), u.gradient[1]])

    def solution(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        return np.outer(np.sin(np.pi * x), np.cos(np.pi * t))

    return Problem(
        name="wave",
        equation="u_tt = u_xx, u(x, 0) = sin(pi x), u_t(x, 0) = 0",
        inputs=("x", "t"),
        domain=_UNIT,
        terms=(
            Term("equation", 1.0, uniform(_UNIT, 64), ((-1.0, 1.0),), residual),
            Term(
                "boundary",
                100.0,
                uniform_on_ends(_UNIT, 32, (0,)),
                None,
                _vanishes,
            ),
            Term("initial", 100.0, uniform((_UNIT[0], (0.0, 0.0)), 32), (), initial),
        ),
        solution=solution,
        grid_shape=(51, 51),
    )


def _reaction_diffusion() -> Problem:
    """Fisher's equation u_t = 0.01 u_xx + 4 u (1 - u) with its travelling front."""
    domain, diffusion, rate = ((-1.0, 1.0), (0.0, 1.0)), 0.01, 4.0

    def front(x: ArrayLike, t: ArrayLike) -> ArrayLike:
        exponent = (rate / diffusion / 6) ** 0.5 * x - 5 / 6 * rate * t
        return (1 + jnp.exp(exponent)) ** -2.0

    def residual(_: jax.Array, u: Derivatives) -> jax.Array:
        return u.gradient[1] - diffusion * u.second[0] - rate * u.value * (1 - u.value)

    def known(points: jax.Array, u: Derivatives) -> jax.Array:
        return u.value - front(points[..., 0], points[..., 1])

    return Problem(
        name="reaction-diffusion",
        equation="u_t = 0.01 u_xx + 4 u (1 - u)",
        inputs=("x", "t"),
        domain=domain,
        terms=(
            Term("equation", 1.0, uniform(domain, 64), ((1.0, 0.0),), residual),
            Term("boundary", 100.0, uniform_on_ends(domain, 32, (0,)), None, known),
            Term("initial", 100.0, uniform((domain[0], (0.0, 0.0)), 32), None, known),
        ),
        solution=lambda x, t: np.asarray(front(x[:, None], t)),
        grid_shape=(101, 51),
    )


_UNIT: tuple[Interval, Interval] = ((0.0, 1.0), (0.0, 1.0))
_SYMMETRIC: tuple[Interval, Interval] = ((-1.0, 1.0), (-1.0, 1.0))

_poisson = partial(_sine_product, waves=(1, 1), wavenumber=0.0, domain=_UNIT)
_helmholtz_1_4 = partial(_sine_product, waves=(1, 4), wavenumber=1.0, domain=_SYMMETRIC)
_helmholtz_4_4 = partial(_sine_product, waves=(4, 4), wavenumber=1.0, domain=_UNIT)


def _poisson_times(loss_scale: str) -> Problem:
    """Poisson's equation, all weights of its loss multiplied."""
    problem = _poisson(f"poisson, loss times {loss_scale}")
    terms = (replace(t, weight=float(loss_scale) * t.weight) for t in problem.terms)
    return replace(problem, terms=tuple(terms))


# name -> how to make it; a problem is made where it is asked for, not at import.
PROBLEMS: dict[str, Callable[[], Problem]] = {
    # 64 points and a plain network: seconds of training, and deep networks fail.
    "poisson": partial(_poisson, "poisson"),
    "helmholtz_1_4": partial(_helmholtz_1_4, "helmholtz_1_4"),
    "helmholtz_4_4": partial(_helmholtz_4_4, "helmholtz_4_4"),
    "burgers": partial(_burgers, "burgers"),
    "allen_cahn": _allen_cahn,
    "wave": _plain_wave,
    "reaction-diffusion": _reaction_diffusion,
    # The same loss in another unit.
    "poisson, loss times 1e-8": partial(_poisson_times, "1e-8"),
    "poisson, loss times 1e-4": partial(_poisson_times, "1e-4"),
    "poisson, loss times 1e4": partial(_poisson_times, "1e4"),
    # More points, and what the field builds in: a shallow network solves them.
    "poisson, 128 points": partial(_poisson, "poisson, 128 points", num_points=128),
    "helmholtz_1_4, Fourier features": partial(
        _helmholtz_1_4,
        "helmholtz_1_4, Fourier features",
        num_points=128,
        feature_stds=(2.0, 6.0),
    ),
    "helmholtz_4_4, Fourier features": partial(
        _helmholtz_4_4,
        "helmholtz_4_4, Fourier features",
        num_points=128,
        feature_stds=(6.0, 6.0),
    ),
    "burgers, 128 points": partial(_burgers, "burgers, 128 points", 128),
    "allen_cahn, periodic, exact start": _allen_cahn_built_in,
    "wave, exact start and ends": _wave,
}


@cache
def shared_problem(name: str) -> Problem:
    """Returns one object for each name: programs are compiled for an object."""
    return PROBLEMS[name]()

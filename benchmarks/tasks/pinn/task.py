"""A network that learns to fulfil a problem: the gradient, its probes, the error."""

from dataclasses import dataclass, field
from functools import cache, partial

import jax
import numpy as np

from benchmarks.lib.task import Gradient
from benchmarks.tasks.pinn.ansatz import Derivatives, SecondOrder
from benchmarks.tasks.pinn.network import Network, Params
from benchmarks.tasks.pinn.problems import Problem, relative_l2
from stablegrad_optax import prediction_grad_std

FAILURE_ERROR = 0.5  # relative L2; above it, or not finite, a run has failed

STATIC = {"static": True}


def failed(error: float) -> bool:
    return not error <= FAILURE_ERROR


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pinn:
    """A problem and the network that learns it; a run carries nothing along.

    The probes are the standard deviations of dL/dy under two readings of what y, a
    PINN's prediction, is: the recipes of
    `stablegrad_optax.value_and_grad_with_prediction_std`. "field" is the direct
    dependence on u alone, "residuals" all residuals. The backward pass meets both on
    its way.
    """

    problem: Problem = field(metadata=STATIC)
    network: Network = field(metadata=STATIC)

    def init(self, key: jax.Array) -> tuple[Params, None]:
        return self.network.init(jax.random.split(key)[0]), None

    def derivatives(
        self, params: Params, points: jax.Array, second: SecondOrder | None
    ) -> Derivatives:
        """Returns those of the field u of the network, as `Network.derivatives`."""
        network = self.network.derivatives(params, points, second)
        ansatz = self.problem.ansatz
        return network if ansatz is None else ansatz(points, network, second)

    def gradient(
        self, params: Params, state: None, key: jax.Array, step: jax.Array
    ) -> Gradient:
        """Takes the points that (key, step) draws."""
        points = self.problem.sample(jax.random.fold_in(key, step))
        return self.gradient_at(params, points)

    def gradient_at(self, params: Params, points: dict[str, jax.Array]) -> Gradient:
        """Runs one backward pass in three parts."""
        problem = self.problem
        fields, to_params = jax.vjp(
            lambda params: problem.fields(partial(self.derivatives, params), points),
            params,
        )
        residuals, to_fields = jax.vjp(
            lambda fields: problem.residuals(fields, points), fields
        )
        value, residual_grads = jax.value_and_grad(problem.weigh)(residuals)
        (field_grads,) = to_fields(residual_grads)
        (grads,) = to_params(field_grads)
        field = {term: grad.value for term, grad in field_grads.items()}
        probes = {"field": field, "residuals": residual_grads}
        probes = {name: prediction_grad_std(tree) for name, tree in probes.items()}
        return Gradient(value, grads, probes, None)

    def score(
        self, params: Params, state: None, held_out: tuple[np.ndarray, np.ndarray]
    ) -> dict[str, jax.Array]:
        """The error on the points f[n0, n1, inputs] with the solution f[n0, n1]."""
        points, solution = held_out
        error = relative_l2(self.derivatives(params, points, None).value, solution)
        return {"error": error}


@cache
def evaluation(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Returns the grid's points, and the solution there, for the error."""
    solution = problem.solution(*problem.axes()).astype(np.float32)
    return grid(problem.axes()), solution


def grid(axes: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """The points f32[n0, n1, 2] of two axes."""
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).astype(np.float32)


def predict(
    network: Network, params: Params, axes: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """The solution f[n0, n1] on the grid of two axes."""
    return np.asarray(jax.jit(network.apply)(params, grid(axes)))

"""The gradient of a problem's loss, and with it the gradient of the predictions."""

from functools import partial
from typing import NamedTuple

import jax

from benchmarks.pinn.network import Network, Params
from benchmarks.pinn.problems import Problem


class PredictionGrads(NamedTuple):
    """dL/dy under two readings of what y, a PINN's prediction, is; keys are terms.

    The recipes of `stablegrad_optax.value_and_grad_with_prediction_std`, whose
    standard deviation is taken where an arm wants it. The backward pass meets both on
    its way, so neither costs anything.
    """

    field: dict[str, jax.Array]  # dL/du, the direct dependence on u alone
    residuals: dict[str, jax.Array]  # dL/dr


def value_and_grads(
    problem: Problem, network: Network, params: Params, points: dict[str, jax.Array]
) -> tuple[jax.Array, Params, PredictionGrads]:
    """The loss, its gradient and the predictions' gradients, by one backward pass."""
    fields, to_params = jax.vjp(
        lambda params: problem.fields(partial(network.derivatives, params), points),
        params,
    )
    residuals, to_fields = jax.vjp(
        lambda fields: problem.residuals(fields, points), fields
    )
    value, residual_grads = jax.value_and_grad(problem.weigh)(residuals)
    (field_grads,) = to_fields(residual_grads)
    (grads,) = to_params(field_grads)
    of_u = {term: grad.value for term, grad in field_grads.items()}
    return value, grads, PredictionGrads(of_u, residual_grads)

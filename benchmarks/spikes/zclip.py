"""ZClip, a baseline: the gradient's norm is clipped where it is an outlier of its own.

Kumar et al., "ZClip: Adaptive Spike Mitigation for LLM Pre-Training", arXiv 2504.02507
(2025), with what their released code adds: the warm-up, and the division by std + eps.
The code's further cap at a fixed norm is left out.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

EPS = 1e-6  # beside the standard deviation, as released


class ZClipState(NamedTuple):
    """Running statistics of the global norm."""

    count: jax.Array  # i32[], norms seen
    mean: jax.Array  # f32[]
    variance: jax.Array  # f32[]


def zclip(
    z_threshold: float = 2.5, decay: float = 0.97, warm_up: int = 25
) -> optax.GradientTransformation:
    """Clips the global norm R where z = (R - mean) / std is above the threshold.

    It becomes mean + threshold^2 / z * std: the farther out, the nearer to the mean.
    The running mean and variance are fed the clipped norm. The first `warm_up` norms
    pass, and their mean and variance (over their number) start the running ones.

    Args:
        z_threshold: above 0.
        decay: of mean and variance, in [0, 1).
        warm_up: at least 1.
    """

    def init(params: optax.Params) -> ZClipState:
        del params
        return ZClipState(jnp.zeros((), jnp.int32), jnp.zeros(()), jnp.zeros(()))

    def update(
        updates: optax.Updates,
        state: ZClipState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ZClipState]:
        del params, extra_args
        norm = optax.tree.norm(updates)
        std = jnp.sqrt(state.variance)
        z = (norm - state.mean) / (std + EPS)
        warm = state.count >= warm_up
        is_outlier = warm & (z > z_threshold)
        clipped = jnp.where(is_outlier, state.mean + z_threshold**2 / z * std, norm)
        scale = jnp.where(is_outlier, clipped / norm, 1.0)

        # The running mean's weight is 1/n in the warm-up, where the variance is that
        # of Welford's recurrence; afterwards the new mean stands in the variance.
        weight = jnp.where(warm, 1 - decay, 1 / (state.count + 1))
        mean = state.mean + weight * (clipped - state.mean)
        deviation = clipped - jnp.where(warm, mean, state.mean)
        square = jnp.where(warm, deviation, clipped - mean) * deviation
        variance = (1 - weight) * state.variance + weight * square
        # n var_n = (n - 1) var_(n-1) + (R - mean_(n-1)) (R - mean_n)
        state = ZClipState(state.count + 1, mean, variance)
        return jax.tree.map(lambda g: (scale * g).astype(g.dtype), updates), state

    return optax.GradientTransformationExtraArgs(init, update)

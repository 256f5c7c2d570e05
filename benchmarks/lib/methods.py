"""Methods that are compared and are neither in the package nor in Optax."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from stablegrad_optax import stablegrad

ZCLIP_EPS = 1e-6  # beside the standard deviation, as released


def stacked_by_name(tree: Any) -> Any:
    """Returns 1 for arrays below a module `stack_...`, which holds many layers, else 0.

    This is a function as `num_stacked_axes` takes it.
    """
    return jax.tree.map_with_path(
        lambda path, _: int("stack_" in jax.tree_util.keystr(path)), tree
    )


stablegrad_by_name = partial(stablegrad, num_stacked_axes=stacked_by_name)


def stablegrad_by_probe(
    probe: str, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """Returns StableGrad with the paper's reference, the prediction gradient's std.

    Its `update` takes the reference from the task's probes and not by the name
    `prediction_grad_std`, which would override the constant reference of others.

    Args:
        probe: The prediction, a key of the probes.
        **options: Of `stablegrad`.
    """
    inner = stablegrad(None, **options)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        probes: Mapping[str, jax.Array],
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra_args
        return inner.update(updates, state, params, prediction_grad_std=probes[probe])

    return optax.GradientTransformationExtraArgs(inner.init, update)


def on_part(
    make: Callable[[], optax.GradientTransformation],
    is_part: Callable[[jax.tree_util.KeyPath, jax.Array], bool],
) -> optax.GradientTransformation:
    """Returns a method that sees the whole gradient and changes a part of it.

    `optax.masked` would compute the factors from the part alone. Here they are those of
    the whole gradient, so that the two parts of a method make up the method.

    Args:
        make: The method.
        is_part: (path, leaf) -> whether the leaf is changed.
    """
    inner = make()

    def update(
        updates: optax.Updates, state: optax.OptState, params: Any = None
    ) -> tuple[optax.Updates, optax.OptState]:
        changed, state = inner.update(updates, state, params)
        part = jax.tree.map_with_path(
            lambda path, new, old: new if is_part(path, old) else old, changed, updates
        )
        return part, state

    return optax.GradientTransformation(inner.init, update)


def normalize_globally() -> optax.GradientTransformation:
    """Divides the whole gradient by its norm; zero stays zero. It has no memory."""

    def size(x: jax.Array) -> jax.Array:
        return jnp.where(x > 0, x, 1)

    def update(updates: optax.Updates, params: Any) -> optax.Updates:
        del params
        largest = size(
            jnp.stack([jnp.max(jnp.abs(g)) for g in jax.tree.leaves(updates)]).max()
        )
        # In units of the largest entry no square leaves the range of the dtype.
        scaled = jax.tree.map(lambda g: g / largest, updates)
        norm = size(optax.tree.norm(scaled))
        return jax.tree.map(lambda g: (g / norm).astype(g.dtype), scaled)

    return optax.stateless(update)


def znorm() -> optax.GradientTransformation:
    """Subtracts the mean of each gradient of two or more axes, divides by its std."""

    def normalize(g: jax.Array) -> jax.Array:
        if g.ndim < 2:
            return g
        # A zero gradient stays zero; 1e-30 is far below any other.
        return (g - g.mean()) / (g.std() + 1e-30)

    return optax.stateless_with_tree_map(lambda g, _: normalize(g))


class ZClipState(NamedTuple):
    """Running statistics of the global norm."""

    count: jax.Array  # i32[], norms seen
    mean: jax.Array  # f32[]
    variance: jax.Array  # f32[]


def zclip(
    z_threshold: float = 2.5, decay: float = 0.97, warm_up: int = 25
) -> optax.GradientTransformation:
    """Clips the global norm R where z = (R - mean) / std is large: ZClip.

    Kumar et al., "ZClip: Adaptive Spike Mitigation for LLM Pre-Training", arXiv
    2504.02507 (2025), with what their released code adds: the warm-up, and the division
    by std + eps. The code's further cap at a fixed norm is left out.

    Where z is above the threshold R becomes mean + threshold^2 / z * std: the farther
    out, the nearer to the mean. The running mean and variance are fed the clipped norm.
    The first `warm_up` norms pass, and their mean and variance (over their number)
    start the running ones.

    Args:
        z_threshold: Above 0.
        decay: Of mean and variance, in [0, 1).
        warm_up: At least 1.
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
        z = (norm - state.mean) / (std + ZCLIP_EPS)
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

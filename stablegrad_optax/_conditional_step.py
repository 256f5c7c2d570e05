"""A step of an optimizer that is taken or not, as the values of the step decide."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

Step = tuple[optax.Updates, optax.OptState]


def step_unless(skip: jax.Array, step: Callable[[], Step], old: optax.OptState) -> Step:
    """Returns the updates and state of ``step()``, or zeros and the old state.

    Python chooses outside ``jit``, because XLA would compile a conditional on these
    closures at every call. Within ``jit``, a CPU gets the conditional, and accelerators
    choose each entry within the optimizer's own loops.
    """

    def stay(new: Step) -> Step:
        # The dtypes are those of a step: moments that start in bfloat16 are float32
        # after the first float32 gradient.
        updates, state = new
        zeros = jax.tree.map(jnp.zeros_like, updates)
        return zeros, jax.tree.map(_cast_like, old, state)

    def vary(result: Step) -> Step:
        # Under shard_map, both branches must vary over the devices as `skip` does.
        return jax.tree.map(lambda leaf: jnp.where(skip, leaf, leaf), result)

    def conditional() -> Step:
        return lax.cond(
            skip, lambda: vary(stay(jax.eval_shape(step))), lambda: vary(step())
        )

    def select() -> Step:
        new = step()
        return jax.tree.map(functools.partial(jnp.where, skip), stay(new), new)

    if isinstance(skip, jax.core.Tracer):
        return lax.platform_dependent(cpu=conditional, default=select)
    return stay(jax.eval_shape(step)) if skip else step()


def _cast_like(array: jax.Array, like: Any) -> jax.Array:
    has_dtype = getattr(array, "dtype", like.dtype) == like.dtype
    return array if has_dtype else array.astype(like.dtype)

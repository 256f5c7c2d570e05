"""Compares optimizers of an Equinox PINN: u'' = f, u = 0 at both ends, depth 12."""

import equinox as eqx
import jax
import jax.numpy as jnp

from stablegrad_optax import Comparison, compare_optimizers


def make(key):
    """Equinox's own initializer, which fades the gradient from layer to layer."""
    return eqx.nn.MLP("scalar", "scalar", 24, 12, jnp.tanh, key=key)


static = eqx.partition(make(jax.random.key(0)), eqx.is_inexact_array)[1]


def init(key):
    """The parameters alone."""
    return eqx.filter(make(key), eqx.is_inexact_array)


def exact(x):
    """The solution."""
    return jnp.sin(2 * jnp.pi * x)


def sample(key):
    """Points inside the interval."""
    return jax.random.uniform(key, (32,))


def loss_fn(params, points):
    """The mean squared residual, and the ends weighted by 100."""
    field = eqx.combine(params, static)
    second = jax.vmap(jax.grad(jax.grad(field)))(points)
    residual = second + (2 * jnp.pi) ** 2 * exact(points)
    ends = jax.vmap(field)(jnp.array([0.0, 1.0]))
    return jnp.mean(residual**2) + 100 * jnp.mean(ends**2)


def score(params):
    """The relative error of u."""
    x = jnp.linspace(0, 1, 201)
    error = jax.vmap(eqx.combine(params, static))(x) - exact(x)
    return jnp.linalg.norm(error) / jnp.linalg.norm(exact(x))


def run(**settings) -> Comparison:
    """Compares the default optimizers; ``settings`` replace the defaults."""
    defaults = {
        "steps": 300,
        "num_seeds": 7,
        "num_tuning_seeds": 2,
        "score": score,
        "failure_score": 0.5,
        "parallel": 8,
        "key": jax.random.key(0),
    }
    return compare_optimizers(loss_fn, init, sample, **(defaults | settings))


if __name__ == "__main__":
    print(run())

"""The experiments: a gradient's scale, a giant gradient, a network that vanishes."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.lib.optimizers import Optimizer, absolute_soap
from benchmarks.lib.train import kernels
from benchmarks.tasks.pinn.network import Network
from benchmarks.tasks.pinn.problems import PROBLEMS
from benchmarks.tasks.pinn.task import Pinn, evaluation
from stablegrad_optax import stablegrad

SHAPES = {"kernel": (16, 16), "bias": (16,)}
SEED = 0


def _params() -> dict[str, jax.Array]:
    return {name: jnp.zeros(shape) for name, shape in SHAPES.items()}


def _gradient(step: jax.Array) -> dict[str, jax.Array]:
    """Draws a gradient with a mean and noise of equal size; its norm is about 0.4."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(SEED), step), len(SHAPES))
    means = jax.random.split(jax.random.key(SEED + 1), len(SHAPES))
    return {
        name: 0.017
        * (jax.random.normal(key, SHAPES[name]) + jax.random.normal(mean, SHAPES[name]))
        for name, key, mean in zip(SHAPES, keys, means, strict=True)
    }


def rms(x: jax.Array) -> jax.Array:
    """Returns the root mean square, without a square that leaves float32."""
    largest = jnp.max(jnp.abs(x))
    unit = jnp.where(largest > 0, largest, 1)
    return unit * jnp.sqrt(jnp.mean((x / unit) ** 2))


def update_sizes(name: str, scales: np.ndarray, *, steps: int = 50) -> np.ndarray:
    """Returns the size of the kernel's update at learning rate 1, f[scales].

    Args:
        name: Of the optimizer.
        scales: What the gradient of every step is multiplied by.
        steps: Updates; the last one is measured.
    """
    tx = Optimizer.named(name)(lambda _: 1.0)

    @jax.jit
    def size(scale: jax.Array) -> jax.Array:
        def update(state: Any, step: jax.Array) -> tuple[Any, jax.Array]:
            grads = jax.tree.map(lambda g: scale * g, _gradient(step))
            updates, state = tx.update(grads, state, _params(), probes={})
            return state, rms(updates["kernel"])

        return jax.lax.scan(update, tx.init(_params()), jnp.arange(steps))[1][-1]

    # The mean entry of the gradient is about 0.02: scales are those of the gradient.
    return np.array([size(jnp.float32(scale / 0.024)) for scale in scales])


def deviations(
    name: str, steps: int, *, giant: float = 1e4, warm_up: int = 200
) -> np.ndarray:
    """Returns how far one giant gradient moves each update that follows it, f[steps].

    The number is the norm of the difference between the kernel's updates with the giant
    gradient and without it, over the norm of the latter.

    Args:
        name: Of the optimizer.
        steps: Updates after the giant gradient, which is the first of them.
        giant: What one gradient is multiplied by.
        warm_up: Updates before the giant gradient.
    """
    tx = Optimizer.named(name)(lambda _: 1.0)

    @jax.jit
    def updates(factor: jax.Array) -> jax.Array:
        def update(state: Any, step: jax.Array) -> tuple[Any, jax.Array]:
            scale = jnp.where(step == warm_up, factor, 1)
            grads = jax.tree.map(lambda g: scale * g, _gradient(step))
            change, state = tx.update(grads, state, _params(), probes={})
            return state, change["kernel"]

        total = jnp.arange(warm_up + steps)
        return jax.lax.scan(update, tx.init(_params()), total)[1][warm_up:]

    plain, disturbed = (np.asarray(updates(jnp.float32(f))) for f in (1.0, giant))
    norm = partial(np.linalg.norm, axis=(1, 2))
    return norm(disturbed - plain) / norm(plain)


def memory(deviation: np.ndarray, limit: float = 0.5) -> int:
    """Returns the number of updates up to the last that deviates by the limit."""
    above = np.flatnonzero(~(deviation < limit))
    return 0 if not above.size else int(above[-1]) + 1


class Layers(NamedTuple):
    """Gradients and updates of the layers of a deep network, by step.

    Attributes:
        gradient: f[steps, kernels], root mean squares of the backpropagated gradient.
        update: f[steps, kernels], of the update, over the learning rate.
        error: f[], relative L2, after the last step.
    """

    gradient: np.ndarray
    update: np.ndarray
    error: np.ndarray


EPS = (1e-8, 1e-16, 1e-30)
BASES: Mapping[str, Callable[..., optax.GradientTransformation]] = {
    "SOAP": absolute_soap,
    "AdamW": partial(optax.adamw, weight_decay=0.0),
    "AdamW (b2=0.9)": partial(optax.adamw, b2=0.9, weight_decay=0.0),
}
# Column of the figure -> eps, and whether StableGrad stands before the optimizer.
COLUMNS = {f"eps={eps:g}": (eps, False) for eps in EPS} | {
    "StableGrad, eps=1e-08": (1e-8, True)
}


def layers(
    base: str,
    columns: Mapping[str, tuple[float, bool]] = COLUMNS,
    *,
    depth: int = 50,
    width: int = 32,
    steps: int = 500,
    rate: float = 3e-3,
    seed: int = SEED,
) -> dict[str, Layers]:
    """Trains a plain tanh network from Equinox's default weights on Poisson's equation.

    Args:
        base: A key of `BASES`.
        columns: As `COLUMNS`.
        depth: Hidden layers.
        width: Units in each.
        steps: Updates.
        rate: The learning rate, constant.
        seed: Of weights and points.
    """
    problem = PROBLEMS["poisson"]()
    task = Pinn(problem, Network(depth, width, initializer="uniform"))
    gradient = jax.jit(task.gradient)
    score = jax.jit(task.score)

    def transformation(eps: Any, scaled: bool) -> optax.GradientTransformation:
        tx = BASES[base](rate, eps=eps)
        return optax.chain(stablegrad(), tx) if scaled else tx

    @partial(jax.jit, static_argnums=0)
    def update(
        scaled: bool, eps: jax.Array, params: Any, state: Any, grads: Any
    ) -> Any:
        updates, state = transformation(eps, scaled).update(grads, state, params)
        sizes = [
            jnp.stack([rms(x) for x in kernels(tree).values()])
            for tree in (grads, updates)
        ]
        return optax.apply_updates(params, updates), state, sizes

    def train(eps: float, scaled: bool) -> Layers:
        init_key, key = jax.random.split(jax.random.key(seed))
        params, _ = task.init(init_key)
        state, sizes = transformation(eps, scaled).init(params), []
        for step in range(steps):
            grads = gradient(params, None, key, step).grads
            params, state, both = update(scaled, jnp.float32(eps), params, state, grads)
            sizes.append(both)
        grads, updates = (np.array(x) for x in zip(*jax.device_get(sizes), strict=True))
        error = score(params, None, evaluation(problem))["error"]
        return Layers(grads, updates / rate, np.asarray(error))

    return {name: train(*column) for name, column in columns.items()}

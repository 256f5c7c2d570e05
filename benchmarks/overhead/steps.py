"""Whole training steps, with a transformation and without: batch, gradient, update."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.overhead.arms import ARMS, BASELINE
from benchmarks.overhead.timing import Times, interleave
from benchmarks.pinn.gradient import value_and_grads
from benchmarks.pinn.network import Network
from benchmarks.pinn.problems import PROBLEMS
from benchmarks.vision.models import ResNet

Params = Any


class Training(NamedTuple):
    """A network and what its step computes before the optimizer's turn."""

    title: str
    init: Callable[[jax.Array], Params]
    grad: Callable[[Params, jax.Array], Params]  # at a key's batch


def resnet20(batch: int = 64) -> Training:
    """ResNet-20 without BatchNorm on images of CIFAR's size; the pixels are noise."""
    model = ResNet(depth=20, norm="none")

    def loss(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = model.apply(params, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()

    def grad(params: Params, key: jax.Array) -> Params:
        images = jax.random.normal(key, (batch, 32, 32, 3))
        labels = jax.random.randint(key, (batch,), 0, 10)
        return jax.grad(loss)(params, images, labels)

    return Training(
        f"ResNet-20 without BatchNorm, batch {batch}",
        lambda key: model.init(key, jnp.zeros((1, 32, 32, 3))),
        grad,
    )


def pinn(depth: int = 32) -> Training:
    """The network and problem of the demo."""
    problem, network = PROBLEMS["poisson"](), Network(depth, 32)

    def grad(params: Params, key: jax.Array) -> Params:
        _, grads, _ = value_and_grads(problem, network, params, problem.sample(key))
        return grads

    return Training(f"PINN, depth {depth}, width 32", network.init, grad)


# name -> the training
TRAININGS: dict[str, Callable[[], Training]] = {"resnet20": resnet20, "pinn": pinn}


def time_training(training: Training, arms: list[str], rounds: int) -> dict[str, Times]:
    """A step of every arm; BASELINE must be among them."""
    key = jax.random.key(0)
    stretches = {name: _stretch(training, name, key) for name in arms}
    return interleave(stretches, rounds, BASELINE)


def _stretch(training: Training, arm: str, key: jax.Array) -> Callable[[int], None]:
    tx = optax.chain(*ARMS[arm].parts())
    params = training.init(key)
    state = tx.init(params)

    @jax.jit
    def step(
        state: optax.OptState, params: Params, key: jax.Array
    ) -> tuple[optax.OptState, Params, jax.Array]:
        updates, state = tx.update(training.grad(params, key), state, params)
        key, _ = jax.random.split(key)
        return state, optax.apply_updates(params, updates), key

    def run(steps: int) -> None:
        nonlocal state, params, key
        for _ in range(steps):
            state, params, key = step(state, params, key)
        jax.block_until_ready(params)

    return run

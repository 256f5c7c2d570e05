"""The protocol of a task: what is trained, without an optimizer, a loop or a file."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax

PyTree = Any


class Gradient(NamedTuple):
    """The gradient of one batch and what was measured on the way."""

    loss: jax.Array  # f[]
    grads: PyTree
    probes: Mapping[str, jax.Array]  # prediction -> f[], the std of dL/d(prediction)
    state: PyTree  # after the batch


class Task(Protocol):
    """A problem that is trained.

    A task is a pytree. Its arrays are arguments of the compiled programs, which are
    compiled once for equal shapes and equal other fields.
    """

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        """Returns the weights, drawn with `jax.random.split(key)[0]`, and the state."""

    def gradient(
        self, params: PyTree, state: PyTree, key: jax.Array, step: jax.Array
    ) -> Gradient:
        """Returns the gradient of the batch that `key` gives step `step`, from 0.

        `key` is the other half of the key that `init` splits.
        """

    def score(
        self, params: PyTree, state: PyTree, held_out: PyTree
    ) -> dict[str, jax.Array]:
        """Returns name -> f[], measured on examples that are not trained on."""

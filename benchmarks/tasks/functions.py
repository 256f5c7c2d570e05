"""Tasks of four functions: initial weights, batches, a loss and an error."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from benchmarks.lib.task import Gradient, PyTree


@jax.tree_util.register_static
@dataclass(frozen=True, eq=False)
class FunctionTask:
    """A small problem without data to hand over, probes or a state.

    Attributes:
        draw: Key -> initial weights.
        loss: (weights, batch) -> f[].
        sample: Key -> batch.
        error: Weights -> f[], 1 for a guess.
    """

    draw: Callable[[jax.Array], PyTree]
    loss: Callable[[PyTree, Any], jax.Array]
    sample: Callable[[jax.Array], Any]
    error: Callable[[PyTree], jax.Array]

    def init(self, key: jax.Array) -> tuple[PyTree, None]:
        return self.draw(jax.random.split(key)[0]), None

    def gradient(
        self, params: PyTree, state: None, key: jax.Array, step: jax.Array
    ) -> Gradient:
        batch = self.sample(jax.random.fold_in(key, step))
        loss, grads = jax.value_and_grad(self.loss)(params, batch)
        return Gradient(loss, grads, {}, state)

    def score(
        self, params: PyTree, state: None, held_out: None
    ) -> dict[str, jax.Array]:
        return {"error": self.error(params)}

"""Networks trained on examples drawn at random, which may be disturbed.

With dynamic loss scaling where they compute in float16.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.training.dynamic_scale import DynamicScale

from benchmarks.lib.task import Gradient
from benchmarks.tasks.disturbances import Disturbance
from stablegrad_optax import prediction_grad_std

PyTree = Any
STATIC = {"static": True}
# The first scale is the library's; a run of hundreds of steps should see it grow.
GROWTH_INTERVAL = 50


class HeldOut(NamedTuple):
    """Examples that are never trained on, and what knowing nothing scores on them."""

    inputs: jax.Array
    targets: jax.Array
    baseline: float = 1.0


@dataclass(frozen=True)
class Supervised:
    """A model and the examples it is trained on; a run carries a loss scale along.

    Its probe, "prediction", is the standard deviation of dL/d(prediction) per example.

    Attributes:
        train: arrays that `sample` draws from.
        disturbance: what goes wrong.
        spike: which update, from 1 on, is the first disturbed one; 0: none.
        model: from inputs [batch, ...] to predictions.
        batch: examples in each.
        loss_scaling: dynamic, by flax: the scale is halved after a gradient that is not
            finite, and doubled after 50 good steps.
        failure_error: a run has failed if its error is not below it.
    """

    train: PyTree
    disturbance: Disturbance
    spike: int
    model: nn.Module = field(metadata=STATIC)
    batch: int = field(metadata=STATIC)
    loss_scaling: bool = field(metadata=STATIC)
    failure_error: ClassVar[float] = 1.0

    def sample(self, key: jax.Array, batch: int) -> tuple[jax.Array, jax.Array]:
        """Inputs and targets of a batch."""
        raise NotImplementedError

    def loss(self, predictions: jax.Array, targets: jax.Array) -> jax.Array:
        """f[], a mean over examples."""
        raise NotImplementedError

    def judge(self, predictions: jax.Array, targets: jax.Array) -> jax.Array:
        """f[], what the task is usually judged by."""
        raise NotImplementedError

    def error(self, judged: jax.Array, baseline: jax.Array) -> jax.Array:
        """f[], the lower the better; by default 1 is what knowing nothing has."""
        return judged / baseline

    def init(self, key: jax.Array) -> tuple[PyTree, DynamicScale | None]:
        """Initial weights, float32."""
        scale = DynamicScale(growth_interval=GROWTH_INTERVAL)
        params = _init(self, jax.random.split(key)[0])
        return params, scale if self.loss_scaling else None

    def gradient(
        self,
        params: PyTree,
        state: DynamicScale | None,
        key: jax.Array,
        step: jax.Array,
    ) -> Gradient:
        """Takes the disturbed batch of (key, step); the gradient may be not finite."""
        key_batch, key_noise = jax.random.split(jax.random.fold_in(key, step))
        inputs, targets = self.sample(key_batch, self.batch)
        is_spike = self.disturbance.is_spike(step + 1, self.spike)
        inputs = self.disturbance.disturb_inputs(inputs, is_spike, key_noise)
        targets = self.disturbance.disturb_targets(targets, is_spike, key_noise)
        factor = self.disturbance.loss_multiplier(is_spike)

        def predict(params: PyTree) -> jax.Array:
            return self.model.apply({"params": params}, inputs)

        # The loss's derivative by the probe is the prediction's gradient.
        def loss(params: PyTree, probe: jax.Array) -> jax.Array:
            return factor * self.loss(predict(params) + probe, targets)

        probe = jnp.zeros_like(jax.eval_shape(predict, params))
        if state is None:
            value, found = jax.value_and_grad(loss, (0, 1))(params, probe)
        else:
            state, _, value, found = state.value_and_grad(loss, (0, 1))(params, probe)
        grads, prediction_grads = found
        std = prediction_grad_std(prediction_grads, num_examples=self.batch)
        return Gradient(value, grads, {"prediction": std}, state)

    def score(self, params: PyTree, state: Any, held_out: HeldOut) -> dict:
        """Clean `loss`, `score` and `error`."""
        del state
        predictions = self.model.apply({"params": params}, held_out.inputs)
        judged = self.judge(predictions, held_out.targets)
        return {
            "loss": self.loss(predictions, held_out.targets),
            "score": judged,
            "error": self.error(judged, held_out.baseline),
        }


@jax.jit
def _init(task: Supervised, key: jax.Array) -> PyTree:
    inputs, _ = task.sample(key, 1)
    return task.model.init(key, inputs)["params"]

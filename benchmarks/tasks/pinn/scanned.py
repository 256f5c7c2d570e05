"""Perceptrons whose hidden layers are one scan, which compiles as fast at any depth."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.tasks.pinn.ansatz import Derivatives, SecondOrder
from benchmarks.tasks.pinn.network import (
    Network,
    Params,
    _activate,
    _input_streams,
    _product,
)

_STACK = "layer_1_stack_"


@dataclass(frozen=True)
class Scanned(Network):
    """A network whose hidden layers but the first are stacked, which compiles faster.

    Its depth is at least 2, and its parameters are `layer_0`, `layer_1_stack_` and
    `layer_<depth>`.
    """

    def init(self, key: jax.Array) -> Params:
        layers = list(super().init(key).values())
        hidden = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers[1:-1])
        return {"layer_0": layers[0], _STACK: hidden, f"layer_{self.depth}": layers[-1]}

    def derivatives(
        self, params: Params, points: jax.Array, second: SecondOrder | None
    ) -> Derivatives:
        def layer(streams: jax.Array, dense: Any) -> tuple[jax.Array, None]:
            streams = _product(streams, dense["kernel"])
            return _activate(self.activation, second, streams, dense["bias"]), None

        flat = points.reshape(-1, self.inputs)
        streams = _input_streams(self.embedding, flat, second)
        streams, _ = layer(streams, params["layer_0"])
        streams, _ = jax.lax.scan(layer, streams, params[_STACK])
        streams = _product(streams, params[f"layer_{self.depth}"]["kernel"])
        streams = streams.reshape(len(streams), *points.shape[:-1])
        if second is None:
            return Derivatives(streams[0])
        split = 1 + self.inputs
        return Derivatives(streams[0], streams[1:split], streams[split:])

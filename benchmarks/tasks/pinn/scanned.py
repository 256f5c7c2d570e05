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


@dataclass(frozen=True)
class Scanned(Network):
    """A network whose hidden layers are stacked, which compiles faster."""

    def init(self, key: jax.Array) -> Params:
        layers = list(super().init(key).values())
        hidden = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers[1:-1])
        return {"first": layers[0], "stack_0": hidden, "last": layers[-1]}

    def derivatives(
        self, params: Params, points: jax.Array, second: SecondOrder | None
    ) -> Derivatives:
        def layer(streams: jax.Array, dense: Any) -> tuple[jax.Array, None]:
            streams = _product(streams, dense["kernel"])
            return _activate(self.activation, second, streams, dense["bias"]), None

        flat = points.reshape(-1, self.inputs)
        streams = _input_streams(self.embedding, flat, second)
        streams, _ = layer(streams, params["first"])
        streams, _ = jax.lax.scan(layer, streams, params["stack_0"])
        streams = _product(streams, params["last"]["kernel"])
        streams = streams.reshape(len(streams), *points.shape[:-1])
        if second is None:
            return Derivatives(streams[0])
        split = 1 + self.inputs
        return Derivatives(streams[0], streams[1:split], streams[split:])

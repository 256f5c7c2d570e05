"""Features of the inputs, and conditions that a solution meets exactly.

Both are plain functions of the points, which `derivatives_of` turns into forward
streams, so that whatever is built in is differentiated by one piece of code.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SecondOrder = tuple[tuple[float, ...], ...]
Function = Callable[[jax.Array], jax.Array]  # of points f[..., inputs]


class Derivatives(NamedTuple):
    """A field u and its derivatives at points of shape [..., inputs]."""

    value: jax.Array  # f[...]
    gradient: jax.Array | None = None  # f[inputs, ...]: du/dx_j
    second: jax.Array | None = None  # f[rows, ...]: sum_j row[j] d2u/dx_j2


def derivatives_of(
    function: Function, points: jax.Array, second: SecondOrder | None
) -> Derivatives:
    """A function and its derivatives by each input, forward over forward.

    Args:
        function: points f[..., inputs] -> f[...] or, of features, f[..., features].
        points: f[..., inputs].
        second: as in `Network.derivatives`.
    """
    value = function(points)
    if second is None:
        return Derivatives(value)

    def along(unit: jax.Array) -> tuple[jax.Array, jax.Array]:
        direction = (jnp.broadcast_to(unit, points.shape),)
        return jax.jvp(
            lambda x: jax.jvp(function, (x,), direction)[1], (points,), direction
        )

    slopes, curvatures = zip(
        *map(along, jnp.eye(points.shape[-1], dtype=points.dtype)), strict=True
    )
    return Derivatives(value, jnp.stack(slopes), combine(second, jnp.stack(curvatures)))


def combine(second: SecondOrder, streams: jax.Array) -> jax.Array:
    """f[rows, ...]: the sums over the inputs that the rows ask for."""
    rows = jnp.asarray(second, streams.dtype).reshape(-1, len(streams))
    return jnp.einsum("kj,j...->k...", rows, streams, precision="highest")


def identity(points: jax.Array) -> jax.Array:
    """The coordinates themselves."""
    return points


def fourier_features(
    wave_vectors: Sequence[Sequence[float]], *, coordinates: Sequence[int] = ()
) -> Function:
    """The features cos(k x) and sin(k x), and some of the coordinates.

    Args:
        wave_vectors: the k. Where all their first components are whole multiples of
            pi, whatever is built on them has period 2 in the first coordinate.
        coordinates: which coordinates are features as they are.
    """
    matrix, kept = np.asarray(wave_vectors, np.float32).T, list(coordinates)

    def features(points: jax.Array) -> jax.Array:
        phase = jnp.matmul(points, matrix, precision="highest")
        parts = [points[..., kept], jnp.cos(phase), jnp.sin(phase)]
        return jnp.concatenate(parts, -1)

    return features


class Ansatz(NamedTuple):
    """u = start + factor N: where the factor is 0, u is known whatever the network N.

    Attributes:
        start: points f[..., inputs] -> f[...], meets the conditions.
        factor: points -> f[...], vanishes where they hold.
    """

    start: Function
    factor: Function

    def __call__(
        self, points: jax.Array, network: Derivatives, second: SecondOrder | None
    ) -> Derivatives:
        """Derivatives of u from those of N, by the product rule."""
        start, factor = (derivatives_of(part, points, second) for part in self)
        value = start.value + factor.value * network.value
        if second is None:
            return Derivatives(value)
        mixed = combine(second, factor.gradient * network.gradient)
        return Derivatives(
            value,
            start.gradient
            + factor.gradient * network.value
            + factor.value * network.gradient,
            start.second
            + factor.second * network.value
            + 2 * mixed
            + factor.value * network.second,
        )

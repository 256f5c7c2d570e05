"""Measures each leaf of a gradient, or each slice, on the host and in float64."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from stablegrad_optax._leaves import Leaf

# A leaf is only rounding if its rms is below this many epsilons of its dtype times the
# rms of its kernel. The key biases of attention, whose exact gradient is zero, have at
# most about 2 of them.
_ROUNDING = 16
_ROUNDING_AT_MOST = 1e-2  # limits the ratio in bfloat16, whose epsilon is large
_ROW_SPARSE = 0.5  # a larger share of zero rows makes a matrix row-sparse
_STACKED_RATIO = 100  # the ratio between slices above which a leaf looks stacked


@dataclasses.dataclass(frozen=True, slots=True)
class LeafReport:
    """Holds the statistics of the finite entries of one leaf of a gradient, or a slice.

    Attributes:
      name: The path of the leaf, "path/to/kernel"; "path/to/kernel[3]" for a slice.
      shape: Its shape, of a slice without the stacked axes.
      is_weight: Whether its std counts in the ratio over layers.
      is_rounding: Whether it holds nothing but rounding, such as the bias of an
        attention's keys: it then counts nowhere.
      std: The standard deviation about the mean; of complex entries, of their modulus
        about the complex mean.
      rms: The root mean square.
      mean_to_std: abs(mean) / std; infinite for a constant leaf, 0 for a zero leaf.
      below_adam_eps: The share of entries with 0 < abs(g) < adam_eps.
      below_muon_eps: Whether it is a matrix that Muon moves too little, because its
        norm is below muon_eps or its squares underflow.
      zero: The share of entries that are exactly zero.
      zero_rows: The share of rows, along the first axis, that are exactly zero.
      nonfinite: The share of entries that are infinite or NaN.
    """

    name: str
    shape: tuple[int, ...]
    is_weight: bool
    is_rounding: bool
    std: float
    rms: float
    mean_to_std: float
    below_adam_eps: float
    below_muon_eps: bool
    zero: float
    zero_rows: float
    nonfinite: float

    @property
    def spread(self) -> float:
        """The std, floored at rms / 10: what ``stablegrad`` divides by."""
        return max(self.std, self.rms / 10)

    @property
    def is_row_sparse(self) -> bool:
        """Tells whether most rows of a tall matrix are zero, as in an embedding."""
        is_tall = len(self.shape) == 2 and self.shape[0] >= 2 * self.shape[1]
        return is_tall and _ROW_SPARSE < self.zero_rows < 1

    @property
    def is_matrix(self) -> bool:
        """Tells whether Muon orthogonalizes the leaf."""
        return len(self.shape) == 2

    @property
    def is_dead(self) -> bool:
        """Tells whether the leaf is a weight without any gradient."""
        return self.is_weight and self.zero == 1


def weights_with_gradient(rows: Sequence[LeafReport]) -> list[LeafReport]:
    """Selects the weights, or all rows if none is a weight, that make the ratio.

    A gradient of zero, as in a dead branch, is not an imbalance.
    """
    counted = [row for row in rows if not row.is_rounding]
    weights = [row for row in counted if row.is_weight]
    return [row for row in weights or counted if row.spread > 0]


def is_floating(leaf: Any) -> bool:
    return bool(jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.inexact))


def fetch(leaves: list[Any]) -> list[NDArray[Any]]:
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        raise ValueError("grads must have values: call gradient_report outside jit.")
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        raise ValueError("grads must have values; got jax.ShapeDtypeStruct.")
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
    if not all(array.is_fully_addressable for array in arrays):
        raise ValueError(
            "grads must be held by this process in full; gather them first with "
            "jax.experimental.multihost_utils.process_allgather(grads, tiled=True)."
        )
    return [np.asarray(leaf) for leaf in jax.device_get(leaves)]


def measure(
    leaf: Leaf,
    array: NDArray[Any],
    is_weight: bool,
    *,
    adam_eps: float,
    muon_eps: float,
) -> list[LeafReport]:
    """Measures each slice of a leaf."""
    name, shape = leaf.name or "grads", leaf.shape[leaf.num_stacked :]
    return [
        LeafReport(
            name=f"{name}{list(index)}" if leaf.num_stacked else name,
            shape=shape,
            is_weight=is_weight,
            is_rounding=False,
            **_statistics(array[index], adam_eps, muon_eps),
        )
        for index in np.ndindex(leaf.stack)
    ]


def _statistics(
    array: NDArray[Any], adam_eps: float, muon_eps: float
) -> dict[str, Any]:
    wide = np.complex128 if np.iscomplexobj(array) else np.float64
    values = array.reshape(-1).astype(wide)
    finite = np.isfinite(values)
    if not finite.all():
        values = values[finite]
    magnitude = np.abs(values)
    zero = values.size - int(np.count_nonzero(magnitude))
    below = max(int(np.count_nonzero(magnitude < adam_eps)) - zero, 0)
    # Values are divided by the largest, so that squares do not overflow in float64.
    unit, count = float(magnitude.max(initial=0)) or 1.0, values.size or 1
    values /= unit
    mean = values.sum() / count
    values -= mean
    std, offset = math.sqrt(np.vdot(values, values).real / count), float(abs(mean))
    size = array.size or 1
    zero_rows = 0.0
    if array.ndim == 2 and zero and array.size:
        zero_rows = float(np.mean(~np.any(array != 0, axis=1)))
    rms = unit * math.hypot(std, offset)
    # The square of a smaller number underflows.
    underflow = float(jnp.finfo(array.dtype).smallest_normal) ** 0.5
    is_small = rms * math.sqrt(count) < muon_eps or rms < underflow
    return {
        "std": unit * std,
        "rms": rms,
        "mean_to_std": offset / std if std else math.inf if offset else 0.0,
        "below_adam_eps": below / size,
        "below_muon_eps": array.ndim == 2 and rms > 0 and is_small,
        "zero": zero / size,
        "zero_rows": zero_rows,
        "nonfinite": (array.size - values.size) / size,
    }


def mark_rounding(
    leaves: Sequence[Leaf],
    rows: Sequence[list[LeafReport]],
    arrays: Sequence[NDArray[Any]],
) -> list[list[LeafReport]]:
    """Marks leaves whose exact gradient is zero, by comparison with their kernel.

    A bias adds to the output of its kernel, so its gradient is the same sum as the
    kernel's, but without the factor of the input. It is smaller by a rounding error
    only if the sum cancels. Layers of a deep network may differ by more, so the kernel
    must have the same parent and more axes.
    """
    # The largest rms f[slices] by parent, and by the numbers of axes and slices.
    kernels: dict[Any, dict[tuple[int, int], NDArray[np.float64]]] = {}
    for leaf, leaf_rows in zip(leaves, rows, strict=True):
        here = kernels.setdefault(leaf.parent, {})
        key = _num_axes(leaf), len(leaf_rows)
        rms = np.array([row.rms for row in leaf_rows])
        here[key] = np.maximum(here.get(key, 0.0), rms)
    marked = []
    for leaf, leaf_rows, array in zip(leaves, rows, arrays, strict=True):
        limit = np.zeros(len(leaf_rows))
        for (axes, num_slices), rms in kernels[leaf.parent].items():
            if axes > _num_axes(leaf) and num_slices in (1, len(leaf_rows)):
                limit = np.maximum(limit, rms)
        epsilons = _ROUNDING * float(jnp.finfo(array.dtype).eps)
        limit *= min(epsilons, _ROUNDING_AT_MOST)
        marked.append(
            [
                dataclasses.replace(row, is_rounding=True)
                if 0 < row.rms < most
                else row
                for row, most in zip(leaf_rows, limit, strict=True)
            ]
        )
    return marked


def _num_axes(leaf: Leaf) -> int:
    return sum(length > 1 for length in leaf.shape[leaf.num_stacked :])


def looks_stacked(
    leaves: Sequence[Leaf], arrays: Sequence[NDArray[Any]]
) -> tuple[str, ...]:
    """Names the leaves whose slices along the first axis differ as layers do.

    An axis of layers or members is the first of all leaves under the same parent.
    """
    shapes: dict[Any, set[tuple[int, ...]]] = {}
    for leaf in leaves:
        shapes.setdefault(leaf.parent, set()).add(leaf.shape)
    return tuple(
        leaf.name
        for leaf, array in zip(leaves, arrays, strict=True)
        if not leaf.num_stacked
        and len(leaf.shape) >= 3
        and leaf.shape[0] > 1
        and all(
            shape[:1] == leaf.shape[:1] and math.prod(shape) > shape[0]
            for shape in shapes[leaf.parent]
        )
        and _differ(array)
    )


def _differ(array: NDArray[Any]) -> bool:
    """Tells whether the largest entries of slices differ by far, or some are zero."""
    largest = np.abs(array.reshape(len(array), -1).astype(np.complex128))
    largest = largest.max(axis=1, initial=0)
    some = largest[np.isfinite(largest) & (largest > 0)]
    if not some.size:
        return False
    return bool(some.max() > _STACKED_RATIO * some.min() or np.any(largest == 0))

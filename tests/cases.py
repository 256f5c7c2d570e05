"""The registry: every method of the package, and what is true of it.

The conformance tests run over `CASES`. A new method, or a new variant of one, joins
with one entry; a property that does not hold for it is switched off in that entry.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stablegrad_optax import (
    clip_by_history,
    gradient_autoscaled_normalization,
    gradient_stabilizer,
    normalize_by_leaf_norm,
    scale_by_soap,
    skip_spikes,
    stablegrad,
)


@dataclass(frozen=True, eq=False)
class Case:
    """Describes one call of a factory, and the properties of the transformation.

    Attributes:
        name: The name in the tests' ids.
        factory: The function that makes the transformation.
        kwargs: Its keyword arguments.
        extra_args: The extra arguments of `update`.
        static_args: The structural arguments for `optax.inject_hyperparams`.
        numerical_floors: The arguments on which safety must not depend.
        lowest_exponent: Gradients of 2^lowest_exponent are much larger than the floors.
        degree: From a fresh state, a gradient scaled by c gives a weight's update
            scaled by c^degree. None if no degree fits.
        is_idempotent: A second application, from a fresh state, changes nothing.
        is_layerwise: A layer's update depends on that layer's gradient alone.
        is_wrapper: The transformation wraps an optimizer, and its own statistics belong
            to no array.
        converges: The problems that SGD with a decaying rate solves after the
            transformation. Mean removal keeps the mean that a weight starts with.
        has_moments: The state holds moments in the shape of the parameters, as Adam's
            does. It has no mask and no scale factors, and does not forget NaN.
    """

    name: str
    factory: Callable[..., optax.GradientTransformationExtraArgs]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    extra_args: Mapping[str, float] = field(default_factory=dict)
    static_args: tuple[str, ...] = ()
    numerical_floors: tuple[str, ...] = ("eps",)
    lowest_exponent: int = -60
    degree: int | None = 0
    is_idempotent: bool = True
    is_layerwise: bool = True
    converges: tuple[str, ...] = ("parabola", "rosenbrock", "matrix")
    is_wrapper: bool = False
    has_moments: bool = False

    def make(self, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
        """Makes the transformation, with some arguments replaced."""
        return self.factory(**{**self.kwargs, **kwargs})

    @functools.cached_property
    def tx(self) -> optax.GradientTransformationExtraArgs:
        """The transformation."""
        return self.make()

    @functools.cached_property
    def update(self) -> Callable[[Any, Any], tuple[Any, Any]]:
        """Gradients and state to updates and state, compiled once for all tests."""
        return jax.jit(functools.partial(self.tx.update, **self.extra_args))

    def first_update(self, grads: Any) -> Any:
        """Returns the updates that a fresh state gives, as NumPy arrays."""
        return jax.tree.map(np.asarray, self.update(grads, self.tx.init(grads))[0])


def stacked_by_name(tree: Any) -> Any:
    """Returns one stacked axis for each leaf whose path contains "stack"."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: int("stack" in jax.tree_util.keystr(path)), tree
    )


def skip_spikes_around(
    max_deviation: float = 6.0,
    *,
    decay: float = 0.99,
    warmup_steps: int = 100,
    mask: Any = None,
    num_stacked_axes: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Wraps stablegrad, which has a state, a mask and stacked axes."""
    inner = stablegrad(mask=mask, num_stacked_axes=num_stacked_axes)
    return skip_spikes(inner, max_deviation, decay=decay, warmup_steps=warmup_steps)


# Of gradients that come as they are: Rosenbrock's valley takes SGD more steps.
SOLVED_BY_SGD = ("parabola", "matrix")

CASES = [
    Case("stablegrad", stablegrad),
    Case(
        "stablegrad-prediction",
        stablegrad,
        {"reference_std": None, "max_reference_growth": 2.0},
        extra_args={"prediction_grad_std": 0.5},
    ),
    Case(
        "stablegrad-weights-only",
        stablegrad,
        {"scale_biases": False},
    ),
    Case(
        "stablegrad-stacked",
        stablegrad,
        {"num_stacked_axes": stacked_by_name},
        static_args=("num_stacked_axes",),
    ),
    Case("stabilizer", gradient_stabilizer, lowest_exponent=-10),
    Case(
        "stabilizer-algorithm-1",
        gradient_stabilizer,
        {"bias_correction": False, "max_norm_ratio": 2.0},
        lowest_exponent=-10,
    ),
    Case(
        "stabilizer-stacked",
        gradient_stabilizer,
        {"num_stacked_axes": stacked_by_name},
        static_args=("num_stacked_axes",),
        lowest_exponent=-10,
    ),
    Case(
        "normalize", normalize_by_leaf_norm, numerical_floors=(), lowest_exponent=-100
    ),
    Case(
        "normalize-stacked",
        normalize_by_leaf_norm,
        {"num_stacked_axes": stacked_by_name},
        static_args=("num_stacked_axes",),
        numerical_floors=(),
        lowest_exponent=-100,
    ),
    Case(
        "autoscaled",
        gradient_autoscaled_normalization,
        numerical_floors=(),
        degree=None,
        is_idempotent=False,
        is_layerwise=False,
        converges=(),
    ),
    Case(
        "autoscaled-stacked",
        gradient_autoscaled_normalization,
        {"num_stacked_axes": stacked_by_name},
        static_args=("num_stacked_axes",),
        numerical_floors=(),
        degree=None,
        is_idempotent=False,
        is_layerwise=False,
        converges=(),
    ),
    Case(
        "autoscaled-none",
        gradient_autoscaled_normalization,
        {"autoscale": "none"},
        numerical_floors=(),
        degree=1,
        converges=(),
    ),
    Case(
        "history",
        clip_by_history,
        numerical_floors=(),
        degree=None,
        is_layerwise=False,
        converges=SOLVED_BY_SGD,
    ),
    Case(
        "history-at-once",
        clip_by_history,
        {"warmup_steps": 0},
        numerical_floors=(),
        degree=1,
        converges=SOLVED_BY_SGD,
    ),
    Case(
        "history-stacked",
        clip_by_history,
        {"num_stacked_axes": stacked_by_name},
        static_args=("num_stacked_axes",),
        numerical_floors=(),
        degree=None,
        is_layerwise=False,
        converges=SOLVED_BY_SGD,
    ),
    Case(
        "skip-spikes",
        skip_spikes_around,
        {"warmup_steps": 1},
        numerical_floors=(),
        is_layerwise=False,
        is_wrapper=True,
    ),
    Case("soap", scale_by_soap, has_moments=True),
    Case(
        "soap-stacked",
        scale_by_soap,
        {"num_stacked_axes": stacked_by_name, "precondition_frequency": 1},
        static_args=("num_stacked_axes",),
        has_moments=True,
    ),
]

# One case of each method that has a mask and statistics of its own arrays.
TRANSFORMATIONS = [
    case
    for case in {case.factory: case for case in reversed(CASES)}.values()
    if not case.is_wrapper and not case.has_moments
]
each_transformation = pytest.mark.parametrize(
    "case", TRANSFORMATIONS, ids=lambda case: case.name
)

# Stacked layers have a test of their own in test_soap.py, and SOAP compiles long.
each_case = pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case, marks=pytest.mark.slow if case.name == "soap-stacked" else ()
        )
        for case in CASES
    ],
    ids=lambda case: case.name,
)

# One case of each method: for what a variant of its arguments cannot change.
METHODS = list({case.factory: case for case in reversed(CASES)}.values())[::-1]
each_method = pytest.mark.parametrize("case", METHODS, ids=lambda case: case.name)

# What changes the scale of gradients and has no moments of its own.
SCALING_CASES, SCALING_METHODS = (
    [case for case in cases if not case.has_moments] for cases in (CASES, METHODS)
)
each_scaling_case = pytest.mark.parametrize(
    "case", SCALING_CASES, ids=lambda case: case.name
)
each_scaling_method = pytest.mark.parametrize(
    "case", SCALING_METHODS, ids=lambda case: case.name
)


def each_with_one(
    cases: Sequence[Case], name: str, values: Sequence[Any], ids: Sequence[str] = ()
) -> pytest.MarkDecorator:
    """Runs each case with one value of another argument, in turn.

    The same code handles a value for every case, so the other pairs are slow.
    """
    ids = ids or [str(value) for value in values]
    pairs = [
        pytest.param(
            case,
            value,
            id=f"{case.name}-{ids[j]}",
            marks=() if i % len(values) == j else pytest.mark.slow,
        )
        for i, case in enumerate(cases)
        for j, value in enumerate(values)
    ]
    return pytest.mark.parametrize(("case", name), pairs)


SHAPES = {
    "hidden": {"bias": (3,), "kernel": (4, 3)},
    "norm": {"scale": (3,)},
    "stack": {"bias": (2, 3), "kernel": (2, 3, 3)},
}


def gradients(seed: int = 0, dtype: Any = jnp.float32, scale: float = 1.0) -> Any:
    """Returns gradients of a layer, a norm without a weight, and two stacked layers."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(scale * (rng.normal(size=shape) + 0.3), dtype),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def is_weight(path: Any) -> bool:
    """Tells whether a path into `gradients()` leads to a weight."""
    return "kernel" in jax.tree_util.keystr(path)


def assert_trees_close(actual: Any, expected: Any, **tolerances: float) -> None:
    """Compares structure, dtypes and shapes, and values to 1e-6 or `tolerances`."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (jnp.shape(a), jnp.result_type(a)) == (jnp.shape(b), jnp.result_type(b))
        np.testing.assert_allclose(
            np.asarray(a), np.asarray(b), **({"rtol": 1e-6, "atol": 1e-12} | tolerances)
        )


def assert_trees_equal(actual: Any, expected: Any) -> None:
    """Compares structure, dtypes and shapes, and values to the last bit."""
    assert_trees_close(actual, expected, rtol=0, atol=0)

"""Checks of arguments, with errors that name the argument, its value and its range."""

import functools
import inspect
import math
import numbers
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

P = ParamSpec("P")
T = TypeVar("T")


def renamed(**names: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Raises a ``TypeError`` with the new name where an old argument is given."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> T:
            for old in names.keys() & kwargs.keys():
                raise TypeError(
                    f"{function.__name__} has no argument '{old}'; its name is "
                    f"'{names[old]}' now."
                )
            return function(*args, **kwargs)

        return checked

    return decorate


def require_bool(name: str, value: Any) -> None:
    """Raises for anything but True and False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False; got {value!r}.")


def require_number(
    name: str,
    value: Any,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> None:
    """Raises for a Python number that is not finite or outside its range.

    Arrays and tracers pass: ``optax.inject_hyperparams`` hands them over in place of
    numbers, and their values are not known while a program is traced.
    """
    if isinstance(value, jax.Array) and value.ndim == 0:
        return
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not (
        math.isfinite(value) and value >= at_least and above < value < below
    ):
        bounds = {"at least": at_least, "above": above, "below": below}
        allowed = " and ".join(
            f"{word} {bound:g}"
            for word, bound in bounds.items()
            if math.isfinite(bound)
        )
        raise ValueError(f"{name} must be a finite number {allowed}; got {value!r}.")


def require_scalar(name: str, value: Any) -> jax.Array:
    """Returns the value as a real array without axes, or raises a ``ValueError``."""
    if isinstance(value, numbers.Real):
        require_number(name, value, at_least=0)
    try:
        array = jnp.asarray(value)
    except TypeError as error:
        raise ValueError(f"{name} must be a real scalar; got {value!r}.") from error
    if array.ndim or not jnp.isrealobj(array) or array.dtype == bool:
        raise ValueError(
            f"{name} must be a real scalar; got dtype {array.dtype}, shape "
            f"{array.shape}."
        )
    return array


def require_count(name: str, value: Any) -> None:
    """Raises for anything but an integer of at least 1."""
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_integer or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1; got {value!r}.")


def with_extra_args(name: str, tx: Any) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation with an ``update`` that accepts any extra arguments.

    The inner ``update`` receives those that its signature names, or all of them if it
    has ``**kwargs``, as in ``optax.chain``. ``optax.MultiSteps`` accepts all of them
    without being a ``GradientTransformationExtraArgs``.

    Raises:
      ValueError: If ``tx`` is not a transformation.
    """
    init, update = getattr(tx, "init", None), getattr(tx, "update", None)
    if not callable(init) or not callable(update):
        raise ValueError(
            f"{name} must be an optax.GradientTransformation, such as "
            f"optax.adam(1e-3); got {tx!r}."
        )
    parameters = inspect.signature(update).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return optax.GradientTransformationExtraArgs(init, update)

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        named = {key: x for key, x in extra_args.items() if key in parameters}
        return update(updates, state, params, **named)

    return optax.GradientTransformationExtraArgs(init, update_fn)

"""Every optimizer of Optax that can be made of a learning rate alone."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import optax
from optax import contrib

Factory = Callable[[optax.Schedule], optax.GradientTransformation]

# These ask `update` for the loss function, which a gradient transformation lacks.
_NEED_THE_LOSS = {"lbfgs", "sophia"}
# These take a number and no schedule: they keep the first learning rate.
_NEED_A_NUMBER = {"optimistic_adam", "rprop", "sm3"}


def _sam(schedule: optax.Schedule) -> optax.GradientTransformation:
    """Returns SAM without the extra arguments that its type promises to take."""
    adversarial = optax.chain(contrib.normalize(), optax.sgd(0.05))
    return optax.GradientTransformation(*contrib.sam(optax.sgd(schedule), adversarial))


def _polyak(schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.polyak_sgd(max_learning_rate=schedule(0))


def _factory(name: str, function: Callable[..., Any]) -> Factory:
    if name in _NEED_A_NUMBER:
        return lambda schedule: function(learning_rate=schedule(0))
    return lambda schedule: function(learning_rate=schedule)


def _public() -> Iterator[tuple[str, Callable[..., Any]]]:
    for module in (optax, contrib):
        for name, function in inspect.getmembers(module, callable):
            if name[0].isupper() or name.startswith(("_", "scale_by")):
                continue
            parameters = inspect.signature(function).parameters
            required = {
                key
                for key, parameter in parameters.items()
                if parameter.default is inspect.Parameter.empty
                and parameter.kind is not inspect.Parameter.VAR_KEYWORD
            }
            if "learning_rate" in parameters and required <= {"learning_rate"}:
                yield name, function


def factories() -> dict[str, Factory]:
    """Returns name -> learning rate schedule -> optimizer, by name."""
    by_name = {
        name: _factory(name, function)
        for name, function in _public()
        if name not in _NEED_THE_LOSS
    }
    return dict(sorted((by_name | {"polyak_sgd": _polyak, "sam": _sam}).items()))

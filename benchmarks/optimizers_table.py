"""Every optimizer of Optax behind each method: does it run, and what becomes of it?

One small problem, a perceptron of one hidden layer with weights twice too large that
learns a function of eight numbers. Each combination has the best of four rates, chosen
on one seed, and four fresh seeds. Which combination is best on a network of yours this
does not say; it says which break.
"""

import inspect
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console

from benchmarks.lib import machine, runs
from benchmarks.lib.command_line import fail, parse
from benchmarks.lib.together import one_of, train_arms
from stablegrad_optax import (
    gradient_autoscaled_normalization,
    gradient_stabilizer,
    stablegrad,
)
from stablegrad_optax._comparison import _median
from stablegrad_optax._trials import Problem

PROG = "python -m benchmarks.optimizers_table"
STEPS, RATES, SEEDS = 200, (1e-3, 1e-2, 1e-1, 1.0), 4
METHODS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "plain": optax.identity,
    "stablegrad": stablegrad,
    "gradient_stabilizer": gradient_stabilizer,
    "autoscaled": gradient_autoscaled_normalization,
}
_WORSE = 2.0  # times the plain one's error: printed in bold

HEAD = """# Every optimizer of Optax behind each method

`python -m benchmarks.optimizers_table` makes this page: the error on fresh points
beside that of predicting zero, median of four seeds at the best of four rates ({rates})
that one further seed chose, {steps} steps with a cosine. "failed": half of the seeds
were not finite or no better than predicting zero. An exception's name: it was raised,
plain or not (sophia asks `update` for the loss function). In **bold** what is more than
twice the error of the plain optimizer. It is one small problem, a perceptron of one
hidden layer: it says which combinations break, not which are best.

{provenance}

| optimizer | {methods} |
|---|{rule}
"""


@dataclass(frozen=True)
class Options:
    optimizers: str = ""
    """Only those whose name contains this."""

    only_page: bool = False
    """Write the page from what is finished, train nothing."""

    results: Path = runs.RESULTS / "optimizers.jsonl"
    """What is finished; the page goes beside it."""


def optimizers() -> dict[str, Callable[[Any], optax.GradientTransformation]]:
    """All that take a learning rate and need nothing else, and three that differ."""

    def found() -> Iterator[tuple[str, Any]]:
        for module in (optax, optax.contrib):
            for name, function in inspect.getmembers(module, callable):
                if name[0].isupper() or name.startswith(("_", "scale_by")):
                    continue
                parameters = inspect.signature(function).parameters
                needed = {
                    name
                    for name, parameter in parameters.items()
                    if parameter.default is inspect.Parameter.empty
                    and parameter.kind is not inspect.Parameter.VAR_KEYWORD
                } - {"learning_rate"}
                if "learning_rate" in parameters and not needed:
                    yield name, function

    def of_rate(function: Any) -> Callable[[Any], optax.GradientTransformation]:
        return lambda rate: function(learning_rate=rate)

    return {
        **{name: of_rate(function) for name, function in sorted(found())},
        "polyak_sgd": lambda rate: optax.polyak_sgd(max_learning_rate=rate),
        "sgd, backtracking line search": lambda rate: optax.chain(
            optax.sgd(rate), optax.scale_by_backtracking_linesearch(10)
        ),
        # Its type says that it takes extra arguments; it takes none.
        "sam": lambda rate: optax.GradientTransformation(
            *optax.contrib.sam(
                optax.sgd(rate), optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
            )
        ),
    }


def init(key: jax.Array) -> Any:
    hidden, out = jax.random.split(key)
    return {
        "hidden": {
            "kernel": 2 * jax.random.normal(hidden, (8, 16)) * 8**-0.5,
            "bias": jnp.zeros(16),
        },
        "out": {"kernel": 2 * jax.random.normal(out, (16, 1)) * 16**-0.5},
    }


def sample(key: jax.Array, num: int = 64) -> tuple[jax.Array, jax.Array]:
    x = jax.random.normal(key, (num, 8))
    return x, jnp.sin(x[:, :1] + x[:, 1:2] * x[:, 2:3])


def loss_fn(params: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    x, y = batch
    x = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return jnp.mean((x @ params["out"]["kernel"] - y) ** 2)


def score(params: Any) -> jax.Array:
    """The error on fresh points beside that of predicting zero."""
    x, y = sample(jax.random.key(1), num=1024)
    return loss_fn(params, (x, y)) / jnp.mean(y**2)


def measure(factory: Callable[[Any], optax.GradientTransformation]) -> dict[str, Any]:
    """For each method the median error, None if it failed, or what went wrong."""

    def optimizer(arm: jax.Array, rate: jax.Array) -> optax.GradientTransformation:
        methods = [make() for make in METHODS.values()]
        return optax.chain(one_of(arm, methods), factory(rate))

    try:
        trained = train_arms(
            Problem(loss_fn, init, sample, score, 1.0, STEPS),
            optimizer,
            num_arms=len(METHODS),
            rates=RATES,
            num_seeds=SEEDS,
            num_tuning_seeds=1,
            key=jax.random.key(0),
        )
    except Exception as error:  # the table says so, and goes on
        return dict.fromkeys(METHODS, type(error).__name__)
    return {
        name: runs.finite(_median(scores), digits=3)
        for name, (_, scores) in zip(METHODS, trained, strict=True)
    }


def page(records: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    first = records[0]
    provenance = (
        f"{len(records)} optimizers; {first['device']}; jax {first['jax']}, optax "
        f"{first['optax']}, stablegrad_optax {first['stablegrad_optax']}; "
        f"{first['date'][:10]}."
    )
    head = HEAD.format(
        rates=", ".join(f"{rate:g}" for rate in RATES),
        steps=STEPS,
        provenance=provenance,
        methods=" | ".join(METHODS),
        rule="---|" * len(METHODS),
    )
    ordered = sorted(records, key=lambda record: record["optimizer"])
    return head + "".join(
        f"| {record['optimizer']} | "
        + " | ".join(_cell(record["errors"], name) for name in METHODS)
        + " |\n"
        for record in ordered
    )


def _cell(errors: dict[str, Any], name: str) -> str:
    plain, error = errors["plain"], errors[name]
    if isinstance(error, str):
        return error
    text = "failed" if error is None else f"{error:.3g}"
    if not isinstance(plain, float):
        return text
    is_worse = (math.inf if error is None else error) > _WORSE * plain
    return f"**{text}**" if is_worse else text


def main(args: Sequence[str] | None = None) -> int:
    options = parse(Options, args, prog=PROG, description=__doc__ or "")
    known = optimizers()
    chosen = [name for name in known if options.optimizers in name]
    if not chosen:
        fail(PROG, f"--optimizers: no name contains {options.optimizers!r}")
    try:
        records = runs.read_lines(options.results)
    except ValueError as error:
        fail(PROG, str(error))
    jax.config.update("jax_disable_most_optimizations", True)  # it is compilation alone
    console, done = Console(), {record["optimizer"] for record in records}
    missing = [] if options.only_page else [name for name in chosen if name not in done]
    for number, name in enumerate(missing, start=1):
        record = {
            "optimizer": name,
            "errors": measure(known[name]),
            "optax": optax.__version__,
            **machine.origin(),
        }
        runs.append(options.results, [record])
        records.append(record)
        said = json.dumps(record["errors"])
        console.print(f"{number} of {len(missing)}  {name}: {said}", soft_wrap=True)
    if not records:
        fail(PROG, f"{options.results} holds nothing yet: leave out --only-page")
    path = options.results.with_suffix(".md")
    path.write_text(page(records))
    console.print(f"{len(records)} optimizers, page {path}.", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

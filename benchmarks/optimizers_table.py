"""Every optimizer of Optax behind each method: does it run, and what becomes of it?

One small problem, a perceptron of three layers with weights twice too large that learns
a function of eight numbers. Each combination has the best of three rates, chosen on one
seed, and three fresh seeds. Which combination is best on a network of yours this does
not say; it says which break.
"""

import inspect
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console

import stablegrad_optax
from benchmarks import figures, runs
from benchmarks.command_line import fail, parse
from stablegrad_optax import (
    compare_optimizers,
    gradient_autoscaled_normalization,
    gradient_stabilizer,
    stablegrad,
)

PROG = "python -m benchmarks.optimizers_table"
STEPS, RATES, SEEDS = 200, (1e-3, 1e-2, 1e-1), 3
METHODS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "plain": optax.identity,
    "stablegrad": stablegrad,
    "gradient_stabilizer": gradient_stabilizer,
    "autoscaled": gradient_autoscaled_normalization,
}
_WORSE = 2.0  # times the plain one's loss: printed in bold

HEAD = """# Every optimizer of Optax behind each method

`python -m benchmarks.optimizers_table` makes this page: final loss, the median of three
seeds at the best of three rates ({rates}) that one further seed chose, {steps} steps
with a cosine. "failed": half of the seeds were not finite or no better than their
start. In **bold** what is more than twice the loss of the plain optimizer. It is one
small problem: it says which combinations break, not which are best.

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
        "sam": lambda rate: optax.contrib.sam(
            optax.sgd(rate), optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
        ),
    }


def init(key: jax.Array) -> Any:
    sizes = (8, 16, 16, 1)
    return [
        {
            "kernel": 2 * jax.random.normal(k, (n, m)) * n**-0.5,
            "bias": jnp.zeros(m),
        }
        for k, n, m in zip(jax.random.split(key, 3), sizes, sizes[1:], strict=False)
    ]


def sample(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    x = jax.random.normal(key, (64, 8))
    return x, jnp.sin(x[:, :1] + x[:, 1:2] * x[:, 2:3])


def loss_fn(params: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    x, y = batch
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return jnp.mean((x @ params[-1]["kernel"] + params[-1]["bias"] - y) ** 2)


def measure(factory: Callable[[Any], optax.GradientTransformation]) -> dict[str, Any]:
    """For each method the median loss, None if failed, or what went wrong."""
    losses: dict[str, Any] = {}
    for name, method in METHODS.items():
        try:
            result = compare_optimizers(
                loss_fn,
                init,
                sample,
                {name: lambda rate, m=method: optax.chain(m(), factory(rate))},
                learning_rates=RATES,
                steps=STEPS,
                num_seeds=SEEDS,
                num_tuning_seeds=1,
                parallel=SEEDS,
                key=jax.random.key(0),
            )
            losses[name] = runs.finite(result.best.median, digits=3)
        except Exception as error:  # the table says so, and goes on
            losses[name] = type(error).__name__
    return losses


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
        + " | ".join(_cell(record["losses"], name) for name in METHODS)
        + " |\n"
        for record in ordered
    )


def _cell(losses: dict[str, Any], name: str) -> str:
    plain, loss = losses["plain"], losses[name]
    if isinstance(loss, str):
        return loss
    text = "failed" if loss is None else f"{loss:.3g}"
    if not isinstance(plain, float):
        return text
    is_worse = (math.inf if loss is None else loss) > _WORSE * plain
    return f"**{text}**" if is_worse else text


def main(args: Sequence[str] | None = None) -> int:
    options = parse(Options, args, prog=PROG, description=__doc__ or "")
    known = optimizers()
    chosen = [name for name in known if options.optimizers in name]
    if not chosen:
        fail(PROG, f"--optimizers: no name contains {options.optimizers!r}")
    try:
        records = runs.read(options.results)
    except ValueError as error:
        fail(PROG, str(error))
    jax.config.update("jax_disable_most_optimizations", True)  # it is compilation alone
    console, done = Console(), {record["optimizer"] for record in records}
    missing = [] if options.only_page else [name for name in chosen if name not in done]
    for number, name in enumerate(missing, start=1):
        record = {
            "optimizer": name,
            "losses": measure(known[name]),
            "device": figures.device_name(),
            "jax": jax.__version__,
            "optax": optax.__version__,
            "stablegrad_optax": stablegrad_optax.__version__,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        runs.append(options.results, [record])
        records.append(record)
        said = json.dumps(record["losses"])
        console.print(f"{number} of {len(missing)}  {name}: {said}", soft_wrap=True)
    if not records:
        fail(PROG, f"{options.results} holds nothing yet: leave out --only-page")
    path = options.results.with_suffix(".md")
    path.write_text(page(records))
    console.print(f"{len(records)} optimizers, page {path}.", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

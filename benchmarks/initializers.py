"""Compares initializers of deep physics-informed networks.

Trains plain networks from several initializers with Adam, for three equations, four
activations and three depths, and writes a page. Finished networks are kept.
"""

import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from operator import itemgetter
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    from benchmarks import start

    sys.exit(start("benchmarks.initializers"))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.nn.initializers import Initializer
from rich.console import Console

from benchmarks.lib import machine, runs
from benchmarks.lib.command_line import parse
from benchmarks.report.tables import markdown_table
from benchmarks.tasks.pinn.ansatz import Derivatives, SecondOrder
from benchmarks.tasks.pinn.network import (
    ACTIVATIONS,
    Network,
    Params,
    _activate,
    _input_streams,
    _product,
)
from benchmarks.tasks.pinn.problems import PROBLEMS
from benchmarks.tasks.pinn.task import FAILURE_ERROR, Pinn, evaluation, failed
from stablegrad_optax import (
    activation_aware_normal,
    gradient_report,
    initialize_weights,
)

PROG = "python -m benchmarks.initializers"
FUNCTIONS = "tanh", "gelu", "sin", "silu"
SHALLOW, DEPTHS, SEEDS = 3, (8, 24, 50), 1
STEPS, RATES = 500, (1e-3, 3e-3)
STACKED = {"first": 0, "hidden": 1, "last": 0}


HEALTHY, LARGEST_RATIO = "no trouble seen", 100
HEAD = [
    "initializer",
    "depth",
    f"reports that read '{HEALTHY}'",
    "largest first loss, relative to the shallow network's",
    "failed runs",
    "median error",
]
PAGE = f"""# Initializers of deep physics-informed networks

Plain networks of width 32 learn Poisson's equation, a wave equation and a
reaction-diffusion equation with Adam, {STEPS} steps, no gradient transformation. All
weights come from one call of `initialize_weights`, except those of Equinox's default.
`python -m benchmarks.initializers` makes this page and resumes where it stopped.

An initializer is good if, for every equation and depth, three things hold:

1. `gradient_report` of the first gradient reads "{HEALTHY}".
2. The first loss is at most {LARGEST_RATIO} times that of a network of {SHALLOW} layers
   with Glorot weights.
3. Adam trains the network at a learning rate of {RATES[0]:g} or {RATES[1]:g}: the
   relative L2 error is at most {FAILURE_ERROR}.

{{summary}}
Each line below is one run per equation, at the better learning rate; a count below 3
means that an equation is not measured yet. Lower errors are
better.

{{details}}
{{device}}; jax {{jax}}, stablegrad_optax {{version}}; {{date}}.
"""


@dataclass(frozen=True)
class Options:
    results: Path = runs.RESULTS / "initializers.jsonl"
    """What is finished; the page goes beside it."""


EQUATIONS = {
    "Poisson": PROBLEMS["poisson"],
    "wave": PROBLEMS["wave"],
    "reaction-diffusion": PROBLEMS["reaction_diffusion"],
}


def initializers(activation: str) -> dict[str, Initializer | None]:
    """Name -> initializer of all weights; None keeps Equinox's default."""
    made = {
        "Equinox's default": None,
        "Glorot": jax.nn.initializers.glorot_uniform(),
        "He": jax.nn.initializers.he_normal(),
    }
    for preserve in ("gradient", "signal"):
        with suppress(ValueError):  # some activations have no gain of this kind
            made[f"preserve='{preserve}'"] = activation_aware_normal(
                lambda z: ACTIVATIONS[activation](z).value, preserve=preserve
            )
    return made


@dataclass(frozen=True)
class Scanned(Network):
    """A network whose hidden layers are stacked, which compiles faster."""

    def init(self, key: jax.Array) -> Params:
        layers = list(super().init(key).values())
        hidden = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers[1:-1])
        return {"first": layers[0], "hidden": hidden, "last": layers[-1]}

    def derivatives(
        self, params: Params, points: jax.Array, second: SecondOrder | None
    ) -> Derivatives:
        def layer(streams: jax.Array, dense: Any) -> tuple[jax.Array, None]:
            streams = _product(streams, dense["kernel"])
            return _activate(self.activation, second, streams, dense["bias"]), None

        flat = points.reshape(-1, self.inputs)
        streams = _input_streams(self.embedding, flat, second)
        streams, _ = layer(streams, params["first"])
        streams, _ = jax.lax.scan(layer, streams, params["hidden"])
        streams = _product(streams, params["last"]["kernel"])
        streams = streams.reshape(len(streams), *points.shape[:-1])
        if second is None:
            return Derivatives(streams[0])
        split = 1 + self.inputs
        return Derivatives(streams[0], streams[1:split], streams[split:])


@partial(jax.jit, static_argnums=0)
def train(
    task: Pinn, held_out: Any, params: Params, rates: jax.Array, key: jax.Array
) -> tuple[jax.Array, Params, jax.Array]:
    """Trains runs side by side, params and rates f[runs, ...], at the same points.

    Returns:
        The first loss, the first gradient and the last error of each run.
    """

    def run(params: Params, rate: jax.Array) -> tuple[jax.Array, Params, jax.Array]:
        tx = optax.adam(optax.cosine_decay_schedule(rate, STEPS))

        def step(carry: Any, index: jax.Array) -> tuple[Any, jax.Array]:
            params, opt_state, first = carry
            found = task.gradient(params, None, key, index)
            updates, opt_state = tx.update(found.grads, opt_state)
            # Kept from the first step: a second gradient would compile twice as long.
            first = optax.tree.where(index == 0, found.grads, first)
            return (optax.apply_updates(params, updates), opt_state, first), found.loss

        start = params, tx.init(params), params
        (last, _, first), losses = jax.lax.scan(step, start, jnp.arange(STEPS))
        return losses[0], first, task.score(last, None, held_out)["error"]

    return jax.vmap(run)(params, rates)


def measure(cell: dict[str, Any]) -> list[dict[str, Any]]:
    """One record for each initializer of a network."""
    network = Scanned(cell["depth"], 32, cell["activation"], "uniform")
    task = Pinn(EQUATIONS[cell["equation"]](), network)
    key, init_key, new_key = jax.random.split(jax.random.key(cell["seed"]), 3)

    def params(network: Network) -> dict[str, Params]:
        default = network.init(init_key)
        return {
            name: default
            if init is None
            else initialize_weights(default, new_key, init, num_stacked_axes=STACKED)
            for name, init in initializers(cell["activation"]).items()
        }

    shallow = Pinn(task.problem, replace(network, depth=SHALLOW))
    points = task.problem.sample(jax.random.fold_in(key, 0))
    first_loss = jax.jit(lambda params: shallow.gradient_at(params, points).loss)
    shallow_losses = {
        name: float(first_loss(made)) for name, made in params(shallow.network).items()
    }
    made = params(network)
    stacked = jax.tree.map(
        lambda *leaves: jnp.repeat(jnp.stack(leaves), len(RATES), 0), *made.values()
    )
    rates = jnp.tile(jnp.array(RATES), len(made))
    losses, grads, errors = jax.device_get(
        train(task, evaluation(task.problem), stacked, rates, key)
    )
    records = []
    for i, name in enumerate(made):
        runs_of_name = slice(i * len(RATES), (i + 1) * len(RATES))
        grad = jax.tree.map(itemgetter(runs_of_name.start), grads)
        error = np.nan_to_num(errors[runs_of_name], nan=np.inf).min()
        loss_ratio = losses[runs_of_name.start] / shallow_losses["Glorot"]
        records.append(
            {
                **cell,
                "initializer": name,
                "verdict": gradient_report(grad, num_stacked_axes=STACKED).verdict,
                "loss_ratio": runs.finite(float(loss_ratio), digits=3),
                "error": runs.finite(float(error), digits=3),
                **machine.origin(),
            }
        )
    return records


def page(records: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    summary, details = [], []
    for activation in dict.fromkeys(r["activation"] for r in records):
        selected = [r for r in records if r["activation"] == activation]
        rows, good = [], []
        for name in dict.fromkeys(r["initializer"] for r in selected):
            checks = []
            for depth in sorted({r["depth"] for r in selected}):
                group = [
                    r
                    for r in selected
                    if (r["initializer"], r["depth"]) == (name, depth)
                ]
                healthy = sum(r["verdict"] == HEALTHY for r in group)
                ratio = max(r["loss_ratio"] or np.inf for r in group)
                errors = [np.inf if r["error"] is None else r["error"] for r in group]
                failures = sum(map(failed, errors))
                checks.append(
                    (healthy == len(group), ratio <= LARGEST_RATIO, not failures)
                )
                rows.append(
                    [
                        name,
                        f"{depth}",
                        f"{healthy}/{len(group)}",
                        f"{ratio:.2g}",
                        f"{failures}/{len(group)}",
                        f"{np.median(errors):.2g}",
                    ]
                )
            good += [name] if np.all(checks) else []
        depths = ", ".join(str(d) for d in sorted({r["depth"] for r in selected}))
        summary.append([activation, depths, ", ".join(good) or "no initializer"])
        details.append(f"## {activation}\n\n{markdown_table(HEAD, rows, num_names=1)}")
    first = records[0]
    return PAGE.format(
        summary=markdown_table(
            ["activation", "depths measured", "initializers that meet all three"],
            summary,
            num_names=3,
        ),
        details="\n".join(details),
        device=first["device"],
        jax=first["jax"],
        version=first["stablegrad_optax"],
        date=first["date"][:10],
    )


def main(args: Sequence[str] | None = None) -> int:
    """Trains what is missing and writes the page; returns the exit code."""
    path = parse(Options, args, prog=PROG, description=__doc__).results
    lines = path.read_text().splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines]
    console = Console()
    cells = product(range(SEEDS), FUNCTIONS, DEPTHS, EQUATIONS)
    for seed, activation, depth, equation in cells:
        cell = dict(equation=equation, activation=activation, depth=depth, seed=seed)
        if any(cell.items() <= record.items() for record in records):
            continue
        measured = measure(cell)
        for record in measured:
            console.print(*list(record.values())[:8], highlight=False)
        records += measured
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in measured)
    path.with_suffix(".md").write_text(page(records))
    console.print(f"Page: {path.with_suffix('.md')}", highlight=False)
    return 0

"""Run three small experiments on what an optimizer does to a gradient's scale.

The first varies the scale of the gradient, the second sends one giant gradient, and the
third trains a deep network whose gradients vanish. Figures and a page are written.
"""

import sys

if __name__ == "__main__":
    from benchmarks import start

    sys.exit(start("benchmarks.why.__main__"))

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # figures are saved, no window opens

import numpy as np

from benchmarks.lib import runs
from benchmarks.lib.command_line import parse
from benchmarks.lib.machine import provenance
from benchmarks.lib.optimizers import chains
from benchmarks.report import figures
from benchmarks.why import experiments, page

PROG = "python -m benchmarks.why"
SCALED = (
    *("AdamW", "AdamW (eps=1e-16)", "StableGrad + AdamW"),
    *("Muon", "range-safe Muon", "StableGrad + Muon"),
    *("SOAP", "SOAP (eps=1e-16)", "SOAP (relative eps)", "StableGrad + SOAP"),
)
REMEMBERED = chains(
    ["none", "clip", "StableGrad"],
    ["AdamW", "AdamW (b2=0.9)", "Muon", "SOAP"],
)


@dataclass(frozen=True)
class Options:
    output: Path = runs.RESULTS
    """The folder of why.md and the figures."""

    quick: bool = False
    """The smallest of everything: shows that it works, and no more."""


def main(args: Sequence[str] | None = None) -> int:
    """Runs the experiments and writes the page; returns the exit code."""
    options = parse(Options, args, prog=PROG, description=__doc__)
    quick = options.quick
    scales = 10.0 ** np.arange(-30, 31, 30 if quick else 1)
    sizes = {name: experiments.update_sizes(name, scales) for name in SCALED}
    num_steps = 20 if quick else 20_000
    deviations = {name: experiments.deviations(name, num_steps) for name in REMEMBERED}
    smaller = {"depth": 3, "width": 8, "steps": 4, "seeds": (0,)} if quick else {}
    rows = {
        base: experiments.layers(base, tuple(experiments.COLUMNS), **smaller)
        for base in experiments.BASES
    }
    drawn = {
        "scale": page.scale_figure(scales, sizes),
        "memory": page.memory_figure(deviations),
        "layers": page.layers_figure(rows),
    }
    seeds = smaller.get("seeds", experiments.SEEDS)
    footer = f"{provenance()}; {datetime.now(UTC):%Y-%m-%d}; "
    footer += (
        f"seed {experiments.SEED}; of the network: seeds {', '.join(map(str, seeds))}"
    )
    paths = figures.save_all(drawn.items(), footer, options.output, "why")
    markdown = options.output / "why.md"
    markdown.write_text(page.markdown(scales, sizes, deviations, rows, footer))
    for path in (markdown, *paths):
        print(path)
    return 0

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
    for path in write(measure(quick=options.quick), options.output):
        print(path)
    return 0


def measure(*, quick: bool) -> page.Results:
    """Runs the three experiments."""
    smaller = {"depth": 3, "width": 8, "steps": 4} if quick else {}
    rows = {base: experiments.layers(base, **smaller) for base in experiments.BASES}
    scales = 10.0 ** np.arange(-30, 31, 30 if quick else 1)
    sizes = {name: experiments.update_sizes(name, scales) for name in SCALED}
    num_steps = 20 if quick else 20_000
    deviations = {name: experiments.deviations(name, num_steps) for name in REMEMBERED}
    return page.Results(scales, sizes, deviations, rows)


def write(results: page.Results, folder: Path) -> list[Path]:
    """Writes the page and its figures; returns their paths."""
    today = datetime.now(UTC)
    footer = f"{provenance()}; {today:%Y-%m-%d}; seed {experiments.SEED}"
    drawn = page.draw(results)
    paths = figures.save_all(drawn.items(), footer, folder, "why")
    markdown = folder / "why.md"
    markdown.write_text(page.markdown(results, footer))
    return [markdown, *paths]

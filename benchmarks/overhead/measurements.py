"""The measurements, one line each; what a file holds is not measured again.

A line has a `kind`, the names that distinguish it from others of its kind (`NAMES`),
the numbers, and where they come from.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from benchmarks.lib import runs
from benchmarks.lib.machine import origin
from benchmarks.lib.optimizers import Optimizer
from benchmarks.lib.runs import Record
from benchmarks.lib.timing import time_trainings
from benchmarks.lib.train import Rule, Task, Training
from benchmarks.overhead import compiled, compilers, programs, timing, trees
from benchmarks.overhead.optimizers import BASELINE, CHAINS
from benchmarks.tasks.images.data import Images
from benchmarks.tasks.images.models import ResNet
from benchmarks.tasks.images.task import Classifier, Recipe
from benchmarks.tasks.pinn.network import Network
from benchmarks.tasks.pinn.problems import PROBLEMS
from benchmarks.tasks.pinn.task import Pinn

# kind -> the names that distinguish its lines
NAMES = {
    "update": ("tree", "dtype", "optimizer"),
    "compile": ("leaves", "optimizer"),
    "training": ("network", "optimizer"),
    "compiled": ("target", "tree", "dtype", "optimizer"),
}
Key = tuple[str | int, ...]
STEPS = 1000  # of the schedule of whole training steps


def key(record: Record) -> Key:
    return (record["kind"], *(record[name] for name in NAMES[record["kind"]]))


class Measurements:
    """Measures what a file lacks, and adds it to the file.

    Args:
        path: The file, one JSON line each.
        rounds: Of every timing; a line of fewer rounds counts as missing.
        say: Is told what is being measured.
    """

    def __init__(self, path: Path, rounds: int, say: Callable[[str], None]):
        self._path, self._rounds, self._say = path, rounds, say
        self.records = {key(record): record for record in runs.read(path)}

    def updates(self, tree: str, dtype: str, names: Sequence[str]) -> list[Record]:
        """Times optimizer steps on a tree."""
        missing = self._missing("update", names, tree=tree, dtype=dtype)
        if not missing:
            return []
        title, make = trees.TREES[tree]
        shapes = make()
        self._say(f"{title}, {dtype}")
        measured = timing.time_updates(
            shapes,
            jnp.dtype(dtype),
            list(dict.fromkeys([BASELINE, *(r["optimizer"] for r in missing)])),
            self._rounds,
            lambda name: self._say(f"{title}, {dtype}: compiling {name}"),
        )
        _, num_elements = trees.size(shapes)
        base = measured[BASELINE].temporary_bytes
        return self._add(
            record
            | measured[record["optimizer"]].times.record()
            | {
                "gradient_bytes": num_elements * jnp.dtype(dtype).itemsize,
                "added_bytes": measured[record["optimizer"]].temporary_bytes - base,
            }
            for record in missing
        )

    def compile(self, leaves: int, names: Sequence[str]) -> list[Record]:
        """Times tracing and compilation for equal arrays."""
        added = []
        for record in self._missing("compile", names, leaves=leaves):
            name = record["optimizer"]
            self._say(f"compiling {name} for {leaves} arrays")
            times = [
                programs.compile_time(CHAINS[name], leaves)
                for _ in range(3 if leaves <= 100 else 1)
            ]
            best = min(times, key=sum)._asdict()
            added.append(record | {part: round(s, 3) for part, s in best.items()})
        return self._add(added)

    def training(self, network: str, names: Sequence[str]) -> list[Record]:
        """Times whole training steps: batch, gradient and update."""
        missing = self._missing("training", names, network=network)
        if not missing:
            return []
        self._say(f"a training step of {network}")
        task = TASKS[network]()
        wanted = dict.fromkeys([BASELINE, *(r["optimizer"] for r in missing)])
        trainings = {
            name: Training(task, Rule(Optimizer.named(name), STEPS), (STEPS,))
            for name in wanted
        }
        times = time_trainings(trainings, self._rounds, BASELINE)
        return self._add(r | times[r["optimizer"]].record() for r in missing)

    def compiled(
        self, target: str, tree: str, dtype: str, names: Sequence[str]
    ) -> list[Record]:
        """Compiles for another machine; a failure is kept and tried again later."""
        title, make = trees.TREES[tree]
        added = []
        for record in self._missing(
            "compiled", names, target=target, tree=tree, dtype=dtype
        ):
            name = record["optimizer"]
            self._say(f"{title}, {dtype}, for a {target.upper()}: {name}")
            numbers = compiled.measure(
                compilers.load(target),
                CHAINS[name],
                trees.abstract(make(), jnp.dtype(dtype)),
            )
            added += self._add([record | numbers])
        return added

    def _missing(
        self, kind: str, names: Sequence[str], **where: str | int
    ) -> list[Record]:
        """Returns the beginnings of the lines that the file lacks."""

        def is_missing(record: Record) -> bool:
            known = self.records.get(key(record))
            if known is None or "error" in known:
                return True
            return known.get("rounds", self._rounds) < self._rounds

        wanted = (
            {"phase": runs.MEASURED, "kind": kind, **where, "optimizer": name}
            for name in names
        )
        return [record for record in wanted if is_missing(record)]

    def _add(self, records: Iterable[Record]) -> list[Record]:
        records = [record | origin() for record in records]
        if records:
            runs.append(self._path, records)
        self.records |= {key(record): record for record in records}
        return records


def _resnet20(batch: int = 64) -> Task:
    """Makes ResNet-20 on images of CIFAR's size; the pixels are noise."""
    rng = np.random.default_rng(0)
    images = Images(
        rng.integers(0, 256, (512, 32, 32, 3), np.uint8),
        rng.integers(0, 10, 512, np.int32),
    )
    recipe = Recipe((0.5,) * 3, (0.3,) * 3, padding=0, flip=False)
    return Classifier(images, ResNet(depth=20, norm="none"), recipe, batch, STEPS)


def _pinn() -> Task:
    """Makes the network of the demo at depth 32."""
    return Pinn(PROBLEMS["poisson"](), Network(32, 32))


TASKS: dict[str, Callable[[], Task]] = {
    "ResNet-20 without BatchNorm, batch 64": _resnet20,
    "PINN, depth 32, width 32": _pinn,
}

"""The measurements, one record each; those that a file holds already are not repeated.

A record has a `kind`, the names that tell it from others of its kind (`NAMES`), the
numbers, and where they come from.
"""

import datetime
import platform
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import stablegrad_optax
from benchmarks.lib import machine, runs
from benchmarks.overhead import (
    compiled,
    compilers,
    programs,
    sharded,
    steps,
    timing,
    trees,
)
from benchmarks.overhead.arms import ALL_ARMS, ARMS, BASELINE, OURS, REMEDIES

Record = dict[str, Any]
Key = tuple[str | int, ...]

# kind -> what tells its records apart
NAMES = {
    "machine": (),
    "update": ("tree", "dtype", "arm"),
    "kernels": ("width", "arm"),
    "compile": ("leaves", "arm"),
    "sharded": ("leaves", "arm"),
    "training": ("network", "arm"),
    "compiled": ("target", "tree", "dtype", "arm"),
}
COMPILED = (BASELINE, *OURS, "clip_by_global_norm")
CROSS_COMPILED = (*COMPILED, "adaptive_grad_clip", *REMEDIES)


def key_of(record: Record) -> Key:
    return (record["kind"], *(record[name] for name in NAMES[record["kind"]]))


class Suite:
    """Measures what is missing in a file, and adds it there.

    Args:
        path: the file of records, one JSON line each.
        rounds: of every timing; records of fewer count as missing.
        say: is told what is being measured.
    """

    def __init__(self, path: Path, rounds: int, say: Callable[[str], None]):
        self._path, self._rounds, self._say = path, rounds, say
        self._records = {key_of(record): record for record in runs.read_lines(path)}

    @property
    def records(self) -> list[Record]:
        return list(self._records.values())

    def machine(self) -> list[Record]:
        if not self._missing([{"kind": "machine"}]):
            return []
        self._say("the machine's bandwidth")
        bandwidth = timing.copy_bandwidth() / 1e9
        return self._add([{"kind": "machine", "copy_gb_per_s": round(bandwidth, 2)}])

    def updates(self, tree: str, dtype: str, arms: Sequence[str]) -> list[Record]:
        wanted = [
            {"kind": "update", "tree": tree, "dtype": dtype, "arm": arm} for arm in arms
        ]
        missing = self._missing(wanted)
        if not missing:
            return []
        title, shapes_of = trees.TREES[tree]
        shapes = shapes_of()
        num_leaves, num_elements = trees.size(shapes)
        names = [arm for arm in arms if arm in {record["arm"] for record in missing}]
        self._say(f"{title}, {dtype}")
        measured = timing.time_updates(
            shapes,
            jnp.dtype(dtype),
            list(dict.fromkeys([BASELINE, *names])),
            self._rounds,
            lambda arm: self._say(f"{title}, {dtype}: compiling {arm}"),
        )
        base = measured[BASELINE]
        return self._add(
            record
            | measured[record["arm"]].times.record()
            | {
                "leaves": num_leaves,
                "elements": num_elements,
                "gradient_bytes": num_elements * jnp.dtype(dtype).itemsize,
                "added_bytes": measured[record["arm"]].temporary_bytes
                - base.temporary_bytes,
            }
            for record in missing
        )

    def kernels(self, width: int, arms: Sequence[str]) -> list[Record]:
        missing = self._missing(
            {"kind": "kernels", "width": width, "arm": arm} for arm in arms
        )
        found = []
        for record in missing:
            self._say(f"kernels of {record['arm']}")
            counts = programs.kernels_per_leaf(ARMS[record["arm"]], width)
            found.append(record | counts._asdict())
        return self._add(found)

    def compile(self, leaves: int, arms: Sequence[str]) -> list[Record]:
        missing = self._missing(
            {"kind": "compile", "leaves": leaves, "arm": arm} for arm in arms
        )
        repeats = 3 if leaves <= 100 else 1
        found = []
        for record in missing:
            self._say(f"compiling {record['arm']} for {leaves} leaves")
            times = [
                programs.compile_time(ARMS[record["arm"]], leaves)
                for _ in range(repeats)
            ]
            best = min(times, key=sum)
            found.append(
                record | {name: round(s, 3) for name, s in best._asdict().items()}
            )
        return self._add(found)

    def sharded(self, leaves: int, arms: Sequence[str]) -> list[Record]:
        missing = self._missing(
            {"kind": "sharded", "leaves": leaves, "arm": arm} for arm in arms
        )
        if not missing:
            return []
        self._say(f"all-reduces for {leaves} leaves")
        counts = sharded.count([record["arm"] for record in missing], leaves)
        return self._add(record | counts[record["arm"]]._asdict() for record in missing)

    def training(self, network: str, arms: Sequence[str]) -> list[Record]:
        missing = self._missing(
            {"kind": "training", "network": network, "arm": arm} for arm in arms
        )
        if not missing:
            return []
        training = steps.TRAININGS[network]()
        self._say(f"a training step of {training.title}")
        names = [BASELINE, *(record["arm"] for record in missing)]
        times = steps.time_training(training, list(dict.fromkeys(names)), self._rounds)
        return self._add(
            record | times[record["arm"]].record() | {"title": training.title}
            for record in missing
        )

    def compiled(
        self, target: str, tree: str, dtype: str, arms: Sequence[str]
    ) -> list[Record]:
        """Each result is kept at once; what could not be compiled is tried again."""
        wanted = [
            {"kind": "compiled", "target": target, "tree": tree}
            | {"dtype": dtype, "arm": arm}
            for arm in arms
        ]
        found = []
        for record in self._missing(wanted):
            title, shapes_of = trees.TREES[tree]
            self._say(f"{title}, {dtype}, for a {target.upper()}: {record['arm']}")
            abstract = trees.abstract(shapes_of(), jnp.dtype(dtype))
            numbers = compiled.measure(
                compilers.load(target), ALL_ARMS[record["arm"]], abstract
            )
            found += self._add([record | numbers])
        return found

    def _missing(self, wanted: Iterable[Record]) -> list[Record]:
        def is_there(record: Record) -> bool:
            found = self._records.get(key_of(record))
            if found is None or "error" in found:
                return False
            return found.get("rounds", self._rounds) >= self._rounds

        return [record for record in wanted if not is_there(record)]

    def _add(self, records: Iterable[Record]) -> list[Record]:
        records = [record | provenance() for record in records]
        if records:
            runs.append(self._path, records)
        self._records |= {key_of(record): record for record in records}
        return records


def provenance() -> Record:
    """Where a number comes from."""
    return {
        "platform": jax.default_backend(),
        "device": machine.device_name(),
        "processor": _processor(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "optax": optax.__version__,
        "stablegrad_optax": stablegrad_optax.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    models = (line.split(":", 1)[1] for line in lines if line.startswith("model name"))
    return next(models, platform.processor()).strip()

"""The tables of what was executed; cells that were not measured are empty."""

from collections.abc import Iterable

from benchmarks.overhead import trees
from benchmarks.overhead.arms import ARMS, BASELINE, OURS
from benchmarks.overhead.suite import NAMES, Key, Record

# What is to be reached on two CPU cores, in float32: at most so many times adamw's
# time.
TARGETS = {
    "stablegrad": {"a": 1.22, "b": 1.20, "c": 1.20, "d": 1.15, "e": 1.25},
    "gradient_stabilizer": {"a": 1.18, "b": 1.15, "c": 1.20, "d": 1.15, "e": 1.25},
}
Rows = list[list[str]]  # the first is the head


def timed_trees(records: Iterable[Key]) -> list[str]:
    timed = {key[1] for key in records if key[0] == "update"}
    return [tree for tree in trees.TREES if tree in timed]


def ratios(records: dict[Key, Record], dtype: str) -> Rows:
    timed = timed_trees(records)
    rows = [["", *map(trees.label, timed)]]
    for arm in ARMS:
        cells = [records.get(("update", tree, dtype, arm)) for tree in timed]
        if arm != BASELINE:
            rows.append([arm, *(ratio(r) if r else "" for r in cells)])
        elif any(map(_is_timed, cells)):
            rows.append(["adamw, ms", *(f"{r['ms']:.4g}" if r else "" for r in cells)])
    for arm in TARGETS if dtype == "float32" else ():
        targets = (TARGETS[arm].get(tree) for tree in timed)
        cells = (f"{target:.2f}" if target else "" for target in targets)
        rows.append([f"*{arm}, at most*", *cells])
    for arm in TARGETS:
        shares = [_share_of_clip(records, tree, dtype, arm) for tree in timed]
        rows.append([f"{arm} over clip_by_global_norm", *shares])
    return rows


def _is_timed(record: Record | None) -> bool:
    """Whether its time is worth telling: on a CPU only ratios are."""
    return record is not None and record["platform"] != "cpu"


def _share_of_clip(records: dict[Key, Record], tree: str, dtype: str, arm: str) -> str:
    clip = records.get(("update", tree, dtype, "clip_by_global_norm"))
    own = records.get(("update", tree, dtype, arm))
    return f"{own['ratio'] / clip['ratio']:.2f}" if own and clip else ""


def reads(records: dict[Key, Record]) -> Rows:
    timed = timed_trees(records)
    rows = [["", *(f"({tree})" for tree in timed)]]
    machine = records.get(("machine",))
    for arm in ARMS:
        cells = []
        for tree in timed:
            own = records.get(("update", tree, "float32", arm))
            base = records.get(("update", tree, "float32", BASELINE))
            cells.append("")
            if own and base and machine and arm != BASELINE:
                added = base["ms"] * (own["ratio"] - 1) * 1e-3
                read = 4 * own["elements"] / (1e9 * machine["copy_gb_per_s"])
                cells[-1] = f"{added / read:.1f}"
        rows.append([arm, *cells])
    return rows


def _added_memory(record: Record) -> str:
    added = record["added_bytes"]
    share = f"{added / record['gradient_bytes']:.2%}"
    # Of a small tree, the share says little.
    return share if added > 1e7 else f"{share} ({added / 1024:.0f} KiB)"


def memory(records: dict[Key, Record]) -> Rows:
    dtypes = sorted({key[2] for key in records if key[0] == "update"})[::-1]
    timed = timed_trees(records)
    head = [f"({tree}), {dtype}" for dtype in dtypes for tree in timed]
    rows = [["", *head]]
    for arm in ARMS:
        cells = [
            records.get(("update", tree, dtype, arm))
            for dtype in dtypes
            for tree in timed
        ]
        rows.append([arm, *(_added_memory(r) if r else "" for r in cells)])
    return rows


def counts(records: dict[Key, Record]) -> Rows:
    leaves = _numbers(records, "sharded")
    widths = _numbers(records, "kernels")
    head = [f"kernels, {width} x {width}" for width in widths]
    rows = [["", *head, *(f"all-reduces, {n} leaves" for n in leaves)]]
    for arm in ARMS:
        keys = [
            *(("kernels", width, arm) for width in widths),
            *(("sharded", n, arm) for n in leaves),
        ]
        found = [records.get(key) for key in keys]
        cells = [f"{r['always']:g} + {r['branches']:g}" if r else "" for r in found]
        rows.append([arm, *cells])
    return rows


def compilation(records: dict[Key, Record]) -> Rows:
    leaves = _numbers(records, "compile")
    rows = [["", *(f"{n} leaves" for n in leaves)]]
    for arm in ARMS:
        cells = []
        for n in leaves:
            record = records.get(("compile", n, arm))
            ratio = compile_ratio(records, n, arm)
            cell = f"{record['trace']:.2f} + {record['compile']:.2f}" if record else ""
            cells.append(cell if ratio is None else f"{cell} ({ratio:.2f})")
        if any(cells):
            rows.append([arm, *cells])
    return rows


def compile_ratio(records: dict[Key, Record], leaves: int, arm: str) -> float | None:
    own = records.get(("compile", leaves, arm))
    base = records.get(("compile", leaves, BASELINE))
    if own is None or base is None or arm == BASELINE:
        return None
    return (own["trace"] + own["compile"]) / (base["trace"] + base["compile"])


def training(records: dict[Key, Record]) -> Rows:
    rows = [["", *OURS]]
    networks = dict.fromkeys(key[1] for key in records if key[0] == "training")
    for network in networks:
        base = records.get(("training", network, BASELINE))
        found = [records.get(("training", network, arm)) for arm in OURS]
        if base:
            cells = [ratio(record) if record else "" for record in found]
            time = f", {base['ms']:.4g} ms" if _is_timed(base) else ""
            rows.append([base["title"] + time, *cells])
    return rows


def _numbers(records: Iterable[Key], kind: str) -> list[int]:
    return sorted({key[1] for key in records if key[0] == kind})


def ratio(record: Record) -> str:
    low, high = record["ratio_quartiles"]
    return f"{record['ratio']:.3f} [{low:.3f}, {high:.3f}]"


def lines(rows: Rows) -> str:
    """A table in Markdown."""
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def machine(records: dict[Key, Record]) -> str:
    machine = records.get(("machine",))
    if machine is None:
        return ""
    return (
        f"{machine['processor']}, {machine['device']}, a copy moves "
        f"{machine['copy_gb_per_s']:g} GB/s; jax {machine['jax']}, optax "
        f"{machine['optax']}, stablegrad_optax {machine['stablegrad_optax']}, "
        f"{machine['date']}."
    )


def of_another_version(records: dict[Key, Record]) -> str:
    """Which cells of our methods are not of the version that the page names."""
    version = records.get(("machine",), {}).get("stablegrad_optax")
    older: dict[str, set[str]] = {}
    for record in records.values():
        own = record["stablegrad_optax"]
        if (
            record.get("arm") in OURS
            and record["kind"] != "compiled"
            and own != version
        ):
            names = NAMES[record["kind"]][:-1]  # without the arm
            cell = " ".join([record["kind"], *(str(record[name]) for name in names)])
            older.setdefault(own, set()).add(cell)
    return " ".join(
        f"Measured with {own}, and not again: {', '.join(sorted(cells))}."
        for own, cells in sorted(older.items())
    )

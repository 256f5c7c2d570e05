"""The tables and the figure of finished measurements."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.lib import figures
from benchmarks.overhead import trees
from benchmarks.overhead.arms import ARMS, BASELINE, OURS
from benchmarks.overhead.suite import Key, Record, key_of

# What issue 5 sets out to reach on two CPU cores, in float32: at most so many times
# adamw's time.
TARGETS = {
    "stablegrad": {"a": 1.22, "b": 1.20, "c": 1.20, "d": 1.15, "e": 1.25},
    "gradient_stabilizer": {"a": 1.18, "b": 1.15, "c": 1.20, "d": 1.15, "e": 1.25},
}
Rows = list[list[str]]  # the first is the head


def as_table(records: Sequence[Record]) -> Table:
    """Records of one kind, as they come."""
    columns: dict[str, Callable[[Record], str]] = {
        "update": lambda r: f"{r['ms']:.4g} ms, {_ratio(r)}",
        "training": lambda r: f"{r['ms']:.4g} ms, {_ratio(r)}",
        "compile": lambda r: f"{r['trace']:.2f} s + {r['compile']:.2f} s",
        "kernels": lambda r: f"{r['always']:g} + {r['branches']:g} in branches",
        "sharded": lambda r: f"{r['always']} + {r['branches']} in branches",
        "machine": lambda r: f"{r['copy_gb_per_s']:g} GB/s",
    }
    first = records[0]
    what = [str(first[name]) for name in _cell(first)]
    table = Table(title=" ".join([first["kind"], *what]), title_justify="left")
    table.add_column("arm")
    table.add_column("")
    for record in records:
        table.add_row(record.get("arm", "copy"), columns[first["kind"]](record))
    return table


def write(records: Sequence[Record], folder: Path) -> list[Path]:
    """Writes overhead.md and overhead.png; returns their paths."""
    by_key = {key_of(record): record for record in records}
    text, picture = folder / "overhead.md", folder / "overhead.png"
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = text.with_suffix(".md.tmp")
    unfinished.write_text(markdown(by_key))
    unfinished.replace(text)
    figures.save(figure(by_key), picture)
    return [text, picture]


def markdown(records: dict[Key, Record]) -> str:
    """All tables; cells that were not measured are empty."""
    parts = [
        "# What a step costs",
        "Made by `python -m benchmarks.overhead`. " + _machine(records),
        "![Time of a step and of compilation over adamw's](overhead.png)",
    ]
    for dtype in sorted({key[2] for key in records if key[0] == "update"})[::-1]:
        parts += [
            f"## One step over adamw's, {dtype}",
            "Median over rounds of the time of `chain(X, adamw)` over that of `adamw` "
            "in the same round, and its quartiles. In one jit, buffers donated.",
            _lines(_ratios(records, dtype)),
        ]
    parts += [
        "## The same in reads of the gradient",
        "What the transformation adds, in times that reading the float32 gradient once "
        "takes at the bandwidth of a copy.",
        _lines(_reads(records)),
        "## Memory",
        "Temporary memory of the program beyond adamw's, over the gradient's bytes.",
        _lines(_memory(records)),
        "## Kernels and collectives",
        "Kernels, copies included, that a further leaf adds to the program; "
        "all-reduces for leaves of 256 x 256 sharded over eight devices. After the "
        "plus: in the branches of conditionals, of which one runs.",
        _lines(_counts(records)),
        "## Compilation",
        "Seconds of the processor for equal leaves, tracing + compilation, and their "
        "sum over adamw's.",
        _lines(_compilation(records)),
        "## A whole training step",
        "Batch, gradient and update, over the same with adamw alone.",
        _lines(_training(records)),
    ]
    return "\n\n".join(parts) + "\n"


def figure(records: dict[Key, Record]) -> Figure:
    """Ratios by tree for each dtype, and of compile times by number of leaves."""
    dtypes = sorted({key[2] for key in records if key[0] == "update"})[::-1]
    canvas, axes = plt.subplots(
        1,
        len(dtypes) + 1,
        figsize=(5 * (len(dtypes) + 1), 5),
        layout="constrained",
        squeeze=False,
    )
    for ax, dtype in zip(axes[0], dtypes, strict=False):
        _draw_ratios(ax, records, dtype)
    _draw_compilation(axes[0, -1], records)
    handles: dict[str, object] = {}
    for ax in axes[0]:
        handles |= dict(zip(*ax.get_legend_handles_labels()[::-1], strict=True))
    if handles:
        canvas.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=4
        )
    canvas.suptitle(_machine(records), fontsize=8, color="0.4")
    return canvas


def _draw_ratios(ax: Axes, records: dict[Key, Record], dtype: str) -> None:
    names = [arm for arm in ARMS if arm != BASELINE]
    for index, arm in enumerate(names):
        places, medians, low, high = [], [], [], []
        for place, tree in enumerate(trees.TREES):
            if record := records.get(("update", tree, dtype, arm)):
                places.append(place + 0.7 * (index / (len(names) - 1) - 0.5))
                medians.append(record["ratio"])
                low.append(record["ratio"] - record["ratio_quartiles"][0])
                high.append(record["ratio_quartiles"][1] - record["ratio"])
        spread = np.clip([low, high], 0, None)
        ax.errorbar(
            places, medians, spread, **_style(arm), linestyle="", label=arm, capsize=2
        )
    for arm in TARGETS if dtype == "float32" else ():
        for place, tree in enumerate(trees.TREES):
            color = _style(arm)["color"]
            ax.hlines(TARGETS[arm][tree], place - 0.4, place + 0.4, color, "dotted")
    ax.axhline(1, color="0.5", linewidth=1)
    labels = [f"({tree}) {title}" for tree, (title, _) in trees.TREES.items()]
    ax.set_xticks(range(len(labels)), labels, rotation=20, ha="right")
    ax.set(yscale="log", ylabel="time of a step over adamw's")
    dotted = " (dotted: the aim)" if dtype == "float32" else ""
    ax.set_title(f"{dtype}{dotted}")
    ticks = [0.8, 1, 1.2, 1.5, 2, 3, 4]
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    ax.minorticks_off()
    ax.grid(axis="y", alpha=0.3)


def _style(arm: str) -> dict[str, str]:
    """Ours are discs, other transformations squares, adamw and its part grey."""
    grey = {"adamw again": "x", "scale_by_adam alone": "+"}
    if arm in grey:
        return {"color": "0.5", "marker": grey[arm]}
    names = [name for name in ARMS if name != BASELINE and name not in grey]
    color = figures.PALETTE[names.index(arm) % len(figures.PALETTE)]
    return {"color": color, "marker": "o" if arm in OURS else "s"}


def _draw_compilation(ax: Axes, records: dict[Key, Record]) -> None:
    for arm in ARMS:
        points = sorted(
            (key[1], ratio)
            for key in records
            if key[0] == "compile" and key[2] == arm
            if (ratio := _compile_ratio(records, *key[1:])) is not None
        )
        if points:
            ax.plot(*zip(*points, strict=True), **_style(arm), label=arm)
    ax.axhline(3, color="0.5", linewidth=1, linestyle=":")
    ax.axhline(1, color="0.5", linewidth=1)
    ax.set(xscale="log", xlabel="leaves", ylabel="time to compile over adamw's")
    ax.set_title("tracing and compilation")
    ax.grid(alpha=0.3)


def _ratios(records: dict[Key, Record], dtype: str) -> Rows:
    rows = [["", *(f"({tree}) {title}" for tree, (title, _) in trees.TREES.items())]]
    for arm in ARMS:
        cells = [records.get(("update", tree, dtype, arm)) for tree in trees.TREES]
        if arm != BASELINE:
            rows.append([arm, *(_ratio(r) if r else "" for r in cells)])
        elif any(map(_is_timed, cells)):
            rows.append(["adamw, ms", *(f"{r['ms']:.4g}" if r else "" for r in cells)])
    for arm in TARGETS if dtype == "float32" else ():
        targets = [f"{TARGETS[arm][tree]:.2f}" for tree in trees.TREES]
        rows.append([f"*{arm}, at most*", *targets])
    for arm in TARGETS:
        shares = [_share_of_clip(records, tree, dtype, arm) for tree in trees.TREES]
        rows.append([f"{arm} over clip_by_global_norm", *shares])
    return rows


def _is_timed(record: Record | None) -> bool:
    """Whether its time is worth telling: on a CPU only ratios are."""
    return record is not None and record["platform"] != "cpu"


def _share_of_clip(records: dict[Key, Record], tree: str, dtype: str, arm: str) -> str:
    clip = records.get(("update", tree, dtype, "clip_by_global_norm"))
    own = records.get(("update", tree, dtype, arm))
    return f"{own['ratio'] / clip['ratio']:.2f}" if own and clip else ""


def _reads(records: dict[Key, Record]) -> Rows:
    rows = [["", *(f"({tree})" for tree in trees.TREES)]]
    machine = records.get(("machine",))
    for arm in ARMS:
        cells = []
        for tree in trees.TREES:
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


def _memory(records: dict[Key, Record]) -> Rows:
    dtypes = sorted({key[2] for key in records if key[0] == "update"})[::-1]
    head = [f"({tree}), {dtype}" for dtype in dtypes for tree in trees.TREES]
    rows = [["", *head]]
    for arm in ARMS:
        cells = [
            records.get(("update", tree, dtype, arm))
            for dtype in dtypes
            for tree in trees.TREES
        ]
        rows.append([arm, *(_added_memory(r) if r else "" for r in cells)])
    return rows


def _counts(records: dict[Key, Record]) -> Rows:
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


def _compilation(records: dict[Key, Record]) -> Rows:
    leaves = _numbers(records, "compile")
    rows = [["", *(f"{n} leaves" for n in leaves)]]
    for arm in ARMS:
        cells = []
        for n in leaves:
            record = records.get(("compile", n, arm))
            ratio = _compile_ratio(records, n, arm)
            cell = f"{record['trace']:.2f} + {record['compile']:.2f}" if record else ""
            cells.append(cell if ratio is None else f"{cell} ({ratio:.2f})")
        if any(cells):
            rows.append([arm, *cells])
    return rows


def _compile_ratio(records: dict[Key, Record], leaves: int, arm: str) -> float | None:
    own = records.get(("compile", leaves, arm))
    base = records.get(("compile", leaves, BASELINE))
    if own is None or base is None or arm == BASELINE:
        return None
    return (own["trace"] + own["compile"]) / (base["trace"] + base["compile"])


def _training(records: dict[Key, Record]) -> Rows:
    rows = [["", *OURS]]
    networks = dict.fromkeys(key[1] for key in records if key[0] == "training")
    for network in networks:
        base = records.get(("training", network, BASELINE))
        found = [records.get(("training", network, arm)) for arm in OURS]
        if base:
            cells = [_ratio(record) if record else "" for record in found]
            time = f", {base['ms']:.4g} ms" if _is_timed(base) else ""
            rows.append([base["title"] + time, *cells])
    return rows


def _numbers(records: Iterable[Key], kind: str) -> list[int]:
    return sorted({key[1] for key in records if key[0] == kind})


def _ratio(record: Record) -> str:
    low, high = record["ratio_quartiles"]
    return f"{record['ratio']:.3f} [{low:.3f}, {high:.3f}]"


def _cell(record: Record) -> list[str]:
    names = ("tree", "dtype", "leaves", "network")
    return [name for name in names if name in record and name != "arm"]


def _machine(records: dict[Key, Record]) -> str:
    machine = records.get(("machine",))
    if machine is None:
        return ""
    return (
        f"{machine['processor']}, {machine['device']}, a copy moves "
        f"{machine['copy_gb_per_s']:g} GB/s; jax {machine['jax']}, optax "
        f"{machine['optax']}, stablegrad_optax {machine['stablegrad_optax']}, "
        f"{machine['date']}."
    )


def _lines(rows: Rows) -> str:
    """A table in Markdown."""
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])

"""The tables and figures of finished measurements."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.lib.runs import Record
from benchmarks.overhead import compilers, trees
from benchmarks.overhead.measurements import Key
from benchmarks.overhead.optimizers import BASELINE, CHAINS, METHODS_OF_THE_PACKAGE
from benchmarks.report import figures
from benchmarks.report.tables import markdown_table

Records = Mapping[Key, Record]
Cell = Callable[[Record, Record], str]  # of a record and AdamW's -> what is written
DTYPES = ("float32", "bfloat16")
ONE_READ = 8 / 7  # one more read of the gradient over the bytes of AdamW


def _median(record: Record, base: Record) -> str:
    return f"{record['ratio']:.2f}"


def _ratio(record: Record, base: Record) -> str:
    low, high = record["ratio_quartiles"]
    return f"{record['ratio']:.3f} ({low:.3f} to {high:.3f})"


def _memory(record: Record, base: Record) -> str:
    return f"{record['added_bytes'] / record['gradient_bytes']:.2%}"


def _seconds(record: Record, base: Record) -> str:
    own, reference = (r["trace"] + r["compile"] for r in (record, base))
    return f"{own:.1f} s" if record is base else f"{own / reference:.2f}"


def _bytes(record: Record, base: Record) -> str:
    always, branches = (
        record[name] / base["bytes"] for name in ("bytes", "branch_bytes")
    )
    return f"{always:.3f}" + f" + {branches:.3f}" * (branches >= 5e-4)


def _kernels(record: Record, base: Record) -> str:
    branches, conditionals = record["branch_kernels"], record["conditionals"]
    text = str(record["kernels"]) + f" + {branches}" * bool(branches)
    return text + f", conditionals: {conditionals}" * bool(conditionals)


def _all_reduces(record: Record, base: Record) -> str:
    if "all_reduces" not in record:
        return ""
    branches, others = record["branch_all_reduces"], record["other_collectives"]
    text = f"{record['all_reduces']}" + f" + {branches}" * bool(branches)
    return text + f" and {others} others" * bool(others)


def _table(records: Records, first: Key, cell: Cell, last: Key = ()) -> str:
    """Returns a line for each optimizer; empty if nothing was measured.

    Args:
        records: By key.
        first: The start of the keys, before the name that distinguishes the columns.
        cell: What is written.
        last: What follows in the keys, before the optimizer.
    """
    place = len(first)
    columns = dict.fromkeys(
        key[place]
        for key in records
        if key[:place] == first and key[place + 1 : -1] == last
    )
    names = [tree for tree in trees.TREES if tree in columns] or sorted(columns)

    def entry(column: str | int, name: str) -> str:
        own = records.get((*first, column, *last, name))
        base = records.get((*first, column, *last, BASELINE))
        if own is None or base is None:
            return ""
        return "failed" if "error" in own or "error" in base else cell(own, base)

    rows = [[name, *(entry(c, name) for c in names)] for name in CHAINS]
    rows = [row for row in rows if any(row[1:])]
    head = ["optimizer", *(_title(name) for name in names)]
    return markdown_table(head, rows) if rows else ""


def _title(column: str | int) -> str:
    if column in trees.TREES:
        return trees.TREES[str(column)][0]
    return f"{column} arrays" if isinstance(column, int) else column


class _Section(NamedTuple):
    heading: str
    text: str
    first: Key
    cell: Cell
    last: Key = ()


_NOT_RUN = "Compiled for {}, float32 unless said; nothing was executed."
SECTIONS = (
    *(
        _Section(
            f"One step over AdamW's, {dtype}",
            "Median over rounds of the time of a step over that of AdamW in the same "
            "round, and its quartiles. In one jit, buffers donated.",
            ("update",),
            _ratio,
            (dtype,),
        )
        for dtype in DTYPES
    ),
    *(
        _Section(
            f"Memory, {dtype}",
            "Temporary memory beyond AdamW's, over the gradient's bytes.",
            ("update",),
            _memory,
            (dtype,),
        )
        for dtype in DTYPES
    ),
    _Section(
        "A whole training step",
        "Batch, gradient and update, over the same with AdamW alone.",
        ("training",),
        _ratio,
    ),
    _Section(
        "Compilation",
        "Tracing and compilation for equal arrays over AdamW's, which is in seconds of "
        "the processor.",
        ("compile",),
        _seconds,
    ),
    *(
        _Section(
            f"{heading} on {title}, {dtype}",
            text,
            ("compiled", target),
            cell,
            (dtype,),
        )
        for target, (title, *_) in compilers.TARGETS.items()
        for dtype in DTYPES
        for heading, text, cell in (
            (
                "Bytes",
                "To and from the device's memory, over AdamW's; nothing was executed. "
                "One more read of the gradient makes 8/7 = 1.143. After a plus, here "
                "and below: in the branches of conditionals, of which one runs.",
                _bytes,
            ),
            ("Kernels", "Copies included, fetches ahead not counted.", _kernels),
            (
                "All-reduces",
                "Every array of two or more axes is cut over 2 x 2 devices.",
                _all_reduces,
            ),
            (
                "Compilation",
                "Tracing and compilation over AdamW's, which is in seconds.",
                _seconds,
            ),
        )
    ),
)


def _summary(records: Records) -> str:
    """Returns the tables that docs/what_it_costs.md includes."""
    parts = ["<!-- summary -->"]
    if table := _table(records, ("update",), _median, ("float32",)):
        parts += ["Time of a step over that of AdamW, float32, median:", table]
        parts.append(f"({_origins(records, 'update')}.)")
    if table := _table(
        records,
        ("compiled", "gpu"),
        lambda own, base: f"{_bytes(own, base)}, {_kernels(own, base)}",
        ("float32",),
    ):
        parts += [
            "Compiled for an H100 and not executed: bytes to and from memory over "
            "AdamW's, and kernels, float32:",
            table,
            f"({_origins(records, 'compiled')}.)",
        ]
    return "\n\n".join([*parts, "<!-- end -->"])


def _origins(records: Records, kind: str) -> str:
    chosen = [record for key, record in records.items() if key[0] == kind]

    def values(name: str) -> str:
        return ", ".join(sorted({r[name] for r in chosen if name in r}))

    dates = sorted(record["date"][:10] for record in chosen)
    what = values("compiler") if kind == "compiled" else values("device")
    return (
        f"{what}; jax {values('jax')}, stablegrad_optax {values('stablegrad_optax')}; "
        f"{dates[0]} to {dates[-1]}"
    )


def markdown(records: Records) -> str:
    """Returns all tables; what was not measured is left out."""
    parts = [
        "# What a step costs",
        "`python -m benchmarks.overhead` writes this page. Times are ratios to AdamW's "
        "time in the same round, on two CPU cores.",
        _summary(records),
    ]
    for section in SECTIONS:
        if table := _table(records, section.first, section.cell, section.last):
            parts += [f"## {section.heading}", section.text, table]
    failures = [
        f"Failed: {' '.join(map(str, key[1:]))}: {record['error']}"
        for key, record in records.items()
        if "error" in record
    ]
    return "\n\n".join([*parts, *failures]) + "\n"


def _draw(
    ax: Axes, records: Records, first: Key, value: Callable[[Record, Record], float]
) -> None:
    """Draws a ratio to AdamW by tree: filled markers float32, open ones bfloat16."""
    known = [
        t
        for t in trees.TREES
        if any(k[: len(first) + 1] == (*first, t) for k in records)
    ]
    names = [name for name in CHAINS if name != BASELINE]
    for index, name in enumerate(names):
        is_method = name in METHODS_OF_THE_PACKAGE
        style = {
            "color": figures.PALETTE[index % len(figures.PALETTE)],
            "marker": "o" if is_method else "s" if index % 2 else "^",
            "linestyle": "",
        }
        for dtype in DTYPES:
            points = {}
            for place, tree in enumerate(known):
                own = records.get((*first, tree, dtype, name), {"error": ""})
                base = records.get((*first, tree, dtype, BASELINE), {"error": ""})
                # The tables alone have what is done in the branch of a conditional.
                is_known = "error" not in own and "error" not in base
                if is_known and not own.get("conditionals"):
                    shift = 0.75 * (index / len(names) - 0.5)
                    points[place + shift] = value(own, base)
            is_filled = dtype == DTYPES[0]
            look = {} if is_filled else {"markerfacecolor": "none"}
            if points:
                label = name if is_filled else None
                ax.plot(
                    list(points), list(points.values()), **style, **look, label=label
                )
    ax.axhline(1, color="0.5", linewidth=1)
    titles = [trees.TREES[tree][0] for tree in known]
    ax.set_xticks(range(len(known)), titles, rotation=20, ha="right")
    ax.grid(axis="y", alpha=0.3)


def _figure(
    panels: Mapping[str, tuple[Key, Callable[[Record, Record], float]]],
    records: Records,
) -> Figure:
    figure, axes = figures.panels(len(panels), 4.5)
    handles: dict[str, object] = {}
    for ax, (title, (first, value)) in zip(axes, panels.items(), strict=True):
        _draw(ax, records, first, value)
        ax.set_title(title, fontsize=9)
        handles |= dict(zip(*ax.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(
        handles.values(), handles.keys(), loc="outside right center", fontsize=8
    )
    figure.suptitle("Over AdamW; filled: float32, open: bfloat16", fontsize=10)
    return figure


def write(records: Records, folder: Path) -> list[Path]:
    """Writes overhead.md and its figures; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "overhead.md", folder / "overhead.png"]
    paths[0].write_text(markdown(records))
    time = {"time of a step": (("update",), lambda own, _: own["ratio"])}
    figures.save(_figure(time, records), paths[1], dpi=110)
    compiled = {
        f"{what}, {title}": (
            ("compiled", target),
            lambda own, base, name=what: own[name] / base[name],
        )
        for what in ("bytes", "kernels")
        for target, (title, *_) in compilers.TARGETS.items()
        if any(key[:2] == ("compiled", target) for key in records)
    }
    if compiled:
        paths.append(folder / "overhead_compiled.png")
        figure = _figure(compiled, records)
        for ax in figure.axes:
            if ax.get_title().startswith("bytes"):
                ax.axhline(ONE_READ, **figures.DOTTED)
            else:
                ax.set_yscale("log")
        figures.save(figure, paths[-1], dpi=110)
    return paths

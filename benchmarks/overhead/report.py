"""The tables and the figure of finished measurements."""

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.table import Table

from benchmarks.lib import figures
from benchmarks.overhead import compiled_tables, tables
from benchmarks.overhead.drawing import compiled_figure, figure
from benchmarks.overhead.suite import Key, Record, key_of


def as_table(records: Sequence[Record]) -> Table:
    """Records of one kind, as they come."""
    columns: dict[str, Callable[[Record], str]] = {
        "update": lambda r: f"{r['ms']:.4g} ms, {tables.ratio(r)}",
        "training": lambda r: f"{r['ms']:.4g} ms, {tables.ratio(r)}",
        "compile": lambda r: f"{r['trace']:.2f} s + {r['compile']:.2f} s",
        "kernels": lambda r: f"{r['always']:g} + {r['branches']:g} in branches",
        "sharded": lambda r: f"{r['always']} + {r['branches']} in branches",
        "compiled": compiled_tables.as_line,
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
    """Writes overhead.md and its figures; returns their paths."""
    by_key = {key_of(record): record for record in records}
    text, picture = folder / "overhead.md", folder / "overhead.png"
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = text.with_suffix(".md.tmp")
    unfinished.write_text(markdown(by_key))
    unfinished.replace(text)
    figures.save(figure(by_key), picture)
    paths = [text, picture]
    if drawn := compiled_figure(by_key):
        paths.append(folder / "overhead_compiled.png")
        figures.save(drawn, paths[-1])
    return paths


def markdown(records: dict[Key, Record]) -> str:
    """All tables; cells that were not measured are empty."""
    parts = [
        "# What a step costs",
        "Made by `python -m benchmarks.overhead`. " + tables.machine(records),
        *filter(None, [tables.of_another_version(records)]),
        "![Time of a step and of compilation over adamw's](overhead.png)",
    ]
    for dtype in sorted({key[2] for key in records if key[0] == "update"})[::-1]:
        parts += [
            f"## One step over adamw's, {dtype}",
            "Median over rounds of the time of `chain(X, adamw)` over that of `adamw` "
            "in the same round, and its quartiles. In one jit, buffers donated.",
            tables.lines(tables.ratios(records, dtype)),
        ]
    parts += [
        "## The same in reads of the gradient",
        "What the transformation adds, in times that reading the float32 gradient once "
        "takes at the bandwidth of a copy.",
        tables.lines(tables.reads(records)),
        "## Memory",
        "Temporary memory of the program beyond adamw's, over the gradient's bytes.",
        tables.lines(tables.memory(records)),
        "## Kernels and collectives",
        "Kernels, copies included, that a further leaf adds to the program; "
        "all-reduces for leaves of 256 x 256 sharded over eight devices. After the "
        "plus: in the branches of conditionals, of which one runs.",
        tables.lines(tables.counts(records)),
        "## Compilation",
        "Seconds of the processor for equal leaves, tracing + compilation, and their "
        "sum over adamw's.",
        tables.lines(tables.compilation(records)),
        "## A whole training step",
        "Batch, gradient and update, over the same with adamw alone.",
        tables.lines(tables.training(records)),
        *compiled_tables.sections(records),
    ]
    return "\n\n".join(parts) + "\n"


def _cell(record: Record) -> list[str]:
    names = ("target", "tree", "dtype", "leaves", "network")
    return [name for name in names if name in record and name != "arm"]

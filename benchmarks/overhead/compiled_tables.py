"""The tables of what the compilers of a TPU and a GPU said; nothing was executed."""

from collections.abc import Callable
from typing import NamedTuple

from benchmarks.overhead import compilers, trees
from benchmarks.overhead.arms import ALL_ARMS, BASELINE
from benchmarks.overhead.suite import Key, Record
from benchmarks.overhead.tables import Rows, lines


def as_line(record: Record) -> str:
    """One record, as it comes."""
    if "error" in record:
        return f"failed: {record['error']}"
    parts = {
        "kernels": _kernels(record, record),
        "conditionals": _conditionals(record, record),
        "all-reduces": _all_reduces(record, record),
    }
    seconds = record["trace"] + record["compile"]
    counts = [f"{text} {name}" for name, text in parts.items() if text not in ("", "0")]
    return ", ".join([f"{record['bytes'] / 1e6:.5g} MB", *counts, f"{seconds:.1f} s"])


def sections(records: dict[Key, Record]) -> list[str]:
    """Markdown, a heading for every target that was compiled for."""
    parts = []
    if any(key[0] == "compiled" for key in records):
        parts.append(
            "![Bytes and kernels over adamw's, compiled](overhead_compiled.png)"
        )
    for target, (title, *_) in compilers.TARGETS.items():
        of_target = {
            key: r for key, r in records.items() if key[:2] == ("compiled", target)
        }
        if not of_target:
            continue
        parts += [
            f"## Compiled for {title}",
            f"By `python -m benchmarks.overhead --compiled {target}`; nothing was "
            f"executed, so nothing here is a time of a step. {_versions(of_target)} "
            "Each cell: float32 / bfloat16.",
        ]
        for table in _TABLES:
            rows = _rows(of_target, target, table.cell)
            if len(rows) > 1:
                parts += [f"### {table.heading}", table.text, lines(rows)]
        parts += _errors(of_target)
    return parts


def _bytes(record: Record, base: Record) -> str:
    ratio = f"{record['bytes'] / base['bytes']:.3f}"
    branches = record["branch_bytes"] / base["bytes"]
    return f"{ratio} + {branches:.3f}" if branches >= 5e-4 else ratio


def _kernels(record: Record, base: Record) -> str:
    branches = record["branch_kernels"]
    return f"{record['kernels']} + {branches}" if branches else str(record["kernels"])


def _conditionals(record: Record, base: Record) -> str:
    return str(record["conditionals"])


def _all_reduces(record: Record, base: Record) -> str:
    if "all_reduces" not in record:
        return ""
    branches, others = record["branch_all_reduces"], record["other_collectives"]
    text = (
        f"{record['all_reduces']} + {branches}"
        if branches
        else f"{record['all_reduces']}"
    )
    return f"{text} and {others} others" if others else text


def _temporary(record: Record, base: Record) -> str:
    added = record["temporary_bytes"] - base["temporary_bytes"]
    share = f"{added / record['gradient_bytes']:.2%}"
    return share if record["gradient_bytes"] > 1e7 else f"{added / 1024:.0f} KiB"


def _compilation(record: Record, base: Record) -> str:
    own, reference = (r["trace"] + r["compile"] for r in (record, base))
    return f"{own:.1f} s" if record is base else f"{own / reference:.2f}"


class _Table(NamedTuple):
    heading: str
    text: str
    cell: Callable[[Record, Record], str]  # of a record and adamw's beside


_TABLES = (
    _Table(
        "Bytes",
        "To and from HBM, over adamw's. One more read of the gradient makes 8/7 = "
        "1.143. What fits into a TPU's VMEM (128 MB) may be read once for both passes. "
        "After a plus, here and below: in the branches of conditionals, of which one "
        "runs.",
        _bytes,
    ),
    _Table("Kernels", "Copies included, fetches ahead apart.", _kernels),
    _Table(
        "Conditionals", "At each, a GPU's host waits for the device.", _conditionals
    ),
    _Table(
        "All-reduces",
        "Every leaf of two dimensions or more is cut over 2 x 2 devices.",
        _all_reduces,
    ),
    _Table(
        "Temporary memory",
        "Beyond adamw's, over the gradient's bytes; of trees below 10 MB in KiB. A "
        "TPU's compiler sets scratch aside for small arrays between two kernels.",
        _temporary,
    ),
    _Table(
        "Compilation",
        "Tracing and compilation over adamw's, whose is in seconds of the processor.",
        _compilation,
    ),
)


def _rows(
    records: dict[Key, Record], target: str, cell: Callable[[Record, Record], str]
) -> Rows:
    compiled = [tree for tree in trees.TREES if any(key[2] == tree for key in records)]
    rows = [["", *map(trees.label, compiled)]]
    for arm in ALL_ARMS:
        cells = []
        for tree in compiled:
            both = [
                _of_pair(
                    cell,
                    *(
                        records.get(("compiled", target, tree, dtype, name), {})
                        for name in (arm, BASELINE)
                    ),
                )
                for dtype in ("float32", "bfloat16")
            ]
            cells.append(" / ".join(text or "-" for text in both) if any(both) else "")
        if any(cells):
            rows.append([arm, *cells])
    return rows


def _of_pair(cell: Callable[[Record, Record], str], own: Record, base: Record) -> str:
    """Empty where one was not compiled."""
    if not own or not base:
        return ""
    return "failed" if "error" in own or "error" in base else cell(own, base)


def _versions(records: dict[Key, Record]) -> str:
    found = {
        f"{r['compiler']}; jax {r['jax']}, optax {r['optax']}, stablegrad_optax "
        f"{r['stablegrad_optax']}, {r['date']}."
        for r in records.values()
    }
    return " ".join(sorted(found))


def _errors(records: dict[Key, Record]) -> list[str]:
    """A line for each that could not be compiled."""
    return [
        f"Failed: {' '.join(map(str, key[2:]))}: {record['error']}"
        for key, record in records.items()
        if "error" in record
    ]

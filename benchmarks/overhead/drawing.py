"""The figures: times of what was executed, and what was compiled for a TPU or GPU."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.lib import figures
from benchmarks.overhead import compilers, tables, trees
from benchmarks.overhead.arms import ALL_ARMS, ARMS, BASELINE, OURS, REMEDIES
from benchmarks.overhead.suite import CROSS_COMPILED, Key, Record


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
    canvas.suptitle(tables.machine(records), fontsize=8, color="0.4")
    return canvas


def _draw_ratios(ax: Axes, records: dict[Key, Record], dtype: str) -> None:
    names = [arm for arm in ARMS if arm != BASELINE]
    timed = tables.timed_trees(records)
    for index, arm in enumerate(names):
        places, medians, low, high = [], [], [], []
        for place, tree in enumerate(timed):
            if record := records.get(("update", tree, dtype, arm)):
                places.append(place + 0.7 * (index / (len(names) - 1) - 0.5))
                medians.append(record["ratio"])
                low.append(record["ratio"] - record["ratio_quartiles"][0])
                high.append(record["ratio_quartiles"][1] - record["ratio"])
        spread = np.clip([low, high], 0, None)
        ax.errorbar(
            places, medians, spread, **style(arm), linestyle="", label=arm, capsize=2
        )
    for arm in tables.TARGETS if dtype == "float32" else ():
        for place, tree in enumerate(timed):
            color = style(arm)["color"]
            target = tables.TARGETS[arm].get(tree, [])
            ax.hlines(target, place - 0.4, place + 0.4, color, "dotted")
    ax.axhline(1, color="0.5", linewidth=1)
    labels = [trees.label(tree) for tree in timed]
    ax.set_xticks(range(len(labels)), labels, rotation=20, ha="right")
    ax.set(yscale="log", ylabel="time of a step over adamw's")
    dotted = " (dotted: the aim)" if dtype == "float32" else ""
    ax.set_title(f"{dtype}{dotted}")
    ticks = [0.8, 1, 1.2, 1.5, 2, 3, 4]
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    ax.minorticks_off()
    ax.grid(axis="y", alpha=0.3)


def style(arm: str) -> dict[str, str]:
    """Methods are discs, remedies for spikes triangles, others squares; adamw grey."""
    grey = {"adamw again": "x", "scale_by_adam alone": "+"}
    if arm in grey:
        return {"color": "0.5", "marker": grey[arm]}
    names = [name for name in ALL_ARMS if name != BASELINE and name not in grey]
    marker = "o" if arm in OURS else "^" if arm in REMEDIES else "s"
    color = figures.PALETTE[names.index(arm) % len(figures.PALETTE)]
    return {"color": color, "marker": marker}


def _draw_compilation(ax: Axes, records: dict[Key, Record]) -> None:
    for arm in ARMS:
        points = sorted(
            (key[1], ratio)
            for key in records
            if key[0] == "compile" and key[2] == arm
            if (ratio := tables.compile_ratio(records, *key[1:])) is not None
        )
        if points:
            ax.plot(*zip(*points, strict=True), **style(arm), label=arm)
    ax.axhline(3, **figures.DOTTED)
    ax.axhline(1, color="0.5", linewidth=1)
    ax.set(xscale="log", xlabel="leaves", ylabel="time to compile over adamw's")
    ax.set_title("tracing and compilation")
    ax.grid(alpha=0.3)


def compiled_figure(records: dict[Key, Record]) -> Figure | None:
    """Bytes and kernels over adamw's, a column a target; None if none was compiled."""
    targets = [
        target
        for target in compilers.TARGETS
        if any(key[:2] == ("compiled", target) for key in records)
    ]
    if not targets:
        return None
    canvas, axes = plt.subplots(
        2,
        len(targets),
        figsize=(7 * len(targets), 8),
        layout="constrained",
        squeeze=False,
        sharex="col",
    )
    for column, target in zip(axes.T, targets, strict=True):
        for ax, name in zip(column, ("bytes", "kernels"), strict=True):
            _draw_compiled(ax, records, target, name)
        column[0].set_title(f"compiled for {compilers.TARGETS[target].title}")
        column[0].axhline(8 / 7, **figures.DOTTED)
        column[1].set(yscale="log")
        ticks = [0.1, 0.2, 0.5, 1, 2, 5, 10]
        column[1].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        column[1].minorticks_off()
    axes[0, 0].set_ylabel("bytes to and from HBM over adamw's")
    axes[1, 0].set_ylabel("kernels over adamw's")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=3)
    canvas.suptitle(
        "filled: float32, open: bfloat16; dotted: one more read of the gradient; what "
        "has a conditional is in the tables alone",
        fontsize=9,
        color="0.4",
    )
    return canvas


def _draw_compiled(
    ax: Axes, records: dict[Key, Record], target: str, name: str
) -> None:
    compiled = [
        tree
        for tree in trees.TREES
        if ("compiled", target, tree) in {k[:3] for k in records}
    ]
    names = [arm for arm in CROSS_COMPILED if arm != BASELINE]
    for index, arm in enumerate(names):
        for dtype in ("float32", "bfloat16"):
            places, values = [], []
            for place, tree in enumerate(compiled):
                own = records.get(("compiled", target, tree, dtype, arm), {})
                base = records.get(("compiled", target, tree, dtype, BASELINE), {})
                if name in own and name in base and not own["conditionals"]:
                    side = 0.05 if dtype == "bfloat16" else -0.05
                    places.append(place + 0.7 * (index / (len(names) - 1) - 0.5) + side)
                    values.append(own[name] / base[name])
            filled = dtype == "float32"
            look = style(arm) | ({} if filled else {"markerfacecolor": "none"})
            ax.plot(places, values, **look, linestyle="", label=arm if filled else None)
    ax.axhline(1, color="0.5", linewidth=1)
    for edge in range(1, len(compiled)):
        ax.axvline(edge - 0.5, color="0.9", linewidth=1)
    ax.set_xticks(
        range(len(compiled)), map(trees.label, compiled), rotation=20, ha="right"
    )
    ax.grid(axis="y", alpha=0.3)

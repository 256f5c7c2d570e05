"""Writes the page of a suite, its tables and figures, from finished runs alone."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from benchmarks.lib import claims, figures, panels
from benchmarks.lib.claims import Claim
from benchmarks.lib.grid import Ledger
from benchmarks.lib.regret import regret_table
from benchmarks.lib.runs import Record
from benchmarks.lib.suite import Choice, Suite, lowest_median
from benchmarks.lib.summary import Cell, Scores, provenance, scores
from benchmarks.lib.tables import error_table

matplotlib.use("Agg")  # figures are saved, no window is opened


def num_cells(table: Scores) -> str:
    return f"{len(table)} cells"


@dataclass(frozen=True)
class Page:
    """What a suite's page is made of.

    Attributes:
        title: of the page.
        text: what the errors are, when a run fails, how it was trained; Markdown.
        cell: the settings that make a cell of `scores`.
        count: says how much of a preset there is, after the number of its runs.
        summary: Markdown; stands before the notes and the figures of a preset.
        figures: name -> what draws one of a preset, or finds nothing to draw.
        tables: Markdown; stands behind them.
        times: the lines of `time` -> Markdown, behind the presets.
        claims: what a text may say of two arms; their table is the last of the page.
        named: a cell -> what the claims call it.
    """

    title: str
    text: str
    cell: tuple[str, ...]
    count: Callable[[Scores], str]
    summary: Callable[[Scores], str]
    figures: Mapping[str, Callable[[Scores], Figure | None]]
    tables: Callable[[Scores], str]
    times: Callable[[Sequence[Record]], str] | None = None
    claims: Sequence[Claim] = ()
    named: Callable[[Cell], str] = str

    @classmethod
    def default(cls, suite: Suite) -> "Page":
        """Of a suite that names none: regret, errors, and curves of `keep_error`."""

        def name(cell: Cell) -> str:
            both = zip(suite.cell, cell, strict=True)
            return ", ".join(f"{setting} {value}" for setting, value in both)

        return cls(
            suite.name.capitalize(),
            f"{suite.about[0].upper()}{suite.about[1:]}.",
            suite.cell,
            num_cells,
            lambda table: regret_table(table, "cells"),
            {
                "regret": panels.regret_figure,
                "curves": partial(panels.curves_figure, name=name),
            },
            lambda table: error_table(
                "Errors", {name(cell): column for cell, column in table.items()}
            ),
        )


def write(
    page: Page,
    records: Sequence[Record],
    suite: Suite,
    folder: Path,
) -> list[Path]:
    """Write `<suite>.md` and, for each preset, its figures; returns their paths.

    A file `<suite>_<preset>_notes.md` beside them, written by hand, is put under the
    preset's summary.

    Args:
        page: what to write.
        records: the lines of the suite's file.
        suite: says how rates were chosen, and what is missing.
        folder: where to.
    """
    by_preset: dict[str, list[Record]] = {}
    times = [record for record in records if record["phase"] == "timing"]
    for record in records:
        if record["phase"] != "timing":
            by_preset.setdefault(record["preset"], []).append(record)
    head = (
        f"# {page.title}\n\nWritten by `python -m benchmarks report {suite.name}` from "
        f"`{suite.name}.jsonl`; not edited by hand.\n\n{page.text}\n"
    )
    text, paths, tables = [head], [], []
    for preset, of_preset in by_preset.items():
        choose = suite.choice(preset)
        table = scores(of_preset, page.cell, choose)
        tables.append(table)
        stem = f"{suite.name}_{preset}"
        drawn: list[Path] = []
        if table:
            named = ((name, draw(table)) for name, draw in page.figures.items())
            drawn = figures.save_all(named, provenance(of_preset), folder, stem)
        notes = folder / f"{stem}_notes.md"
        parts = [
            f"\n## Preset {preset}\n",
            f"{len(of_preset)} runs, {page.count(table)}; {provenance(of_preset)}.\n",
            _unfinished(suite, preset, of_preset),
            "" if choose is lowest_median else f"{_rule(choose)}\n",
            page.summary(table),
            notes.read_text().strip() + "\n" if notes.exists() else "",
            *(f"![{path.stem}]({path.name})\n" for path in drawn),
            page.tables(table),
        ]
        text.append("\n".join(part for part in parts if part))
        paths += drawn
    if times and page.times is not None:
        text.append(page.times(times))
    if page.claims:
        text.append(f"\n## Claims\n\n{claims.table(page.claims, tables, page.named)}")
    markdown = folder / f"{suite.name}.md"
    markdown.parent.mkdir(parents=True, exist_ok=True)
    markdown.write_text("\n".join(text))
    return [markdown, *paths]


def _unfinished(suite: Suite, preset: str, records: Sequence[Record]) -> str:
    """Says what is missing, if anything is."""
    if preset not in suite.presets:
        return ""
    ledger = Ledger(suite.presets[preset], records)
    num_done, num_runs = ledger.done()[0], ledger.num_runs
    if num_done == num_runs:
        return ""
    return (
        f"**Not finished: {num_done} of {num_runs} runs.** What is shown are the arms "
        "whose reported seeds are all there. It goes on with "
        f"`python -m benchmarks run {suite.name} --preset {preset}`.\n"
    )


def _rule(choose: Choice) -> str:
    return f"Rates are chosen by another rule. {inspect.getdoc(choose)}"

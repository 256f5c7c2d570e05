"""Writes the page of a suite, its tables and figures, from finished runs alone."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from benchmarks.lib import runs
from benchmarks.lib.grid import Ledger
from benchmarks.lib.runs import Record
from benchmarks.lib.suite import Suite, lowest_median
from benchmarks.report import figures
from benchmarks.report.rates import RATES_CAPTION, rates_figure, rates_table
from benchmarks.report.scores import (
    ERROR,
    Problem,
    Quantity,
    Sweeps,
    Table,
    provenance,
    scores,
    sweeps,
)
from benchmarks.report.tables import SCORE_CAPTION, overview_table, score_table

matplotlib.use("Agg")  # figures are saved, no window is opened

RATES, SEEDS = "rates", "seeds"


@dataclass(frozen=True)
class Page:
    """Declares what the page of a suite shows.

    Attributes:
        title: Of the page.
        text: What the numbers are, when a run fails and how it was trained; Markdown.
        problem: The settings that make a problem, in the order in which `label` has
            them.
        label: Problem -> its heading.
        quantity: What is shown of a run.
        limit: Where a run fails, in the unit of the quantity; None: is not drawn.
        notes: Preset -> what its problems are and what to read from it, without
            numbers; Markdown.
        shown: Preset -> the names of its figures; by default `seeds`, or `rates` where
            no rate is chosen.
        drawings: Further figures by name; each draws one of a preset, or nothing.
        sections: Further Markdown behind the tables of a preset; each may be empty.
        ending: (measurements, preset -> table) -> Markdown behind the presets.
        has_score_tables: Whether each problem has its own table.
    """

    title: str
    text: str
    problem: tuple[str, ...]
    label: Callable[..., str]
    quantity: Quantity = ERROR
    limit: float | None = None
    notes: Mapping[str, str] = field(default_factory=dict)
    shown: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    drawings: Mapping[str, Callable[[Table], Figure | None]] = field(
        default_factory=dict
    )
    sections: Sequence[Callable[[Table], str]] = ()
    ending: Callable[[Sequence[Record], Mapping[str, Table]], str] | None = None
    has_score_tables: bool = True

    @classmethod
    def default(cls, suite: Suite) -> "Page":
        """Shows the errors of a suite that declares no page."""

        def label(*problem: str | int) -> str:
            pairs = zip(suite.problem, problem, strict=True)
            return ", ".join(f"{name} {value}" for name, value in pairs)

        about = f"{suite.about[0].upper()}{suite.about[1:]}."
        return cls(suite.name.capitalize(), about, suite.problem, label)

    def name(self, problem: Problem) -> str:
        return self.label(*problem)


def write(
    page: Page, records: Sequence[Record], suite: Suite, folder: Path
) -> list[Path]:
    """Writes `<suite>.md` and the figures of its presets; returns their paths.

    Args:
        page: What to write.
        records: The lines of the suite's file.
        suite: Says how rates were chosen, and what is missing.
        folder: Where the files go.
    """
    by_preset: dict[str, list[Record]] = {}
    measured = [record for record in records if record["phase"] == runs.MEASURED]
    for record in records:
        if record["phase"] != runs.MEASURED:
            by_preset.setdefault(record["preset"], []).append(record)
    text = [
        f"# {page.title}\n\n`python -m benchmarks report {suite.name}` writes this "
        f"page from the finished runs, `{suite.name}.jsonl.gz`.\n\n{page.text}\n",
    ]
    paths, tables = [], {}
    for preset, chosen in by_preset.items():
        draw = _Preset(page, suite, preset, chosen)
        if draw.table and page.has_score_tables and SCORE_CAPTION not in text:
            text.append(SCORE_CAPTION)
        tables[preset] = draw.table
        paths += figures.save_all(
            draw.figures(), provenance(chosen), folder, f"{suite.name}_{preset}"
        )
        text += draw.markdown(paths)
    if page.ending is not None:
        text.append(page.ending(measured, tables))
    markdown = folder / f"{suite.name}.md"
    markdown.parent.mkdir(parents=True, exist_ok=True)
    markdown.write_text("\n".join(part for part in text if part))
    return [markdown, *paths]


class _Preset:
    """The part of a page that shows one preset."""

    def __init__(
        self, page: Page, suite: Suite, preset: str, records: Sequence[Record]
    ):
        self._page, self._suite, self._preset = page, suite, preset
        self._records = records
        self._choose = suite.choice(preset)
        self.table: Table = {}
        self._sweeps: Sweeps = {}
        if self._choose is None:
            self._sweeps = sweeps(records, page.problem, page.quantity)
        else:
            self.table = scores(records, page.problem, self._choose, page.quantity)

    def figures(self) -> Iterator[tuple[str, Figure | None]]:
        page = self._page
        if self._sweeps:
            for name in page.shown.get(self._preset, (RATES,)):
                yield name, rates_figure(self._sweeps, page.name)
            return
        drawings = {
            SEEDS: partial(figures.seeds_figure, label=page.name, limit=page.limit),
            **page.drawings,
        }
        for name in page.shown.get(self._preset, (SEEDS,)):
            yield name, drawings[name](self.table)

    def markdown(self, paths: Sequence[Path]) -> Iterator[str]:
        page, stem = self._page, f"{self._suite.name}_{self._preset}_"
        num_problems = len(self.table or self._sweeps)
        yield f"\n## Preset {self._preset}\n"
        plural = "" if num_problems == 1 else "s"
        yield f"{len(self._records)} runs, {num_problems} problem{plural}; "
        yield f"{provenance(self._records)}.\n"
        yield self._unfinished()
        if self._choose not in (lowest_median, None):
            yield f"{inspect.getdoc(self._choose)}\n"
        if note := page.notes.get(self._preset):
            yield f"{note}\n"
        yield overview_table(self.table) if page.has_score_tables else ""
        for path in paths:
            if path.name.startswith(stem):
                yield f"![{path.stem}]({path.name})\n"
        yield from (section(self.table) for section in page.sections)
        tables = {p: score_table(column) for p, column in self.table.items()}
        if self._sweeps:
            yield RATES_CAPTION
            tables |= {p: rates_table(sweep) for p, sweep in self._sweeps.items()}
        for problem, table in tables.items() if page.has_score_tables else ():
            yield f"### {page.name(problem)}\n\n{table}"

    def _unfinished(self) -> str:
        """Says what is missing, if anything is."""
        suite, preset = self._suite, self._preset
        if preset not in suite.presets:
            return ""
        ledger = Ledger(suite.presets[preset], self._records)
        num_done, num_runs = ledger.done()[0], ledger.num_runs
        if num_done == num_runs:
            return ""
        return (
            f"**Not finished: {num_done} of {num_runs} runs.** The tables show these. "
            f"`python -m benchmarks run {suite.name} --preset {preset}` goes on.\n"
        )

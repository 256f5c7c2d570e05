"""Tests what holds for every suite, and the imports between them."""

import ast
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import suites
from benchmarks.lib import runs
from benchmarks.lib.grid import Ledger
from benchmarks.lib.optimizers import Optimizer

ROOT = Path(__file__).parents[1]
PRESETS = [
    pytest.param(suite, preset, id=f"{suite}-{preset}")
    for suite in suites.NAMES
    for preset in suites.load(suite).presets
]
# What every line has, whatever the suite.
KEYS = (
    "preset optimizer learning_rate seed phase steps error failed ms_per_step "
    "device jax stablegrad_optax date"
)


@pytest.mark.parametrize(("suite", "preset"), PRESETS)
def test_presets_name_what_exists(suite, preset):
    preset_name, preset = preset, suites.load(suite).presets[preset]
    ledger, protocol = Ledger(preset), preset.protocol
    for group in preset.groups:
        assert ledger.missing(group)
        # What is computed side by side is one optimizer and one program.
        assert len({entry.settings["optimizer"] for entry in group}) == 1
    keys = {tuple(entry.settings.values()) for entry in preset.entries}
    assert len(keys) == len(preset.entries)
    assert not set(protocol.tuning_seeds) & set(protocol.reported_seeds)
    assert len(protocol.reported_seeds) >= 3
    for entry in preset.entries:
        assert Optimizer.named(entry.settings["optimizer"])
        assert entry.settings["preset"] == preset_name
        rates = entry.learning_rates
        assert list(rates) == sorted(set(rates))
        is_chosen = protocol.tuning_seeds or protocol.choose is None
        assert len(rates) == 1 or (len(rates) > 2 and is_chosen)


@pytest.mark.parametrize("suite", suites.NAMES)
def test_every_training_can_be_made(suite, monkeypatch):
    """One of each problem: settings name tasks, models and data that exist."""
    monkeypatch.delenv("STABLEGRAD_DATA", raising=False)
    loaded, seen = suites.load(suite), set()
    for preset in loaded.presets.values():
        for first, *_ in preset.groups:
            settings = {**first.settings, "optimizer": "AdamW"}
            problem = {k: v for k, v in settings.items() if k not in ("preset", "rate")}
            if tuple(problem.values()) in seen:
                continue
            seen.add(tuple(problem.values()))
            if settings.get("data") == "cifar10-jpeg":
                with pytest.raises(ValueError, match="STABLEGRAD_DATA must name"):
                    loaded.training(settings, "reported")
                continue
            training = loaded.training(settings, "reported")
            assert training.recorded[-1] == settings["steps"] == training.rule.steps
            assert list(training.recorded) == sorted(set(training.recorded))


@pytest.mark.parametrize("suite", suites.NAMES)
def test_committed_results_are_whole_presets_or_said_not_to_be(suite):
    """A command that is repeated computes nothing; what has gaps is called so."""
    loaded = suites.load(suite)
    records = runs.read(runs.RESULTS / f"{suite}.jsonl")
    page = (runs.RESULTS / f"{suite}.md").read_text() if records else ""
    presets = {r["preset"] for r in records if r["phase"] != runs.MEASURED}
    for name in presets & loaded.presets.keys():
        ledger = Ledger(loaded.presets[name], records)
        num_done, num_runs = ledger.done()[0], ledger.num_runs
        assert num_done == num_runs or (
            f"**Not finished: {num_done} of {num_runs} runs.**" in page
        )
    for record in records:
        if record["phase"] != runs.MEASURED:
            assert Optimizer.named(record["optimizer"]).name == record["optimizer"]


@pytest.mark.recent_xla  # before, a resumed run could differ in its last digits
@pytest.mark.parametrize(
    "suite",
    [
        pytest.param(name, marks=() if name == "pinn" else pytest.mark.slow)
        for name in suites.NAMES
    ],
)
def test_smoke_runs_resumes_and_is_reported(suite, tmp_path, capsys, monkeypatch):
    path = tmp_path / f"{suite}.jsonl"
    run = ["run", suite, "--preset", "smoke", "--results", str(path)]
    assert command.main(run) == 0
    preset = suites.load(suite).presets["smoke"]
    records = _runs(path)
    assert len(records) == preset.num_runs
    assert all(set(KEYS.split()) <= record.keys() for record in records)
    for entry in preset.entries:
        reported = [
            record
            for record in records
            if record["phase"] == "reported"
            and entry.settings.items() <= record.items()
        ]
        rates = sorted({record["learning_rate"] for record in reported})
        seeds = [100, 101, 102] * len(rates)
        assert [record["seed"] for record in reported] == seeds
        is_chosen = preset.protocol.choose is not None
        assert rates == list(entry.learning_rates) or (is_chosen and len(rates) == 1)
        assert all(
            record["curve"]["step"][-1] == record["steps"] for record in reported
        )

    # Again, and after a crash that cut off the last line: what is missing alone.
    text = path.read_bytes()
    for cut in (0, 9):
        path.write_bytes(text[: len(text) - cut])
        assert command.main(run) == 0
        assert [_known(r) for r in _runs(path)] == [_known(r) for r in records]
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert last_line.startswith(f"{len(records)} of {len(records)} runs")

    assert command.main(["report", suite, "--results", str(path)]) == 0
    pictures = sorted(tmp_path.glob(f"{suite}_smoke_*.png"))
    page = (tmp_path / f"{suite}.md").read_text()
    assert pictures
    assert all(picture.name in page for picture in pictures)
    for word in ("reported seeds 100 to 102", "jax", f"benchmarks report {suite}"):
        assert word in page
    assert "Not finished" not in page
    assert path.read_bytes() == b""
    assert [_known(r) for r in _runs(path)] == [_known(r) for r in records]
    path.with_name(f"{path.name}.gz").unlink()
    path.write_bytes(text[: len(text) - 9])
    assert command.main(["report", suite, "--results", str(path)]) == 0
    page = (tmp_path / f"{suite}.md").read_text()
    assert f"**Not finished: {len(records) - 1} of {len(records)} runs.**" in page


def _runs(path):
    return [r for r in runs.read(path) if r["phase"] != runs.MEASURED]


def _known(record):
    """But for what differs from time to time."""
    return {k: v for k, v in record.items() if k not in ("ms_per_step", "date")}


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on(tmp_path):
    path = tmp_path / "pinn.jsonl"
    line = [sys.executable, "-m", "benchmarks", "run", "pinn", "--preset", "smoke"]
    line += ["--results", str(path)]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while not (path.exists() and path.stat().st_size):
            time.sleep(0.1)
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    num_done = len(runs.read(path))
    num_runs = suites.load("pinn").presets["smoke"].num_runs
    assert 0 < num_done < num_runs
    assert command.main(line[3:]) == 0
    seen = [str(_known(record)) for record in runs.read(path)]
    assert len(seen) == len(set(seen)) == num_runs


def test_the_list_names_every_preset(capsys):
    assert command.main(["run", "--list"]) == 0
    words = capsys.readouterr().out.split()
    for suite in suites.NAMES:
        assert {suite, *suites.load(suite).presets} <= set(words)


# What may import what: benchmarks.<place> -> the places below it.
BELOW = {
    "lib": {"lib"},
    "report": {"lib", "report"},
    "tasks": {"lib", "tasks"},
    "suites": {"lib", "report", "tasks", "suites"},
    "overhead": {"lib", "report", "tasks", "overhead"},
    "why": {"lib", "report", "tasks", "why"},
}


@pytest.mark.parametrize("place", BELOW)
def test_imports_run_one_way(place):
    """And none from one task or one suite to another."""
    for path in (ROOT / "benchmarks" / place).rglob("*.py"):
        module = path.relative_to(ROOT).with_suffix("").parts
        for name in _imported(path):
            parts = name.split(".")
            if parts[0] != "benchmarks" or len(parts) < 3:
                continue
            assert parts[1] in BELOW[place], f"{path} imports {name}"
            is_folder = (ROOT / "benchmarks" / place / parts[2]).is_dir()
            if place == "tasks" and is_folder:
                assert parts[2] == module[2], f"{path} imports {name}"
            if place == "suites" and parts[1] == "suites" and len(parts) > 2:
                suite, other = (place.split("_")[0] for place in (module[2], parts[2]))
                assert suite == other, f"{path} imports {name}"


def _imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_a_task_knows_no_training_and_no_benchmark_a_private_name():
    for path in (ROOT / "benchmarks").rglob("*.py"):
        for name in _imported(path):
            package, *rest = name.split(".")
            private = package == "stablegrad_optax" and any(x[0] == "_" for x in rest)
            assert not private, f"{path} imports {name}"
            if path.is_relative_to(ROOT / "benchmarks" / "tasks"):
                allowed = ("benchmarks.lib.task.", "benchmarks.tasks.")
                assert package != "benchmarks" or name.startswith(allowed), path

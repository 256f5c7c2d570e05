"""Files of runs: whole lines, resuming, archives, the choice of a rate."""

import math
import multiprocessing
import random
import resource
import signal
import threading
import time
from dataclasses import replace

import pytest
from rich.console import Console

import benchmarks
from benchmarks.lib import runs
from benchmarks.lib.grid import Ledger, run_grid
from benchmarks.lib.runs import Run
from benchmarks.lib.suite import (
    Entry,
    Preset,
    Protocol,
    lowest_median,
    lowest_worst,
    lowest_worst_with_margin,
)

PROTOCOL = Protocol(tuning_seeds=(0, 1), reported_seeds=(10, 11, 12))
ENTRIES = [
    Entry({"preset": "p", "problem": problem, "optimizer": name}, (0.1, 0.2), cost=2.0)
    for problem in ("easy", "hard")
    for name in ("A", "B")
]
PRESET = Preset([[entry] for entry in ENTRIES], PROTOCOL, "no time", "a test")
NUM_RUNS = 4 * (4 + 3)


def result(error):
    failed = not error <= 0.5
    return {"error": runs.finite(error), "failed": failed, "ms_per_step": 1.0}


def tuned(rate, *errors):
    return [{"learning_rate": rate, **result(error)} for error in errors]


# The file


def test_what_is_appended_is_read_back(tmp_path):
    path = tmp_path / "made" / "runs.jsonl"
    assert runs.read_lines(path) == []
    runs.append(path, [{"a": 1}, {"a": 2.5, "b": None}])
    runs.append(path, [{"a": "é"}])
    assert runs.read_lines(path) == [{"a": 1}, {"a": 2.5, "b": None}, {"a": "é"}]


@pytest.mark.parametrize("torn", ['{"a": 2, "b"', '{"a": 2}', "{"])
def test_a_torn_last_line_is_no_run_and_is_replaced(torn, tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text('{"a": 1}\n' + torn)
    assert runs.read_lines(path) == [{"a": 1}]
    runs.append(path, [{"a": 3}])
    assert path.read_text() == '{"a": 1}\n{"a": 3}\n'


@pytest.mark.parametrize("line", ["nonsense", "[1]"])
def test_a_broken_line_elsewhere_is_named(line, tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text(f'{{"a": 1}}\n{line}\n{{"a": 2}}\n')
    with pytest.raises(ValueError, match=r"runs.jsonl, line 2, is not a run"):
        runs.read_lines(path)


def test_a_line_that_is_not_a_run_is_named(tmp_path):
    path = tmp_path / "runs.jsonl"
    assert run(Trainer(), path) == 0
    (good, *_) = runs.read(path)
    for key, value in (
        ("seed", None),
        ("error", "low"),
        ("optimizer", 3),
        ("failed", 0),
    ):
        path.unlink()
        runs.append(path, [good, {**good, key: value}])
        with pytest.raises(ValueError, match=f"line 2, is not a run: its {key} is"):
            runs.read(path)
    path.unlink()
    runs.append(path, [{"answer": 42}])
    with pytest.raises(ValueError, match="line 1, is not a run: it has no phase"):
        runs.read(path)


def test_an_archive_holds_the_lines_and_both_files_are_read_as_one(tmp_path):
    path = tmp_path / "runs.jsonl"
    runs.archive(path)
    assert not list(tmp_path.iterdir())
    for number in range(3):
        runs.append(path, [{"a": number}, {"b": "x" * 1000}])
        assert runs.read_lines(path)[-2] == {"a": number} or number
        runs.archive(path)
        assert path.read_bytes() == b""
    # A line that is there twice, as a crash within `archive` leaves it, counts once.
    runs.append(path, [{"a": 1}, {"a": 7}])
    expected = [{"a": 0}, {"b": "x" * 1000}, {"a": 1}, {"a": 2}, {"a": 7}]
    assert runs.read_lines(path) == expected
    assert path.with_name("runs.jsonl.gz").stat().st_size < 200


def test_a_torn_line_is_not_archived(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text('{"a": 1}\n{"a": 2')
    runs.archive(path)
    assert runs.read_lines(path) == [{"a": 1}]


def test_what_is_appended_while_a_file_is_archived_is_kept(tmp_path):
    path, num = tmp_path / "runs.jsonl", 60

    def write(name):
        for number in range(num):
            runs.append(path, [{name: number}])

    writers = [threading.Thread(target=write, args=(name,)) for name in "ab"]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        runs.archive(path)
    records = runs.read_lines(path)
    assert len(records) == 2 * num
    assert [r["a"] for r in records if "a" in r] == list(range(num))


def test_an_archive_that_cannot_be_written_loses_nothing(tmp_path, small_disk):
    path = tmp_path / "runs.jsonl"
    rng = random.Random(0)
    runs.append(path, [{"a": [rng.random() for _ in range(100)]}])
    records = runs.read_lines(path)
    small_disk(100)
    with pytest.raises(OSError, match="File too large"):
        runs.archive(path)
    assert runs.read_lines(path) == records
    assert [file.name for file in tmp_path.iterdir()] == ["runs.jsonl"]


def test_a_damaged_archive_is_named(tmp_path):
    path = tmp_path / "runs.jsonl"
    runs.append(path, [{"a": number} for number in range(50)])
    runs.archive(path)
    archive = path.with_name("runs.jsonl.gz")
    archive.write_bytes(archive.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"runs.jsonl.gz is damaged"):
        runs.read_lines(path)


@pytest.fixture
def small_disk():
    """Sets how large a file may become: a write beyond it is short, then fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, small_disk):
    path = tmp_path / "runs.jsonl"
    runs.append(path, [{"a": 1}])
    before = path.read_bytes()
    small_disk(len(before) + 20)
    with pytest.raises(OSError, match="File too large"):
        runs.append(path, [{"a": 2, "text": "x" * 100}])
    assert path.read_bytes() == before


def test_a_full_disk_ends_the_grid_and_is_told(tmp_path, small_disk):
    path, trainer = tmp_path / "runs.jsonl", Trainer()
    small_disk(3000)
    with pytest.raises(OSError, match=r"the last batch could not be written") as told:
        run(trainer, path)
    num_done = len(runs.read(path))
    assert 0 < num_done < NUM_RUNS
    assert f"{num_done} of {NUM_RUNS} runs are in" in str(told.value)
    # What could not be kept is not computed either, but for the batch that met it.
    assert sum(map(len, trainer.batches)) <= num_done + 4


def test_a_second_command_on_the_same_runs_is_refused(tmp_path):
    path = tmp_path / "runs.jsonl"
    fork = multiprocessing.get_context("spawn")
    with runs.at_work(path, "cpu"), fork.Pool(1) as pool:
        told = pool.apply(told_at_work, (path, "cpu"))
        assert "another command is at preset cpu of" in told
        assert pool.apply(told_at_work, (path, "gpu")) == "free"
    assert told_at_work(path, "cpu") == "free"
    assert not list(tmp_path.iterdir())


def told_at_work(path, preset):
    try:
        with runs.at_work(path, preset):
            return "free"
    except ValueError as error:
        return str(error)


def test_a_file_holds_no_nan(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        runs.append(tmp_path / "runs.jsonl", [{"error": math.nan}])
    assert runs.finite(math.nan) is None
    assert runs.finite(math.inf) is None
    assert runs.finite(0.123456, digits=3) == 0.123


# The choice of a learning rate


@pytest.mark.parametrize(
    ("records", "chosen"),
    [
        (tuned(1, 0.3, 0.1) + tuned(2, 0.1, 0.2), 2),
        # A failure beats no success, however low the other error.
        (tuned(1, 0.4, 0.4) + tuned(2, 0.01, 0.6), 1),
        (tuned(1, 0.1, 0.2, 0.9) + tuned(2, 0.3, 0.3, 0.3), 1),
        # Both medians fail: fewer failures, then the lower error, NaN being 1.
        (tuned(1, 0.6, 0.6) + tuned(2, 0.9, 0.4), 2),
        (tuned(1, math.nan, math.nan) + tuned(2, 5.0, 0.9), 2),
        (tuned(2, 0.1, 0.1) + tuned(1, 0.1, 0.1), 1),
    ],
)
def test_the_lowest_median_wins_and_failures_are_last(records, chosen):
    assert lowest_median(records) == chosen


@pytest.mark.parametrize(
    ("records", "chosen"),
    [
        # The worst seed decides, not the median.
        (
            tuned(1, 0.2, 0.2, 0.2) + tuned(2, 0.1, 0.1, 0.3) + tuned(3, 0.4, 0.4, 0.4),
            1,
        ),
        # The best rate has a neighbour that fails: a step further down.
        (
            tuned(1, 0.3, 0.3)
            + tuned(2, 0.2, 0.2)
            + tuned(3, 0.1, 0.1)
            + tuned(4, 0.1, 0.9),
            2,
        ),
        # The largest rate has none.
        (tuned(1, 0.3, 0.3) + tuned(2, 0.1, 0.1), 1),
        # A rate that fails has no margin, whatever the next one does: the best of all.
        (tuned(1, 0.9, 0.3) + tuned(2, 0.1, 0.2) + tuned(3, 0.1, 0.9), 2),
        # Nothing has a margin: the best of all.
        (tuned(1, 0.3, 0.3) + tuned(2, 0.6, 0.1) + tuned(3, 0.9, 0.9), 1),
    ],
)
def test_the_worst_seed_and_a_margin_choose(records, chosen):
    assert lowest_worst_with_margin(records) == chosen


def test_the_worst_seed_chooses_without_a_margin():
    records = tuned(1, 0.2, 0.2, 0.2) + tuned(2, 0.1, 0.1, 0.3)
    assert lowest_worst(records + tuned(3, 0.1, 0.1, 0.9)) == 1
    assert lowest_worst(records + tuned(3, 0.15, 0.15, 0.15)) == 3
    assert lowest_worst(tuned(1, 0.9, 0.1) + tuned(2, 0.9, 0.9)) == 1


# The grid


class Trainer:
    """Pretends to train; counts the runs it was asked for."""

    def __init__(self, on_batch=lambda number: None):
        self.batches = []
        self._on_batch = on_batch

    def __call__(self, batch, tick):
        self._on_batch(len(self.batches))
        tick()
        self.batches.append(batch)
        return [result(0.1 if run.learning_rate == 0.2 else 0.4) for run in batch]


def run(trainer, path, **options):
    return run_grid(
        PRESET,
        trainer,
        path,
        console=Console(),
        **options,
    )


@pytest.mark.parametrize("workers", [1, 3])
def test_a_grid_tunes_and_reports_every_entry(workers, tmp_path, capsys):
    path, trainer = tmp_path / "runs.jsonl", Trainer()
    assert run(trainer, path, workers=workers) == 0
    records = runs.read(path)
    assert len(records) == NUM_RUNS
    reported = [r for r in records if r["phase"] == "reported"]
    assert len(reported) == 12
    assert {r["learning_rate"] for r in reported} == {0.2}
    assert {"device", "jax", "date"} <= records[0].keys()
    assert len(trainer.batches) == 8
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"{NUM_RUNS} of {NUM_RUNS} runs are in {path}."
    # Again: nothing is computed.
    again = Trainer()
    assert run(again, path) == 0
    assert not again.batches
    assert runs.read(path) == records


def test_stopped_by_ctrl_c_it_says_so_and_goes_on_later(request, tmp_path, capsys):
    def interrupt(number):
        if number == 3:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            time.sleep(0.5)  # for the main thread to notice, as training would

    # A shell without job control starts its background processes with SIGINT ignored.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, handler))
    path, first = tmp_path / "runs.jsonl", Trainer(interrupt)
    assert run(first, path) == 130
    done = len(runs.read(path))
    assert done == 4 + 3 + 4
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"Interrupted: {done} of {NUM_RUNS} runs")
    second = Trainer()
    assert run(second, path) == 0
    assert sum(map(len, first.batches)) + sum(map(len, second.batches)) == NUM_RUNS
    assert len(runs.read(path)) == NUM_RUNS


def test_a_killed_write_costs_the_torn_run_alone(tmp_path):
    path = tmp_path / "runs.jsonl"
    assert run(Trainer(), path) == 0
    text = path.read_bytes()
    path.write_bytes(text[:-9])
    trainer = Trainer()
    assert run(trainer, path) == 0
    ((recomputed,),) = trainer.batches
    assert (recomputed.seed, recomputed.phase) == (12, "reported")
    assert len(runs.read(path)) == NUM_RUNS


def test_a_failing_batch_is_named_and_the_others_go_on(tmp_path, capsys):
    def fail_at_first(number):
        if not failures:
            failures.append(number)
            raise RuntimeError("out of\nmemory")

    path, failures = tmp_path / "runs.jsonl", []
    assert run(Trainer(fail_at_first), path) == 1
    assert "A batch failed: RuntimeError: out of memory" in capsys.readouterr().out
    assert len(runs.read(path)) == NUM_RUNS - 7


def test_time_that_is_up_ends_it_with_what_there_is(tmp_path, capsys):
    path = tmp_path / "runs.jsonl"
    slow = Trainer(lambda number: time.sleep(0.06))
    assert run(slow, path, minutes=0.1 / 60) == 0
    assert 0 < len(runs.read(path)) < NUM_RUNS
    assert "Stopped after 0.00166667 minutes" in capsys.readouterr().out


def test_other_runs_of_the_file_do_not_count():
    settings = {**ENTRIES[0].settings, "learning_rate": 0.1, "phase": "tuning"}
    others = [
        {**settings, "seed": 7},  # not of the protocol
        {**settings, "seed": 0, "learning_rate": 0.3},
        {**settings, "seed": 0, "problem": "other"},
    ]
    assert Ledger(PRESET, others).done() == (0, 0.0)
    ledger = Ledger(PRESET, [*others, {**settings, "seed": 0}])
    assert ledger.done() == (1, 2.0)
    assert len(ledger.missing(ENTRIES[:1])) == 3


def test_one_rate_needs_no_tuning():
    entry = Entry({"optimizer": "A"}, (0.1,))
    missing = Ledger(replace(PRESET, groups=[[entry]])).missing([entry])
    assert missing == [
        Run(entry.settings, 0.1, seed, "reported") for seed in PROTOCOL.reported_seeds
    ]


def test_runs_that_tune_may_be_shorter():
    """They say so, cost less, and choose the rate of the whole ones."""
    settings = {"optimizer": "A", "steps": 100, "tuning_steps": 25}
    entry = Entry(settings, (0.1, 0.2), cost=8.0)
    ledger = Ledger(replace(PRESET, groups=[[entry]]))
    records = []
    for steps, num in ((25, 4), (100, 3)):
        missing = ledger.missing([entry])
        assert [run.settings["steps"] for run in missing] == num * [steps]
        records += [{**run.as_record(), **result(run.learning_rate)} for run in missing]
        ledger.add(records)
        assert ledger.done() == (len(records), 2.0 * 4 + 8.0 * (len(records) - 4))
    assert ledger.cost == ledger.done()[1]
    assert {record["learning_rate"] for record in records[4:]} == {0.1}


def test_without_tuning_every_rate_is_reported():
    """Every rate is run, for curves of the error against the learning rate."""
    protocol = Protocol((), (10, 11, 12), None)
    entry = Entry({"optimizer": "A"}, (0.1, 0.2, 0.3), cost=2.0)
    preset = replace(PRESET, groups=[[entry]], protocol=protocol)
    ledger = Ledger(preset)
    missing = ledger.missing([entry])
    assert [(run.learning_rate, run.seed) for run in missing] == [
        (rate, seed) for rate in (0.1, 0.2, 0.3) for seed in (10, 11, 12)
    ]
    assert {run.phase for run in missing} == {"reported"}
    assert (preset.num_runs, ledger.cost) == (9, 18.0)
    ledger.add(run.as_record() for run in missing)
    assert ledger.done() == (9, 18.0)


def test_ctrl_c_while_modules_are_imported_is_quiet(monkeypatch, capsys):
    def interrupt(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmarks, "import_module", interrupt)
    assert benchmarks.start("benchmarks.demo") == 130
    assert capsys.readouterr() == ("", "")

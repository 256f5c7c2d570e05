"""Files of runs: whole lines, resuming, the choice of a rate; what runs say."""

import math
import multiprocessing
import operator
import resource
import signal
import threading
import time
from dataclasses import replace

import pytest
from rich.console import Console

from benchmarks.lib import runs, start
from benchmarks.lib.grid import Ledger, run_grid
from benchmarks.lib.regret import regret, versus_table
from benchmarks.lib.runs import Run
from benchmarks.lib.suite import (
    Entry,
    Preset,
    Protocol,
    lowest_median,
    lowest_worst,
    lowest_worst_with_margin,
)
from benchmarks.lib.summary import scores

PROTOCOL = Protocol(tuning_seeds=(0, 1), reported_seeds=(10, 11, 12))
ENTRIES = [
    Entry({"preset": "p", "problem": problem, "arm": arm}, (0.1, 0.2), cost=2.0)
    for problem in ("easy", "hard")
    for arm in ("A", "B")
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
    for key, value in (("seed", None), ("error", "low"), ("arm", 3), ("failed", 0)):
        path.unlink()
        runs.append(path, [good, {**good, key: value}])
        with pytest.raises(ValueError, match=f"line 2, is not a run: its {key} is"):
            runs.read(path)
    path.unlink()
    runs.append(path, [{"answer": 42}])
    with pytest.raises(ValueError, match="line 1, is not a run: it has no arm"):
        runs.read(path)


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
    of_entry = {**ENTRIES[0].settings, "learning_rate": 0.1, "phase": "tuning"}
    others = [
        {**of_entry, "seed": 7},  # not of the protocol
        {**of_entry, "seed": 0, "learning_rate": 0.3},
        {**of_entry, "seed": 0, "problem": "other"},
    ]
    assert Ledger(PRESET, others).done() == (0, 0.0)
    ledger = Ledger(PRESET, [*others, {**of_entry, "seed": 0}])
    assert ledger.done() == (1, 2.0)
    assert len(ledger.missing(ENTRIES[:1])) == 3


def test_one_rate_needs_no_tuning():
    entry = Entry({"arm": "A"}, (0.1,))
    missing = Ledger(replace(PRESET, groups=[[entry]])).missing([entry])
    assert missing == [
        Run(entry.settings, 0.1, seed, "reported", detailed=seed == 10)
        for seed in PROTOCOL.reported_seeds
    ]


def test_runs_that_tune_may_be_shorter():
    """They say so, cost less, and choose the rate of the whole ones."""
    settings = {"arm": "A | B", "optimizer": "B", "steps": 100, "tuning_steps": 25}
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
    table = scores(records, ("optimizer", "steps"))
    assert list(table) == [("B", 100)]
    assert table["B", 100]["A"].rates == (0.1, 0.2)
    assert table["B", 100]["A"].learning_rate == 0.1


# The regret table, against numbers worked out by hand


def reported(problem, arm, *errors, rate=0.1):
    settings = {"problem": problem, "arm": arm, "learning_rate": rate}
    return [
        {**settings, "phase": "reported", "seed": seed, **result(error)}
        for seed, error in enumerate(errors)
    ]


TABLE = [
    # A solves cell 1, B misses it once: its median is twice A's.
    *reported("1", "A", 0.10, 0.12, 0.11),
    *reported("1", "B", 0.20, 0.22, math.nan),
    *reported("1", "C", 0.9, 2.0, 3.0),
    # B is the best of cell 2, A next to it, C fails.
    *reported("2", "A", 0.05, 0.04, 0.06),
    *reported("2", "B", 0.04, 0.04, 0.04),
    *reported("2", "C", 0.6, 0.1, 0.1),
    # Nobody solves cell 3 in every run: it says nothing.
    *reported("3", "A", 0.6, 0.6, 0.6),
    *reported("3", "B", 0.1, 0.1, 0.7),
    *reported("3", "C", 0.8, 0.8, 0.8),
    # Cell 4 lacks C, which is compared in the others.
    *reported("4", "A", 0.1, 0.1, 0.1),
    *reported("4", "B", 0.1, 0.1, 0.1),
]


def test_the_regret_table_is_the_one_worked_out_by_hand():
    tuning = {**TABLE[0], "phase": "tuning", "error": 1e-9}
    table = scores([tuning, *TABLE], ("problem",))
    assert list(table) == [("1",), ("2",), ("3",), ("4",)]
    by_arm = {r.arm: r for r in regret(table)}
    assert list(by_arm) == ["A", "B", "C"]
    assert [r.failed for r in by_arm.values()] == [(), (("1",),), (("1",), ("2",))]
    assert [r.num_failed_runs for r in by_arm.values()] == [0, 1, 4]
    assert [r.num_runs for r in by_arm.values()] == [9, 9, 6]
    assert by_arm["A"].costs == pytest.approx({("1",): 1.0, ("2",): 1.25, ("4",): 1.0})
    assert by_arm["B"].costs == pytest.approx({("1",): 2.0, ("2",): 1.0, ("4",): 1.0})
    # Errors above 1 count as 1: 1 / 0.11.
    assert by_arm["C"].worst == pytest.approx(1 / 0.11)
    assert by_arm["A"].median == pytest.approx(1.0)


def test_runs_at_a_rate_that_is_no_longer_chosen_do_not_count():
    old, new = reported("1", "A", 0.5, 0.6), reported("1", "A", 0.1, 0.2, rate=0.3)
    tuning = [{**old[0], "phase": "tuning"}]
    (score,) = scores([*tuning, *old], ("problem",))["1",].values()
    assert score.records == tuple(old)
    tuning.append({**new[0], "phase": "tuning"})
    (score,) = scores([*tuning, *old, *new], ("problem",))["1",].values()
    assert score.records == tuple(new)
    assert scores([*tuning, *old], ("problem",)) == {}


def test_regret_may_be_a_difference_and_cells_may_lack_an_arm():
    table = scores(TABLE, ("problem",))
    by_arm = {r.arm: r for r in regret(table, operator.sub)}
    expected = {("1",): 0.0, ("2",): 0.01, ("4",): 0.0}
    assert by_arm["A"].costs == pytest.approx(expected)
    assert by_arm["C"].costs == pytest.approx({("1",): 0.89, ("2",): 0.06})
    assert [by_arm[arm].num_runs for arm in "ABC"] == [9, 9, 6]


def test_one_arm_against_another_is_the_row_worked_out_by_hand():
    table = versus_table(scores(TABLE, ("problem",)), [("A", "B"), ("C", "A"), "AZ"])
    _, _, *rows = table.splitlines()
    # Cells 1, 2 and 4, with ratios 1/2, 5/4 and 1; one failure in 9 runs of each is as
    # likely with either arm. All 3 of 6 that fail in cell 1 and the one of cell 2 are
    # C's, or A's: 2 of the (6 over 3) 2 ways.
    # However the seeds are drawn, A's and B's middle ratio is that of cell 4. C's and
    # A's reach from 0.9 / 0.12 and 0.1 / 0.06 to 1 / 0.10 and 0.6 / 0.04.
    interval = rows[1].split(" 5.55 ")[1].split(" |")[0]
    low, high = map(float, interval.strip("[]").split(", "))
    assert (0.9 / 0.12 + 0.1 / 0.06) / 2 < low < 5.55 < high <= (10 + 15) / 2
    assert rows == [
        "| A | B | 1 of 3 | 1.00 [1.00, 1.00] | 0 of 9 against 1 of 9 | 1 |",
        f"| C | A | 0 of 2 | 5.55 {interval} | 4 of 6 against 0 of 6 | 0.05 |",
    ]


def test_where_the_optimizer_is_of_the_cell_a_row_is_a_treatment():
    rows = [
        {**row, "optimizer": "AdamW", "arm": f"{row['arm']} | AdamW"}
        for row in reported("1", "clip 1", 0.1)
    ]
    (column,) = scores(rows, ("problem", "optimizer")).values()
    assert list(column) == ["clip 1"]
    (column,) = scores(rows, ("problem",)).values()
    assert list(column) == ["clip 1 | AdamW"]


def test_without_a_solved_cell_there_is_no_regret():
    assert regret(scores(reported("3", "A", 0.6), ("problem",))) == []


def test_ctrl_c_while_modules_are_imported_is_quiet(monkeypatch, capsys):
    def interrupt(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(start, "import_module", interrupt)
    assert start.start("benchmarks.demo") == 130
    assert capsys.readouterr() == ("", "")

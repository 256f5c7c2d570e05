"""A mistake on the command line of a benchmark costs the user one line, not a page."""

import pytest

from benchmarks import __main__ as suites
from benchmarks import demo
from benchmarks.overhead import __main__ as overhead


@pytest.mark.parametrize(
    ("command", "args", "words"),
    [
        (demo, ["--problem", "heat"], "poisson"),
        (demo, ["--depth", "deep"], "whole number"),
        (demo, ["--gain", "big"], "number"),
        (demo, ["--nonsense", "1"], "--nonsense"),
        (demo, ["--depth", "1"], "--depth must be at least 2, got 1"),
        (demo, ["--width", "-3"], "--width must be at least 1, got -3"),
        (demo, ["--steps", "0"], "--steps must be at least 1, got 0"),
        (demo, ["--gain", "nan"], "--gain must be a finite number above 0, got nan"),
        (
            demo,
            ["--learning-rate", "0"],
            "--learning-rate must be a finite number above 0",
        ),
        (demo, ["--seed", "-1"], "--seed must be from 0"),
        (demo, ["--output", "figure.gif"], ".png"),
        (demo, ["--reference", "x.mat"], "--problem burgers"),
        (demo, ["--problem", "burgers", "--reference", "x.mat"], "no file x.mat"),
        (overhead, ["--rounds", "1"], "--rounds must be at least 2, got 1"),
        (overhead, ["--leaves", "0"], "--leaves must be at least 1, got 0"),
        (overhead, ["--trees", "z"], "trees"),
        (overhead, ["--rounds", "many"], "whole number"),
        (suites, [], "run"),
        (suites, ["run"], "run needs a suite of pinn, "),
        (suites, ["run", "chess"], "vision"),
        (suites, ["run", "pinn", "--preset", "huge"], "one of smoke, "),
        (suites, ["run", "pinn", "--minutes", "0"], "--minutes must be above 0, got 0"),
        (suites, ["run", "pinn", "--workers", "0"], "--workers must be at least 1"),
        (suites, ["run", "vision", "--preset", "cifar"], "$STABLEGRAD_DATA must name"),
        (suites, ["run", "pinn", "--results", "setup.cfg/x"], "setup.cfg"),
        (suites, ["report", "pinn", "--results", "none.jsonl"], "none.jsonl holds no"),
    ],
)
def test_a_mistake_is_refused_in_one_line(
    command, args, words, capsys, tmp_path, monkeypatch
):
    monkeypatch.delenv("STABLEGRAD_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "setup.cfg").write_text("")
    with pytest.raises(SystemExit) as stop:
        command.main(args)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


@pytest.mark.parametrize("args", [["report", "pinn"], ["run", "pinn"]])
def test_a_file_that_holds_something_else_costs_one_line(args, capsys, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"answer": 42}\n')
    with pytest.raises(SystemExit):
        suites.main([*args, "--results", str(path)])
    (line,) = capsys.readouterr().err.splitlines()
    assert "x.jsonl, line 1, is not a run: it has no phase" in line

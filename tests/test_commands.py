"""A mistake on the command line of a benchmark costs the user one line, not a page."""

import pytest

from benchmarks import demo, report
from benchmarks.overhead import __main__ as overhead
from benchmarks.pinn import __main__ as pinn
from benchmarks.spikes import __main__ as spikes
from benchmarks.vision import __main__ as vision


@pytest.mark.parametrize(
    ("command", "args", "words"),
    [
        (demo, ["--problem", "heat"], "poisson"),
        (demo, ["--depth", "deep"], "whole number"),
        (demo, ["--gain", "big"], "number"),
        (demo, ["--nonsense", "1"], "--nonsense"),
        (demo, ["--depth", "0"], "--depth must be at least 1, got 0"),
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
        (pinn, ["--preset", "huge"], "smoke"),
        (pinn, ["--minutes", "0"], "--minutes must be above 0, got 0"),
        (pinn, ["--workers", "0"], "--workers must be at least 1, got 0"),
        (spikes, ["--minutes", "0"], "--minutes must be above 0, got 0"),
        (spikes, ["--workers", "0"], "--workers must be at least 1, got 0"),
        (spikes, ["--preset", "huge"], "smoke"),
        (vision, ["--minutes", "0"], "--minutes must be above 0, got 0"),
        (vision, ["--workers", "0"], "--workers must be at least 1, got 0"),
        (vision, ["--preset", "cifar"], "CIFAR-10 (JPEG) needs --data-dir"),
        (report, ["pinn", "--results", "none.jsonl"], "none.jsonl holds no runs"),
    ],
)
def test_a_mistake_is_refused_in_one_line(command, args, words, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(args)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line

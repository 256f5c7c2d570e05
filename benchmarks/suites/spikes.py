"""Spikes, low precision, corrupted inputs and weight decay, with every method."""

import math
import platform
from dataclasses import asdict, dataclass, replace
from typing import Literal

from benchmarks.lib.curves import Curves
from benchmarks.lib.optimizers import chains
from benchmarks.lib.runs import Phase, Record, Run, Settings, finite
from benchmarks.lib.suite import SMOKE, Entry, Preset, Protocol, Suite, curve, entries
from benchmarks.lib.train import Rule, Training, record_steps
from benchmarks.tasks.disturbances import DISTURBANCES
from benchmarks.tasks.images import digits
from benchmarks.tasks.images.models import MODELS
from benchmarks.tasks.sequences import tasks
from benchmarks.tasks.sequences.models import Blocks, Decoder, Forecaster, Numbers
from benchmarks.tasks.supervised import HeldOut, Supervised

AFTER = (1, 2, 5, 10, 20, 50, 100, 200, 500)  # updates from a spike's on: recorded
METHODS = (
    "none",
    "clip values at 0.1",
    "clip",
    "AGC",
    "ZClip",
    "GradientStabilizer",
    "GradientStabilizer (bias_correction=False)",
    "GradientStabilizer (max_norm_ratio=2)",
    "GradientStabilizer (0.7, 0.9)",
    "clip by history",
    "skip spikes",
    "StableGrad",
    "StableGrad (reference: prediction, max_reference_growth=2)",
    "normalize per array",
    "scale by 30",
)
# Those that came after the preset cpu, which is not run again for them.
_LATER = ("GradientStabilizer (0.7, 0.9)", "clip by history", "skip spikes")
Size = Literal["tiny", "cpu", "million"]
# The decoder of size "million" has 1.3 million parameters, that of "cpu" 43 thousand,
# which two busy cores can train some hundreds of times.
LANGUAGE: dict[Size, tuple[int, int, int]] = {  # width, depth, context
    "tiny": (8, 1, 8),
    "cpu": (32, 2, 32),
    "million": (128, 6, 64),
}
FORECAST: dict[Size, tuple[int, int, int, int]] = {  # width, depth, context, horizon
    "tiny": (8, 1, 16, 4),
    "cpu": (16, 2, 32, 8),
}
DIGITS: dict[Size, int] = {"tiny": 2, "cpu": 4}  # width


@dataclass(frozen=True)
class Grid:
    """A problem, and the optimizers that it is run with.

    Attributes:
        task: "lm", "forecast" or "resnet20".
        rates: The learning rates; each optimizer chooses from them where `tuned`, else
            all of them are reported.
        base: A name of `BASES`.
        numbers: What the model computes in.
        disturbance: A name of `DISTURBANCES`.
        spike: Which update is the disturbed one; 0: none.
        weight_decay: Added to the gradient; a number, as it is to be written.
        steps: The number of updates.
        batch: The number of examples in a batch.
        size: Of the model.
        methods: What stands before the base.
    """

    task: str
    rates: tuple[float, ...]
    tuned: bool = False
    base: str = "Adam"
    numbers: Numbers = "float32"
    disturbance: str = "none"
    spike: int = 0
    weight_decay: str = "0"
    steps: int = 400
    batch: int = 8
    size: Size = "cpu"
    methods: tuple[str, ...] = tuple(t for t in METHODS if t not in _LATER)


def _groups(preset: str, grids: tuple[Grid, ...]) -> list[list[Entry]]:
    """Returns the entries, each a group."""
    groups = []
    for grid in grids:
        problem = asdict(grid)
        optimizers = chains(problem.pop("methods"), [problem.pop("base")])
        sets = {f"{rate:g}": (rate,) for rate in problem.pop("rates")}
        if problem.pop("tuned"):
            sets = {"tuned": grid.rates}
        for name, rates in sets.items():
            settings = {**problem, "rate": name}
            groups += entries(preset, [settings], optimizers, lambda _, r=rates: r)
    return groups


SPIKES = ("loss x10", "loss x100", "loss x1e4")
NOISES = ("none", "noise of 1 range", "noise of 2 ranges", "noise of 3 ranges")
DECAYS = ("0", "1e-4", "5e-4")

_FIRST = tuple(name for name in METHODS if name not in _LATER)
_STABILIZERS = tuple(name for name in _FIRST if name.startswith("GradientStabilizer"))
# A constant factor cancels in Adam and Lion, but for eps: it is a control of the decay.
_METHODS = tuple(name for name in _FIRST if name != "scale by 30")
_DECAYED = (
    "none",
    "clip",
    *_STABILIZERS,
    "StableGrad",
    "normalize per array",
    "scale by 30",
)
_FEW = (
    "none",
    "clip",
    "ZClip",
    "GradientStabilizer",
    "GradientStabilizer (max_norm_ratio=2)",
    "StableGrad (reference: prediction, max_reference_growth=2)",
)
_MAIN = ("none", "clip", "GradientStabilizer", "StableGrad")
# In factors of about 3: to choose from; then, for the range in which optimizers do not
# diverge, two decades, and three for the small language model.
_RATES = (1e-3, 3e-3, 1e-2)
_HIGHER = (3e-3, 1e-2, 3e-2)
_LOWER = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
_WIDE = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)

# One of 700 updates, 500 before the last.
_SPIKED = Grid("lm", (3e-3,), spike=200, steps=700, methods=_METHODS)
_TEXT = Grid("lm", _HIGHER, tuned=True, methods=_METHODS)
_SERIES = Grid(
    "forecast",
    (*_RATES, 3e-2, 1e-1),
    tuned=True,
    base="AdamW",
    batch=32,
    methods=_METHODS,
)
_DIGITS = Grid("resnet20", (*_RATES, 3e-2), tuned=True, batch=16, methods=_DECAYED)
_SPIKED_DIGITS = replace(
    _DIGITS, rates=(3e-3,), tuned=False, spike=200, steps=700, methods=_FEW
)
_B2_SPIKED = replace(_SPIKED, base="Adam (b2=0.9)", methods=_MAIN)
_SPIKED_MILLION = replace(
    _SPIKED,
    rates=(1e-3,),
    size="million",
    methods=(*_MAIN, "GradientStabilizer (max_norm_ratio=2)"),
)
_REMEDIES = replace(
    _SPIKED,
    methods=(
        "none",
        "clip",
        "ZClip",
        "GradientStabilizer",
        "GradientStabilizer (max_norm_ratio=2)",
        *_LATER,
    ),
)
_REMEDIES_FEW = replace(
    _REMEDIES, base="Adam (b2=0.9)", methods=("none", "clip", "ZClip", *_LATER)
)
_REMEDIES_MUON = replace(_REMEDIES_FEW, base="Muon")
_REMEDIES_MILLION = replace(
    _REMEDIES,
    rates=(1e-3,),
    steps=400,
    size="million",
    methods=("none", "clip", *_LATER),
)
_SPIKES_OF_REMEDIES = ("none", "wrong labels", "loss x1e4", "loss x1e4, 10 updates")
_LION = replace(_TEXT, base="Lion", rates=_LOWER, tuned=False, methods=_FEW)
_B2_TEXT = replace(_TEXT, base="Adam (b2=0.9)", methods=_MAIN)
_B2_SERIES = replace(_SERIES, base="AdamW (b2=0.9)", methods=_MAIN)


def _with(grid: Grid, name: str, values: tuple[str, ...]) -> tuple[Grid, ...]:
    """Returns a grid for each value of one of its attributes."""
    return tuple(replace(grid, **{name: value}) for value in values)


PRESETS = {
    "smoke": Preset(
        _groups(
            "smoke",
            _with(
                Grid(
                    "forecast",
                    (1e-3,),
                    spike=2,
                    steps=4,
                    batch=4,
                    size="tiny",
                    methods=("none", "GradientStabilizer"),
                ),
                "disturbance",
                ("none", "inputs x100"),
            ),
        ),
        SMOKE,
        "seconds",
        "every part of the machinery; its errors mean nothing",
    ),
    # In the order of what tells most: one case of each question, then the others.
    # Around a spike all have one rate: a run is compared with itself without the spike.
    "cpu": Preset(
        _groups(
            "cpu",
            (
                *_with(_SPIKED, "disturbance", ("none", "loss x1e4")),
                *_with(_TEXT, "numbers", ("float32", "fp4")),
                *_with(_DIGITS, "weight_decay", ("5e-4", "0")),
                *_with(_SERIES, "disturbance", (NOISES[3], NOISES[0])),
                replace(_TEXT, rates=_WIDE, tuned=False),
                replace(_TEXT, numbers="float16"),
                *_with(_SPIKED_DIGITS, "disturbance", ("none", "inputs x100")),
                replace(_SPIKED, disturbance="loss x100"),
                replace(_DIGITS, weight_decay="1e-4"),
                *_with(_SERIES, "disturbance", NOISES[1:3]),
                replace(_SPIKED, disturbance="loss x10"),
                *_with(_SPIKED_DIGITS, "disturbance", SPIKES),
                _LION,
                *_with(_B2_SPIKED, "disturbance", ("none", "loss x1e4")),
                *_with(_B2_TEXT, "numbers", ("float32", "float16", "fp4")),
                *_with(_B2_SERIES, "disturbance", (NOISES[0], NOISES[3])),
            ),
        ),
        Protocol(tuning_seeds=(0, 1), reported_seeds=(100, 101, 102)),
        "3 hours on 2 idle cores",
        "models of 8 to 43 thousand parameters",
    ),
    # Whether a spike does to a larger decoder what it does to that of cpu.
    "million": Preset(
        _groups(
            "million", _with(_SPIKED_MILLION, "disturbance", ("none", "loss x1e4"))
        ),
        Protocol((), (100, 101, 102)),
        "half an hour on 2 idle cores",
        "one spike in the training of a decoder of 1.3 million parameters",
    ),
    # What remembers, against spikes that last or point the wrong way.
    "remedies": Preset(
        _groups(
            "remedies",
            tuple(
                grid
                for disturbances in (
                    _SPIKES_OF_REMEDIES,
                    ("wrong labels, 10 updates",),
                )
                for one in (_REMEDIES, _REMEDIES_FEW, _REMEDIES_MUON)
                for grid in _with(one, "disturbance", disturbances)
            ),
        ),
        Protocol((), tuple(range(100, 105))),
        "half an hour on 2 idle cores",
        "spikes that last, or of wrong labels, under what remembers",
    ),
    "remedies-million": Preset(
        _groups(
            "remedies-million",
            _with(
                _REMEDIES_MILLION,
                "disturbance",
                ("none", "wrong labels, 10 updates"),
            ),
        ),
        Protocol((), tuple(range(100, 105))),
        "40 minutes on 2 idle cores",
        "wrong labels in the training of a decoder of 1.3 million parameters",
    ),
}


def training(settings: Settings, phase: Phase) -> Training:
    """Tuning runs are scored on validation examples, reported ones on test examples."""
    steps, spike, numbers = settings["steps"], settings["spike"], settings["numbers"]
    is_float16 = numbers == "float16"
    kind, held_out, pieces = _task(
        settings["task"],
        settings["size"],
        numbers,
        "validation" if phase == "tuning" else "test",
    )
    return Training(
        kind(
            disturbance=DISTURBANCES[settings["disturbance"]],
            spike=spike,
            batch=settings["batch"],
            loss_scaling=is_float16,
            **pieces,
        ),
        Rule.from_settings(
            settings,
            warm_up=True,
            weight_decay=float(settings["weight_decay"]),
            skip_nonfinite=is_float16,
        ),
        recorded_steps(steps, spike),
        held_out,
        side_by_side=1,  # on a CPU it takes as long
    )


def _task(
    task: str, size: Size, numbers: Numbers, split: Literal["validation", "test"]
) -> tuple[type[Supervised], HeldOut, dict]:
    """The kind of task, what scores it, its model and what it is trained on."""
    if task == "lm":
        width, depth, context = LANGUAGE[size]
        blocks = Blocks(width, depth, heads=4, numbers=numbers)
        return (
            tasks.Language,
            tasks.language_held_out(split, context),
            {"model": Decoder(blocks, context), "train": tasks.language_train()},
        )
    if task == "forecast":
        width, depth, *shape = FORECAST[size]
        blocks = Blocks(width, depth, heads=4, numbers=numbers)
        return (
            tasks.Forecast,
            tasks.forecast_held_out(split, *shape),
            {
                "model": Forecaster(blocks, patch=4, horizon=shape[1]),
                "train": tasks.forecast_train(*shape),
            },
        )
    if numbers != "float32":
        raise ValueError(f"resnet20 is in float32 alone; got {numbers}")
    model = MODELS["ResNet-20"](width=DIGITS[size], norm="none", num_classes=10)
    return digits.Digits, digits.held_out(split), {"model": model, **digits.pieces()}


def recorded_steps(steps: int, spike: int) -> list[int]:
    """Updates done: evenly spaced ones, and those just before and after a spike."""
    chosen = set(record_steps(steps, early=3, even=12 if spike else 6))
    if spike:
        around = {spike - 1, *(spike - 1 + after for after in AFTER)}
        chosen |= {step for step in around if 0 < step <= steps}
    return sorted(chosen)


FAILURES = {"resnet20": digits.Digits.failure_error}


def keep(run: Run, curves: Curves) -> Record:
    """A run has failed if it diverged, or learned nothing: see `failure_error`."""
    last = {name: float(values[-1]) for name, values in curves.scores.items()}
    error, failure = last["error"], FAILURES.get(run.settings["task"], 1.0)
    is_lost = not (math.isfinite(last["loss"]) and math.isfinite(error))
    record: Record = {
        "score": finite(last["score"], digits=6),
        "error": finite(error, digits=6),
        "failed": bool(is_lost or round(error, 6) >= failure),
        "ms_per_step": finite(curves.ms_per_step, digits=4),
        "num_params": curves.num_params,
        "num_skipped": curves.num_skipped,
        "python": platform.python_version(),  # whose library is the text
    }
    if run.phase == "reported":
        record["curve"] = curve(curves, 5, loss=curves.scores["loss"])
    return record


SUITE = Suite(
    "spikes",
    "spikes, few bits, noise and decay, in text, series and images",
    PRESETS,
    training,
    keep,
)

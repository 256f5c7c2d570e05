"""Spikes, low precision, corrupted inputs and decay, under every treatment."""

import math
import platform
from dataclasses import asdict, dataclass, replace
from typing import Literal

from benchmarks.lib.arms import pairs
from benchmarks.lib.runs import Phase, Record, Run, Settings, finite
from benchmarks.lib.suite import SMOKE, Entry, Preset, Protocol, Suite, curve, entries
from benchmarks.lib.train import Curves, Rule, Training, record_steps
from benchmarks.tasks.disturbances import DISTURBANCES
from benchmarks.tasks.images import digits
from benchmarks.tasks.images.models import MODELS
from benchmarks.tasks.sequences import tasks
from benchmarks.tasks.sequences.models import Blocks, Decoder, Forecaster, Numbers
from benchmarks.tasks.supervised import HeldOut, Supervised

AFTER = (1, 2, 5, 10, 20, 50, 100, 200, 500)  # updates from a spike's on: recorded
TREATMENTS = (
    "none",
    "value clip 0.1",
    "clip 1",
    "AGC 0.01",
    "ZClip",
    "GradientStabilizer",
    "GradientStabilizer, Algorithm 1",
    "GradientStabilizer, max_norm_ratio 2",
    "GradientStabilizer .7 .9",
    "clip by history",
    "skip spikes",
    "StableGrad",
    "StableGrad prediction, limit 2",
    "unit norm by leaf",
    "constant factor 30",
)
# Those that came after the preset cpu, which is not run again for them.
_LATER = ("GradientStabilizer .7 .9", "clip by history", "skip spikes")
Size = Literal["tiny", "cpu", "million", "gpu"]
# The decoder of size "gpu" has 4.9 million parameters, "million" 1.3 million, "cpu" 43
# thousand: what two busy cores can train some hundreds of times.
LANGUAGE: dict[Size, tuple[int, int, int]] = {  # width, depth, context
    "tiny": (8, 1, 8),
    "cpu": (32, 2, 32),
    "million": (128, 6, 64),
    "gpu": (256, 6, 256),
}
FORECAST: dict[Size, tuple[int, int, int, int]] = {  # width, depth, context, horizon
    "tiny": (8, 1, 16, 4),
    "cpu": (16, 2, 32, 8),
    "gpu": (128, 3, 64, 16),
}
DIGITS: dict[Size, int] = {"tiny": 2, "cpu": 4, "gpu": 16}  # width


@dataclass(frozen=True)
class Cell:
    """What is trained, and with which arms.

    Attributes:
        task: "lm", "forecast" or "resnet20".
        rates: of learning: to choose from for each arm where `tuned`, else all of them
            are reported.
        optimizer: a name of `OPTIMIZERS`.
        numbers: what the model computes in.
        disturbance: a name of `DISTURBANCES`.
        spike: which update is the disturbed one; 0: none.
        weight_decay: added to the gradient; a number, as it is to be written.
        steps: number of updates.
        batch: examples in each.
        size: of the model.
        treatments: of the arms.
    """

    task: str
    rates: tuple[float, ...]
    tuned: bool = False
    optimizer: str = "Adam"
    numbers: Numbers = "float32"
    disturbance: str = "none"
    spike: int = 0
    weight_decay: str = "0"
    steps: int = 400
    batch: int = 8
    size: Size = "cpu"
    treatments: tuple[str, ...] = tuple(t for t in TREATMENTS if t not in _LATER)


def _groups(preset: str, cells: tuple[Cell, ...]) -> list[list[Entry]]:
    """The entries, each a group."""
    groups = []
    for cell in cells:
        of_cell = asdict(cell)
        arms = pairs(of_cell.pop("treatments"), [cell.optimizer])
        sets = {f"{rate:g}": (rate,) for rate in of_cell.pop("rates")}
        if of_cell.pop("tuned"):
            sets = {"tuned": cell.rates}
        for name, rates in sets.items():
            settings = {**of_cell, "rate": name}
            groups += entries(preset, [settings], arms, lambda arm, rates=rates: rates)
    return groups


SPIKES = ("loss x10", "loss x100", "loss x1e4")
NOISES = ("none", "noise of 1 range", "noise of 2 ranges", "noise of 3 ranges")
DECAYS = ("0", "1e-4", "5e-4")

_FIRST = tuple(arm for arm in TREATMENTS if arm not in _LATER)
_STABILIZERS = tuple(arm for arm in _FIRST if arm.startswith("GradientStabilizer"))
# A constant factor cancels in Adam and Lion, but for eps: it is a control of the decay.
_ARMS = tuple(arm for arm in _FIRST if arm != "constant factor 30")
_DECAYED = (
    "none",
    "clip 1",
    *_STABILIZERS,
    "StableGrad",
    "unit norm by leaf",
    "constant factor 30",
)
_FEW = (
    "none",
    "clip 1",
    "ZClip",
    "GradientStabilizer",
    "GradientStabilizer, max_norm_ratio 2",
    "StableGrad prediction, limit 2",
)
_MAIN = ("none", "clip 1", "GradientStabilizer", "StableGrad")
# Half decades. To choose from; then, for the range in which arms do not diverge, two
# decades, and three for the small language model, which no rate to 0.1 lets diverge.
_RATES = (1e-3, 3e-3, 1e-2)
_HIGHER = (3e-3, 1e-2, 3e-2)
_LOWER = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
_WIDE = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)

# One of 700 updates, 500 before the last.
_SPIKED = Cell("lm", (3e-3,), spike=200, steps=700, treatments=_ARMS)
_TEXT = Cell("lm", _HIGHER, tuned=True, treatments=_ARMS)
_SERIES = Cell(
    "forecast",
    (*_RATES, 3e-2, 1e-1),
    tuned=True,
    optimizer="AdamW",
    batch=32,
    treatments=_ARMS,
)
_DIGITS = Cell("resnet20", (*_RATES, 3e-2), tuned=True, batch=16, treatments=_DECAYED)
_SPIKED_DIGITS = replace(
    _DIGITS, rates=(3e-3,), tuned=False, spike=200, steps=700, treatments=_FEW
)
_SHORT_SPIKED = replace(_SPIKED, optimizer="Adam b2=0.9", treatments=_MAIN)
_SPIKED_MILLION = replace(
    _SPIKED,
    rates=(1e-3,),
    size="million",
    treatments=(*_MAIN, "GradientStabilizer, max_norm_ratio 2"),
)
_REMEDIES = replace(
    _SPIKED,
    treatments=(
        "none",
        "clip 1",
        "ZClip",
        "GradientStabilizer",
        "GradientStabilizer, max_norm_ratio 2",
        *_LATER,
    ),
)
_REMEDIES_FEW = replace(
    _REMEDIES, optimizer="Adam b2=0.9", treatments=("none", "clip 1", "ZClip", *_LATER)
)
_REMEDIES_MUON = replace(_REMEDIES_FEW, optimizer="Muon")
_REMEDIES_MILLION = replace(
    _REMEDIES,
    rates=(1e-3,),
    steps=400,
    size="million",
    treatments=("none", "clip 1", *_LATER),
)
_SPIKES_OF_REMEDIES = ("none", "wrong labels", "loss x1e4", "loss x1e4, 10 updates")
_LION = replace(_TEXT, optimizer="Lion", rates=_LOWER, tuned=False, treatments=_FEW)
_SHORT_TEXT = replace(_TEXT, optimizer="Adam b2=0.9", treatments=_MAIN)
_SHORT_SERIES = replace(_SERIES, optimizer="AdamW b2=0.9", treatments=_MAIN)


def _with(cell: Cell, name: str, values: tuple[str, ...]) -> tuple[Cell, ...]:
    """A cell for each value of one of its attributes."""
    return tuple(replace(cell, **{name: value}) for value in values)


# Estimated, in ms a step on an H100: text 10, series 5, digits 8.
_LARGE_TEXT = Cell(
    "lm", _RATES, tuned=True, steps=600, batch=32, size="gpu", treatments=_MAIN
)
_LARGE_SPIKED = replace(_LARGE_TEXT, rates=(1e-3,), tuned=False, spike=500, steps=1000)
_LARGE_SERIES = replace(_LARGE_TEXT, task="forecast", steps=1000, batch=128)
_LARGE_DIGITS = replace(_LARGE_TEXT, task="resnet20", steps=800, batch=128)
# preset -> its cells, and what it is for
_ON_GPU = {
    "gpu-spike": (
        _with(_LARGE_SPIKED, "disturbance", ("none", "loss x1e4")),
        "one spike, a decoder of 4.9 million parameters",
    ),
    "gpu-numbers": (
        _with(_LARGE_TEXT, "numbers", ("float32", "fp4")),
        "few bits, a decoder of 4.9 million parameters",
    ),
    "gpu-noise": (
        _with(_LARGE_SERIES, "disturbance", (NOISES[0], NOISES[3])),
        "noisy inputs, a forecaster of width 128",
    ),
    "gpu-decay": (
        _with(_LARGE_DIGITS, "weight_decay", ("0", "5e-4")),
        "decay, ResNet-20 at its real width on digits",
    ),
}

PRESETS = {
    "smoke": Preset(
        _groups(
            "smoke",
            _with(
                Cell(
                    "forecast",
                    (1e-3,),
                    spike=2,
                    steps=4,
                    batch=4,
                    size="tiny",
                    treatments=("none", "GradientStabilizer"),
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
    # Around a spike all arms have one rate: a run is compared with itself without it.
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
                *_with(_SHORT_SPIKED, "disturbance", ("none", "loss x1e4")),
                *_with(_SHORT_TEXT, "numbers", ("float32", "float16", "fp4")),
                *_with(_SHORT_SERIES, "disturbance", (NOISES[0], NOISES[3])),
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
                cell
                for disturbances in (
                    _SPIKES_OF_REMEDIES,
                    ("wrong labels, 10 updates",),
                )
                for one in (_REMEDIES, _REMEDIES_FEW, _REMEDIES_MUON)
                for cell in _with(one, "disturbance", disturbances)
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
    **{
        name: Preset(
            _groups(name, of_preset),
            Protocol((0,), (100, 101, 102)),
            "7 minutes on an H100: estimated, never run",
            about,
        )
        for name, (of_preset, about) in _ON_GPU.items()
    },
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
        Rule.of(
            settings,
            warm_up=True,
            weight_decay=float(settings["weight_decay"]),
            skip_nonfinite=is_float16,
        ),
        recorded_steps(steps, spike),
        held_out,
        side_by_side=False,  # on a CPU it takes as long
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

"""Image classifiers with BatchNorm and without, with every treatment."""

from functools import partial
from itertools import chain

import numpy as np

from benchmarks.lib.arms import OPTIMIZERS, Arm, pairs
from benchmarks.lib.runs import Phase, Record, Run, Settings, finite
from benchmarks.lib.suite import (
    SMOKE,
    Entry,
    Preset,
    Protocol,
    Suite,
    curve,
    entries,
    lowest_worst_with_margin,
    rounded,
)
from benchmarks.lib.train import Curves, Rule, Training, record_steps
from benchmarks.tasks.images.data import load
from benchmarks.tasks.images.models import MODELS, Norm
from benchmarks.tasks.images.task import Classifier, Recipe, in_parts, on_device

CONSTANT = "StableGrad 0.01"
PREDICTION = "StableGrad prediction"
BIASES_UNTOUCHED = "StableGrad 0.01, biases untouched"
TREATMENTS = (
    "none",
    CONSTANT,
    PREDICTION,
    "StableGrad prediction, limit 2",
    BIASES_UNTOUCHED,
    "clip 1",
    "AGC 0.01",
    "GradientStabilizer",
    "GradientAutoscaled",
    "mean removal",
    "z-score",
)
RATES = {
    "momentum": (1e-3, 1e-2, 1e-1),
    "AdamW": (3e-4, 1e-3, 3e-3),
    "AdamW b2=0.9": (3e-4, 1e-3, 3e-3),
    "Muon": OPTIMIZERS["Muon"].rates,
}
# What learning rates are multiplied by behind momentum, where the scale of the gradient
# matters: its inverse, when it is far from that of the other treatments. The
# prediction's gradient per example starts near 0.3 for ten classes: 30 times the
# constant reference, which is what the literal one is at batch 32.
RATE_SCALES = {
    PREDICTION: 0.03,
    "StableGrad prediction, limit 2": 0.03,
    "z-score": 0.01,
}


def _groups(
    preset: str,
    model: str,
    width: int,
    norm: Norm = "none",
    *,
    optimizer: str = "momentum",
    treatments: tuple[str, ...] = TREATMENTS,
    rates: tuple[float, ...] | None = None,
    data: str = "digits",
    steps: int = 200,
    tuning_steps: int | None = None,
    batch: int = 32,
    scored: int = 10_000,
) -> list[list[Entry]]:
    """The entries of a cell, each a group.

    Args:
        preset: its name.
        model: a name of `MODELS`.
        width: of the model.
        norm: of the model.
        optimizer: a name of `RATES`.
        treatments: of the arms.
        rates: of learning, to choose from for each arm, in the scale of "none"; by
            default the optimizer's. A single one is used as it is.
        data: a name of `DATASETS`.
        steps: number of updates.
        tuning_steps: in the runs that tune, where they are shorter.
        batch: images in each.
        scored: images that the accuracy is of, at most.
    """
    rates = rates or RATES[optimizer]
    shorter = {} if tuning_steps is None else {"tuning_steps": tuning_steps}
    tuned = f"tuned on {tuning_steps} steps" if shorter else "tuned"
    cell = {
        "model": model,
        "width": width,
        "norm": norm,
        "data": data,
        "rate": tuned if len(rates) > 1 else f"{rates[0]:g}",
        "batch": batch,
        "steps": steps,
        "scored": scored,
        **shorter,
    }
    arms = pairs(treatments, [optimizer])
    return entries(preset, [cell], arms, partial(_in_scale, rates))


def _in_scale(rates: tuple[float, ...], arm: Arm) -> tuple[float, ...]:
    scale = 1.0
    if not OPTIMIZERS[arm.optimizer].scale_free:
        scale = RATE_SCALES.get(arm.treatment, 1.0)
    return tuple(float(f"{rate * scale:.3g}") for rate in rates)


# Half decades: at 0.001 and 0.01 the plain net still stands or already overshoots.
_FINE = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
_WITH_BATCHNORM = ("none", CONSTANT, "GradientAutoscaled", "mean removal")
_TUNED = ("none", CONSTANT, "clip 1")
_PLAIN = "plain-24, gain 0.75"
# Before Muon, and before AdamW b2=0.9 beside it. The constant of StableGrad is that of
# the other presets: any would do, for both forget the scale of their gradient.
_BEFORE_MUON = ("none", "clip 1", CONSTANT, "unit norm by leaf", "GradientStabilizer")
_AUTOSCALED = ("none", "GradientAutoscaled", "mean removal")
_RATES_OF_MUON = (3e-3, 1e-2, 3e-2)
_RATES_WITH_BATCHNORM = (3e-2, 1e-1, 3e-1)


_on_cpu = partial(_groups, "cpu")
_CPU = (
    _on_cpu("ResNet-56", 8, rates=(0.01,)),
    _on_cpu(
        _PLAIN,
        8,
        rates=_FINE,
        treatments=("none", BIASES_UNTOUCHED, CONSTANT, PREDICTION, "clip 1"),
    ),
    *(
        _on_cpu(model, 8, "batch", treatments=_WITH_BATCHNORM)
        for model in ("ResNet-56", "ResNet-20", "VGG-16")
    ),
    _on_cpu(
        f"{_PLAIN}, no conv biases",
        8,
        rates=_FINE,
        treatments=(BIASES_UNTOUCHED, CONSTANT),
    ),
    *(
        _on_cpu("ResNet-56", 8, optimizer=optimizer, treatments=_TUNED)
        for optimizer in ("momentum", "AdamW", "AdamW b2=0.9")
    ),
)
_behind = partial(_groups, "muon")
_MUON = (
    *(
        _behind(model, 8, optimizer="Muon", treatments=_BEFORE_MUON)
        for model in (_PLAIN, "ResNet-56")
    ),
    *(
        _behind(
            model,
            8,
            optimizer="AdamW b2=0.9",
            treatments=_TUNED,
            rates=OPTIMIZERS["AdamW b2=0.9"].rates,
        )
        for model in (_PLAIN, "ResNet-56")
    ),
)
_on_batchnorm = partial(
    _groups, model="ResNet-20", width=8, norm="batch", treatments=_AUTOSCALED
)
_on_cifar = partial(_groups, "cifar", data="cifar10-jpeg", rates=(0.01,), scored=1000)
_CIFAR = (
    _on_cifar(
        "ResNet-20", 8, steps=150, treatments=("none", CONSTANT, PREDICTION, "clip 1")
    ),
    *(
        _on_cifar(model, width, steps=60, treatments=("none", CONSTANT))
        for model, width in (
            ("ResNet-56", 8),
            ("ResNet-50", 8),
            ("EfficientNetV2-S", 6),
        )
    ),
)
# At its real width. In the order of what a grid that is not finished should answer; the
# net with BatchNorm, the target, has the rate of He et al.
_on_resnet20 = partial(
    _groups,
    "cifar-resnet20",
    "ResNet-20",
    16,
    data="cifar10-jpeg",
    batch=64,
    steps=1500,
    tuning_steps=300,
    scored=2000,
)
_CIFAR_RESNET20 = (
    _on_resnet20("batch", treatments=("none",), rates=(0.1,)),
    *(
        _on_resnet20(optimizer=optimizer, treatments=(*_TUNED, "AGC 0.01"), rates=rates)
        for optimizer, rates in (
            ("Muon", _RATES_OF_MUON),
            # Alone it is still at chance after 300 steps of 0.001.
            ("momentum", (1e-4, 3e-4, *_FINE)),
            ("AdamW b2=0.9", RATES["AdamW b2=0.9"]),
        )
    ),
)
# Estimated, in ms a step of 128 images on an H100: ResNet-56 10, VGG-16 6.
_on_gpu = partial(_groups, data="cifar10-jpeg", batch=128, tuning_steps=400)
_on_resnet56 = partial(_on_gpu, "gpu-resnet56", "ResNet-56", 16, steps=2000)
_GPU_RESNET56 = (
    _on_resnet56(optimizer="Muon", treatments=_TUNED, rates=_RATES_OF_MUON),
    _on_resnet56("batch", treatments=("none",), rates=(0.1,)),
)
_GPU_AUTOSCALED = (
    _on_gpu(
        "gpu-autoscaled",
        model,
        width,
        "batch",
        treatments=_AUTOSCALED,
        rates=_RATES_WITH_BATCHNORM,
        steps=1000,
    )
    for model, width in (("ResNet-56", 16), ("VGG-16", 64))
)

PRESETS = {
    "smoke": Preset(
        _groups(
            "smoke",
            "ResNet-20",
            2,
            "batch",
            steps=3,
            scored=20,
            treatments=("none", PREDICTION, "GradientAutoscaled"),
        ),
        SMOKE,
        "a minute",
        "every part of the machinery; its accuracies mean nothing",
    ),
    "cpu": Preset(
        list(chain(*_CPU)),
        Protocol(tuning_seeds=(0,), reported_seeds=(100, 101, 102)),
        "1 hour on 2 idle cores",
        "the digits of scikit-learn",
    ),
    "cifar": Preset(
        list(chain(*_CIFAR)),
        Protocol((), (100, 101, 102)),
        "1 hour on 2 idle cores",
        "few steps on CIFAR-10 (JPEG), of the folder $STABLEGRAD_DATA",
    ),
    "muon": Preset(
        list(chain(*_MUON)),
        Protocol((0, 1, 2), tuple(range(200, 210)), lowest_worst_with_margin),
        "40 minutes on 1 idle core",
        "Muon behind each scale control, without BatchNorm, on digits",
        workers=2,
    ),
    "autoscaled": Preset(
        _on_batchnorm("autoscaled", rates=(1e-2, *_RATES_WITH_BATCHNORM, 1.0)),
        Protocol((0, 1, 2), tuple(range(200, 205))),
        "3 minutes on 2 idle cores",
        "Gradient Autoscaled Normalization with BatchNorm, on digits",
        workers=2,
    ),
    "cifar-autoscaled": Preset(
        _on_batchnorm(
            "cifar-autoscaled",
            rates=(1e-2, *_RATES_WITH_BATCHNORM),
            data="cifar10-jpeg",
            scored=2000,
        ),
        Protocol((0, 1, 2), tuple(range(200, 205))),
        "25 minutes on 1 idle core",
        "the same on CIFAR-10 (JPEG)",
        workers=2,
    ),
    "cifar-resnet20": Preset(
        list(chain(*_CIFAR_RESNET20)),
        Protocol((0,), (100, 101, 102)),
        "3 hours on 2 idle cores",
        "ResNet-20 at its real width on CIFAR-10 (JPEG), rates chosen on 300 steps",
        workers=2,
    ),
    "gpu-resnet56": Preset(
        list(chain(*_GPU_RESNET56)),
        Protocol((0,), (100, 101, 102)),
        "7 minutes on an H100: estimated, never run",
        "ResNet-56 at its real width on CIFAR-10 (JPEG), with Muon",
    ),
    "gpu-autoscaled": Preset(
        list(chain(*_GPU_AUTOSCALED)),
        Protocol((0,), tuple(range(100, 105))),
        "7 minutes on an H100: estimated, never run",
        "Gradient Autoscaled Normalization on ResNet-56 and VGG-16, CIFAR-10 (JPEG)",
    ),
}


def training(settings: Settings, phase: Phase) -> Training:
    """Tuning runs are scored on validation images, reported ones on test images."""
    data, steps = load(settings["data"]), settings["steps"]
    model = MODELS[settings["model"]](
        width=settings["width"], norm=settings["norm"], num_classes=data.num_classes
    )
    split = "validation" if phase == "tuning" else "test"
    return Training(
        Classifier(on_device(data), model, Recipe.of(data), settings["batch"], steps),
        Rule.of(settings, warm_up=True),
        record_steps(steps, early=3, even=6),
        in_parts(data, split, settings["scored"]),
        side_by_side=False,
    )


def keep(run: Run, curves: Curves) -> Record:
    """`error` is the share of wrong images, which the shared code ranks arms by."""
    accuracies = curves.scores["accuracy"].astype(float).round(6)
    accuracy, is_lost = accuracies[-1], not np.isfinite(curves.loss[-1])
    failure = load(run.settings["data"]).failure_accuracy
    record: Record = {
        "accuracy": finite(accuracy, digits=6),
        "error": finite(1 - accuracy, digits=6),
        "failed": bool(is_lost or accuracy <= failure),
        "ms_per_step": finite(curves.ms_per_step, digits=4),
    }
    if run.phase == "tuning":
        return record
    record["curve"] = curve(curves, 4, accuracy=accuracies, loss=curves.loss)
    # log10 of the std of the kernels' gradients: least, quartiles, largest.
    with np.errstate(invalid="ignore"):
        quartiles = np.quantile(curves.exponents, (0, 0.25, 0.5, 0.75, 1), axis=1).T
    record["quartiles"] = rounded(quartiles)
    if run.detailed:
        record["layers"] = rounded(curves.exponents)
    return record


SUITE = Suite(
    "vision",
    "image classifiers without BatchNorm and with it; errors are shares of images",
    PRESETS,
    training,
    keep,
    timed=tuple(
        tuple(
            entry.settings
            for (entry,) in _groups("timing", "ResNet-56", 8, optimizer=optimizer)
        )
        for optimizer in ("momentum", "AdamW")
    ),
)

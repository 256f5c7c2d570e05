"""Image classifiers with BatchNorm and without it, with every method."""

from functools import partial
from itertools import chain

import numpy as np

from benchmarks.lib.curves import Curves
from benchmarks.lib.optimizers import BASES, Optimizer, chains
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
)
from benchmarks.lib.train import Rule, Training, record_steps
from benchmarks.tasks.images.data import load
from benchmarks.tasks.images.models import MODELS, Norm
from benchmarks.tasks.images.task import Classifier, Recipe, in_parts, on_device

CONSTANT = "StableGrad (reference_std=0.01)"
PREDICTION = "StableGrad (reference: prediction)"
LIMITED = "StableGrad (reference: prediction, max_reference_growth=2)"
WEIGHTS_ALONE = "StableGrad (reference_std=0.01, scale_biases=False)"
METHODS = (
    "none",
    CONSTANT,
    PREDICTION,
    LIMITED,
    WEIGHTS_ALONE,
    "clip",
    "AGC",
    "GradientStabilizer",
    "autoscaled normalization",
    "mean removal",
    "ZNorm",
)
RATES = {
    "momentum": (1e-3, 1e-2, 1e-1),
    "AdamW": (3e-4, 1e-3, 3e-3),
    "AdamW (b2=0.9)": (3e-4, 1e-3, 3e-3),
    "Muon": BASES["Muon"].rates,
}
# What learning rates are multiplied by behind momentum, where the scale of the gradient
# matters: its inverse, when it is far from that of the other methods. The
# prediction's gradient per example starts near 0.3 for ten classes: 30 times the
# constant reference, which is what the literal one is at batch 32.
RATE_SCALES = {PREDICTION: 0.03, LIMITED: 0.03, "ZNorm": 0.01}


def _groups(
    preset: str,
    model: str,
    width: int,
    norm: Norm = "none",
    *,
    base: str = "momentum",
    methods: tuple[str, ...] = METHODS,
    rates: tuple[float, ...] | None = None,
    data: str = "digits",
    steps: int = 200,
    tuning_steps: int | None = None,
    batch: int = 32,
    scored: int = 10_000,
) -> list[list[Entry]]:
    """Returns the entries of a problem, each a group.

    Args:
        preset: Its name.
        model: A name of `MODELS`.
        width: Of the model.
        norm: Of the model.
        base: A name of `RATES`.
        methods: What stands before the base.
        rates: The learning rates to choose from, in the scale of the base alone; by
            default those of the base. A single one is used as it is.
        data: A name of `DATASETS`.
        steps: The number of updates.
        tuning_steps: In the runs that tune, where they are shorter.
        batch: The number of images in a batch.
        scored: The largest number of images that the accuracy is measured on.
    """
    rates = rates or RATES[base]
    shorter = {} if tuning_steps is None else {"tuning_steps": tuning_steps}
    tuned = f"tuned on {tuning_steps} steps" if shorter else "tuned"
    problem = {
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
    optimizers = chains(methods, [base])
    return entries(preset, [problem], optimizers, partial(_in_scale, rates))


def _in_scale(rates: tuple[float, ...], optimizer: Optimizer) -> tuple[float, ...]:
    scale = 1.0
    if not BASES[optimizer.base].scale_free:
        scale = RATE_SCALES.get(optimizer.method, 1.0)
    return tuple(float(f"{rate * scale:.3g}") for rate in rates)


# In factors of about 3: at 0.001 the plain net hardly moves, at 0.01 it overshoots.
_FINE = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
_WITH_BATCHNORM = ("none", CONSTANT, "autoscaled normalization", "mean removal")
_TUNED = ("none", CONSTANT, "clip")
_PLAIN = "plain-24, gain 0.75"
# For Muon and for AdamW (b2=0.9). The constant of StableGrad is that of the other
# presets: any would do, for both forget the scale of their gradient.
_BEFORE_MUON = ("none", "clip", CONSTANT, "normalize per array", "GradientStabilizer")
_AUTOSCALED = ("none", "autoscaled normalization", "mean removal")
_RATES_OF_MUON = (3e-3, 1e-2, 3e-2)
_RATES_WITH_BATCHNORM = (3e-2, 1e-1, 3e-1)


_on_cpu = partial(_groups, "cpu")
_CPU = (
    _on_cpu("ResNet-56", 8, rates=(0.01,)),
    _on_cpu(
        _PLAIN,
        8,
        rates=_FINE,
        methods=("none", WEIGHTS_ALONE, CONSTANT, PREDICTION, "clip"),
    ),
    *(
        _on_cpu(model, 8, "batch", methods=_WITH_BATCHNORM)
        for model in ("ResNet-56", "ResNet-20", "VGG-16")
    ),
    _on_cpu(
        f"{_PLAIN}, no conv biases",
        8,
        rates=_FINE,
        methods=(WEIGHTS_ALONE, CONSTANT),
    ),
    *(
        _on_cpu("ResNet-56", 8, base=base, methods=_TUNED)
        for base in ("momentum", "AdamW", "AdamW (b2=0.9)")
    ),
)
_behind = partial(_groups, "muon")
_MUON = (
    *(
        _behind(model, 8, base="Muon", methods=_BEFORE_MUON)
        for model in (_PLAIN, "ResNet-56")
    ),
    *(
        _behind(
            model,
            8,
            base="AdamW (b2=0.9)",
            methods=_TUNED,
            rates=BASES["AdamW (b2=0.9)"].rates,
        )
        for model in (_PLAIN, "ResNet-56")
    ),
)
_on_batchnorm = partial(
    _groups, model="ResNet-20", width=8, norm="batch", methods=_AUTOSCALED
)
_on_cifar = partial(_groups, "cifar", data="cifar10-jpeg", rates=(0.01,), scored=1000)
_CIFAR = (
    _on_cifar(
        "ResNet-20", 8, steps=150, methods=("none", CONSTANT, PREDICTION, "clip")
    ),
    *(
        _on_cifar(model, width, steps=60, methods=("none", CONSTANT))
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
    _on_resnet20("batch", methods=("none",), rates=(0.1,)),
    *(
        _on_resnet20(base=base, methods=(*_TUNED, "AGC"), rates=rates)
        for base, rates in (
            ("Muon", _RATES_OF_MUON),
            # Alone it is still at chance after 300 steps of 0.001.
            ("momentum", (1e-4, 3e-4, *_FINE)),
            ("AdamW (b2=0.9)", RATES["AdamW (b2=0.9)"]),
        )
    ),
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
            methods=("none", PREDICTION, "autoscaled normalization"),
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
}


def training(settings: Settings, phase: Phase) -> Training:
    """Scores tuning runs on validation images and reported runs on test images."""
    data, steps = load(settings["data"]), settings["steps"]
    model = MODELS[settings["model"]](
        width=settings["width"], norm=settings["norm"], num_classes=data.num_classes
    )
    split = "validation" if phase == "tuning" else "test"
    return Training(
        Classifier(
            on_device(data), model, Recipe.for_data(data), settings["batch"], steps
        ),
        Rule.from_settings(settings, warm_up=True),
        record_steps(steps, early=3, even=6),
        in_parts(data, split, settings["scored"]),
        side_by_side=1,
    )


def keep(run: Run, curves: Curves) -> Record:
    """Keeps the accuracy; `error` is the share of wrong images."""
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
    record["curve"] = curve(curves, 4, accuracy=accuracies)
    return record


SUITE = Suite(
    "vision",
    "image classifiers without BatchNorm and with it; errors are shares of images",
    PRESETS,
    training,
    keep,
)

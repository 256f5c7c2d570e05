"""Image classifiers with BatchNorm and without, with every treatment."""

from functools import partial
from itertools import product

import numpy as np

from benchmarks.lib.arms import OPTIMIZERS, Arm, pairs
from benchmarks.lib.runs import Phase, Record, Run, Settings, finite
from benchmarks.lib.suite import Entry, Preset, Protocol, Suite, entries
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
        batch: images in each.
        scored: images that the accuracy is of, at most.
    """
    rates = rates or RATES[optimizer]
    cell = {
        "model": model,
        "width": width,
        "norm": norm,
        "data": data,
        "rate": "tuned" if len(rates) > 1 else f"{rates[0]:g}",
        "batch": batch,
        "steps": steps,
        "scored": scored,
    }
    arms = pairs(treatments, [optimizer])
    return entries(preset, cell, arms, partial(_in_scale, rates), cost=steps)


def _in_scale(rates: tuple[float, ...], arm: Arm) -> tuple[float, ...]:
    scale = 1.0
    if not OPTIMIZERS[arm.optimizer].scale_free:
        scale = RATE_SCALES.get(arm.treatment, 1.0)
    return tuple(float(f"{rate * scale:.3g}") for rate in rates)


# Half decades: at 0.001 and 0.01 the plain net still stands or already overshoots.
_FINE = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
_WITH_BATCHNORM = ("none", CONSTANT, "GradientAutoscaled", "mean removal")
_TUNED = ("none", CONSTANT, "clip 1")
_CIFAR = ("none", CONSTANT, PREDICTION, "clip 1")
_GPU_MODELS = {
    "ResNet-56": 16,
    "ResNet-20": 16,
    "ResNet-50": 64,
    "VGG-16": 64,
    "EfficientNetV2-S": 24,
}


def _cpu() -> list[list[Entry]]:
    plain = "plain-24, gain 0.75"
    treatments = ("none", BIASES_UNTOUCHED, CONSTANT, PREDICTION, "clip 1")
    return [
        *_groups("cpu", "ResNet-56", 8, rates=(0.01,)),
        *_groups("cpu", plain, 8, rates=_FINE, treatments=treatments),
        *(
            group
            for model in ("ResNet-56", "ResNet-20", "VGG-16")
            for group in _groups("cpu", model, 8, "batch", treatments=_WITH_BATCHNORM)
        ),
        *_groups(
            "cpu",
            f"{plain}, no conv biases",
            8,
            rates=_FINE,
            treatments=(BIASES_UNTOUCHED, CONSTANT),
        ),
        *(
            group
            for optimizer in RATES
            for group in _groups(
                "cpu", "ResNet-56", 8, optimizer=optimizer, treatments=_TUNED
            )
        ),
    ]


def _cifar() -> list[list[Entry]]:
    return [
        group
        for model, width, steps, treatments in (
            ("ResNet-20", 8, 150, _CIFAR),
            ("ResNet-56", 8, 60, _CIFAR[:2]),
            ("ResNet-50", 8, 60, _CIFAR[:2]),
            ("EfficientNetV2-S", 6, 60, _CIFAR[:2]),
        )
        for group in _groups(
            "cifar",
            model,
            width,
            data="cifar10-jpeg",
            rates=(0.01,),
            steps=steps,
            scored=1000,
            treatments=treatments,
        )
    ]


def _gpu() -> list[list[Entry]]:
    return [
        group
        for norm, optimizer, (model, width) in product(
            ("none", "batch"), RATES, _GPU_MODELS.items()
        )
        for group in _groups(
            "gpu",
            model,
            width,
            norm,
            data="cifar10-jpeg",
            optimizer=optimizer,
            steps=3000,
            batch=128,
        )
    ]


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
        Protocol((0,), (100, 101, 102)),
        "a minute",
        "every part of the machinery; its accuracies mean nothing",
    ),
    "cpu": Preset(
        _cpu(),
        Protocol(tuning_seeds=(0,), reported_seeds=(100, 101, 102)),
        "1 hour on 2 idle cores",
        "the digits of scikit-learn",
    ),
    "cifar": Preset(
        _cifar(),
        Protocol((), (100, 101, 102)),
        "1 hour on 2 idle cores",
        "few steps on CIFAR-10 (JPEG), of the folder $STABLEGRAD_DATA",
    ),
    "gpu": Preset(
        _gpu(),
        Protocol((0, 1), tuple(range(100, 105))),
        "never run; --minutes 8 cuts it in pieces",
        "full widths on CIFAR-10 (JPEG), of the folder $STABLEGRAD_DATA",
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
        Rule(Arm.of(settings["arm"]), steps, warm_up=True),
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
    with np.errstate(divide="ignore", invalid="ignore"):
        exponents = np.log10(curves.stds.astype(float))
        quartiles = np.quantile(exponents, (0, 0.25, 0.5, 0.75, 1), axis=1).T
    record["curve"] = {
        "step": curves.steps.tolist(),
        "accuracy": [finite(a, digits=4) for a in accuracies],
        "loss": [finite(float(loss), digits=4) for loss in curves.loss],
    }
    # log10 of the std of the kernels' gradients: least, quartiles, largest.
    record["quartiles"] = _rounded(quartiles)
    if run.detailed:
        record["layers"] = _rounded(exponents)
    return record


def _rounded(exponents: np.ndarray) -> list[list[float | None]]:
    return [[finite(e) for e in row] for row in exponents.round(1).tolist()]


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

"""The page of the image classifiers."""

import numpy as np

from benchmarks.report.pages import Page
from benchmarks.report.scores import Quantity

PROBLEM = ("data", "norm", "model", "width", "rate", "batch", "steps")


def _label(
    data: str, norm: str, model: str, width: int, rate: str, batch: int, steps: int
) -> str:
    with_norm = "with BatchNorm" if norm == "batch" else "without BatchNorm"
    how = rate if rate.startswith("tuned") else f"learning rate {rate}"
    return (
        f"{data}, {model} {with_norm}, width {width}, {how}, {steps} steps of {batch}"
    )


PAGE = Page(
    "Image classifiers with BatchNorm and without it",
    """\
Accuracies on test images after the last step. A run fails if its accuracy is not above
1.5 times chance (15 % for ten classes) or its loss is not a number. Where the learning
rate is "tuned", each optimizer has the rate of its set with the lowest median error
over the tuning seeds on validation images, unless a preset names another rule; "tuned
on 300 steps": these runs are shorter, with a whole schedule of their own. Else all have
the rate that is named, in their own scale: with momentum 0.03 times it for the
reference "prediction" and 0.01 times it for ZNorm, whose gradients are larger by as
much. "Reference: prediction" is the prediction gradient per example; "mean removal" is
Gradient Autoscaled Normalization without its factor. All optimizers have equal steps,
initial weights and batches; float32; 5 % warm-up, then a half cosine to 0.""",
    PROBLEM,
    _label,
    Quantity(
        "accuracy (%)",
        "accuracy",
        100.0,
        ".1f",
        missing=0.0,
        higher_is_better=True,
        statistic=("mean", np.mean),
    ),
    15.0,
    {
        "cpu": "Small nets on the digits of scikit-learn. ResNet-56 without BatchNorm "
        "explodes with momentum; the plain net of 24 layers vanishes.",
        "cifar": "A short look at CIFAR-10 (JPEG), far from a trained network.",
        "muon": "The same nets behind Muon and AdamW with `b2=0.9`: where gradients "
        "vanish, scale control per layer before Muon trains the plain net.",
        "autoscaled": "Gradient Autoscaled Normalization on its paper's ground, a net "
        "with BatchNorm and momentum.",
        "cifar-autoscaled": "The same on CIFAR-10 (JPEG).",
        "cifar-resnet20": "ResNet-20 at its real width. The net with BatchNorm, whose "
        "rate is not tuned, is the target.",
    },
)

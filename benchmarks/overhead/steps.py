"""Whole training steps, with a transformation and without: batch, gradient, update."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from benchmarks.lib.arms import Arm
from benchmarks.lib.timing import Times, time_trainings
from benchmarks.lib.train import Rule, Task, Training
from benchmarks.overhead.arms import BASELINE
from benchmarks.tasks.images.data import Images
from benchmarks.tasks.images.models import ResNet
from benchmarks.tasks.images.task import Classifier, Recipe
from benchmarks.tasks.pinn.network import Network
from benchmarks.tasks.pinn.problems import PROBLEMS
from benchmarks.tasks.pinn.task import Pinn

STEPS = 1000  # of the schedule
# The names here -> those of `benchmarks.lib.arms`.
ARMS = {
    BASELINE: "none | AdamW",
    "stablegrad": "StableGrad | AdamW",
    "gradient_stabilizer": "GradientStabilizer | AdamW",
    "gradient_autoscaled_normalization": "GradientAutoscaled | AdamW",
}


class Step(NamedTuple):
    """What is trained, and its name."""

    title: str
    task: Task


def resnet20(batch: int = 64) -> Step:
    """ResNet-20 without BatchNorm on images of CIFAR's size; the pixels are noise."""
    rng = np.random.default_rng(0)
    images = Images(
        rng.integers(0, 256, (512, 32, 32, 3), np.uint8),
        rng.integers(0, 10, 512, np.int32),
    )
    recipe = Recipe((0.5,) * 3, (0.3,) * 3, padding=0, flip=False)
    model = ResNet(depth=20, norm="none")
    task = Classifier(images, model, recipe, batch, STEPS)
    return Step(f"ResNet-20 without BatchNorm, batch {batch}", task)


def pinn(depth: int = 32) -> Step:
    """The network and problem of the demo."""
    task = Pinn(PROBLEMS["poisson"](), Network(depth, 32))
    return Step(f"PINN, depth {depth}, width 32", task)


# name -> the training
TRAININGS: dict[str, Callable[[], Step]] = {"resnet20": resnet20, "pinn": pinn}


def time_training(step: Step, arms: Iterable[str], rounds: int) -> dict[str, Times]:
    """A step of every arm; BASELINE must be among them."""
    trainings = {
        arm: Training(step.task, Rule(Arm.of(ARMS[arm]), STEPS), (STEPS,))
        for arm in arms
    }
    return time_trainings(trainings, rounds, BASELINE)

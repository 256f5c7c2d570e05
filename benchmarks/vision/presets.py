"""The grids that can be asked for by name."""

from dataclasses import dataclass
from itertools import product

from benchmarks.runs import Entry, Protocol
from benchmarks.vision.arms import ARMS, OPTIMIZERS
from benchmarks.vision.models import Norm


@dataclass(frozen=True)
class Cell:
    """What is trained, and with which arms.

    Attributes:
        model: a name of `MODELS`.
        width: of the model.
        norm: of the model.
        data: a name of `DATASETS`.
        optimizer: a name of `OPTIMIZERS`.
        rates: of learning, to choose from for each arm, in the scale of arm "none";
            none: the optimizer's. A single one is used as it is.
        steps: number of updates.
        batch: images in each.
        scored: images that the accuracy is of, at most.
        arms: names of `ARMS`.
    """

    model: str
    width: int
    norm: Norm = "none"
    data: str = "digits"
    optimizer: str = "momentum"
    rates: tuple[float, ...] = ()
    steps: int = 200
    batch: int = 32
    scored: int = 10_000
    arms: tuple[str, ...] = tuple(ARMS)


@dataclass(frozen=True)
class Preset:
    """A grid.

    Attributes:
        cells: in the order in which they are computed.
        protocol: its seeds.
    """

    cells: tuple[Cell, ...]
    protocol: Protocol

    def groups(self, name: str) -> list[list[Entry]]:
        """The entries, each a group: runs of one arm are trained in turn."""
        return [[_entry(name, cell, arm)] for cell in self.cells for arm in cell.arms]


def _entry(preset: str, cell: Cell, arm: str) -> Entry:
    rates = cell.rates or OPTIMIZERS[cell.optimizer].rates
    settings = {
        "preset": preset,
        "model": cell.model,
        "width": cell.width,
        "norm": cell.norm,
        "data": cell.data,
        "optimizer": cell.optimizer,
        "rate": "tuned" if len(rates) > 1 else f"{rates[0]:g}",
        "batch": cell.batch,
        "steps": cell.steps,
        "scored": cell.scored,
        "arm": arm,
    }
    return Entry(settings, ARMS[arm].rates(cell.optimizer, rates), cost=cell.steps)


CONSTANT = "StableGrad, constant 0.01"
PREDICTION = "StableGrad, prediction"
WEIGHTS_ONLY = "StableGrad, weights only"

# Half decades: at 0.001 and 0.01 the plain net still stands or already overshoots.
_FINE = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
_PLAIN = ("none", WEIGHTS_ONLY, CONSTANT, PREDICTION, "clip 1")
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

PRESETS: dict[str, Preset] = {
    # Every part of the machinery, in seconds; its accuracies mean nothing.
    "smoke": Preset(
        cells=(
            Cell(
                "ResNet-20",
                width=2,
                norm="batch",
                steps=3,
                scored=20,
                arms=("none", PREDICTION, "GradientAutoscaled"),
            ),
        ),
        protocol=Protocol((0,), (100, 101, 102)),
    ),
    "cpu": Preset(
        cells=(
            Cell("ResNet-56", 8, rates=(0.01,)),
            Cell("plain-24, gain 0.75", 8, rates=_FINE, arms=_PLAIN),
            Cell("ResNet-56", 8, "batch", arms=_WITH_BATCHNORM),
            Cell("ResNet-20", 8, "batch", arms=_WITH_BATCHNORM),
            Cell("VGG-16", 8, "batch", arms=_WITH_BATCHNORM),
            Cell(
                "plain-24, gain 0.75, no conv biases",
                8,
                rates=_FINE,
                arms=_PLAIN[1:3],
            ),
            Cell("ResNet-56", 8, arms=_TUNED),
            Cell("ResNet-56", 8, optimizer="AdamW", arms=_TUNED),
            Cell("ResNet-56", 8, optimizer="AdamW b2=0.9", arms=_TUNED),
        ),
        protocol=Protocol(tuning_seeds=(0,), reported_seeds=(100, 101, 102)),
    ),
    # As many steps of CIFAR-10 as two slow cores manage in minutes.
    "cifar": Preset(
        cells=tuple(
            Cell(
                model,
                width,
                data="cifar10-jpeg",
                rates=(0.01,),
                steps=steps,
                scored=1000,
                arms=arms,
            )
            for model, width, steps, arms in (
                ("ResNet-20", 8, 150, _CIFAR),
                ("ResNet-56", 8, 60, _CIFAR[:2]),
                ("ResNet-50", 8, 60, _CIFAR[:2]),
                ("EfficientNetV2-S", 6, 60, _CIFAR[:2]),
            )
        ),
        protocol=Protocol((), (100, 101, 102)),
    ),
    "gpu": Preset(
        cells=tuple(
            Cell(
                model,
                _GPU_MODELS[model],
                norm,
                data="cifar10-jpeg",
                optimizer=optimizer,
                steps=3000,
                batch=128,
            )
            for norm, optimizer, model in product(
                ("none", "batch"), OPTIMIZERS, _GPU_MODELS
            )
        ),
        protocol=Protocol((0, 1), tuple(range(100, 105))),
    ),
}

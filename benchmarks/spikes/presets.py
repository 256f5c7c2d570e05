"""The grids that can be asked for by name."""

from dataclasses import dataclass, replace

from benchmarks.runs import Entry, Protocol
from benchmarks.spikes.arms import ARMS
from benchmarks.spikes.models import Numbers
from benchmarks.spikes.tasks import TASKS, Size


@dataclass(frozen=True)
class Cell:
    """What is trained, and with which arms.

    Attributes:
        task: a name of `TASKS`.
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
        arms: names of `ARMS`.
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
        return [
            [entry]
            for cell in self.cells
            for arm in cell.arms
            for entry in _entries(name, cell, arm)
        ]


def _entries(preset: str, cell: Cell, arm: str) -> list[Entry]:
    settings = {
        "preset": preset,
        "task": cell.task,
        "size": cell.size,
        "numbers": cell.numbers,
        "disturbance": cell.disturbance,
        "spike": cell.spike,
        "weight_decay": cell.weight_decay,
        "optimizer": cell.optimizer,
        "batch": cell.batch,
        "steps": cell.steps,
        "arm": arm,
    }
    if cell.tuned:
        return [Entry({**settings, "rate": "tuned"}, cell.rates, cell.steps)]
    return [
        Entry({**settings, "rate": f"{rate:g}"}, (rate,), cell.steps)
        for rate in cell.rates
    ]


SPIKES = ("loss x10", "loss x100", "loss x1e4")
NOISES = ("none", "noise of 1 range", "noise of 2 ranges", "noise of 3 ranges")
DECAYS = ("0", "1e-4", "5e-4")

_STABILIZERS = tuple(arm for arm in ARMS if arm.startswith("GradientStabilizer"))
# A constant factor cancels in Adam and Lion, but for eps: it is a control of the decay.
_ARMS = tuple(arm for arm in ARMS if arm != "constant factor 30")
_DECAYED = (
    "none",
    "norm clip 1",
    *_STABILIZERS,
    "StableGrad, constant 1",
    "unit norm of each leaf",
    "constant factor 30",
)
_FEW = (
    "none",
    "norm clip 1",
    "ZClip",
    "GradientStabilizer",
    "GradientStabilizer, max_norm_ratio 2",
    "StableGrad, prediction, limit 2",
)
_MAIN = ("none", "norm clip 1", "GradientStabilizer", "StableGrad, constant 1")
# Half decades. To choose from; then, for the range in which arms do not diverge, two
# decades, and three for the small language model, which no rate to 0.1 lets diverge.
_RATES = (1e-3, 3e-3, 1e-2)
_HIGHER = (3e-3, 1e-2, 3e-2)
_LOWER = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
_LOWEST = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
_WIDE = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)

# One of 700 updates, 500 before the last.
_SPIKED = Cell("lm", (3e-3,), spike=200, steps=700, arms=_ARMS)
_TEXT = Cell("lm", _HIGHER, tuned=True, arms=_ARMS)
_SERIES = Cell(
    "forecast",
    (*_RATES, 3e-2, 1e-1),
    tuned=True,
    optimizer="AdamW",
    batch=32,
    arms=_ARMS,
)
_DIGITS = Cell("resnet20", (*_RATES, 3e-2), tuned=True, batch=16, arms=_DECAYED)
_SPIKED_DIGITS = replace(
    _DIGITS, rates=(3e-3,), tuned=False, spike=200, steps=700, arms=_FEW
)
_SHORT_SPIKED = replace(_SPIKED, optimizer="Adam b2=0.9", arms=_MAIN)
_SPIKED_MILLION = replace(
    _SPIKED,
    rates=(1e-3,),
    size="million",
    arms=(*_MAIN, "GradientStabilizer, max_norm_ratio 2"),
)
_SHORT_TEXT = replace(_TEXT, optimizer="Adam b2=0.9", arms=_MAIN)
_SHORT_SERIES = replace(_SERIES, optimizer="AdamW b2=0.9", arms=_MAIN)


def _with(cell: Cell, name: str, values: tuple[str, ...]) -> tuple[Cell, ...]:
    """A cell for each value of one of its attributes."""
    return tuple(replace(cell, **{name: value}) for value in values)


def _large(task: str) -> tuple[Cell, ...]:
    """Every question, asked of the larger model of one task."""
    one = Cell(
        task,
        _RATES,
        tuned=True,
        steps=2000,
        batch=32 if task == "lm" else 128,
        size="gpu",
    )
    spiked = replace(one, spike=1000, rates=(1e-3,), tuned=False)
    spikes = SPIKES if task == "lm" else (*SPIKES, "inputs x100")
    numbers = ("float32",) if task == "resnet20" else ("float32", "float16", "fp4")
    noises = NOISES[1:] if task == "forecast" else ()
    return (
        *_with(spiked, "disturbance", ("none", *spikes)),
        *(
            replace(one, tuned=False, optimizer=optimizer, rates=rates, arms=arms)
            for optimizer, rates, arms in (
                ("Adam", _LOWER, _ARMS),
                ("AdamW", _LOWER, _FEW),
                ("Lion", _LOWEST, _FEW),
            )
        ),
        *_with(one, "numbers", numbers),
        *_with(one, "disturbance", noises),
        *_with(one, "weight_decay", DECAYS[1:]),
    )


PRESETS: dict[str, Preset] = {
    # Every part of the machinery, in seconds; its errors mean nothing.
    "smoke": Preset(
        cells=(
            *_with(
                Cell(
                    "forecast",
                    (1e-3,),
                    spike=2,
                    steps=4,
                    batch=4,
                    size="tiny",
                    arms=("none", "GradientStabilizer"),
                ),
                "disturbance",
                ("none", "inputs x100"),
            ),
        ),
        protocol=Protocol((0,), (100, 101, 102)),
    ),
    # In the order of what tells most: one case of each question, then the others.
    # Around a spike all arms have one rate: a run is compared with itself without it.
    "cpu": Preset(
        cells=(
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
            replace(_TEXT, optimizer="Lion", rates=_LOWER, tuned=False, arms=_FEW),
            *_with(_SHORT_SPIKED, "disturbance", ("none", "loss x1e4")),
            *_with(_SHORT_TEXT, "numbers", ("float32", "float16", "fp4")),
            *_with(_SHORT_SERIES, "disturbance", (NOISES[0], NOISES[3])),
        ),
        protocol=Protocol(tuning_seeds=(0, 1), reported_seeds=(100, 101, 102)),
    ),
    # Whether a spike does to a larger decoder what it does to that of cpu.
    "million": Preset(
        cells=_with(_SPIKED_MILLION, "disturbance", ("none", "loss x1e4")),
        protocol=Protocol((), (100, 101, 102)),
    ),
    "gpu": Preset(
        cells=tuple(cell for task in TASKS for cell in _large(task)),
        protocol=Protocol((0, 1), tuple(range(100, 105))),
    ),
}

"""The grids that can be asked for by name."""

from dataclasses import dataclass
from itertools import product

from benchmarks.pinn.arms import ARMS
from benchmarks.pinn.batch import INITS
from benchmarks.runs import Entry, Protocol


@dataclass(frozen=True)
class Cell:
    """What is trained, whatever the arm.

    Attributes:
        init: a name of `INITS`.
        learning_rate: the only one; None where each arm's is to be chosen.
    """

    problem: str
    init: str
    depth: int
    width: int = 32
    activation: str = "tanh"
    steps: int = 1000
    learning_rate: float | None = None


@dataclass(frozen=True)
class Preset:
    """A grid: every arm in every cell.

    Attributes:
        cells: in the order in which they are computed.
        protocol: its seeds.
        arms: names of `ARMS`.
        joined: whether cells that differ in their initializer alone are computed side
            by side, as suits a GPU.
        workers: batches computed at a time.
    """

    cells: tuple[Cell, ...]
    protocol: Protocol
    arms: tuple[str, ...] = tuple(ARMS)
    joined: bool = False
    workers: int = 1

    def groups(self, name: str) -> list[list[Entry]]:
        """The entries, grouped by what is computed side by side."""
        groups: dict[tuple, list[Entry]] = {}
        for cell, arm in product(self.cells, self.arms):
            entry = _entry(name, cell, arm)
            apart = "" if self.joined else cell.init
            shape = (cell.problem, cell.depth, cell.width, cell.activation, cell.steps)
            groups.setdefault((*shape, apart, arm), []).append(entry)
        return list(groups.values())


def _entry(preset: str, cell: Cell, arm: str) -> Entry:
    settings = {
        "preset": preset,
        "problem": cell.problem,
        "depth": cell.depth,
        "width": cell.width,
        "activation": cell.activation,
        "init": cell.init,
        "steps": cell.steps,
        "optimizer": ARMS[arm].optimizer,
        "arm": arm,
    }
    rates = ARMS[arm].learning_rates
    if cell.learning_rate is not None:
        rates = (cell.learning_rate,)
    # A step's work grows with the number of kernels.
    return Entry(settings, rates, cost=cell.steps * (cell.depth + 1))


def _cells(
    problem: str, inits: tuple[str, ...], depths: tuple[int, ...], **rest: str | int
) -> tuple[Cell, ...]:
    return tuple(
        Cell(problem, init, depth, **rest) for depth in depths for init in inits
    )


# The starts that told optimizers apart come first: a grid that is not finished yet
# should answer the questions that matter.
_TELLING = ("normal 5/3", "uniform", "normal 1")
_OTHERS = tuple(init for init in INITS if init not in _TELLING)

_PROTOCOL = Protocol(tuning_seeds=(0, 1), reported_seeds=tuple(range(100, 106)))

PRESETS: dict[str, Preset] = {
    # Every part of the machinery, in seconds; its errors mean nothing.
    "smoke": Preset(
        cells=_cells("poisson", ("normal 1", "uniform"), (2,), width=8, steps=20),
        protocol=Protocol((0,), (100, 101, 102)),
        arms=("AdamW", "StableGrad + AdamW", "StableGrad, probe on residuals"),
    ),
    # Twenty fresh seeds in the two cells where clipping and b2=0.9 failed.
    "twenty-seeds": Preset(
        cells=(
            Cell("poisson", "uniform", 32, steps=1500, learning_rate=3e-3),
            Cell("poisson", "normal 5/3", 50, steps=1500, learning_rate=1e-3),
        ),
        protocol=Protocol((), tuple(range(200, 220))),
        arms=(
            "StableGrad + AdamW",
            "StableGrad + AdamW b2=0.99",
            "StableGrad + AdamW b2=0.9",
            "AdamW b2=0.9",
            "clip 1 + AdamW",
            "AdamW",
            "Adam eps=1e-16",
            "StableGrad, probe on u",
            "StableGrad, probe on residuals",
            "StableGrad, residuals, limit 2",
        ),
    ),
    "cpu": Preset(
        cells=(
            *_cells("poisson", _TELLING, (32, 16)),
            *_cells("burgers", _TELLING, (8,)),
            Cell("allen_cahn", "normal 5/3", 8),
            Cell("helmholtz_4_4", "normal 5/3", 8),
            *_cells("poisson", (*_TELLING, *_OTHERS), (8, 4)),
            Cell("poisson", "uniform", 8, activation="sin"),
            Cell("poisson", "uniform", 8, activation="silu"),
        ),
        protocol=_PROTOCOL,
        workers=2,
    ),
    "gpu": Preset(
        cells=(
            *_cells("poisson", tuple(INITS), (32, 50, 16), width=128, steps=3000),
            *_cells("burgers", tuple(INITS), (32, 16), width=128, steps=3000),
            *_cells("helmholtz_1_4", tuple(INITS), (32, 16), width=128, steps=3000),
            *_cells("allen_cahn", tuple(INITS), (32, 16), width=128, steps=3000),
        ),
        protocol=_PROTOCOL,
        joined=True,
    ),
}

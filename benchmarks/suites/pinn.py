"""Physics-informed networks under every optimizer, from six laws of initial weights."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

from benchmarks.lib.arms import OPTIMIZERS, Arm, pairs
from benchmarks.lib.runs import Phase, Settings
from benchmarks.lib.suite import (
    SMOKE,
    Entry,
    Preset,
    Protocol,
    Suite,
    cells,
    entries,
    keep_error,
    lowest_worst_with_margin,
)
from benchmarks.lib.train import Rule, Training, record_steps
from benchmarks.tasks.pinn.network import Network
from benchmarks.tasks.pinn.problems import PROBLEMS, Problem
from benchmarks.tasks.pinn.task import FAILURE_ERROR, Pinn, evaluation

# name in the results -> what it means for `Network`
INITS: dict[str, dict[str, str | float]] = {
    "normal 0.3": {"initializer": "normal", "gain": 0.3},
    "normal 1": {"initializer": "normal", "gain": 1.0},
    "normal 1.4": {"initializer": "normal", "gain": 1.4},
    "normal 5/3": {"initializer": "normal", "gain": 5 / 3},
    "uniform": {"initializer": "uniform"},
    "glorot": {"initializer": "glorot"},
    "activation-aware": {"initializer": "activation_aware"},
}

ARMS = (
    *pairs(["none"], ["AdamW", "AdamW b2=0.9", "Adam eps=1e-16"]),
    "clip 1 | AdamW",
    "StableGrad | AdamW",
    "StableGrad field | AdamW",
    "StableGrad residuals | AdamW",
    "StableGrad residuals, limit 2 | AdamW",
    "StableGrad, biases untouched | AdamW",
    *pairs(["StableGrad"], ["AdamW b2=0.9", "AdamW b2=0.99"]),
    "StableGrad, biases untouched | AdamW b2=0.9",
    *pairs(["GradientStabilizer", "GradientAutoscaled", "mean removal"], ["AdamW"]),
    *pairs(["none"], ["NovoGrad", "LAMB"]),
    *pairs(["none", "clip 1", "StableGrad"], ["momentum"]),
)
# The optimizer behind. Before Muon: what a recommendation may be of, and what costs as
# much. What differs most comes first, as below for the cells.
CANDIDATES = pairs(["StableGrad", "none", "unit norm by leaf", "clip 1"], ["Muon"])
CLIPPED_WITHOUT_EPS = "clip 1 | Muon eps=1e-30"
# Which part of Muon needs a scale control: its matrices, or the leaves of its Adam?
ON_A_PART = pairs(
    [
        f"{name} on {part}"
        for name in ("StableGrad", "clip 1")
        for part in ("matrices", "biases")
    ],
    ["Muon"],
)
ADAMW = (*pairs(["none", "clip 1"], ["AdamW b2=0.9"]), "none | AdamW")
# The other optimizers that are used, alone and with what differed most before Muon.
SOAP = pairs(["none", "StableGrad", "clip 1", "unit norm by leaf"], ["SOAP"])
OTHERS = pairs(
    ["none", "StableGrad"], ["Muon b2=0.9", "AdamW warm-up", "Nadam b2=0.9", "Lion"]
)
# Of problems that are solved: what anyone would use, and the best of `behind`.
SOLVERS = (
    *pairs(["none"], ["AdamW", "AdamW b2=0.9"]),
    *pairs(["clip 1", "StableGrad"], ["Muon"]),
    *pairs(["none"], ["SOAP", "Muon"]),
)
SOLVERS_RATES = {
    "AdamW": (3e-3, 1e-2, 3e-2),
    "AdamW b2=0.9": (3e-3, 1e-2, 3e-2),
    "Muon": (4e-3, 8e-3, 1.6e-2),
    "SOAP": (3e-3, 1e-2, 3e-2),
}
# Is deeper ever better?
AT_ANY_DEPTH = (
    "none | AdamW",
    *pairs(["clip 1", "StableGrad", "unit norm by leaf"], ["Muon"]),
)
DEPTH_RATES = {"Muon": (2e-3, 4e-3, 8e-3, 1.6e-2)}  # of the others all of theirs
# Deep nets have their best rates lower: each set goes one step further down, for all
# arms of the optimizer. Lion's needs none.
DEEP_RATES = {
    optimizer: (lowest, *OPTIMIZERS[optimizer].rates)
    for lowest, optimizers in (
        (5e-4, ("Muon", "Muon b2=0.9", "Muon warm-up", "Muon eps=1e-30")),
        (1e-4, ("AdamW", "AdamW b2=0.9", "AdamW warm-up", "Nadam b2=0.9")),
        (3e-4, ("SOAP",)),
    )
    for optimizer in optimizers
}
# Does a rate, once chosen, serve the same loss in another unit? At depth 4 the best of
# the preset `depth`, before momentum of `cpu`.
_SCALED = ("none", "clip 1", "StableGrad", "unit norm by leaf")
UNITS_RATES = {
    **dict.fromkeys(pairs(_SCALED, ["AdamW"]), 1e-2),
    **dict.fromkeys(pairs(_SCALED, ["Muon"]), 8e-3),
    "none | momentum": 1e-4,
    "clip 1 | momentum": 1e-1,
    "StableGrad | momentum": 3e-3,
}
# Where the scale of the optimizer's input differs from the others'.
RATES = {
    "clip 1 | momentum": (1e-3, 1e-2, 1e-1, 3e-1),
    "StableGrad | momentum": (1e-5, 1e-4, 1e-3, 3e-3),
}


def _cells(
    problem: str,
    inits: Sequence[str],
    depths: Sequence[int],
    *,
    width: int = 32,
    activation: str = "tanh",
    steps: int = 1000,
) -> list[Settings]:
    """What is trained, whatever the arm; `inits` are names of `INITS`."""
    return cells(
        problem=[problem],
        depth=depths,
        width=[width],
        activation=[activation],
        init=inits,
        steps=[steps],
    )


def _cell(problem: str, init: str, depth: int, **others: Any) -> Settings:
    (cell,) = _cells(problem, (init,), (depth,), **others)
    return cell


def _groups(
    preset: str,
    of: Sequence[Settings],
    arms: tuple[str, ...],
    *,
    rates: tuple[float, ...] | None = None,
    joined: bool = False,
) -> list[list[Entry]]:
    """Every arm in every cell.

    Args:
        preset: its name.
        of: the cells, in the order in which they are computed.
        arms: in the order in which they are computed.
        rates: one for each cell; by default each arm's is to be chosen.
        joined: whether cells that differ in their initial weights alone are computed
            side by side, as suits a GPU.
    """
    groups: dict[tuple, list[Entry]] = {}
    for index, cell in enumerate(of):

        def rates_of(arm: Arm, index: int = index) -> tuple[float, ...]:
            tuned = RATES.get(arm.name, arm.rates)
            return tuned if rates is None else (rates[index],)

        shape = tuple(v for key, v in cell.items() if not (joined and key == "init"))
        for (entry,) in entries(preset, [cell], arms, rates_of):
            groups.setdefault((*shape, entry.settings["arm"]), []).append(entry)
    return list(groups.values())


def _rates(sets: Mapping[str, tuple[float, ...]]) -> Callable[[Arm], tuple[float, ...]]:
    """An arm's, by its optimizer; of those that are not named the vocabulary's."""
    return lambda arm: sets.get(arm.optimizer, arm.rates)


_tuned_deep = partial(entries, rates=_rates(DEEP_RATES))

# The starts that told optimizers apart come first: a grid that is not finished yet
# should answer the questions that matter.
_TELLING = ("normal 5/3", "uniform", "normal 1")
_OTHER_INITS = ("normal 0.3", "glorot", "activation-aware")
_DEEP = (
    _cell("poisson", "uniform", 50, steps=1500),
    _cell("poisson", "normal 0.3", 32, steps=1500),
    *_cells("poisson", _TELLING, (32,), steps=1500),
)
_DEEPER = _cell("poisson", "normal 5/3", 50, steps=1500)
# Four that nothing was chosen on, and three of the hard ones again, on fresh seeds.
_FRESH = (
    _cell("poisson", "normal 0.3", 24, steps=1500),
    _cell("poisson", "uniform", 24, activation="gelu", steps=1500),
    _cell("poisson", "normal 1.4", 50, steps=1500),
    *_DEEP[:2],
    _DEEPER,
    _cell("poisson", "normal 0.3", 50, steps=1500),
)
# What lies around them, where less can go wrong.
_AROUND = (
    _cell("poisson", "normal 1", 50, steps=1500),
    _cell("poisson", "normal 0.3", 16, steps=1500),
    _cell("poisson", "glorot", 32, steps=1500),
)
# What tells the field's remedies first; then what a plain network solves as well.
SOLVED = tuple(
    _cell(problem, "glorot", 4, width=64, steps=10_000)
    for problem in (
        "allen_cahn, periodic, exact start",
        "wave, exact start and ends",
        "burgers, 128 points",
        "helmholtz_4_4, Fourier features",
        "helmholtz_1_4, Fourier features",
        "poisson, 128 points",
    )
)
# As many steps at every depth; then, of shallower networks, as many as take at most the
# time of depth 50: a step's grows with the number of kernels, or faster.
_AT_DEPTHS = (
    *_cells("poisson", ("uniform",), (8, 50, 4, 16, 32, 2), steps=1500),
    *(
        _cell("poisson", "uniform", depth, steps=1500 * 51 // (depth + 1))
        for depth in (8, 4, 16, 2)
    ),
)
IN_UNITS = tuple(
    _cell(problem, "uniform", 4, steps=1500)
    for problem in (
        "poisson",
        "poisson, loss times 1e-4",
        "poisson, loss times 1e-8",
        "poisson, loss times 1e4",
    )
)
_PROTOCOL = Protocol(tuning_seeds=(0, 1), reported_seeds=tuple(range(100, 106)))

PRESETS = {
    "smoke": Preset(
        _groups(
            "smoke",
            _cells("poisson", ("normal 1", "uniform"), (2,), width=8, steps=20),
            pairs(["none", "StableGrad", "StableGrad residuals"], ["AdamW"]),
        ),
        SMOKE,
        "seconds",
        "every part of the machinery; its errors mean nothing",
    ),
    "twenty-seeds": Preset(
        _groups(
            "twenty-seeds",
            (_cell("poisson", "uniform", 32, steps=1500), _DEEPER),
            (
                *pairs(["StableGrad"], ["AdamW", "AdamW b2=0.99", "AdamW b2=0.9"]),
                "none | AdamW b2=0.9",
                "clip 1 | AdamW",
                *pairs(["none"], ["AdamW", "Adam eps=1e-16"]),
                "StableGrad field | AdamW",
                "StableGrad residuals | AdamW",
                "StableGrad residuals, limit 2 | AdamW",
            ),
            rates=(3e-3, 1e-3),
        ),
        Protocol((), tuple(range(200, 220))),
        "1 hour on 2 idle cores",
        "ten arms at a fixed rate, 20 seeds, where clipping and b2=0.9 failed",
    ),
    "cpu": Preset(
        _groups(
            "cpu",
            (
                *_cells("poisson", _TELLING, (32, 16)),
                *_cells("burgers", _TELLING, (8,)),
                _cell("allen_cahn", "normal 5/3", 8),
                _cell("helmholtz_4_4", "normal 5/3", 8),
                *_cells("poisson", (*_TELLING, *_OTHER_INITS), (8, 4)),
                _cell("poisson", "uniform", 8, activation="sin"),
                _cell("poisson", "uniform", 8, activation="silu"),
            ),
            ARMS,
        ),
        _PROTOCOL,
        "3 hours on 2 idle cores",
        "25 cells of 4 problems, depth 4 to 32, 20 arms",
        workers=2,
    ),
    "behind": Preset(
        [
            *_tuned_deep(
                "behind",
                _DEEP[:3],
                (
                    *CANDIDATES,
                    "GradientStabilizer .7 .9 | Muon",
                    "none | Muon eps=1e-30",
                    CLIPPED_WITHOUT_EPS,
                ),
            ),
            *_tuned_deep("behind", (_DEEP[0], _DEEP[2]), ON_A_PART),
            *_tuned_deep("behind", _DEEP[:1], ADAMW),
            *_tuned_deep(
                "behind",
                _DEEP[:3],
                (
                    *SOAP,
                    *pairs(["unit norm", "GradientStabilizer"], ["Muon"]),
                    "StableGrad | AdamW b2=0.9",
                ),
            ),
            *_tuned_deep("behind", (_DEEP[0], _DEEP[2]), OTHERS),
            *_tuned_deep("behind", _DEEP[3:], (*CANDIDATES, "none | AdamW b2=0.9")),
            *_tuned_deep(
                "behind",
                _DEEP[:3],
                pairs(["StableGrad residuals", "GradientAutoscaled"], ["Muon"]),
            ),
        ],
        Protocol((0, 1, 2), tuple(range(300, 310)), lowest_worst_with_margin),
        "2 hours on 2 idle cores",
        "optimizers behind scale controls, or parts of them, depth 32 and 50",
        workers=2,
    ),
    "confirm": Preset(
        [
            *_tuned_deep("confirm", _FRESH, (*CANDIDATES, CLIPPED_WITHOUT_EPS)),
            *_tuned_deep(
                "confirm",
                (_DEEP[0], _DEEPER),
                pairs(["StableGrad", "unit norm by leaf"], ["Muon warm-up"]),
            ),
            *_tuned_deep("confirm", _FRESH, ("unit norm by leaf | SOAP",)),
            *_tuned_deep("confirm", _AROUND, (*CANDIDATES, "unit norm by leaf | SOAP")),
        ],
        Protocol((0, 1, 2), tuple(range(400, 420)), lowest_worst_with_margin),
        "2 hours on 2 idle cores",
        "what behind recommends, on fresh seeds and cells between and around",
        workers=2,
    ),
    "solved": Preset(
        entries("solved", SOLVED, SOLVERS, _rates(SOLVERS_RATES)),
        Protocol((0, 1), tuple(range(500, 505))),
        "an hour on 2 idle cores",
        "six problems as the field solves them, depth 4, width 64, 10,000 steps",
        workers=2,
    ),
    "depth": Preset(
        entries("depth", _AT_DEPTHS, AT_ANY_DEPTH, _rates(DEPTH_RATES)),
        Protocol((0, 1, 2), tuple(range(600, 605)), lowest_worst_with_margin),
        "an hour on 2 idle cores",
        "depth 2 to 50 at equal steps and at equal steps times kernels",
        workers=2,
    ),
    "units": Preset(
        entries("units", IN_UNITS, UNITS_RATES, lambda arm: (UNITS_RATES[arm.name],)),
        Protocol((), tuple(range(700, 710))),
        "5 minutes on 1 idle core",
        "the loss in four units, each arm at one rate, depth 4",
    ),
    # Estimated: 12 ms a step of the 48 runs that tune, 8 of the 16 that are reported,
    # 40 seconds of compilation for every arm.
    "gpu": Preset(
        _groups(
            "gpu",
            _cells("poisson", (*_TELLING, "normal 0.3"), (32,), width=128, steps=2000),
            pairs(["StableGrad", "none", "clip 1", "unit norm by leaf"], ["Muon"]),
            joined=True,
        ),
        Protocol((0, 1), (100, 101, 102, 103)),
        "7 minutes on an H100: estimated, never run",
        "depth 32 at width 128, the initial weights side by side",
    ),
}


@cache  # one object for each: programs are compiled for an object
def _problem(name: str) -> Problem:
    return PROBLEMS[name]()


def training(settings: Settings, phase: Phase) -> Training:
    """A network of the settings; both phases are scored on the same grid."""
    del phase
    problem, steps = _problem(settings["problem"]), settings["steps"]
    network = Network(
        settings["depth"],
        settings["width"],
        settings["activation"],
        **INITS[settings["init"]],
        embedding=problem.embedding,
    )
    return Training(
        Pinn(problem, network),
        Rule.of(settings),
        record_steps(steps, early=8, even=12),
        evaluation(problem),
    )


SUITE = Suite(
    "pinn",
    "physics-informed networks; errors are relative L2",
    PRESETS,
    training,
    partial(keep_error, failure=FAILURE_ERROR),
)

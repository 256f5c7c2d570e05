"""Physics-informed networks with every optimizer and seven laws of initial weights."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from benchmarks.lib.optimizers import BASES, Optimizer, chains
from benchmarks.lib.runs import Phase, Settings
from benchmarks.lib.suite import (
    SMOKE,
    Preset,
    Protocol,
    Suite,
    entries,
    keep_error,
    lowest_worst_with_margin,
    problems,
)
from benchmarks.lib.train import Rule, Training, record_steps
from benchmarks.tasks.pinn.network import Network
from benchmarks.tasks.pinn.problems import shared_problem
from benchmarks.tasks.pinn.task import FAILURE_ERROR, Pinn, evaluation

# name in the results -> arguments of `Network`
INITS: dict[str, dict[str, str | float]] = {
    "normal 0.3": {"initializer": "normal", "gain": 0.3},
    "normal 1": {"initializer": "normal", "gain": 1.0},
    "normal 1.4": {"initializer": "normal", "gain": 1.4},
    "normal 5/3": {"initializer": "normal", "gain": 5 / 3},
    "uniform": {"initializer": "uniform"},
    "glorot": {"initializer": "glorot"},
    "activation-aware": {"initializer": "activation_aware"},
}

BEFORE_ADAMW = (
    *chains(["none"], ["AdamW", "AdamW (b2=0.9)", "Adam (eps=1e-16)"]),
    "clip + AdamW",
    "StableGrad + AdamW",
    "StableGrad (reference: field) + AdamW",
    "StableGrad (reference: residuals) + AdamW",
    "StableGrad (reference: residuals, max_reference_growth=2) + AdamW",
    "StableGrad (scale_biases=False) + AdamW",
    *chains(["StableGrad"], ["AdamW (b2=0.9)", "AdamW (b2=0.99)"]),
    "StableGrad (scale_biases=False) + AdamW (b2=0.9)",
    *chains(
        ["GradientStabilizer", "autoscaled normalization", "mean removal"], ["AdamW"]
    ),
    *chains(["none"], ["NovoGrad", "LAMB"]),
    *chains(["none", "clip", "StableGrad"], ["momentum"]),
)
# Within a preset the optimizers and problems that differ most come first, so that a
# grid that is not finished yet answers the questions that matter.
_SCALED = ("none", "clip", "StableGrad", "normalize per array")
BEFORE_MUON = chains(["StableGrad", "none", "normalize per array", "clip"], ["Muon"])
CLIPPED_WITHOUT_EPS = "clip + Muon (eps=1e-30)"
# These say which part of Muon needs scale control: its matrices, or its Adam's arrays.
ON_A_PART = chains(
    [
        f"{name} on {part}"
        for name in ("StableGrad", "clip")
        for part in ("matrices", "biases")
    ],
    ["Muon"],
)
BEFORE_SOAP = chains(["none", "StableGrad", "clip", "normalize per array"], ["SOAP"])
OTHER_BASES = chains(
    ["none", "StableGrad"],
    ["Muon (b2=0.9)", "AdamW (warm-up)", "Nadam (b2=0.9)", "Lion"],
)
# For problems that are solved: what anyone would use, and the best of `behind`.
SOLVERS = (
    *chains(["none"], ["AdamW", "AdamW (b2=0.9)"]),
    *chains(["clip", "StableGrad"], ["Muon"]),
    *chains(["none"], ["SOAP", "Muon"]),
)
SOLVERS_RATES = {
    "AdamW": (3e-3, 1e-2, 3e-2),
    "AdamW (b2=0.9)": (3e-3, 1e-2, 3e-2),
    "Muon": (4e-3, 8e-3, 1.6e-2),
    "SOAP": (3e-3, 1e-2, 3e-2),
}
AT_ANY_DEPTH = (
    "AdamW",
    *chains(["clip", "StableGrad", "normalize per array"], ["Muon"]),
)
DEPTH_RATES = {"Muon": (2e-3, 4e-3, 8e-3, 1.6e-2)}  # of the others all of theirs
# Deep nets have their best rates lower: each set goes one step further down, for all
# optimizers of the base. Lion's needs none.
DEEP_RATES = {
    base: (lowest, *BASES[base].rates)
    for lowest, bases in (
        (5e-4, ("Muon", "Muon (b2=0.9)", "Muon (warm-up)", "Muon (eps=1e-30)")),
        (1e-4, ("AdamW", "AdamW (b2=0.9)", "AdamW (warm-up)", "Nadam (b2=0.9)")),
        (3e-4, ("SOAP",)),
    )
    for base in bases
}
# Each optimizer has the rate that is best in the unit 1: of depth 4 in the preset
# `depth`, and for momentum in `cpu`.
UNITS_RATES = {
    **dict.fromkeys(chains(_SCALED, ["AdamW"]), 1e-2),
    **dict.fromkeys(chains(_SCALED, ["Muon"]), 8e-3),
    "momentum": 1e-4,
    "clip + momentum": 1e-1,
    "StableGrad + momentum": 3e-3,
}
# The method changes the scale of what momentum is given.
CPU_RATES = {
    "clip + momentum": (1e-3, 1e-2, 1e-1, 3e-1),
    "StableGrad + momentum": (1e-5, 1e-4, 1e-3, 3e-3),
}


def _problems(
    equation: str,
    inits: Iterable[str],
    depths: Iterable[int],
    *,
    width: int = 32,
    activation: str = "tanh",
    steps: int = 1500,
) -> list[Settings]:
    """Returns the settings that make problems; `inits` are names of `INITS`."""
    return problems(
        equation=[equation],
        depth=depths,
        width=[width],
        activation=[activation],
        init=inits,
        steps=[steps],
    )


def _problem(equation: str, init: str, depth: int, **options: Any) -> Settings:
    (problem,) = _problems(equation, (init,), (depth,), **options)
    return problem


def _rates(sets: Mapping[str, tuple[float, ...]]) -> Callable[[Optimizer], tuple]:
    """Returns an optimizer's rates by its name, its base, or else by the vocabulary."""
    return lambda o: sets.get(o.name, sets.get(o.base, o.rates))


_deep = partial(entries, rates=_rates(DEEP_RATES))

_TELLING = ("normal 5/3", "uniform", "normal 1")
_OTHER_INITS = ("normal 0.3", "glorot", "activation-aware")
_DEEP = (
    _problem("poisson", "uniform", 50),
    _problem("poisson", "normal 0.3", 32),
    *_problems("poisson", _TELLING, (32,)),
)
_DEEPER = _problem("poisson", "normal 5/3", 50)
_TWENTY_SEEDS = (  # problem, the rate of all optimizers
    (_problem("poisson", "uniform", 32), 3e-3),
    (_DEEPER, 1e-3),
)
# Four that nothing was chosen on, and three of the hard ones again, on fresh seeds.
_FRESH = (
    _problem("poisson", "normal 0.3", 24),
    _problem("poisson", "uniform", 24, activation="gelu"),
    _problem("poisson", "normal 1.4", 50),
    *_DEEP[:2],
    _DEEPER,
    _problem("poisson", "normal 0.3", 50),
)
# Milder problems between them.
_AROUND = (
    _problem("poisson", "normal 1", 50),
    _problem("poisson", "normal 0.3", 16),
    _problem("poisson", "glorot", 32),
)
SOLVED = tuple(
    _problem(equation, "glorot", 4, width=64, steps=10_000)
    for equation in (
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
    *_problems("poisson", ("uniform",), (8, 50, 4, 16, 32, 2)),
    *(
        _problem("poisson", "uniform", depth, steps=1500 * 51 // (depth + 1))
        for depth in (8, 4, 16, 2)
    ),
)
IN_UNITS = tuple(
    _problem(equation, "uniform", 4)
    for equation in (
        "poisson",
        "poisson, loss times 1e-4",
        "poisson, loss times 1e-8",
        "poisson, loss times 1e4",
    )
)
_short = partial(_problems, steps=1000)
_CPU = (
    *_short("poisson", _TELLING, (32, 16)),
    *_short("burgers", _TELLING, (8,)),
    *_short("allen_cahn", ("normal 5/3",), (8,)),
    *_short("helmholtz_4_4", ("normal 5/3",), (8,)),
    *_short("poisson", (*_TELLING, *_OTHER_INITS), (8, 4)),
    *_short("poisson", ("uniform",), (8,), activation="sin"),
    *_short("poisson", ("uniform",), (8,), activation="silu"),
)

PRESETS = {
    "smoke": Preset(
        entries(
            "smoke",
            _problems("poisson", ("normal 1", "uniform"), (2,), width=8, steps=20),
            chains(
                ["none", "StableGrad", "StableGrad (reference: residuals)"], ["AdamW"]
            ),
        ),
        SMOKE,
        "seconds",
        "every part of the machinery; its errors mean nothing",
    ),
    "twenty-seeds": Preset(
        [
            group
            for problem, rate in _TWENTY_SEEDS
            for group in entries(
                "twenty-seeds",
                [problem],
                (
                    *chains(
                        ["StableGrad"], ["AdamW", "AdamW (b2=0.99)", "AdamW (b2=0.9)"]
                    ),
                    "AdamW (b2=0.9)",
                    "clip + AdamW",
                    *chains(["none"], ["AdamW", "Adam (eps=1e-16)"]),
                    "StableGrad (reference: field) + AdamW",
                    "StableGrad (reference: residuals) + AdamW",
                    "StableGrad (reference: residuals, max_reference_growth=2) + AdamW",
                ),
                lambda _, rate=rate: (rate,),
            )
        ],
        Protocol((), tuple(range(200, 220))),
        "1 hour on 2 idle cores",
        "ten optimizers at one rate, where clipping and b2=0.9 fail on some seeds",
    ),
    "cpu": Preset(
        entries("cpu", _CPU, BEFORE_ADAMW, _rates(CPU_RATES)),
        Protocol((0, 1), tuple(range(100, 106))),
        "3 hours on 2 idle cores",
        "25 problems of 4 equations, depth 4 to 32, 20 optimizers",
        workers=2,
    ),
    "behind": Preset(
        [
            *_deep(
                "behind",
                _DEEP[:3],
                (
                    *BEFORE_MUON,
                    "GradientStabilizer (0.7, 0.9) + Muon",
                    "Muon (eps=1e-30)",
                    CLIPPED_WITHOUT_EPS,
                ),
            ),
            *_deep("behind", (_DEEP[0], _DEEP[2]), ON_A_PART),
            *_deep(
                "behind",
                _DEEP[:1],
                (*chains(["none", "clip"], ["AdamW (b2=0.9)"]), "AdamW"),
            ),
            *_deep(
                "behind",
                _DEEP[:3],
                (
                    *BEFORE_SOAP,
                    *chains(
                        ["normalize all arrays together", "GradientStabilizer"],
                        ["Muon"],
                    ),
                    "StableGrad + AdamW (b2=0.9)",
                ),
            ),
            *_deep("behind", (_DEEP[0], _DEEP[2]), OTHER_BASES),
            *_deep("behind", _DEEP[3:], (*BEFORE_MUON, "AdamW (b2=0.9)")),
            *_deep(
                "behind",
                _DEEP[:3],
                chains(
                    ["StableGrad (reference: residuals)", "autoscaled normalization"],
                    ["Muon"],
                ),
            ),
        ],
        Protocol((0, 1, 2), tuple(range(300, 310)), lowest_worst_with_margin),
        "2 hours on 2 idle cores",
        "optimizers behind scale control, or behind a part of it, depth 32 and 50",
        workers=2,
    ),
    "confirm": Preset(
        [
            *_deep("confirm", _FRESH, (*BEFORE_MUON, CLIPPED_WITHOUT_EPS)),
            *_deep(
                "confirm",
                (_DEEP[0], _DEEPER),
                chains(["StableGrad", "normalize per array"], ["Muon (warm-up)"]),
            ),
            *_deep("confirm", _FRESH, ("normalize per array + SOAP",)),
            *_deep("confirm", _AROUND, (*BEFORE_MUON, "normalize per array + SOAP")),
        ],
        Protocol((0, 1, 2), tuple(range(400, 420)), lowest_worst_with_margin),
        "2 hours on 2 idle cores",
        "what behind recommends, on fresh seeds and on problems between and around",
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
        entries("units", IN_UNITS, UNITS_RATES, lambda o: (UNITS_RATES[o.name],)),
        Protocol((), tuple(range(700, 710))),
        "5 minutes on 1 idle core",
        "the loss in four units, each optimizer at one rate, depth 4",
    ),
}


def training(settings: Settings, phase: Phase) -> Training:
    """Makes the training of the settings; both phases are scored on the same grid."""
    del phase
    equation, steps = shared_problem(settings["equation"]), settings["steps"]
    network = Network(
        settings["depth"],
        settings["width"],
        settings["activation"],
        **INITS[settings["init"]],
        embedding=equation.embedding,
    )
    return Training(
        Pinn(equation, network),
        Rule.from_settings(settings),
        record_steps(steps, early=8, even=12),
        evaluation(equation),
    )


SUITE = Suite(
    "pinn",
    "physics-informed networks; errors are relative L2",
    PRESETS,
    training,
    partial(keep_error, failure=FAILURE_ERROR),
)

"""Error and failures at every learning rate: nothing is tuned, every rate is run."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from benchmarks.lib.curves import Curves
from benchmarks.lib.optimizers import chains
from benchmarks.lib.runs import Phase, Record, Run, Settings
from benchmarks.lib.suite import (
    Entry,
    Preset,
    Protocol,
    Suite,
    entries,
    keep_error,
    problems,
)
from benchmarks.lib.train import Rule, Training, record_steps
from benchmarks.tasks.images.data import load
from benchmarks.tasks.images.models import MODELS
from benchmarks.tasks.images.task import Classifier, Recipe, in_parts, on_device
from benchmarks.tasks.pinn.network import Network
from benchmarks.tasks.pinn.problems import shared_problem
from benchmarks.tasks.pinn.task import FAILURE_ERROR, Pinn, evaluation

# The package's; plain "SOAP" has the absolute eps of the released code.
_SOAP = "SOAP (relative eps)"
# What a reader would try where layers may vanish, and the controls that could show that
# scale control is not needed.
TELLING = (
    *("SOAP", _SOAP, "StableGrad + SOAP"),
    *("Muon", "range-safe Muon", "StableGrad + Muon"),
    *("AdamW (b2=0.9)", "AdamW (b2=0.9, eps=1e-16)", "StableGrad + AdamW (b2=0.9)"),
)
EVERY = (
    *TELLING,
    *chains(["none", "StableGrad"], ["AdamW"]),
    *chains(["StableGrad"], ["range-safe Muon", _SOAP]),
    *chains(
        ["clip", "normalize per array"],
        ["Muon", "range-safe Muon", _SOAP, "AdamW (b2=0.9)", "AdamW"],
    ),
    *("SOAP (eps=1e-16)", "Muon (eps=1e-16)", "SOAP (normalize_updates)"),
    *("LAMB", "LARS", "NovoGrad"),  # the nearest kin
)
_MUON_PAIR, _SOAP_PAIR, _ADAMW_PAIR = (
    chains(["none", "StableGrad"], [base]) for base in ("Muon", _SOAP, "AdamW (b2=0.9)")
)
# Factors of two, to where both ends are worse on most problems.
_COMMON = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
_LOWER, _HIGHER = (1.25e-4, 2.5e-4), (6.4e-2, 1.28e-1)
RATES: Mapping[str, tuple[float, ...]] = {
    **dict.fromkeys(
        ("AdamW", "AdamW (b2=0.9)", "AdamW (b2=0.9, eps=1e-16)"), _LOWER + _COMMON
    ),
    "SOAP (normalize_updates)": _LOWER + _COMMON,
    **dict.fromkeys(
        ("Muon", "range-safe Muon", "Muon (eps=1e-16)"), _COMMON + _HIGHER[:1]
    ),
    "LAMB": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2),
    "NovoGrad": _COMMON + _HIGHER,
    # Its rate multiplies a trust coefficient of 0.001.
    "LARS": (0.0625, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0),
}
_HIGH_RATES = dict.fromkeys(("Muon", _SOAP), _COMMON + _HIGHER)
SEEDS = tuple(range(800, 805))
PROTOCOL = Protocol((), SEEDS, None)


def _problem(
    task: str,
    init: str,
    depth: int,
    *,
    network: str = "perceptron",
    width: int = 32,
    steps: int = 1000,
) -> Settings:
    (problem,) = problems(
        task=[task],
        network=[network],
        init=[init],
        depth=[depth],
        width=[width],
        steps=[steps],
    )
    return problem


def _curves(
    preset: str,
    cells: Iterable[Settings],
    optimizers: Iterable[str],
    rates: Mapping[str, tuple[float, ...]] = RATES,
) -> list[list[Entry]]:
    return entries(preset, cells, optimizers, lambda o: rates.get(o.base, _COMMON))


# Depth 24, and 16 where a step costs more.
_DEPTHS = (
    ("poisson", 24),
    ("reaction-diffusion", 24),
    ("poisson", 50),
    ("wave", 24),
    ("burgers", 16),
)


def _deep(init: str) -> list[Settings]:
    return [_problem(task, init, depth) for task, depth in _DEPTHS]


_DEFAULT, _GLOROT = _deep("uniform"), _deep("glorot")
_RESIDUAL = [
    _problem(task, "uniform", 24, network="residual")
    for task in ("poisson", "reaction-diffusion")
]
_SOLVED = [
    _problem(task, "glorot", 4, width=64)
    for task in (
        "allen_cahn, periodic, exact start",
        "burgers, 128 points",
        "wave, exact start and ends",
        "helmholtz_4_4, Fourier features",
        "helmholtz_1_4, Fourier features",
        "poisson, 128 points",
    )
]
_PAPER = _problem(
    "allen_cahn, periodic, exact start", "glorot", 4, width=64, steps=5_000
)
_CONV = _problem("digits", "gain 0.75", 24, network="convolutional", width=8, steps=200)

PRESETS = {
    "smoke": Preset(
        _curves(
            "smoke",
            [_problem("poisson", "uniform", 2, width=8, steps=5)],
            ("range-safe Muon", "AdamW (b2=0.9, eps=1e-16)"),
        ),
        Protocol((), (100, 101, 102), None),
        "seconds",
        "every part of the machinery; its errors mean nothing",
    ),
    "controls": Preset(
        _curves("controls", _DEFAULT[:1], EVERY),
        PROTOCOL,
        "45 minutes on 2 idle cores",
        "Poisson's equation, 24 layers: every chain and control",
        workers=2,
    ),
    "deep": Preset(
        [
            *_curves("deep", _DEFAULT[1:3], TELLING),
            *_curves("deep", _DEFAULT[3:], (*_MUON_PAIR, *_SOAP_PAIR, *_ADAMW_PAIR)),
            *_curves("deep", _DEFAULT[3:], ("range-safe Muon",)),
            *_curves("deep", _DEFAULT[1:], ("clip + Muon",)),
            *_curves(
                "deep",
                _DEFAULT[1:3],
                chains(["normalize per array"], ["Muon", _SOAP]),
            ),
        ],
        PROTOCOL,
        "70 minutes on 2 idle cores",
        "the other deep networks, from Equinox's default weights",
        workers=2,
    ),
    "initialization": Preset(
        [
            *_curves(
                "initialization",
                _GLOROT[:1],
                (*_MUON_PAIR, *_SOAP_PAIR, "clip + Muon"),
                {},
            ),
            *_curves("initialization", _GLOROT[1:], (*_MUON_PAIR, _SOAP), {}),
            *_curves("initialization", _GLOROT[:1], _ADAMW_PAIR),
        ],
        PROTOCOL,
        "30 minutes on 2 idle cores",
        "the same networks from Glorot weights",
        workers=2,
    ),
    "preserving": Preset(
        _curves("preserving", _deep("gradient_preserving"), ("Muon", _SOAP), {}),
        PROTOCOL,
        "20 minutes on 2 idle cores",
        "the same from the initializer that preserves the gradient",
        workers=2,
    ),
    "conv": Preset(
        _curves(
            "conv",
            [_CONV],
            (
                *_MUON_PAIR,
                *_ADAMW_PAIR,
                *("range-safe Muon", _SOAP, "AdamW (b2=0.9, eps=1e-16)", "clip + Muon"),
            ),
        ),
        PROTOCOL,
        "15 minutes on 2 idle cores",
        "the plain convolutional net of 24 layers, on digits",
        workers=2,
    ),
    "residual": Preset(
        _curves("residual", _RESIDUAL, (*_MUON_PAIR, _SOAP), _HIGH_RATES),
        PROTOCOL,
        "15 minutes on 2 idle cores",
        "24 layers with shortcuts and gates that start at 0",
        workers=2,
    ),
    "solved": Preset(
        [
            *_curves("solved", _SOLVED, _SOAP_PAIR, _HIGH_RATES),
            *_curves("solved", _SOLVED, _MUON_PAIR, _HIGH_RATES),
        ],
        PROTOCOL,
        "40 minutes on 2 idle cores",
        "six problems that the field solves, 4 layers",
        workers=2,
    ),
    "paper": Preset(
        _curves("paper", [_PAPER], chains(["none", "normalize per array"], [_SOAP])),
        PROTOCOL,
        "15 minutes on 2 idle cores",
        "Allen-Cahn as papers set it, at a budget that two cores can pay",
        workers=2,
    ),
}


def training(settings: Settings, phase: Phase) -> Training:
    """Makes the training of the settings; every run is scored on the test points."""
    del phase
    if settings["network"] == "convolutional":
        return _classifier(settings)
    equation, steps = shared_problem(settings["task"]), settings["steps"]
    network = Network(
        settings["depth"],
        settings["width"],
        initializer=settings["init"],
        embedding=equation.embedding,
        residual=settings["network"] == "residual",
    )
    return Training(
        Pinn(equation, network),
        Rule.from_settings(settings),
        record_steps(steps, early=4, even=6),
        evaluation(equation),
    )


def _classifier(settings: Settings) -> Training:
    data, steps = load(settings["task"]), settings["steps"]
    name = f"plain-{settings['depth']}, {settings['init']}"
    model = MODELS[name](
        width=settings["width"], norm="none", num_classes=data.num_classes
    )
    return Training(
        Classifier(on_device(data), model, Recipe.for_data(data), 32, steps),
        Rule.from_settings(settings, warm_up=True),
        record_steps(steps, early=3, even=6),
        in_parts(data, "test", 10_000),
        side_by_side=1,
    )


def keep(run: Run, curves: Curves) -> Record:
    """Keeps the relative L2 error, or the share of wrong images, and its curve."""
    if run.settings["network"] != "convolutional":
        return keep_error(run, curves, FAILURE_ERROR)
    wrong = {"error": 1 - curves.scores["accuracy"]}
    failure = 1 - load(run.settings["task"]).failure_accuracy
    return keep_error(run, replace(curves, scores=wrong), failure)


SUITE = Suite(
    "rates",
    "error and failures against the learning rate; nothing is tuned",
    PRESETS,
    training,
    keep,
)

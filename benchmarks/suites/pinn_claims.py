"""What a text may say of two arms, if the runs carry it."""

from benchmarks.lib.claims import Claim
from benchmarks.lib.summary import Cell, cell_of
from benchmarks.suites.pinn import IN_UNITS, SOLVED

CELL = ("problem", "activation", "init", "depth", "width", "steps")


def _poisson(init: str, depth: int, activation: str = "tanh") -> Cell:
    return "poisson", activation, init, depth, 32, 1500


NATURAL, VANISHING = _poisson("uniform", 50), _poisson("normal 0.3", 32)
EXPLODING, SHALLOWER = _poisson("normal 5/3", 32), _poisson("uniform", 32)
HARD = (NATURAL, VANISHING, EXPLODING)
DEEPER = _poisson("normal 5/3", 50)
# In between and around; nothing was chosen on these.
GELU, LESS_DEEP = _poisson("uniform", 24, "gelu"), _poisson("normal 0.3", 24)
LESS_STEEP, VANISHED = _poisson("normal 1.4", 50), _poisson("normal 0.3", 50)
SHORT = _poisson("normal 0.3", 16)
HEALTHY = (_poisson("normal 1", 50), _poisson("glorot", 32))
FRESH = (GELU, LESS_DEEP, LESS_STEEP, VANISHED, DEEPER, SHORT, *HEALTHY)
SEVEN_DEEP = (NATURAL, VANISHING, VANISHED, DEEPER, GELU, LESS_DEEP, LESS_STEEP)
SHALLOW = tuple(cell_of(settings, CELL) for settings in SOLVED)
UNITS = tuple(cell_of(settings, CELL) for settings in IN_UNITS)
SMALL = tuple(cell for cell in UNITS if "times 1e-" in cell[0])
OURS = "StableGrad | Muon"
BEHIND_ADAM = "StableGrad | AdamW b2=0.9"

CLAIMS = (
    *(
        Claim(sentence, "fails less", BEHIND_ADAM, other, (SHALLOWER, DEEPER))
        for sentence, other in (
            ("With b2=0.9, StableGrad fails less often than AdamW.", "none | AdamW"),
            ("It fails less often than a clip before AdamW.", "clip 1 | AdamW"),
            ("It fails less often than b2=0.9 alone.", "none | AdamW b2=0.9"),
        )
    ),
    Claim(
        "Before Muon, StableGrad fails less often than nothing.",
        "fails less",
        OURS,
        "none | Muon",
        (*HARD, GELU, LESS_STEEP, DEEPER, VANISHED),
    ),
    *(
        Claim(
            f"Over seven deep starts {one} before Muon fails less often than {name}.",
            "fails less",
            f"{one} | Muon",
            other,
            SEVEN_DEEP,
            together=True,
        )
        for one in ("StableGrad", "unit norm by leaf")
        for name, other in (
            ("nothing", "none | Muon"),
            ("a clip", "clip 1 | Muon"),
            ("a clip with eps=1e-30", "clip 1 | Muon eps=1e-30"),
        )
    ),
    Claim(
        "The unit norm of each leaf errs less before SOAP than before Muon.",
        "errs less",
        "unit norm by leaf | SOAP",
        "unit norm by leaf | Muon",
        (*SEVEN_DEEP, *HEALTHY),
    ),
    Claim(
        "Muon's eps=1e-30 does not replace it.",
        "fails less",
        OURS,
        "none | Muon eps=1e-30",
        (NATURAL, VANISHING),
    ),
    Claim(
        "A clip before Muon fails more often than it.",
        "fails less",
        OURS,
        "clip 1 | Muon",
        (NATURAL, VANISHING, VANISHED, GELU),
    ),
    Claim(
        "A clip before Muon errs more than it.",
        "errs less",
        OURS,
        "clip 1 | Muon",
        (NATURAL, VANISHING),
    ),
    Claim(
        "One unit norm for the whole gradient fails more often than it.",
        "fails less",
        OURS,
        "unit norm | Muon",
        (NATURAL, VANISHING),
    ),
    Claim(
        "Where the start explodes, a clip before Muon is level with StableGrad.",
        "is level",
        OURS,
        "clip 1 | Muon",
        (EXPLODING, LESS_STEEP, DEEPER),
    ),
    *(
        Claim(
            f"In shallow nets {what} is level with StableGrad before Muon.",
            "is level",
            OURS,
            other,
            SHALLOW,
        )
        for what, other in (
            ("a clip before Muon", "clip 1 | Muon"),
            ("Muon alone", "none | Muon"),
        )
    ),
    Claim(
        "In shallow nets SOAP alone errs less than Muon behind StableGrad.",
        "errs less",
        "none | SOAP",
        OURS,
        SHALLOW,
    ),
    *(
        Claim(
            f"{other} alone fails more often than Muon behind StableGrad.",
            "fails less",
            OURS,
            f"none | {other}",
            cells,
        )
        for other, cells in (
            ("SOAP", HARD),
            *(
                (other, (NATURAL, EXPLODING))
                for other in ("Muon b2=0.9", "AdamW warm-up", "Nadam b2=0.9", "Lion")
            ),
        )
    ),
    *(
        Claim(
            f"Before SOAP, {name} fails less often than nothing.",
            "fails less",
            f"{name} | SOAP",
            "none | SOAP",
            HARD,
        )
        for name in ("StableGrad", "unit norm by leaf", "clip 1")
    ),
    Claim(
        "The unit norm of each leaf, which has no constant, is level with StableGrad.",
        "is level",
        OURS,
        "unit norm by leaf | Muon",
        (*HARD, *FRESH),
    ),
    Claim(
        "The unit norm of each leaf errs less than StableGrad.",
        "errs less",
        "unit norm by leaf | Muon",
        OURS,
        (*HARD, *FRESH),
    ),
    Claim(
        "GradientStabilizer with Stable-SPAM's constants is level with StableGrad.",
        "is level",
        OURS,
        "GradientStabilizer .7 .9 | Muon",
        HARD,
    ),
    Claim(
        "GradientStabilizer as released is level with StableGrad.",
        "is level",
        OURS,
        "GradientStabilizer | Muon",
        HARD,
    ),
    Claim(
        "Muon behind StableGrad errs less than AdamW with b2=0.9 behind it.",
        "errs less",
        OURS,
        BEHIND_ADAM,
        HARD,
    ),
    Claim(
        "Where the loss is small, StableGrad before momentum fails less than a clip.",
        "fails less",
        "StableGrad | momentum",
        "clip 1 | momentum",
        SMALL,
    ),
    Claim(
        "Where the loss is small, StableGrad before AdamW errs less than a clip.",
        "errs less",
        "StableGrad | AdamW",
        "clip 1 | AdamW",
        SMALL,
    ),
    Claim(
        "In every unit Muon alone is level with StableGrad before it.",
        "is level",
        OURS,
        "none | Muon",
        UNITS,
    ),
    Claim(
        "Where Muon alone trains, StableGrad before it errs more.",
        "errs less",
        "none | Muon",
        OURS,
        (SHALLOWER, SHORT, *HEALTHY),
    ),
    *(
        Claim(
            f"Scaled by {name}, Muon's {part} alone fail less often than nothing.",
            "fails less",
            f"{name} on {part} | Muon",
            "none | Muon",
            (NATURAL, EXPLODING),
        )
        for name in ("StableGrad", "clip 1")
        for part in ("matrices", "biases")
    ),
    *(
        Claim(
            f"{name} on all leaves errs less than on {part} alone.",
            "errs less",
            f"{name} | Muon",
            f"{name} on {part} | Muon",
            (NATURAL, EXPLODING),
        )
        for name in ("StableGrad", "clip 1")
        for part in ("matrices", "biases")
    ),
)

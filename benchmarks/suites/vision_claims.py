"""What a text may say of two treatments of a classifier, if the runs carry it."""

from benchmarks.lib.arms import Arm
from benchmarks.lib.claims import Claim
from benchmarks.lib.summary import Cell, cell_of
from benchmarks.suites.vision import CONSTANT, PRESETS, Norm

CELL = ("data", "norm", "model", "width", "optimizer", "rate", "batch", "steps")


def _cells(presets: tuple[str, ...], norm: Norm, *treatments: str) -> tuple[Cell, ...]:
    """Those in which each of the treatments has the best of its rates."""
    has: dict[Cell, set[str]] = {}
    for entry in (e for preset in presets for e in PRESETS[preset].entries):
        if len(entry.learning_rates) > 1 and entry.settings["norm"] == norm:
            cell = cell_of(entry.settings, CELL)
            has.setdefault(cell, set()).add(Arm.of(entry.settings["arm"]).treatment)
    return tuple(cell for cell in has if has[cell].issuperset(treatments))


CLAIMS = (
    *(
        Claim(
            f"Without BatchNorm StableGrad {sentence}.",
            says,
            CONSTANT,
            other,
            _cells(("cpu", "muon", "cifar-resnet20"), "none", CONSTANT, other),
        )
        for sentence, says, other in (
            ("errs less than nothing", "errs less", "none"),
            ("is level with a clip", "is level", "clip 1"),
            ("is level with each leaf's unit norm", "is level", "unit norm by leaf"),
        )
    ),
    *(
        Claim(
            f"With BatchNorm Gradient Autoscaled Normalization is level with {name}.",
            "is level",
            "GradientAutoscaled",
            other,
            _cells(
                ("cpu", "autoscaled", "cifar-autoscaled"),
                "batch",
                "GradientAutoscaled",
                other,
            ),
        )
        for name, other in (("nothing", "none"), ("its mean removal", "mean removal"))
    ),
)

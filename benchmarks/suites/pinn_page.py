"""The page of the physics-informed networks."""

from collections.abc import Mapping

from matplotlib.figure import Figure

from benchmarks.lib.optimizers import chains
from benchmarks.report.figures import depth_figure
from benchmarks.report.pages import Page
from benchmarks.report.scores import Quantity, Score, Table
from benchmarks.tasks.pinn.task import FAILURE_ERROR

PROBLEM = ("equation", "activation", "init", "depth", "width", "steps")
_INITS = {
    "uniform": "Equinox's default",
    "glorot": "Glorot",
    "activation-aware": "activation-aware",
}
# The optimizers of the figure of depths; the tables have all of them.
_DRAWN = (
    *chains(["none", "clip", "StableGrad", "GradientStabilizer"], ["AdamW"]),
    *chains(["none", "StableGrad"], ["AdamW (b2=0.9)"]),
    *chains(["clip", "StableGrad", "normalize per array"], ["Muon"]),
)


def _init(name: str) -> str:
    return _INITS.get(name, name.replace("normal", "gain"))


def _label(
    equation: str, activation: str, init: str, depth: int, width: int, steps: int
) -> str:
    return (
        f"{equation}, {activation}, {_init(init)}, depth {depth}, width {width}, "
        f"{steps} steps"
    )


def _depth(table: Table) -> Figure | None:
    """Draws error against depth, at equal steps and at equal steps times kernels."""
    groups: dict[str, dict[int, Mapping[str, Score]]] = {}
    for problem, column in sorted(table.items(), key=lambda item: item[0][3]):
        equation, activation, init, depth, _, steps = problem
        start = f"{equation}, {activation}, {_init(init)}"
        for amount in (f"{steps} steps", f"steps x kernels = {steps * (depth + 1)}"):
            drawn = {name: column[name] for name in _DRAWN if name in column}
            groups.setdefault(f"{start}, {amount}", {})[depth] = drawn
    return depth_figure(groups, FAILURE_ERROR)


PAGE = Page(
    "Physics-informed networks",
    f"""\
Relative L2 errors after the last step, at most 1, which is the error of predicting
zero. A run fails if its error is above {FAILURE_ERROR} or not a number. The learning
rate of each optimizer is the one of its set with the lowest median error over the
tuning seeds, unless a preset names another rule or one rate. All optimizers have equal
steps, initial weights and points; float32 with products at the highest precision;
learning rates fall to 0 along a half cosine. Networks are perceptrons; "gain g" draws
weights from N(0, g^2 / fan_in).""",
    PROBLEM,
    _label,
    Quantity("relative L2 error", largest=1.0),
    FAILURE_ERROR,
    {
        "twenty-seeds": "Ten optimizers at one learning rate for all, on two problems "
        "where clipping or `b2=0.9` fails on some seeds. One rate favours the "
        "optimizers that it suits: compare failures and not errors.",
        "cpu": "Four equations, six initializations, depth 4 to 32, and twenty "
        "optimizers, most of them AdamW behind a method. Six seeds tell few of them "
        "apart on one problem: read the overview.",
        "behind": "Muon, SOAP and others behind a method, on deep networks. From "
        "Equinox's default and from gain 0.3 gradients vanish, and Muon's and SOAP's "
        "`eps` is larger than what it is added to. From gain 5/3 gradients explode. "
        "The best learning rate often lies next to one at which runs fail, and the "
        "margin takes a lower one: differences of a few times between methods that "
        "train are differences of the rate.",
        "confirm": "The recommendations of `behind` on fresh seeds, on its hard "
        "problems and on others that nothing was chosen on, three of them mild.",
        "solved": "Six problems with what the field builds in: Fourier features "
        "(Helmholtz, wave, Allen-Cahn, whose features are periodic in x), initial "
        "values that hold exactly (wave, Allen-Cahn), residual weights that decay in "
        "time (Allen-Cahn). The wave vectors of the features are drawn once, with a "
        "standard deviation set with the solution's frequencies in mind, alike for all "
        "optimizers. Compare jaxpi (arXiv 2308.08468) and PINNacle (arXiv 2306.08827), "
        "which have other networks, points and steps.",
        "depth": "The same problem at depth 2 to 50, at equal steps and at as many "
        "steps as make the same number of steps times kernels, a stand-in for equal "
        "time.",
        "units": "The loss multiplied by 1e-8 to 1e4, with one learning rate in all "
        "units, chosen in the unit 1. A clip's threshold is in the units of the loss; "
        "StableGrad and normalization per array have no unit.",
    },
    {"cpu": ("depth",), "depth": ("depth",)},
    {"depth": _depth},
)

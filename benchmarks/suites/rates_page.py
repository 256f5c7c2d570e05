"""The page of the learning-rate curves."""

from benchmarks.report.pages import Page
from benchmarks.report.scores import Quantity
from benchmarks.tasks.pinn.task import FAILURE_ERROR

_INITS = {
    "uniform": "Equinox's default",
    "glorot": "Glorot",
    "gradient_preserving": "gradient-preserving",
}


def _label(
    task: str, network: str, init: str, depth: int, width: int, steps: int
) -> str:
    kind = "" if network == "perceptron" else f"{network}, "
    return (
        f"{task}, {kind}{_INITS.get(init, init)}, depth {depth}, width {width}, "
        f"{steps} steps"
    )


PAGE = Page(
    "Error and failures against the learning rate",
    f"""\
Each optimizer is run at every learning rate of a grid of factors of two, with the same
five seeds at each. Nothing else is tuned: weight decay is 0, `b2` is the default unless
a name says otherwise, and only the convolutional net has a warm-up (5 % of the steps).
Rates fall to 0 along a half cosine. All optimizers have equal steps, initial weights
and points or batches. "Smaller eps" is 1e-16 in place of 1e-8; "range-safe norm" is
Muon with its matrices divided by their largest entry before the norm, and Adam's `eps`
1e-16.

The error is relative L2, at most 1, which predicting zero has; a run fails above
{FAILURE_ERROR}. For digits the error is the share of wrong images. The plan that was
written before the first run, and what departed from it, are in
`benchmarks/rates_plan.md`.""",
    ("task", "network", "init", "depth", "width", "steps"),
    _label,
    Quantity("error", largest=1.0),
    FAILURE_ERROR,
    {
        "controls": "The gradients of the first layers vanish. Every optimizer and "
        "control.",
        "deep": "Three more equations, and Poisson's at twice the depth.",
        "initialization": "The same networks as above from Glorot weights.",
        "preserving": "The same from `activation_aware_normal(jnp.tanh, "
        'preserve="gradient")`, whose hidden weights have the variance of Glorot\'s.',
        "conv": "Without BatchNorm, from a gain at which gradients vanish.",
        "residual": "Gates start at 0, so that the network starts with one layer.",
        "solved": "Problems that networks of 4 layers solve with more steps "
        "([preset solved](pinn.md#preset-solved)).",
        "paper": "Published errors on this equation, of networks of width 256 after "
        "300,000 steps, are 5.4e-5 (jaxpi, arXiv 2308.08468) and 3.5e-6 (SOAP with "
        "PirateNet, arXiv 2502.00604). Here the network has a quarter of the width and "
        "a sixtieth of the steps.",
    },
    # Tables alone: a page has six figures at most.
    shown=dict.fromkeys(("preserving", "paper"), ()),
)

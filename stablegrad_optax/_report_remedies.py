"""The remedies for a bad scale of the gradients: the one table that all advice reads.

The order is that of cost: each remedy needs no more work than the next.
"""

from typing import NamedTuple

# The verdicts of a report, the gravest first.
VERDICTS = (
    "non-finite",
    "vanishing",
    "mostly below Adam's eps",
    "exploding at initialization",
    "unbalanced between layers",
    "large",
    "dead weights",
    "no trouble seen",
)

_SMALL = ("vanishing", "mostly below Adam's eps", "unbalanced between layers")
_LARGE = ("exploding at initialization", "large")


class Remedy(NamedTuple):
    """Describes one thing to try."""

    name: str
    advice: str  # an imperative, without a full stop
    verdicts: tuple[str, ...]  # the verdicts for which it may help


REMEDIES = (
    Remedy(
        "initializer",
        "draw new weights, initialize_weights(params, key); for relu pass he_normal(), "
        "for gelu or silu activation_aware_normal(activation)",
        (*_SMALL, *_LARGE),
    ),
    Remedy("eps", "set the optimizer's eps=1e-16 (Adam, SOAP or Muon)", _SMALL),
    Remedy(
        "learning rate",
        "tune the learning rate in factors of about 3",
        (*_SMALL, *_LARGE),
    ),
    Remedy(
        "b2",
        "use b2=0.9 in Adam; a clip shrinks all layers alike and seldom helps",
        _SMALL,
    ),
    Remedy(
        "clip",
        "clip with optax.clip_by_global_norm(1.0), or use b2=0.9 in Adam",
        _LARGE,
    ),
    Remedy(
        "scale control",
        "put stablegrad() before the optimizer, or normalize_by_leaf_norm() before "
        "Muon",
        (*_SMALL, *_LARGE),
    ),
)

# The advice for these verdicts opens with a text, and some have no remedies.
OPENINGS = {
    "large": (
        "A loss of large scale alone would explain it, and Adam does not mind that. "
        "Gradients that explode at initialization look the same: pass the first steps "
        "as history. If they explode, "
    ),
    "no trouble seen": (
        "This gradient needs none. That is no promise: compare_optimizers tries the "
        "remedies on the network itself."
    ),
    "dead weights": (
        "No scaling moves a weight without a gradient. Find out whether that is meant, "
        "as for a frozen part, or whether rectifiers are never active."
    ),
    "non-finite": (
        "Find the cause in the loss or the model, or lower the learning rate. No "
        "transformation repairs such a gradient; skip_spikes skips single steps."
    ),
}

# The square of a smaller gradient times 1 - b2 leaves the range of float32 in Adam, and
# somewhat smaller entries of a matrix leave that of Muon's norm.
EPS_REACH = 1e-17
SMALL_EPS = 1e-16


def remedies(verdict: str, *, eps_helps: bool = True) -> tuple[Remedy, ...]:
    """Lists what to try for a verdict, in this order.

    Args:
      verdict: One of ``VERDICTS``.
      eps_helps: Whether some gradients lie below the optimizer's eps and above the
        reach of a smaller one.
    """
    return tuple(
        remedy
        for remedy in REMEDIES
        if verdict in remedy.verdicts and (eps_helps or remedy.name != "eps")
    )


def advice(verdict: str, *, eps_helps: bool = True) -> str:
    """Writes the remedies of a verdict as sentences."""
    opening = OPENINGS.get(verdict, "")
    steps = remedies(verdict, eps_helps=eps_helps)
    if not steps:
        return opening
    listed = "; ".join(f"({i}) {step.advice}" for i, step in enumerate(steps, start=1))
    start = f"{opening}try" if opening else "Try"
    return (
        f"{start} in this order: {listed}. compare_optimizers compares them on the "
        "network itself."
    )

"""The advice of a report: one table, its order, and where a smaller eps ends."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stablegrad_optax import gradient_report
from stablegrad_optax._report_remedies import OPENINGS, REMEDIES, VERDICTS, remedies

STDS = {
    "vanishing": (1e-14, 1e-15),
    "mostly below Adam's eps": (1e-9, 1e-9),
    "unbalanced between layers": (1.0, 1.0, 1.0, 1e-9),
    "large": (1e5, 1e5),
}


def layers(*stds):
    rng = np.random.default_rng(0)
    return {
        f"l{i}": {"kernel": std * rng.normal(size=(32, 32))}
        for i, std in enumerate(stds)
    }


@pytest.mark.parametrize("verdict", STDS)
def test_a_report_lists_the_remedies_of_its_verdict_in_the_order_of_the_table(verdict):
    report = gradient_report(layers(*STDS[verdict]))
    assert report.verdict == verdict
    places = [report.remedy.find(remedy.advice) for remedy in remedies(verdict)]
    assert -1 not in places
    assert places == sorted(places)
    others = set(REMEDIES) - set(remedies(verdict))
    assert not any(remedy.advice in report.remedy for remedy in others)


def test_the_page_has_the_table():
    page = Path(__file__).parents[1] / "docs" / "reading_the_report.md"
    text = page.read_text().replace("`", "")
    columns = [verdict for verdict in VERDICTS if remedies(verdict)]
    assert f"| {' | '.join(columns)} |" in text
    rows = [
        f"| {remedy.advice} | "
        + " | ".join("x" if v in remedy.verdicts else "" for v in columns)
        + " |"
        for remedy in REMEDIES
    ]
    assert "\n".join(rows) in text


def test_every_verdict_has_advice():
    for verdict in VERDICTS:
        assert remedies(verdict) or verdict in OPENINGS
    assert {v for remedy in REMEDIES for v in remedy.verdicts} <= set(VERDICTS)


def test_a_clip_is_advised_against_large_gradients_alone():
    for verdict in VERDICTS:
        names = [remedy.name for remedy in remedies(verdict)]
        explodes = verdict in ("large", "exploding at initialization")
        assert ("clip" in names) == explodes


def test_eps_is_advised_only_where_it_helps():
    advice = "eps=1e-16 (Adam"
    below = layers(1.0, 1.0, 1.0, 1e-9)
    assert advice in gradient_report(below).remedy
    # No gradient is below the eps, or the optimizer has a small one already.
    above = gradient_report(layers(1.0, 1.0, 1e-4), adam_eps=0.0, muon_eps=0.0)
    assert above.verdict == "unbalanced between layers"
    assert advice not in above.remedy
    small = gradient_report(layers(1e-14, 1e-14), adam_eps=1e-16, muon_eps=1e-16)
    assert advice not in small.remedy
    # Below 1e-17 it does not reach, and the report says so.
    beyond = gradient_report(layers(1e-10, 1e-19))
    assert advice in beyond.remedy
    assert "down to about 1e-17; l1/kernel has 1e-19" in beyond.remedy
    everything = gradient_report(layers(1e-19, 1e-19))
    assert advice not in everything.remedy
    assert "down to about 1e-17" in everything.remedy
    assert "1e-30" not in str(everything)


def first_step(make, eps, magnitude):
    """Returns the first update's norm relative to that for a gradient of size one."""
    grads = {"k": jax.random.normal(jax.random.key(0), (32, 32))}
    tx = make(eps)

    def norm(grads):
        updates, _ = tx.update(grads, tx.init(grads), grads)
        return float(jnp.linalg.norm(updates["k"]))

    return norm(jax.tree.map(lambda g: magnitude * g, grads)) / norm(grads)


@pytest.mark.parametrize(
    "make",
    [
        lambda eps: optax.adam(1.0, eps=eps),
        lambda eps: optax.contrib.muon(1.0, eps=eps),
    ],
    ids=["adam", "muon"],
)
def test_what_the_advice_says_of_eps_is_true_of_optax(make):
    """An eps of 1e-16 steps as at scale one, down to some 1e-16, and never too far."""
    assert first_step(make, 1e-8, 1e-14) < 0.01
    assert first_step(make, 1e-16, 1e-14) > 0.9
    for magnitude in (1e-16, 1e-17, 1e-19, 1e-22, 1e-30):
        assert first_step(make, 1e-16, magnitude) < 1.1
    # Why nothing smaller is advised.
    assert not first_step(make, 1e-30, 1e-20) < 1e6


def test_matrices_below_the_eps_of_muon_are_counted():
    # Norms of 32 times the std: 3.2e-11 and 32.
    grads = layers(1e-12, 1.0) | {"bias": 1e-12 * np.ones(32)}
    report = gradient_report(grads)
    assert report.below_muon_eps == 1
    said = " ".join(str(report).split())
    assert "the norm of 1 of 2 matrices is below 1e-08" in said
    assert "l0/kernel" in said
    assert gradient_report(grads, muon_eps=1e-12).below_muon_eps == 0
    # Squares of float32 numbers below 1e-19 underflow, whatever the eps.
    tiny = jax.tree.map(np.float32, layers(1e-20, 1.0))
    assert gradient_report(tiny, muon_eps=0.0).below_muon_eps == 1
    assert "Muon" not in str(gradient_report(layers(1.0, 1.0)))


def test_one_element_has_no_ratio_to_its_own_deviation():
    report = gradient_report({**layers(1.0), "scale": np.ones(1), "log": np.float32(3)})
    assert "inf" not in str(report)
    constant = gradient_report({**layers(1.0), "scale": np.ones(4)})
    assert " inf " in str(constant)

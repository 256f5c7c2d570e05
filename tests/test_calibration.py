"""The calibration of the report and the table of optimizers: what is quick of them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import optimizers_table
from benchmarks.calibration import __main__ as command
from benchmarks.calibration import page
from benchmarks.calibration.networks import NETWORKS

pytestmark = pytest.mark.usefixtures("quick_compilation")


def record(name, adamw, remedy, **statistics):
    return {
        "network": name,
        "family": "MLP",
        "num_parameters": 10,
        "max_std": 1.0,
        "std_ratio": 10.0,
        "below_adam_eps": 0.0,
        "zero": 0.0,
        "num_dead": 0,
        "drift": 2.0,
        "late_ratio": 10.0,
        "optimizers": {
            "AdamW": {"learning_rate": 1e-3, "scores": adamw},
            "clip": {"learning_rate": 1e-3, "scores": remedy},
        },
        "steps": 100,
        "device": "cpu",
        "jax": "1",
        "stablegrad_optax": "1",
        "date": "2026-01-01T00:00:00+00:00",
        **statistics,
    }


BAD, GOOD = [0.8, 0.81, None, 0.83, 0.84, None], [0.1, 0.11, 0.12, 0.13, 0.14, 0.15]
RECORDS = [
    record("helped, seen", BAD, GOOD, max_std=1e6, drift=1e5),
    record("helped, not seen", BAD, GOOD),
    record("fine, not seen", GOOD, GOOD),
    record("fine, seen at first", GOOD, GOOD, max_std=1e6),
    record("fine, seen", GOOD, BAD, std_ratio=1e6, late_ratio=1e6),
    record("dead", GOOD, GOOD, num_dead=3),
    # Told apart, and yet not by much.
    record("a little", [0.12 + 0.001 * i for i in range(6)], [0.11] * 6),
]


def test_what_helps():
    assert [page.helps(r) for r in RECORDS] == [["clip"]] * 2 + [[]] * 5


def test_verdicts():
    first = [page.first_verdict(r) for r in RECORDS]
    assert first[:5] == [
        "large",
        "no trouble seen",
        "no trouble seen",
        "large",
        "unbalanced between layers",
    ]
    late = [page.late_verdict(r) for r in RECORDS]
    assert late[0] == "exploding start"
    assert late[3] == "no trouble seen"
    assert first[5] == late[5] == "dead weights"


def test_the_page_counts_false_alarms_and_misses(tmp_path, capsys):
    path = tmp_path / "calibration.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    assert command.main(["--only-page", "--results", str(path)]) == 0
    text = path.with_suffix(".md").read_text()
    assert "| the first gradient | 2 of 5 that nothing helps | 1 of 2 that" in text
    assert "| the first hundred steps | 1 of 5 that nothing helps | 1 of 2 that" in text
    assert "| helped, seen | 1e+06 | 1e+01 | 0% | 1e+05 | 1e+01 | large |" in text
    assert "7 networks" in capsys.readouterr().out


def test_a_wrong_option_costs_one_line(capsys):
    with pytest.raises(SystemExit):
        command.main(["--networks", "no such"])
    assert "no name contains 'no such'" in capsys.readouterr().err


def test_there_are_at_least_thirty_networks_of_many_kinds():
    assert len(NETWORKS) >= 30


@pytest.mark.parametrize("name", ["MLP 4", "five MLPs, one dead", "Poisson 4"])
def test_a_network_has_a_finite_gradient_and_a_relative_score(name):
    network = NETWORKS[name]()
    params = network.init(jax.random.key(0))
    loss, grads = jax.jit(jax.value_and_grad(network.loss))(
        params, network.sample(jax.random.key(1))
    )
    assert jnp.isfinite(loss)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert 0.3 < network.score(params) < 2  # untrained: about 1


def test_the_table_knows_what_optax_has():
    known = optimizers_table.optimizers()
    assert {"adamw", "momo_adam", "nadam", "sam", "muon"} <= known.keys()
    assert len(known) > 40


def test_the_table_marks_what_gets_worse_and_what_fails():
    losses = {
        "plain": 0.1,
        "stablegrad": 0.3,
        "gradient_stabilizer": None,
        "autoscaled": "TypeError",
    }
    origin = {"device": "cpu", "jax": "1", "optax": "1", "stablegrad_optax": "1"}
    records = [{"optimizer": "x", "losses": losses, "date": "2026-01-01", **origin}]
    text = optimizers_table.page(records)
    assert "| x | 0.1 | **0.3** | **failed** | TypeError |" in text

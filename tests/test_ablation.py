"""Methods on a part of the gradient: on Muon's matrices, or on the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.lib.optimizers import METHODS, Optimizer

GRADS = {
    "dense": {
        "kernel": jnp.arange(1.0, 7.0).reshape(3, 2),
        "bias": jnp.array([1e3, -1e-3]),
    },
    "out": {"kernel": jnp.ones((2, 1))},
}
MATRICES = {"dense": {"kernel": True, "bias": False}, "out": {"kernel": True}}


def changed(name):
    tx = METHODS[name]()
    return tx.update(GRADS, tx.init(GRADS), GRADS)[0]


@pytest.mark.parametrize("name", ["clip", "StableGrad"])
def test_the_two_parts_of_a_method_make_up_the_method(name):
    whole = changed(name)
    assert all(
        not np.allclose(new, old)
        for new, old in zip(jax.tree.leaves(whole), jax.tree.leaves(GRADS), strict=True)
    )
    for part, wanted in (("matrices", True), ("biases", False)):
        expected = jax.tree.map(
            lambda new, old, is_matrix, wanted=wanted: (
                new if is_matrix == wanted else old
            ),
            whole,
            GRADS,
            MATRICES,
        )
        jax.tree.map(
            np.testing.assert_array_equal, changed(f"{name} on {part}"), expected
        )


def test_they_stand_before_an_optimizer():
    tx = Optimizer.named("StableGrad on biases + Muon")(lambda count: 1e-3)
    updates, _ = tx.update(GRADS, tx.init(GRADS), GRADS, probes={})
    assert all(jnp.isfinite(u).all() and u.any() for u in jax.tree.leaves(updates))

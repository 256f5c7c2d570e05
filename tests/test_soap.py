"""SOAP against the algorithm written out in NumPy, and what its bases must do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

from benchmarks.lib.soap import soap

SHAPES = {"square": (3, 3), "tall": (3, 2), "convolution": (2, 1, 2, 4), "bias": (3,)}
RATE, B1, B2, EPS, FREQUENCY = 0.1, 0.9, 0.8, 1e-8, 3


def gradients(steps, seed=0):
    """Their scale changes along the way."""
    rng = np.random.default_rng(seed)
    return [
        {name: rng.normal(size=shape) * (1 + step) for name, shape in SHAPES.items()}
        for step in range(steps)
    ]


def literal(grads):
    """The updates of one leaf, step for step as the paper and the released code say."""
    last = grads[0].shape[-1]
    matrices = [g.reshape(-1, last) if g.ndim > 1 else g for g in grads]
    if grads[0].ndim == 1:
        m, v, updates = 0.0, 0.0, [np.zeros(last)]
        for t, g in enumerate(matrices[1:], start=1):
            m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g * g
            m_hat, v_hat = m / (1 - B1**t), v / (1 - B2**t)
            updates.append(-RATE * m_hat / (np.sqrt(v_hat) + EPS))
        return updates
    first = matrices[0]
    left, right = (1 - B2) * first @ first.T, (1 - B2) * first.T @ first
    q_left = np.linalg.eigh(left)[1][:, ::-1]
    q_right = np.linalg.eigh(right)[1][:, ::-1]
    m, v, updates = np.zeros_like(first), np.zeros_like(first), [0 * grads[0]]
    for t, g in enumerate(matrices[1:], start=1):
        m = B1 * m + (1 - B1) * g
        v = B2 * v + (1 - B2) * (q_left.T @ g @ q_right) ** 2
        m_hat = q_left.T @ m @ q_right / (1 - B1**t)
        n = m_hat / (np.sqrt(v / (1 - B2**t)) + EPS)
        updates.append((-RATE * q_left @ n @ q_right.T).reshape(grads[0].shape))
        left = B2 * left + (1 - B2) * g @ g.T
        right = B2 * right + (1 - B2) * g.T @ g
        if t % FREQUENCY == 0:
            order = np.argsort(-np.diag(q_left.T @ left @ q_left))
            q_left, v = np.linalg.qr(left @ q_left[:, order])[0], v[order]
            order = np.argsort(-np.diag(q_right.T @ right @ q_right))
            q_right, v = np.linalg.qr(right @ q_right[:, order])[0], v[:, order]
    return updates


def trajectory(tx, grads):
    state, updates, step = tx.init(grads[0]), [], jax.jit(tx.update)
    for g in grads:
        update, state = step(g, state)
        updates.append(jax.tree.map(np.asarray, update))
    return updates


def our_soap(rate=RATE):
    return soap(rate, B1, B2, EPS, FREQUENCY)


def test_updates_are_those_of_the_algorithm_written_out():
    grads = gradients(11)
    with jax.enable_x64(True):
        ours = trajectory(our_soap(), jax.tree.map(jnp.asarray, grads))
    for name in SHAPES:
        expected = literal([g[name] for g in grads])
        for step, (update, value) in enumerate(zip(ours, expected, strict=True)):
            # float64; what is left is the order of sums.
            np.testing.assert_allclose(
                update[name], value, rtol=1e-8, atol=1e-10, err_msg=f"{name}, {step}"
            )


def test_a_rotated_problem_has_the_rotated_updates():
    rng = np.random.default_rng(1)
    u, w = (np.linalg.qr(rng.normal(size=(3, 3)))[0] for _ in range(2))
    grads = [g["square"] for g in gradients(8)]
    with jax.enable_x64(True):
        plain = trajectory(our_soap(), [jnp.asarray(g) for g in grads])
        turned = trajectory(our_soap(), [jnp.asarray(u @ g @ w) for g in grads])
    for one, other in zip(plain, turned, strict=True):
        np.testing.assert_allclose(u @ one @ w, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("offset", [0, 1])
def test_runs_side_by_side_are_as_each_alone(offset):
    """`offset`: how many updates the second run is ahead of the first."""
    tx, grads = our_soap(), [gradients(8), gradients(8, seed=1)]
    grads = jax.tree.map(jnp.float32, grads)
    states = [tx.init(grads[0][0]) for _ in range(2)]
    step = jax.jit(tx.update)
    for g in grads[1][:offset]:
        _, states[1] = step(g, states[1])
    batched = jax.tree.map(lambda *x: jnp.stack(x), *states)
    together = jax.jit(jax.vmap(tx.update))
    for i in range(7):
        now = [grads[0][i], grads[1][i + offset]]
        updates, batched = together(
            jax.tree.map(lambda *x: jnp.stack(x), *now), batched
        )
        for run in range(2):
            alone, states[run] = step(now[run], states[run])
            for name in SHAPES:
                # float32: a basis is known to some 1e-5 where eigenvalues are near.
                np.testing.assert_allclose(
                    updates[name][run], alone[name], rtol=1e-3, atol=1e-5
                )


def test_bases_are_only_computed_when_they_are_due():
    """The decompositions stand in conditionals of the program of a batch, too."""
    tx = our_soap()
    states = jax.vmap(tx.init)({"kernel": jnp.ones((2, 3, 3))})
    jaxpr = jax.make_jaxpr(jax.vmap(tx.update))({"kernel": jnp.ones((2, 3, 3))}, states)
    outside = {equation.primitive.name for equation in _outside_of_cond(jaxpr.jaxpr)}
    assert "cond" in outside
    assert not outside & {"eigh", "qr", "geqrf", "householder_product"}
    assert {"eigh"} <= {e.primitive.name for e in _everywhere(jaxpr.jaxpr)}


def _outside_of_cond(jaxpr):
    return _equations(jaxpr, lambda equation: equation.primitive.name != "cond")


def _everywhere(jaxpr):
    return _equations(jaxpr, lambda equation: True)


def _equations(jaxpr, enters):
    for equation in jaxpr.eqns:
        yield equation
        if enters(equation):
            for inner in jax.tree.leaves(
                list(equation.params.values()), is_leaf=_is_jaxpr
            ):
                if _is_jaxpr(inner):
                    yield from _equations(getattr(inner, "jaxpr", inner), enters)


def _is_jaxpr(value):
    return isinstance(value, ClosedJaxpr | Jaxpr)


def test_zero_gradients_are_no_step():
    zero = jax.tree.map(jnp.zeros_like, gradients(1)[0])
    for update in trajectory(our_soap(), [zero] * 5):
        assert not any(np.any(u) for u in jax.tree.leaves(update))

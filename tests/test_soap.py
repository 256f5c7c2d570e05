"""SOAP against its algorithm in NumPy, in every range, in every kind of program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soap_reference
from cases import assert_trees_close, assert_trees_equal
from optax.contrib import MuonDimensionNumbers

from stablegrad_optax import scale_by_soap, skip_spikes
from stablegrad_optax._orthogonal import gram_schmidt

# Each side is full rank from the first gradient on: the eigenvectors of a null space
# are arbitrary, and the updates depend on them.
SHAPES = {
    "square": (4, 4),
    "tall": (5, 4),
    "convolution": (3, 2, 2, 3),
    "bias": (3,),
    "scalar": (),
}
B1, B2, EPS = 0.9, 0.8, 1e-8


def gradients(steps, shapes=SHAPES, seed=0, dtype=np.float64):
    """Their scale changes from step to step."""
    rng = np.random.default_rng(seed)
    return [
        {
            name: (rng.normal(size=shape) * 10 ** rng.uniform(-1, 1)).astype(dtype)
            for name, shape in shapes.items()
        }
        for _ in range(steps)
    ]


def trajectory(tx, grads, *, compiled=True):
    """The updates for a list of gradients, as NumPy arrays."""
    grads = [jax.tree.map(jnp.asarray, g) for g in grads]
    state, updates = tx.init(grads[0]), []
    step = jax.jit(tx.update) if compiled else tx.update
    for g in grads:
        update, state = step(g, state)
        updates.append(jax.tree.map(np.asarray, update))
    return updates


def assert_close_to_reference(updates, grads, names=None, *, rtol, **arguments):
    """Relative to the largest entry of an update."""
    for name in names or grads[0]:
        expected = soap_reference.soap([g[name] for g in grads], B1, B2, **arguments)
        for step, (update, value) in enumerate(zip(updates, expected, strict=True)):
            atol = rtol * max(1, np.abs(value).max())
            np.testing.assert_allclose(
                -update[name], value, rtol=0, atol=atol, err_msg=f"{name}, step {step}"
            )


# One transformation for each set of arguments, so that tests share its programs.
shared_soap = functools.cache(scale_by_soap)
absolute = functools.partial(shared_soap, B1, B2, EPS, relative_eps=False)


@pytest.mark.parametrize("frequency", [1, 3, 10])
def test_updates_are_those_of_the_algorithm_in_numpy(frequency):
    grads = gradients(101)
    tx = absolute(precondition_frequency=frequency)
    with jax.enable_x64(True):
        updates = trajectory(tx, grads)
    # Only the order of sums differs.
    assert_close_to_reference(updates, grads, eps=EPS, frequency=frequency, rtol=1e-11)


def test_float32_is_right_to_its_rounding():
    grads = gradients(31, dtype=np.float32)
    updates = trajectory(absolute(precondition_frequency=3), grads)
    wide = [jax.tree.map(np.float64, g) for g in grads]
    assert_close_to_reference(updates, wide, eps=EPS, frequency=3, rtol=2e-5)


def test_a_large_absolute_eps_is_that_of_the_released_code():
    """It stands next to the square root before bias correction."""
    grads = gradients(12)
    tx = scale_by_soap(B1, B2, 0.3, precondition_frequency=3, relative_eps=False)
    with jax.enable_x64(True):
        updates = trajectory(tx, grads)
    assert_close_to_reference(updates, grads, eps=0.3, frequency=3, rtol=1e-11)


def test_normalized_updates_are_those_of_the_released_code():
    grads = gradients(12)
    tx = absolute(precondition_frequency=3, normalize_updates=True)
    with jax.enable_x64(True):
        updates = trajectory(tx, grads)
    assert_close_to_reference(
        updates, grads, eps=EPS, frequency=3, normalize=True, rtol=1e-11
    )


def test_an_axis_beyond_max_precondition_size_has_no_basis():
    grads = gradients(12)
    tx = absolute(precondition_frequency=3, max_precondition_size=4)
    with jax.enable_x64(True):
        updates = trajectory(tx, grads)
    assert_close_to_reference(
        updates, grads, eps=EPS, frequency=3, max_size=4, rtol=1e-11
    )
    state = tx.init({"tall": jnp.ones((5, 4))})
    assert [basis.shape for basis in state.bases[0]] == [(1, 4, 4)]


def test_complex_arrays_have_unitary_bases():
    real, imaginary = (gradients(12, {"w": (4, 3)}, seed=seed) for seed in range(2))
    grads = [{"w": a["w"] + 1j * b["w"]} for a, b in zip(real, imaginary, strict=True)]
    # Three columns leave one eigenvector of the rows for the null space: no choice.
    with jax.enable_x64(True):
        updates = trajectory(absolute(precondition_frequency=3), grads)
    expected = soap_reference.soap([g["w"] for g in grads], B1, B2, EPS, 3)
    for update, value in zip(updates, expected, strict=True):
        np.testing.assert_allclose(-update["w"], value, rtol=0, atol=1e-10)


def test_dimension_numbers_merge_axes_to_a_matrix():
    """Kernels of convolutions in Flax's order and in Equinox's."""
    matrices = gradients(12, {"w": (12, 3)}, dtype=np.float32)
    flax = [{"w": g["w"].reshape(2, 2, 3, 3)} for g in matrices]
    equinox = [{"w": g["w"].T.reshape(3, 3, 2, 2)} for g in matrices]
    expected = [u["w"] for u in trajectory(scale_by_soap(), matrices)]

    def merged(grads, rows, columns):
        numbers = {"w": MuonDimensionNumbers(rows, columns)}
        tx = scale_by_soap(weight_dimension_numbers=numbers)
        return [u["w"] for u in trajectory(tx, grads)]

    for update, value in zip(merged(flax, (0, 1, 2), 3), expected, strict=True):
        np.testing.assert_array_equal(update.reshape(12, 3), value)
    for update, value in zip(merged(equinox, (1, 2, 3), 0), expected, strict=True):
        np.testing.assert_array_equal(update.reshape(3, 12).T, value)


def test_axes_without_a_dimension_number_index_separate_matrices():
    grads = gradients(12, {"w": (3, 2, 3)}, dtype=np.float32)
    numbers = MuonDimensionNumbers(0, 2)
    tx = scale_by_soap(weight_dimension_numbers=lambda params: numbers)
    single = trajectory(shared_soap(), [{"w": g["w"][:, 1]} for g in grads])
    for update, value in zip(trajectory(tx, grads), single, strict=True):
        np.testing.assert_allclose(update["w"][:, 1], value["w"], rtol=0, atol=1e-5)


def test_stacked_layers_are_slices():
    grads = gradients(12, {"w": (3, 4, 3), "b": (3, 4)}, dtype=np.float32)
    updates = trajectory(scale_by_soap(num_stacked_axes=1), grads)
    for i in range(3):
        single = trajectory(shared_soap(), [{k: g[k][i] for k in g} for g in grads])
        for update, value in zip(updates, single, strict=True):
            for name in update:
                # A sum over a stack may round in another order.
                np.testing.assert_allclose(update[name][i], value[name], atol=1e-5)


@pytest.mark.parametrize("exponent", [-100, -60, 60, 100])
def test_the_size_of_the_gradient_cancels(exponent):
    """Powers of two from 1e-30 to 1e30 change no bit of an update."""
    grads = gradients(25, dtype=np.float32)
    tx = shared_soap(precondition_frequency=3)
    factor = np.float32(2.0**exponent)
    scaled = [jax.tree.map(lambda x: x * factor, g) for g in grads]
    for one, other in zip(trajectory(tx, grads), trajectory(tx, scaled), strict=True):
        assert_trees_equal(one, other)


@pytest.mark.parametrize("rate", [10.0, 0.1])
def test_gradients_that_grow_or_shrink_by_sixty_orders(rate):
    """Each step by a factor of ten, or of a tenth, from one end of float32."""
    kernel = gradients(1, {"w": (4, 3)})[0]["w"]
    noise = gradients(60, {"w": (4, 3)}, seed=1)
    grads = [
        {"w": ((kernel + noise[i]["w"]) * 1e-30 ** np.sign(rate - 1) * rate**i)}
        for i in range(60)
    ]
    narrow = [{"w": g["w"].astype(np.float32)} for g in grads]
    updates = trajectory(shared_soap(B1, B2, 0.0, precondition_frequency=3), narrow)
    expected = soap_reference.soap([g["w"] for g in grads], B1, B2, 0.0, 3)
    for update, value in zip(updates[1:], expected[1:], strict=True):
        assert np.isfinite(update["w"]).all()
        size = np.abs(value).max()
        # Bases of gradients that differ tenfold each step are known to few digits.
        np.testing.assert_allclose(-update["w"] / size, value / size, atol=2e-2)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_zero_gradients_are_no_step_and_hurt_no_later_one(value):
    """Zeros come at the start, or between gradients of size ``value``."""
    grads = gradients(4, dtype=np.float32)
    zero = jax.tree.map(np.zeros_like, grads[0])
    start = [jax.tree.map(lambda x: np.float32(value) * x, g) for g in grads]
    updates = trajectory(
        shared_soap(eps=0.0, precondition_frequency=2), [*start, *[zero] * 5, *grads]
    )
    for update in updates:
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(update))
    if value == 0:
        assert not any(x.any() for u in updates[:9] for x in jax.tree.leaves(u))
    assert any(x.any() for x in jax.tree.leaves(updates[-1]))


def test_a_non_finite_gradient_shows_and_skip_spikes_recovers():
    grads = gradients(12, dtype=np.float32)
    bad = jax.tree.map(lambda x: x * np.float32(np.nan), grads[0])
    plain, guarded = shared_soap(), skip_spikes(shared_soap())
    expected = trajectory(plain, grads)
    for step in (0, 5):
        broken = [*grads[:step], bad, *grads[step:]]
        with_nan = trajectory(plain, broken)
        assert all(np.isnan(x).all() for x in jax.tree.leaves(with_nan[step]))
        skipped = trajectory(guarded, broken)
        assert not any(x.any() for x in jax.tree.leaves(skipped.pop(step)))
        for one, other in zip(skipped, expected, strict=True):
            assert_trees_close(one, other, rtol=0, atol=1e-5)


def hard_matrices(size):
    """Rank one, dead rows, a wide spectrum, nearly equal columns; and zero."""
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(size, size))
    dead = normal.copy()
    dead[size // 2 :] = 0
    graded = normal * 10.0 ** -np.linspace(0, 30, size)
    repeated = np.repeat(normal[:, :1], size, 1) + 1e-6 * normal
    rank_one = np.outer(normal[0], normal[1])
    factors = [normal, dead, graded, repeated, rank_one, np.zeros_like(normal)]
    return np.stack([f @ f.T / max(np.abs(f).max(), 1) ** 2 for f in factors])


def assert_orthonormal(bases):
    """Checks each basis up to a few roundings of float32 for each of its columns."""
    for basis in jax.tree.leaves(bases):
        gram = np.einsum("kia,kib->kab", *[np.asarray(basis, np.float64)] * 2)
        np.testing.assert_allclose(
            gram, [np.eye(basis.shape[-1])] * len(gram), atol=1e-5
        )


@pytest.mark.parametrize("size", [2, 5, 32, 33, 70])
def test_bases_stay_orthonormal_for_singular_covariances(size):
    """The update refreshes the bases of one covariance five times in float32."""
    covariances = hard_matrices(size)
    roots = [
        np.linalg.cholesky(c + 1e-30 * np.eye(size)) if i == 0 else c
        for i, c in enumerate(covariances)
    ]
    grads = {str(i): jnp.asarray(root, jnp.float32) for i, root in enumerate(roots)}
    tx = scale_by_soap(precondition_frequency=1)
    state, step = tx.init(grads), jax.jit(tx.update)
    for _ in range(6):
        _, state = step(grads, state)
        assert_orthonormal(state.bases)


@pytest.mark.parametrize("size", [3, 32, 50, 96])
def test_gram_schmidt_is_the_qr_decomposition(size):
    matrices = np.random.default_rng(0).normal(size=(3, size, size))
    with jax.enable_x64(True):
        columns = np.asarray(gram_schmidt(jnp.asarray(matrices), "highest"))
    expected = np.linalg.qr(matrices)[0]
    signs = np.sign(np.sum(columns * expected, axis=1, keepdims=True))
    np.testing.assert_allclose(columns, signs * expected, atol=1e-10)


def test_bases_stay_orthonormal_where_gradients_have_rank_one():
    """The decomposition gets columns that are nearly parallel where a direction turns.

    Each kernel's gradient has almost rank one in a network whose gradients vanish. A
    direction that the decomposition loses never comes back.
    """
    size = 32
    tx = scale_by_soap()
    vectors = np.random.default_rng(0).standard_normal((200, 2, size), np.float32)
    state, update = tx.init({"kernel": jnp.zeros((size, size))}), jax.jit(tx.update)
    for row, column in vectors:
        _, state = update({"kernel": jnp.outer(row, column)}, state)
        assert_orthonormal(state.bases)

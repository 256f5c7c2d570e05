"""The floored spread, right to 1e-5 at every dtype, scale and mean."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stablegrad_optax import _leaves, _statistics

RTOL = 1e-5  # what the docstring promises

# dtype: exponents of ten that the std may have without leaving the dtype's range.
RANGES = {
    "bfloat16": (-36, 36),
    "float16": (-3, 3),
    "float32": (-36, 37),
    "float64": (-300, 300),
    "complex64": (-36, 37),
}


def wide(g):
    """The stored numbers, in float64 or complex128."""
    return np.asarray(g).astype(np.complex128 if np.iscomplexobj(g) else np.float64)


def true_spread(g):
    """max(std, rms / 10) of the stored numbers, with no square out of range."""
    g = wide(g)
    largest = np.max(np.abs(g))
    g = g / largest
    std = np.sqrt(np.mean(np.abs(g - g.mean()) ** 2))
    return largest * max(std, np.sqrt(np.mean(np.abs(g) ** 2)) / 10)


def true_norm(g):
    g = wide(g)
    largest = np.max(np.abs(g))
    return largest * np.sqrt(np.sum(np.abs(g / largest) ** 2))


@functools.partial(jax.jit, static_argnames=("which", "num_stacked"))
def measure(tree, which="spreads", num_stacked=0):
    layout = _leaves.lay_out(tree, mask=None, stacked_axes=num_stacked)
    leaves = jax.tree.leaves(tree)
    starts = _statistics.positions(leaves[0].ravel(), layout.leaves)
    return getattr(_statistics, which)(leaves, layout, starts)


def leaf(rng, dtype, exponent, mean=0.0, shape=(16, 16)):
    """Entries mean + N(0, 1), of modulus at least 1e-2, times 10^exponent.

    Smaller entries would be subnormal at the lower end, which XLA flushes to zero.
    """
    g = rng.normal(size=shape)
    if dtype.startswith("complex"):
        g = g + 1j * rng.normal(size=shape)
        g = g + mean * np.exp(0.7j)
    else:
        g = g + mean
    low = np.abs(g.real) < 0.02
    g = np.where(low, g + 0.1, g)
    if dtype.startswith("complex"):
        g = np.where(np.abs(g.imag) < 0.02, g + 0.1j, g)
    return (g * 10.0**exponent).astype(jnp.dtype(dtype))


def bounded(dtype, exponent, mean):
    """Whether all entries stay below the dtype's maximum."""
    largest = float(ml_dtypes.finfo(dtype).max if dtype != "complex64" else 3.4e38)
    return (abs(mean) + 6) * 10.0**exponent < largest


@pytest.mark.parametrize("dtype", RANGES)
def test_right_to_1e_5_at_every_scale_and_mean(dtype):
    rng = np.random.default_rng(0)
    lowest, highest = RANGES[dtype]
    exponents = np.linspace(lowest, highest, 13)
    with jax.enable_x64(dtype == "float64"):
        for mean in (0.0, 0.3, -1.0, 3.0, 9.9, -10.1, 100.0, 1e4, 1e8):
            for exponent in exponents:
                if not bounded(dtype, exponent, mean):
                    continue
                g = leaf(rng, dtype, exponent, mean)
                np.testing.assert_allclose(
                    measure([g])[0], true_spread(g), rtol=RTOL, err_msg=f"{mean=}"
                )


@pytest.mark.parametrize("dtype", RANGES)
def test_norms_right_to_1e_5_at_every_scale(dtype):
    rng = np.random.default_rng(0)
    lowest, highest = RANGES[dtype]
    with jax.enable_x64(dtype == "float64"):
        for exponent in np.linspace(lowest, highest, 25):
            if bounded(dtype, exponent + 2, 0.0):
                g = leaf(rng, dtype, exponent)
                np.testing.assert_allclose(
                    measure([g], which="norms")[0], true_norm(g), rtol=RTOL
                )


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    exponent=st.floats(-36, 37),
    mean=st.floats(-1e6, 1e6),
    two_scales=st.booleans(),
)
def test_spread_of_any_float32_leaf(seed, exponent, mean, two_scales):
    if not bounded("float32", exponent, mean):
        mean = 0.0
    g = leaf(np.random.default_rng(seed), "float32", exponent, mean)
    if two_scales:  # half of the leaf a millionfold smaller, zero where it would flush
        small = g[:8] * np.float32(1e-6)
        g[:8] = np.where(np.abs(small) < 1e-37, 0, small)
    np.testing.assert_allclose(measure([g])[0], true_spread(g), rtol=RTOL)


def test_large_leaves_lose_no_digits_to_summation():
    """2^22 entries: XLA sums in blocks, not one by one."""
    rng = np.random.default_rng(0)
    for mean in (0.0, 1.0, 5.0):
        g = rng.normal(mean, 1, (2048, 2048)).astype(np.float32)
        np.testing.assert_allclose(measure([g])[0], true_spread(g), rtol=RTOL)


# One leaf that only the careful path can measure takes the whole tree there.
FORCING = np.full((2, 2), 1e-30, np.float32)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    exponent=st.floats(-14, 18),
    mean=st.floats(-1, 1),
)
def test_fast_and_careful_paths_agree_where_both_hold(seed, exponent, mean):
    """Squares within range, and variance above half of the mean square."""
    g = leaf(np.random.default_rng(seed), "float32", exponent, mean)
    (fast,) = measure([g])
    careful, _ = measure([g, FORCING])
    # There E[g^2] - E[g]^2 doubles the rounding of the sums.
    np.testing.assert_allclose(fast, careful, rtol=1e-6)


@pytest.mark.parametrize("size", [2**8, 1000, 2**16])
def test_no_compiler_rewriting_leaves_the_range(size):
    """XLA turns (sum / n)^2 into sum^2 / n^2, which overflows where mean^2 does not."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(size // 8, 8)) + 1
    for exponent in np.arange(10, 20, 0.5):
        g = (z * 10**exponent).astype(np.float32)
        for tree in ([g], [g, FORCING]):
            np.testing.assert_allclose(measure(tree)[0], true_spread(g), rtol=RTOL)


def test_one_scalar_condition_chooses_the_path():
    """DESIGN.md: one `lax.cond` that returns statistics, never a select on leaves."""
    tree = [np.ones((n, n), np.float32) for n in (2, 3, 4)]
    layout = _leaves.lay_out(tree, mask=None)
    starts = [np.uint32(i) for i in range(len(tree))]
    jaxpr = jax.make_jaxpr(lambda t: _statistics.spreads(t, layout, starts))(tree)
    conds = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "cond"]
    assert len(conds) == 1
    assert conds[0].invars[0].aval.shape == ()
    assert sum(out.aval.size for out in conds[0].outvars) == len(tree)


@pytest.mark.parametrize("which", ["spreads", "norms"])
def test_zeros_and_values_that_are_not_finite(which):
    bad = [np.full((2, 2), value, np.float32) for value in (np.nan, np.inf, -np.inf)]
    bad.append(np.array([[1, np.inf], [1, 1]], np.float32))
    good = [np.zeros((2, 2), np.float32), np.array([[3, -3], [3, -3]], np.float32)]
    zero, three, *rest = measure([*good, *bad], which=which)
    assert zero == 0
    np.testing.assert_allclose(three, 3 if which == "spreads" else 6, rtol=1e-6)
    assert not np.isfinite(rest).any()


def test_slices_of_a_stack_are_measured_apart():
    """At scales that no common sum could hold."""
    rng = np.random.default_rng(0)
    g = np.stack([leaf(rng, "float32", e, 2.0) for e in (-30, -5, 0, 30)])
    np.testing.assert_allclose(
        measure([g], num_stacked=1), [true_spread(s) for s in g], rtol=RTOL
    )
    np.testing.assert_allclose(
        measure([g], which="norms", num_stacked=1),
        [true_norm(s) for s in g],
        rtol=RTOL,
    )

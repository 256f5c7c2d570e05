"""Spreads and norms against NumPy float64, at every dtype, scale and mean."""

import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stablegrad_optax import _gradients, _moments, _statistics, stablegrad

# Rounding depends on how XLA compiles.
pytestmark = pytest.mark.optimized

# dtype: exponents of ten that the std may have without leaving the dtype's range.
RANGES = {
    "bfloat16": (-36, 36),
    "float16": (-3, 3),
    "float32": (-36, 37),
    "float64": (-300, 300),
    "complex64": (-36, 37),
}


def wide(g):
    """Returns the stored numbers in float64 or complex128."""
    return np.asarray(g).astype(np.complex128 if np.iscomplexobj(g) else np.float64)


def true_spread(g):
    """Computes max(std, rms / 10) of the stored numbers, with squares in range."""
    g = wide(g)
    largest = np.max(np.abs(g))
    g = g / largest
    std = np.sqrt(np.mean(np.abs(g - g.mean()) ** 2))
    return largest * max(std, np.sqrt(np.mean(np.abs(g) ** 2)) / 10)


def true_norm(g):
    g = wide(g)
    largest = np.max(np.abs(g))
    return largest * np.sqrt(np.sum(np.abs(g / largest) ** 2))


@pytest.fixture(scope="module", params=["cpu", "accelerator"])
def machine(request):
    return request.param


@pytest.fixture(scope="module")
def measure(machine):
    """Returns a function that measures leaves by the sums of either kind of machine."""

    @functools.partial(jax.jit, static_argnames=("which", "num_stacked"))
    def compiled(tree, which="spreads", num_stacked=0):
        layout = _gradients.lay_out(tree, num_stacked_axes=num_stacked)
        return getattr(_statistics, which)(jax.tree.leaves(tree), layout.leaves)

    def side_by_side(*args, cpu, default):
        return default(*args)

    def measure(tree, **kwargs):
        with pytest.MonkeyPatch.context() as patch:
            if machine == "accelerator":
                patch.setattr(_moments.lax, "platform_dependent", side_by_side)
                patch.setattr(_moments, "_compiled", _moments._moments)
            return compiled(tree, **kwargs)

    return measure


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
    """Tells whether all entries stay below the dtype's maximum."""
    largest = float(ml_dtypes.finfo(dtype).max if dtype != "complex64" else 3.4e38)
    return (abs(mean) + 6) * 10.0**exponent < largest


def rtol(mean):
    """Returns the error that the docstring allows for a mean of so many deviations."""
    return 1e-5 if abs(mean) <= 2 or abs(mean) >= 15 else 1e-3


@pytest.mark.parametrize("dtype", RANGES)
def test_right_at_every_scale_and_mean(measure, dtype):
    rng = np.random.default_rng(0)
    lowest, highest = RANGES[dtype]
    exponents = np.linspace(lowest, highest, 13)
    with jax.enable_x64(dtype == "float64"):
        for mean in (0.0, 0.3, -1.0, 2.0, 3.0, 9.9, -10.1, 100.0, 1e4, 1e8):
            for exponent in exponents:
                if not bounded(dtype, exponent, mean):
                    continue
                g = leaf(rng, dtype, exponent, mean)
                np.testing.assert_allclose(
                    measure([g])[0],
                    true_spread(g),
                    rtol=rtol(mean),
                    err_msg=f"{mean=}, {exponent=}",
                )


@pytest.mark.parametrize("dtype", RANGES)
def test_norms_right_to_1e_5_at_every_scale(measure, dtype):
    rng = np.random.default_rng(0)
    lowest, highest = RANGES[dtype]
    with jax.enable_x64(dtype == "float64"):
        for exponent in np.linspace(lowest, highest, 25):
            if bounded(dtype, exponent + 2, 0.0):
                g = leaf(rng, dtype, exponent)
                np.testing.assert_allclose(
                    measure([g], which="norms")[0], true_norm(g), rtol=1e-5
                )


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    exponent=st.floats(-36, 37),
    mean=st.floats(-20, 20),
    two_scales=st.booleans(),
)
def test_spread_of_any_float32_leaf(measure, seed, exponent, mean, two_scales):
    if not bounded("float32", exponent, mean):
        mean = 0.0
    g = leaf(np.random.default_rng(seed), "float32", exponent, mean)
    if two_scales:  # half of the leaf a millionfold smaller, zero where it would flush
        small = g[:8] * np.float32(1e-6)
        g[:8] = np.where(np.abs(small) < 1e-37, 0, small)
    # Half a leaf near zero and half about the mean have a mean of one deviation.
    np.testing.assert_allclose(measure([g])[0], true_spread(g), rtol=rtol(5.0))


@pytest.mark.parametrize("scale", [1.0, 1e30, 1e37, 1e-30])
def test_large_leaves_lose_no_digits_to_summation(measure, machine, scale):
    """2^22 entries: XLA sums in blocks, and no sum leaves the range."""
    # One by one, where XLA:CPU meets a reduction of several operands: 2^22 roundings.
    rtol = 1e-5 if machine == "cpu" else 1e-2
    rng = np.random.default_rng(0)
    for mean in (0.0, 1.0, 2.0):
        g = (rng.normal(mean, 1, (2048, 2048)) * scale).astype(np.float32)
        np.testing.assert_allclose(measure([g])[0], true_spread(g), rtol=rtol)


def test_leaves_that_need_other_units_change_nothing_for_the_rest(measure):
    """Zeros, tiny and giant leaves change no bit of the statistics of the rest."""
    rng = np.random.default_rng(0)
    g = rng.normal(0.5, 1, (3, 8, 8)).astype(np.float32)
    extreme = [np.full((2, 2), scale, np.float32) for scale in (1e-30, 0, 1e30)]
    np.testing.assert_array_equal(measure(list(g)), measure([*g, *extreme])[:3])


@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (2, 128), (125, 8), (2**13, 8)])
def test_no_compiler_rewriting_leaves_the_range(measure, shape):
    """XLA moves constants out of squares where it may, and then they overflow."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=shape) + 1
    for exponent in np.arange(-36, 35, 1.5):
        g = (z * 10**exponent).astype(np.float32)
        np.testing.assert_allclose(measure([g])[0], true_spread(g), rtol=1e-3)
        np.testing.assert_allclose(
            measure([g], which="norms")[0], true_norm(g), rtol=1e-5
        )


def lowered(platform, *shapes):
    tree = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    leaves = _gradients.lay_out(tree).leaves
    spreads = jax.jit(lambda tree: _statistics.spreads(tree, leaves))
    return spreads.trace(tree).lower(lowering_platforms=(platform,))


@pytest.mark.parametrize("platform", ["tpu", "cuda", "rocm"])
def test_an_accelerator_reads_once_and_nothing_keeps_sums_apart(platform):
    """One reduction of five operands a leaf; the compiled program has its own test."""
    text = lowered(platform, (100, 100), (200, 300)).as_text()
    assert text.count("stablehlo.reduce(") == 2
    assert "optimization_barrier" not in text


def test_a_cpu_takes_two_sums_and_on_one_condition_two_more():
    text = lowered("cpu", (100, 100)).compile().as_text()
    entry = text[text.index("\nENTRY") :]
    assert len(re.findall(r" conditional\(", text)) == 1
    assert len(re.findall(r" conditional\(", entry)) == 1
    assert len(re.findall(r" reduce\(", text)) == 2 + 2


@pytest.mark.recent_xla
def test_on_a_cpu_no_kernel_of_a_leaf_knows_its_place_in_the_vector():
    """Or XLA compiles one for every leaf: seven times adamw's time at 100 leaves."""
    grads = [jnp.ones((100, 100))] * 3
    tx = optax.chain(stablegrad(), optax.sgd(0.1))
    # The emitters that users have, not those of the other tests.
    options = {"xla_cpu_use_fusion_emitters": True}
    program = jax.jit(tx.update).lower(grads, tx.init(grads))
    text = program.compile(compiler_options=options).as_text()
    kernels = [part for part in text.split("\n\n") if "f32[100,100]" in part]
    assert not any(re.search(r" slice\(", part) for part in kernels)
    assert text.count(" dynamic-slice(") >= len(grads)


@pytest.mark.parametrize("which", ["spreads", "norms"])
def test_zeros_and_values_that_are_not_finite(measure, which):
    bad = [np.full((2, 2), value, np.float32) for value in (np.nan, np.inf, -np.inf)]
    bad.append(np.array([[1, np.inf], [1, 1]], np.float32))
    good = [np.zeros((2, 2), np.float32), np.array([[3, -3], [3, -3]], np.float32)]
    zero, three, *rest = measure([*good, *bad], which=which)
    assert zero == 0
    np.testing.assert_allclose(three, 3 if which == "spreads" else 6, rtol=1e-6)
    assert not np.isfinite(rest).any()


def test_slices_of_a_stack_are_measured_apart(measure):
    """The scales of the slices are so different that no common sum could hold them."""
    rng = np.random.default_rng(0)
    g = np.stack([leaf(rng, "float32", e, 2.0) for e in (-30, -5, 0, 30)])
    np.testing.assert_allclose(
        measure([g], num_stacked=1), [true_spread(s) for s in g], rtol=1e-5
    )
    np.testing.assert_allclose(
        measure([g], which="norms", num_stacked=1),
        [true_norm(s) for s in g],
        rtol=1e-5,
    )


@pytest.mark.parametrize("scale", [1e-36, 1e-3, 1.0, 1e30])
def test_derivatives_are_those_of_the_equation(measure, scale):
    """D sigma = sum (g - mean) dg / (n sigma), in NumPy float64, at every scale."""
    g = np.random.default_rng(0).normal(0.5, 1, (4, 5))
    scaled = (g * scale).astype(np.float32)
    derivative = jax.grad(lambda g: measure([g]).sum())(scaled)
    np.testing.assert_allclose(
        derivative, (g - g.mean()) / g.size / g.std(), rtol=1e-4, atol=1e-7
    )
    derivative = jax.grad(lambda g: measure([g], which="norms").sum())(scaled)
    np.testing.assert_allclose(derivative, g / np.sqrt(np.sum(g**2)), rtol=1e-5)

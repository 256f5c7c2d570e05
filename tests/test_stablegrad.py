"""StableGrad against its equation in NumPy, and who is scaled by whom."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import assert_trees_close, assert_trees_equal, gradients
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from stablegrad_optax import scale_factors, stablegrad

DECAY = 0.95


def spread(g):
    """Computes max(sigma, rms / 10) in float64."""
    g = np.asarray(g, np.float64)
    return max(g.std(), np.sqrt(np.mean(g**2)) / 10)


def factor(*weights, reference=1.0, eps=1e-30):
    """Returns the factor of the leaves that follow these weights, or of one weight."""
    size = sum(g.size for g in weights)
    pooled = np.sqrt(sum(g.size * spread(g) ** 2 for g in weights) / size)
    return reference / (pooled + eps) if pooled else 1.0


class Reference:
    """Computes the update literally in NumPy float64 for {layer: {leaf: array}}."""

    def __init__(self, scale_biases=True, max_reference_growth=None):
        self.scale_biases = scale_biases
        self.growth = max_reference_growth
        self.means = []  # of the references so far, after the limit

    def limit(self, reference):
        """Limits to k times the bias-corrected mean of the limited references."""
        if self.growth is None:
            return reference
        if self.means:
            ages = np.arange(len(self.means))[::-1]
            weights = DECAY**ages
            mean = np.sum(weights * self.means) / np.sum(weights)
            reference = min(reference, self.growth * mean)
        self.means.append(reference)
        return reference

    def update(self, grads, reference):
        reference = self.limit(reference)
        return {name: self.layer(layer, reference) for name, layer in grads.items()}

    def layer(self, layer, reference):
        weights = [g for g in layer.values() if g.ndim >= 2 and g.size > 1]
        scaled = {}
        for name, g in layer.items():
            if g.ndim >= 2 and g.size > 1:
                scaled[name] = g * factor(g, reference=reference)
            elif weights and self.scale_biases:
                scaled[name] = g * factor(*weights, reference=reference)
            else:
                scaled[name] = g
        return scaled


def random_tree(rng):
    """Layers of zero to three weights with biases and scalars, at random scales."""
    tree = {}
    for i in range(rng.integers(2, 5)):
        layer = {}
        for j in range(rng.integers(0, 4)):
            layer[f"weight_{j}"] = tuple(rng.integers(1, 5, rng.integers(2, 5)))
        layer["bias"] = (int(rng.integers(1, 4)),)
        if rng.random() < 0.3:
            layer["scalar"] = ()
        tree[f"layer_{i}"] = layer
    return tree


def random_gradients(rng, shapes):
    """Draws normal entries of std 1e-8 to 1e8, some with a mean of up to 30 std."""

    def leaf(shape):
        offset = rng.choice([0.0, 0.0, 0.5, 30.0])
        scale = 10.0 ** rng.uniform(-8, 8)
        return np.asarray(scale * (rng.normal(size=shape) + offset), np.float32)

    return jax.tree.map(leaf, shapes, is_leaf=lambda node: isinstance(node, tuple))


@pytest.mark.parametrize(
    "options",
    [{}, {"scale_biases": False}, {"max_reference_growth": 2.0}],
    ids=["default", "weights-only", "limited"],
)
def test_equals_the_literal_equation_over_100_steps(options):
    """Four random trees of 25 steps each, with a new reference at every step."""
    rng = np.random.default_rng(0)
    tx = stablegrad(None, **options)
    step = jax.jit(tx.update)
    for _ in range(2 if options else 4):
        shapes = random_tree(rng)
        state, reference = None, Reference(**options)
        for _ in range(50 if options else 25):
            grads = random_gradients(rng, shapes)
            state = tx.init(grads) if state is None else state
            sigma = 10.0 ** rng.uniform(-3, 3)
            updates, state = step(grads, state, prediction_grad_std=sigma)
            expected = reference.update(grads, sigma)
            # Statistics in float32 of at most 256 entries: a few units in its last
            # place, 6e-8 each; 50 more of the running mean. The difference of mean
            # square and squared mean is smaller than both by 1 + (mean / std)^2.
            rtol = 3e-6 if "max_reference_growth" in options else 1e-6
            rtol *= 1 + max(
                (g.mean() / spread(g)) ** 2
                for g in jax.tree.leaves(grads)
                if g.ndim >= 2 and g.size > 1
            )
            for actual, wanted in zip(
                jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True
            ):
                np.testing.assert_allclose(actual, wanted, rtol=rtol)


def test_biases_follow_their_layer_or_stay():
    grads = gradients()
    layer = jax.tree.map(np.asarray, grads["hidden"])
    scaled = factor(layer["kernel"])
    for scale_biases in (True, False):
        tx = stablegrad(scale_biases=scale_biases)
        updates, _ = tx.update(grads, tx.init(grads))
        np.testing.assert_allclose(
            updates["hidden"]["kernel"], layer["kernel"] * scaled, rtol=1e-6
        )
        np.testing.assert_allclose(
            updates["hidden"]["bias"],
            layer["bias"] * (scaled if scale_biases else 1),
            rtol=1e-6,
        )
        # A norm's scale has no weight under its parent.
        assert_trees_equal(updates["norm"], grads["norm"])


def test_followers_of_several_weights_take_the_pooled_factor():
    """An LSTM cell or an attention block whose weights stand side by side."""
    rng = np.random.default_rng(0)
    small, large = rng.normal(size=(2, 3)), 100 * rng.normal(size=(5, 4))
    grads = {"i": np.float32(small), "h": np.float32(large), "b": np.ones(3, "f")}
    updates, _ = stablegrad().update(grads, stablegrad().init(grads))
    pooled = np.sqrt((6 * spread(small) ** 2 + 20 * spread(large) ** 2) / 26)
    np.testing.assert_allclose(updates["b"], np.ones(3) / pooled, rtol=1e-6)


def test_followers_of_a_zero_weight_keep_their_gradient():
    """A zero weight has no scale, and it counts in the pool of several as zero."""
    grads = {
        "dead": {"kernel": np.zeros((2, 2), "f"), "bias": np.ones(2, "f")},
        "half": {
            "a": np.zeros((2, 2), "f"),
            "b": np.array([[2, -2], [2, -2]], "f"),
            "bias": np.ones(2, "f"),
        },
    }
    updates, _ = stablegrad().update(grads, stablegrad().init(grads))
    assert_trees_equal(jax.device_get(updates["dead"]), grads["dead"])
    np.testing.assert_allclose(updates["half"]["bias"], 1 / np.sqrt(2), rtol=1e-6)


def test_no_scaled_weight_exceeds_ten_references():
    """A spread much smaller than the mean is floored at a tenth of the rms."""
    rng = np.random.default_rng(0)
    for offset in (0.0, 1.0, 9.0, 11.0, 1e3, 1e6):
        g = np.float32(rng.normal(size=(8, 8)) + offset)
        updates, _ = stablegrad(3.0).update({"w": g}, stablegrad(3.0).init({"w": g}))
        rms = np.sqrt(np.mean(np.asarray(updates["w"], np.float64) ** 2))
        assert rms <= 30 * (1 + 1e-5)
        # At nine deviations the variance is a difference of two numbers near 82, each
        # with some roundings of 6e-8.
        rtol = 1e-4 if offset == 9 else 1e-5
        np.testing.assert_allclose(updates["w"], g * 3 / spread(g), rtol=rtol)


def test_eps_is_added_to_the_spread():
    grads = {"w": np.float32(1e-9 * np.random.default_rng(0).normal(size=(4, 4)))}
    tx = stablegrad(eps=1e-8)
    updates, _ = tx.update(grads, tx.init(grads))
    expected = grads["w"] / (spread(grads["w"]) + 1e-8)
    np.testing.assert_allclose(updates["w"], expected, rtol=1e-6)


def test_a_given_prediction_grad_std_overrides_the_constant():
    grads = gradients()
    tx = stablegrad(7.0)
    updates, state = tx.update(grads, tx.init(grads), prediction_grad_std=0.25)
    expected, _ = stablegrad(0.25).update(grads, tx.init(grads))
    assert_trees_equal(updates, expected)
    assert state.reference_std == 0.25


def test_missing_reference_raises_and_says_how_to_give_it():
    tx = stablegrad(None)
    with pytest.raises(ValueError, match="pass prediction_grad_std to update") as info:
        tx.update(gradients(), tx.init(gradients()))
    assert "constant reference_std" in str(info.value)


# The layers are hidden, with bias and kernel, norm, with scale, and stack.
TREE_WEIGHTS = {
    "hidden": {"bias": False, "kernel": True},
    "norm": {"scale": False},
    "stack": {"bias": False, "kernel": True},
}


@pytest.mark.parametrize(
    "weights",
    [
        TREE_WEIGHTS,
        TREE_WEIGHTS | {"norm": False},
        lambda tree: (
            jax.tree.map(lambda x: x.ndim == 2 or x.ndim == 3, tree)
            | {"stack": TREE_WEIGHTS["stack"]}
        ),
        lambda tree: jax.tree_util.tree_map_with_path(
            lambda path, _: "kernel" in jax.tree_util.keystr(path), tree
        ),
    ],
    ids=["tree", "prefix", "callable", "callable on paths"],
)
def test_weights_selects_whose_statistics_count(weights):
    grads = gradients()
    tx = stablegrad(weights=weights)
    updates, state = jax.jit(tx.update)(grads, tx.init(grads))
    expected = Reference().update(
        {
            "hidden": jax.tree.map(np.asarray, grads["hidden"]),
            "norm": jax.tree.map(np.asarray, grads["norm"]),
            # (2, 3) is a weight by default; here it follows its kernel.
            "stack": {"kernel": np.asarray(grads["stack"]["kernel"])},
        },
        1.0,
    )
    bias = grads["stack"]["bias"] * factor(np.asarray(grads["stack"]["kernel"]))
    expected["stack"]["bias"] = np.asarray(bias)
    assert_trees_close(
        jax.tree.map(np.asarray, updates), optax.tree.cast(expected, jnp.float32)
    )
    assert list(scale_factors(state, grads)) == [
        "hidden/bias",
        "hidden/kernel",
        "stack/bias",
        "stack/kernel",
    ]


def test_a_prefix_true_makes_every_leaf_below_a_weight_of_its_own():
    grads = gradients()
    tx = stablegrad(weights={"hidden": True, "norm": True, "stack": False})
    updates, _ = tx.update(grads, tx.init(grads))
    for leaf, g in [
        (updates["hidden"]["bias"], grads["hidden"]["bias"]),
        (updates["norm"]["scale"], grads["norm"]["scale"]),
    ]:
        np.testing.assert_allclose(leaf, g * factor(np.asarray(g)), rtol=1e-6)
    assert_trees_equal(updates["stack"], grads["stack"])


def test_a_masked_array_stays_and_scales_no_other():
    table, kernel = np.full((2, 2), 8.0), np.array([[2.0, -2.0], [2.0, -2.0]])
    grads = {"table": table, "kernel": kernel, "bias": np.ones(2)}
    tx = stablegrad(mask={"table": False, "kernel": True, "bias": True})
    updates, state = tx.update(grads, tx.init(grads))
    np.testing.assert_array_equal(updates["table"], table)
    np.testing.assert_allclose(updates["bias"], np.ones(2) / 2, rtol=1e-6)
    assert list(scale_factors(state, grads)) == ["bias", "kernel"]
    # The bias follows the weights that are left, and none if there is none.
    tx = stablegrad(mask={"table": False, "kernel": False, "bias": True})
    updates, state = tx.update(grads, tx.init(grads))
    assert_trees_equal(updates, grads)
    assert scale_factors(state, grads) == {}


def test_mask_and_weights_combine():
    grads = {"a": np.eye(2), "b": np.full((2, 2), 3.0), "bias": np.array([4.0, 2.0])}
    tx = stablegrad(
        weights={"a": True, "b": False, "bias": False},
        mask={"a": True, "b": False, "bias": True},
    )
    updates, _ = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(updates["a"], 2 * np.eye(2), rtol=1e-6)  # std 1/2
    np.testing.assert_array_equal(updates["b"], grads["b"])
    np.testing.assert_allclose(updates["bias"], [8, 4], rtol=1e-6)


class Cell(NamedTuple):
    kernel: Any
    bias: Any


class Module(eqx.Module):
    kernel: Any
    bias: Any
    activation: Any = eqx.field(static=True, default="tanh")


def nnx_state(kernel, bias):
    linear = nnx.Linear(*kernel.shape, rngs=nnx.Rngs(0))
    linear.kernel[...] = kernel
    linear.bias[...] = bias
    return nnx.state(linear, nnx.Param)


CONTAINERS = {
    "dict": lambda kernel, bias: {"kernel": kernel, "bias": bias},
    "list": lambda kernel, bias: [kernel, bias],
    "tuple": lambda kernel, bias: (kernel, bias),
    "NamedTuple": Cell,
    "Equinox": Module,
    "nnx": nnx_state,
    "linen boxes": lambda kernel, bias: {
        "kernel": nn.Partitioned(kernel, (None, "model")),
        "bias": nn.Partitioned(bias, ("model",)),
    },
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_layers_are_found_in_any_container(container):
    """Two layers of each kind, a hundredfold apart, in a list."""
    make = CONTAINERS[container]
    kernel = np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)
    bias = np.ones(2, np.float32)
    pairs = [(kernel, bias), (100 * kernel, bias)]
    grads = [make(*map(jnp.asarray, pair)) for pair in pairs]
    updates, state = stablegrad().update(grads, stablegrad().init(grads))
    expected = [
        make(jnp.asarray(k * factor(k)), jnp.asarray(b * factor(k))) for k, b in pairs
    ]
    assert_trees_close(updates, optax.tree.cast(expected, jnp.float32))
    factors = scale_factors(state, grads)
    assert len(factors) == 4
    assert {name.split("/")[0] for name in factors} == {"0", "1"}


# Stacked layers.


def block(x, kernel, bias):
    return jnp.tanh(x @ kernel + bias)


def test_a_scanned_net_equals_the_same_net_unrolled():
    """Eight layers in one leaf by nn.scan, gradients of both by JAX itself."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return jnp.tanh(nn.Dense(5)(x)), None

    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = nn.scan(
                Layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=8,
            )
            return layers()(x, None)[0]

    x = jax.random.normal(jax.random.key(0), (7, 5))
    model = Scanned()
    params = jax.jit(model.init)(jax.random.key(1), x)["params"]
    stack = params["ScanLayer_0"]["Dense_0"]
    unrolled = {
        f"layer_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], stack) for i in range(8)
    }

    def scanned_loss(params):
        return jnp.mean(model.apply({"params": params}, x) ** 2)

    def unrolled_loss(params):
        y = x
        for i in range(8):
            y = block(y, **params[f"layer_{i}"])
        return jnp.mean(y**2)

    tx = stablegrad(num_stacked_axes=1)
    grads = jax.jit(jax.grad(scanned_loss))(params)
    updates, state = jax.jit(tx.update)(grads, tx.init(grads))
    scanned = updates["ScanLayer_0"]["Dense_0"]

    grads = jax.jit(jax.grad(unrolled_loss))(unrolled)
    apart, apart_state = jax.jit(stablegrad().update)(grads, stablegrad().init(grads))
    together = {
        name: np.stack([apart[f"layer_{i}"][name] for i in range(8)])
        for name in ("bias", "kernel")
    }
    # Relative to a leaf's scale, which is 1: the gradients themselves are rounded
    # in another order.
    assert_trees_close(jax.device_get(scanned), together, rtol=1e-6, atol=1e-6)
    factors = scale_factors(state, params)["ScanLayer_0/Dense_0/kernel"]
    expected = scale_factors(apart_state, unrolled)
    np.testing.assert_allclose(
        factors, [expected[f"layer_{i}/kernel"] for i in range(8)], rtol=1e-6
    )


def slices_scaled_alone(tx, grads, num_slices):
    """Transforms each slice of a stacked tree on its own."""
    update = jax.jit(tx.update)
    parts = []
    for i in range(num_slices):
        part = jax.tree.map(lambda leaf, i=i: leaf[i], grads)
        parts.append(update(part, tx.init(part))[0])
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)


def test_nnx_vmapped_layers_are_scaled_slice_by_slice():
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def create(rngs):
        return nnx.Linear(4, 2, rngs=rngs)

    params = nnx.state(create(nnx.Rngs(0)), nnx.Param)
    scales = jnp.array([1e-3, 1.0, 1e3])
    grads = jax.tree.map(
        lambda p: (p + 0.1) * scales.reshape(3, *(1,) * (p.ndim - 1)), params
    )
    tx = stablegrad(num_stacked_axes=1)
    updates, _ = tx.update(grads, tx.init(grads))
    assert_trees_close(updates, slices_scaled_alone(stablegrad(), grads, 3))


def test_a_vmapped_ensemble_is_scaled_member_by_member():
    """Stacked axes equal `jax.vmap` of the transformation over the members."""
    members = [gradients(seed, scale=10.0**seed) for seed in range(3)]
    grads = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    tx = stablegrad(num_stacked_axes=1)
    updates, state = tx.update(grads, tx.init(grads))
    assert_trees_close(updates, slices_scaled_alone(stablegrad(), grads, 3))
    over_members = jax.vmap(lambda g: stablegrad().update(g, stablegrad().init(g))[0])
    assert_trees_close(updates, jax.jit(over_members)(grads))
    assert scale_factors(state, grads)["hidden/kernel"].shape == (3,)


def test_two_stacked_axes_and_plain_layers_in_one_tree():
    rng = np.random.default_rng(0)
    grads = {
        "grid": {
            "kernel": rng.normal(size=(2, 3, 4, 5)).astype("f"),
            "bias": rng.normal(size=(2, 3, 5)).astype("f"),
        },
        "head": {"kernel": rng.normal(size=(4, 2)).astype("f")},
    }
    tx = stablegrad(num_stacked_axes={"grid": 2, "head": 0})
    updates, state = tx.update(grads, tx.init(grads))
    for i, j in np.ndindex(2, 3):
        by = factor(grads["grid"]["kernel"][i, j])
        for name in ("kernel", "bias"):
            np.testing.assert_allclose(
                updates["grid"][name][i, j], grads["grid"][name][i, j] * by, rtol=1e-6
            )
    by = factor(grads["head"]["kernel"])
    np.testing.assert_allclose(
        updates["head"]["kernel"], grads["head"]["kernel"] * by, rtol=1e-6
    )
    assert {k: np.shape(v) for k, v in scale_factors(state, grads).items()} == {
        "grid/bias": (6,),
        "grid/kernel": (6,),
        "head/kernel": (),
    }


def test_a_bias_follows_slice_by_slice_and_the_whole_of_an_unstacked_weight():
    rng = np.random.default_rng(0)
    stacked, whole = rng.normal(size=(2, 3, 3)), 10 * rng.normal(size=(4, 4))
    grads = {"w": np.float32(stacked), "v": np.float32(whole), "b": np.ones((2, 3))}
    tx = stablegrad(
        num_stacked_axes={"w": 1, "v": 0, "b": 1},
        weights={"b": False} | {"w": True, "v": True},
    )
    updates, _ = tx.update(grads, tx.init(grads))
    for i in range(2):
        expected = factor(stacked[i], whole)
        np.testing.assert_allclose(updates["b"][i], expected, rtol=1e-6)


# The limit on the reference.


@functools.cache
def limited(growth):
    tx = stablegrad(None, max_reference_growth=growth)
    return tx, jax.jit(tx.update)


@settings(max_examples=25, deadline=None)
@given(
    growth=st.sampled_from([1.5, 2.0, 10.0]),
    exponents=st.lists(st.floats(-6, 6), min_size=1, max_size=40),
)
def test_the_limit_equals_its_formula(growth, exponents):
    tx, step = limited(growth)
    grads = {"w": jnp.array([[1.0, -1.0]])}
    state, reference = tx.init(grads), Reference(max_reference_growth=growth)
    for exponent in exponents:
        sigma = np.float32(10.0**exponent)
        updates, state = step(grads, state, prediction_grad_std=sigma)
        expected = reference.limit(float(sigma))
        # 40 roundings of the running mean in float32.
        np.testing.assert_allclose(state.reference_std, expected, rtol=1e-5)
        np.testing.assert_allclose(updates["w"], grads["w"] * expected, rtol=1e-5)


@pytest.mark.parametrize("growth", [1.1, 2.0, 10.0])
def test_a_loss_spike_changes_a_step_by_at_most_the_growth(growth):
    """1e4 times the loss: the step grows k-fold, and later ones forget it."""
    tx, step = limited(growth)
    grads = gradients()
    state = tx.init(grads)
    for _ in range(20):
        usual, state = step(grads, state, prediction_grad_std=0.3)
    spiked = jax.tree.map(lambda g: 1e4 * g, grads)
    updates, state = step(spiked, state, prediction_grad_std=3e3)
    weight = updates["hidden"]["kernel"]
    np.testing.assert_allclose(weight, growth * usual["hidden"]["kernel"], rtol=1e-5)
    updates, state = step(grads, state, prediction_grad_std=0.3)
    assert_trees_equal(updates["hidden"], usual["hidden"])


def test_a_bad_reference_does_not_enter_the_running_mean():
    """NaN and Inf harm their own step, an exact zero stops one: none stays."""
    tx, step = limited(2.0)
    grads = gradients()
    _, state = step(grads, tx.init(grads), prediction_grad_std=1.0)
    for bad in (np.nan, np.inf, 0.0):
        _, after = step(grads, state, prediction_grad_std=np.float32(bad))
        updates, _ = step(grads, after, prediction_grad_std=1.0)
        expected, _ = step(grads, state, prediction_grad_std=1.0)
        assert_trees_close(updates, expected)


def test_a_first_reference_of_zero_sets_no_limit():
    tx, step = limited(2.0)
    grads = gradients()
    _, state = step(grads, tx.init(grads), prediction_grad_std=0.0)
    _, state = step(grads, state, prediction_grad_std=5.0)
    assert state.reference_std == 5.0


def test_the_limit_stands_still_at_a_constant_reference():
    grads = gradients()
    tx = stablegrad(max_reference_growth=2.0)
    state = tx.init(grads)
    for _ in range(3):
        updates, state = tx.update(grads, state)
    expected, _ = stablegrad().update(grads, stablegrad().init(grads))
    assert_trees_close(updates, expected)


def test_scale_factors_are_what_the_update_multiplied_by():
    grads = gradients()
    tx = optax.chain(stablegrad(), optax.adamw(1e-3))
    _, state = tx.update(grads, tx.init(grads), grads)
    updates, _ = stablegrad().update(grads, stablegrad().init(grads))
    factors = scale_factors(state, grads)
    for path, g in jax.tree.leaves_with_path(grads):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        scaled = updates
        for key in name.split("/"):
            scaled = scaled[key]
        np.testing.assert_allclose(g * factors.get(name, 1.0), scaled, rtol=1e-6)


# The table in the docs: (gradient, its dtype, std, mean / std).
TABLE = [
    ("float32", 1e-39, 0),
    ("float32", 1e-36, 0),
    ("float32", 1e-28, 0),
    ("float32", 1, 0),
    ("float32", 1, 9),
    ("float32", 1, 100),
    ("float32", 1e37, 0),
    ("float32", 1e38, 0),
    ("bfloat16", 1e-36, 0),
    ("bfloat16", 1e36, 0),
    ("float16", 1e-4, 0),
    ("float16", 300, 0),
    ("complex64", 1e-36, 0),
    ("complex64", 1e37, 0),
    ("float64", 1e-300, 0),
    ("float64", 1e300, 0),
]
WORDS = {
    "all zero": np.zeros((4, 4), np.float32),
    "all 1e3": np.full((4, 4), 1e3, np.float32),
    "one NaN": np.array([[1, -1], [1, np.nan]], np.float32),
    "one Inf": np.array([[1, -1], [1, np.inf]], np.float32),
}


def table():
    """Returns the updates of `stablegrad()` for leaves of every dtype and scale."""
    rng = np.random.default_rng(0)
    rows, grads = [], []
    for dtype, std, mean in TABLE:
        z = rng.uniform(0.2, 1, (32, 32)) * rng.choice([-1, 1], (32, 32))
        z = (z - z.mean()) / z.std()
        rows.append((dtype, f"{std:g}", f"{mean}"))
        grads.append((std * (z + mean)).astype(jnp.dtype(dtype)))
    rows += [("float32", words, "") for words in WORDS]
    grads += WORDS.values()
    default, without = scaled(stablegrad(), grads), scaled(stablegrad(eps=0), grads)
    with np.errstate(invalid="ignore"):
        for i, (a, b) in enumerate(zip(default, without, strict=True)):
            results = np.std(a), np.std(b), np.sqrt(np.mean(np.abs(a) ** 2))
            cells = *rows[i], *(f"{x:.3f}" for x in results)
            rows[i] = f"| {' | '.join(cells)} |"
    return [
        "| dtype | std | mean/std | scaled std | with eps=0 | scaled rms |",
        "|---|---|---|---|---|---|",
        *rows,
    ]


def scaled(tx, grads):
    """Transforms each gradient as a weight and returns it in double precision."""
    with jax.enable_x64(True):
        updates, _ = jax.jit(tx.update)(grads, tx.init(grads))
    return [
        np.asarray(g).astype(np.complex128 if np.iscomplexobj(g) else np.float64)
        for g in updates
    ]


def test_the_docs_show_what_each_dtype_and_extreme_gives():
    """Printed by `python tests/test_stablegrad.py`."""
    tables = Path(__file__).parents[1] / "docs" / "methods" / "tables"
    lines = (tables / "stablegrad_extremes.md").read_text().splitlines()
    rows = table()
    assert lines[lines.index(rows[0]) :] == rows


if __name__ == "__main__":
    print(*table(), sep="\n")

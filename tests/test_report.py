"""The verdicts on real and synthetic gradients, and the statistics behind them."""

import time

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from stablegrad_optax import gradient_report, scale_factors, stablegrad

# Three physics-informed networks. The hidden layers are stacked for `lax.scan`, which
# compiles in a fraction of the time, and the gradient's layers taken apart again.


def field(params, x):
    def layer(x, hidden):
        return jnp.tanh(x @ hidden["kernel"] + hidden["bias"]), None

    x, _ = layer(x, params["first"])
    x, _ = jax.lax.scan(layer, x, params["hidden"])
    return (x @ params["last"]["kernel"] + params["last"]["bias"])[0]


def derivatives(params, point):
    """Returns the first and second derivatives of the field, each f[2]."""

    def along(axis):
        def first(x):
            return jax.jvp(lambda x: field(params, x), (x,), (axis,))[1]

        return jax.jvp(first, (point,), (axis,))

    return jax.vmap(along)(jnp.eye(2))


def poisson_loss(params):
    """Returns the loss of u_xx + u_yy = f on the unit square, boundary times 100."""
    interior = jax.random.uniform(jax.random.key(1), (64, 2))
    side = jnp.linspace(0, 1, 16)
    boundary = jnp.concatenate(
        [jnp.stack([side, 0 * side], 1), jnp.stack([1 + 0 * side, side], 1)]
    )

    def residual(x):
        _, second = derivatives(params, x)
        return jnp.sum(second) + 2 * jnp.pi**2 * jnp.prod(jnp.sin(jnp.pi * x))

    on_boundary = jax.vmap(lambda x: field(params, x))(boundary)
    return jnp.mean(jax.vmap(residual)(interior) ** 2) + 100 * jnp.mean(on_boundary**2)


def burgers_loss(params):
    """Returns the loss of u_t + u u_x = 0.01 / pi u_xx, u = -sin(pi x) at t = 0."""
    interior = jax.random.uniform(jax.random.key(1), (64, 2), minval=-1)
    start = jnp.stack([jnp.zeros(32), jnp.linspace(-1, 1, 32)], 1)

    def residual(x):
        (u_t, u_x), (_, u_xx) = derivatives(params, x)
        return u_t + field(params, x) * u_x - 0.01 / jnp.pi * u_xx

    at_start = jax.vmap(lambda x: field(params, x) + jnp.sin(jnp.pi * x[1]))(start)
    return jnp.mean(jax.vmap(residual)(interior) ** 2) + jnp.mean(at_start**2)


def tanh_network(gain, depth=32, width=32):
    rng = np.random.default_rng(0)  # nothing to compile

    def normal(std, *shape):
        return rng.normal(0, std, shape).astype(np.float32)

    hidden = normal(gain / width**0.5, depth - 1, width, width)
    return {
        "first": {
            "kernel": normal(gain / 2**0.5, 2, width),
            "bias": normal(0, width),
        },
        "hidden": {"kernel": hidden, "bias": normal(0, depth - 1, width)},
        "last": {"kernel": normal(width**-0.5, width, 1), "bias": normal(0, 1)},
    }


def taken_apart(grads):
    """The gradient as that of a network with one dict for each layer."""
    hidden = [
        jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], grads["hidden"])
        for i in range(len(grads["hidden"]["bias"]))
    ]
    layers = [grads["first"], *hidden, grads["last"]]
    return {f"Dense_{i}": layer for i, layer in enumerate(layers)}


poisson_grad = jax.jit(jax.grad(poisson_loss))


def test_a_healthy_network():
    report = gradient_report(taken_apart(poisson_grad(tanh_network(gain=1.0))))
    assert report.verdict == "no trouble seen"
    assert "compare_optimizers" in report.remedy
    assert report.std_ratio < 30
    assert report.below_adam_eps < 0.01


def test_an_exploding_network():
    report = gradient_report(taken_apart(poisson_grad(tanh_network(gain=5 / 3))))
    assert report.verdict == "large"
    assert report.max_std > 1e5
    for remedy in ("history", "stablegrad()", "clip_by_global_norm(1.0)", "b2=0.9"):
        assert remedy in report.remedy


def first_steps(scale, gain, depth=16, steps=100):
    """Returns the first gradient and the factors of the first steps of training."""
    params = tanh_network(gain, depth)
    stacked = {"first": 0, "hidden": 1, "last": 0}
    tx = optax.chain(stablegrad(num_stacked_axes=stacked), optax.adamw(1e-3))

    def loss(params):
        return scale * poisson_loss(params)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), state

        start = params, tx.init(params)
        return jax.lax.scan(step, start, length=steps)[1]

    history = scale_factors(train(params), params)
    return jax.grad(loss)(params), {"num_stacked_axes": stacked, "history": history}


def test_the_first_steps_tell_an_exploding_start_from_a_large_loss():
    grads, first = first_steps(scale=1.0, gain=5 / 3)
    exploding = gradient_report(grads, **first)
    assert exploding.verdict == "exploding at initialization"
    assert f"{exploding.history.drifted} fell by" in " ".join(str(exploding).split())

    grads, first = first_steps(scale=1e5, gain=1.0)
    assert (
        gradient_report(grads, num_stacked_axes=first["num_stacked_axes"]).verdict
        == "large"
    )
    report = gradient_report(grads, **first)
    assert report.verdict == "no trouble seen"
    assert report.history.steps == 100


def test_a_vanishing_network():
    report = gradient_report(taken_apart(poisson_grad(tanh_network(gain=0.3))))
    assert report.verdict == "vanishing"
    assert report.below_adam_eps > 0.9
    assert report.below_muon_eps == 32 + 1
    assert "initialize_weights(params, key)" in report.remedy


def test_equinox_default_at_depth_20():
    model = eqx.nn.MLP(2, 1, 100, 20, jnp.tanh, key=jax.random.key(0))
    layers = [
        {"kernel": np.asarray(x.weight).T, "bias": np.asarray(x.bias)}
        for x in model.layers
    ]
    params = {
        "first": layers[0],
        "hidden": jax.tree.map(lambda *x: np.stack(x), *layers[1:-1]),
        "last": layers[-1],
    }
    grads = taken_apart(jax.jit(jax.grad(burgers_loss))(params)).values()
    model_grads = eqx.tree_at(
        lambda model: [leaf for x in model.layers for leaf in (x.weight, x.bias)],
        eqx.filter(model, eqx.is_inexact_array),
        [leaf for x in grads for leaf in (np.asarray(x["kernel"]).T, x["bias"])],
    )
    report = gradient_report(model_grads)
    assert report.verdict == "unbalanced between layers"
    assert 1e3 < report.std_ratio < 1e6
    assert report.leaves[0].name == "layers/0/weight"
    for remedy in ("stablegrad()", "initialize_weights", "b2=0.9"):
        assert remedy in report.remedy


def layers_of(*stds, entries=64):
    """Weights with gradients of these standard deviations."""
    ones = np.where(np.arange(entries) % 2, 1.0, -1.0).reshape(-1, 2)
    ones[:, 1] *= -1  # so that rows and columns differ in sign
    ones *= np.sign(np.arange(entries).reshape(-1, 2) - entries / 2 + 0.5)
    return {f"layer_{i}": {"kernel": std * ones} for i, std in enumerate(stds)}


VERDICTS = {
    "no trouble seen": [(1.0, 1.0), (1e-3, 0.9), (900.0, 1.0), (2e-8, 2e-8)],
    "large": [(1e9, 1e6), (1.1e3, 1e3)],
    "dead weights": [(1.0, 0.0)],
    "vanishing": [(1e-16, 1e-16), (0.0, 0.0), (1e-30, 1e-300)],
    "mostly below Adam's eps": [(1e-9, 1e-9), (1.0, 1e-9, 1e-9), (1e-9, 0.0)],
    "unbalanced between layers": [(1.0, 1e-7), (500.0, 1.0, 0.4), (1e9, 1.0)],
    "non-finite": [(np.nan, 1.0), (1e9, np.inf)],
}


@pytest.mark.parametrize(
    ("verdict", "stds"), [(v, stds) for v, cases in VERDICTS.items() for stds in cases]
)
def test_verdicts(verdict, stds):
    report = gradient_report(layers_of(*stds))
    assert report.verdict == verdict
    assert str(report).splitlines()[0] == (
        f"Gradients: {verdict} ({len(stds)} leaves)."
    )


def test_only_weights_decide_on_the_balance():
    grads = layers_of(1.0, 2.0)
    grads["layer_0"]["bias"] = np.array([1e-6, -1e-6])
    grads["layer_1"]["scale"] = np.array([[1e-7]])  # a single entry is no layer
    report = gradient_report(grads)
    assert report.verdict == "no trouble seen"
    assert report.std_ratio == pytest.approx(2.0)
    assert report.smallest.name == "layer_0/kernel"
    assert report.largest.name == "layer_1/kernel"
    assert "(layer_0/kernel) to" in str(report)
    # Without any weight all leaves decide.
    vectors = {"a": np.array([1.0, -1.0]), "b": np.array([1e-5, -1e-5])}
    assert gradient_report(vectors).std_ratio == pytest.approx(1e5)


def test_none_leaves_a_leaf_out():
    grads = layers_of(1.0, 1.0, 1e-9)
    grads["layer_2"] = dict.fromkeys(grads["layer_2"])
    assert gradient_report(grads).verdict == "no trouble seen"


def test_a_gradient_without_spread_is_not_vanishing():
    """All entries alike: the std is 0, but stablegrad divides by rms / 10."""
    report = gradient_report({"kernel": np.ones((4, 4)), "other": np.ones((4, 4))})
    assert report.verdict == "no trouble seen"
    assert report.max_std == pytest.approx(0.1)
    assert report.leaves[0].mean_to_std == np.inf


@pytest.mark.parametrize(
    ("dtype", "magnitude"),
    [("float16", magnitude) for magnitude in (0.1, 1.0, 50.0)]
    + [
        (dtype, magnitude)
        for dtype in ("bfloat16", "float32", "complex64")
        for magnitude in (1e-30, 1.0, 1e30)
    ]
    + [
        (dtype, magnitude)
        for dtype in ("float64", "complex128")
        for magnitude in (1e-300, 1.0, 1e300)
    ],
)
def test_statistics_at_any_magnitude(dtype, magnitude):
    """Against NumPy's, taken at scale one of the same rounded entries."""
    rng = np.random.default_rng(0)
    values = rng.normal(0.5, 1.0, (40, 30))
    if dtype.startswith("complex"):
        values = values + 1j * rng.normal(-0.5, 2.0, (40, 30))
    leaf = (values * magnitude).astype(jnp.dtype(dtype))
    exact = leaf.astype(np.complex128) / magnitude
    (got,) = gradient_report({"w": leaf}).leaves
    # Sums in float64: 1e-13 at 1,200 entries, and the division by the magnitude.
    assert got.std / magnitude == pytest.approx(np.std(exact), rel=1e-12)
    rms = np.sqrt(np.mean(np.abs(exact) ** 2))
    assert got.rms / magnitude == pytest.approx(rms, rel=1e-12)
    ratio = np.abs(np.mean(exact)) / np.std(exact)
    assert got.mean_to_std == pytest.approx(ratio, rel=1e-10)


def test_shares():
    grads = {"w": np.array([[0.0, 1e-9, 2e-8, 1.0], [np.nan, -np.inf, -1e-9, 0.0]])}
    report = gradient_report(grads)
    (leaf,) = report.leaves
    assert (leaf.zero, leaf.below_adam_eps, leaf.nonfinite) == (2 / 8, 2 / 8, 2 / 8)
    assert (report.zero, report.below_adam_eps, report.nonfinite) == (0.25, 0.25, 0.25)
    finite = np.array([0.0, 1e-9, 2e-8, 1.0, -1e-9, 0.0])
    assert leaf.std == pytest.approx(finite.std())
    assert gradient_report(grads, adam_eps=1e-7).leaves[0].below_adam_eps == 3 / 8
    assert gradient_report(grads, adam_eps=0.0).leaves[0].below_adam_eps == 0
    # Over all leaves it is entries that count.
    grads["zeros"] = np.zeros(24)
    assert gradient_report(grads).zero == 26 / 32


def test_leaves_without_finite_entries_or_without_any():
    grads = {"nan": np.full((2, 2), np.nan), "empty": np.zeros((0, 3))}
    empty, nan = gradient_report(grads).leaves
    assert (nan.std, nan.rms, nan.mean_to_std, nan.nonfinite) == (0, 0, 0, 1)
    assert (empty.std, empty.rms, empty.zero, empty.nonfinite) == (0, 0, 0, 0)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
        return nn.Dense(2, kernel_init=init)(x)


def front_ends():
    x = jnp.ones((1, 3))
    boxed = jax.jit(Block().init)(jax.random.key(0), x)["params"]
    yield boxed, ["Dense_0/bias", "Dense_0/kernel"]
    state = nnx.state(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    yield state, ["bias", "kernel"]
    model = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    grads = eqx.filter_grad(lambda m: jnp.sum(m(jnp.ones(3))))(model)
    names = [f"layers/{i}/{leaf}" for i in (0, 1) for leaf in ("weight", "bias")]
    yield grads, names
    mixed = [
        {"w": np.ones(2, np.float32), "x": 1.0, "z": 1j, "none": None, "step": 3},
        jnp.arange(3),
        jax.random.key(0),
        jnp.tanh,
    ]
    yield mixed, ["0/w", "0/x", "0/z"]
    integer = jax.grad(lambda p: p[0] ** 2, allow_int=True)([3.0, 1])
    yield integer, ["0"]
    yield jnp.ones((2, 2)), ["grads"]


def test_trees_of_any_kind():
    for grads, names in front_ends():
        report = gradient_report(grads)
        assert [leaf.name for leaf in report.leaves] == names
        assert all(name in str(report) for name in names)


def test_sharded_gradients():
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    spec = jax.sharding.PartitionSpec("x", "y")
    grads = {"w": jax.random.normal(jax.random.key(0), (8, 4))}
    sharded = jax.device_put(grads, jax.sharding.NamedSharding(mesh, spec))
    assert gradient_report(sharded) == gradient_report(grads)


def test_to_dict_is_flat_and_of_floats():
    flat = gradient_report(layers_of(1.0, 1e-5)).to_dict()
    assert flat.pop("verdict") == "unbalanced between layers"
    assert all(type(value) is float for value in flat.values())
    assert flat["layer_1/kernel/std"] == pytest.approx(1e-5)
    assert flat["std_ratio"] == pytest.approx(1e5)
    assert len(flat) == 2 * 6 + 7


def test_table_is_aligned_and_short():
    lines = str(gradient_report(layers_of(1.0, 1e-300, np.nan))).splitlines()
    table = lines[lines.index("") + 1 :]
    assert len(table) == 4
    assert len({len(line) for line in table}) == 1
    assert all(len(line) <= 80 for line in lines)

    deep = {
        f"a_very_long_name_of_a_module_{i}" * 3: {"kernel": np.eye(3)} for i in "ab"
    }
    lines = str(gradient_report(deep)).splitlines()
    assert all(len(line) <= 80 for line in lines if not line.startswith("  "))
    assert lines[-1].startswith("a_very_long_...")

    stds = np.geomspace(1e-3, 1, 1_234)
    lines = str(gradient_report(layers_of(*stds))).splitlines()
    table = lines[lines.index("") + 2 :]
    assert len(table) == 21
    assert table[0].startswith("layer_1233/kernel")
    assert table[-1].startswith("layer_0/kernel")
    assert "1,214 leaves" in table[10]

    # By std: the rms of a leaf with a mean says nothing about its layer's spread.
    offset = {
        **layers_of(*stds),
        "offset": 1e3 + 1e-5 * layers_of(1.0)["layer_0"]["kernel"],
    }
    assert str(gradient_report(offset)).splitlines()[-1].startswith("offset")

    broken = {**layers_of(*stds), "broken": np.array([np.nan, 0.03])}
    assert "\nbroken " in str(gradient_report(broken))


def test_shares_are_not_rounded_to_all_or_nothing():
    entries = np.ones((100, 100))
    entries[0, 0] = 0
    assert "<1%" in str(gradient_report({"w": entries}))
    assert ">99%" in str(gradient_report({"w": 1 - entries}))


def attention(features=64, heads=4):
    model = nn.MultiHeadAttention(num_heads=heads)
    x = jax.random.normal(jax.random.key(0), (8, 16, features))
    params = model.init(jax.random.key(1), x)["params"]

    def loss(params):
        return jnp.mean(model.apply({"params": params}, x) ** 2)

    return jax.jit(jax.grad(loss))(params)


def test_rounding_is_named_and_counts_nowhere():
    """The softmax cancels the gradient of the keys' bias."""
    grads = attention()
    report = gradient_report(grads)
    assert [leaf.name for leaf in report.leaves if leaf.is_rounding] == ["key/bias"]
    assert report.verdict == "no trouble seen"
    assert report.std_ratio < 30
    assert report.below_adam_eps < 0.01
    assert "Rounding alone, left out: key/bias." in str(report)
    # Also where weights= makes a weight of it.
    everything = gradient_report(
        grads, weights=lambda tree: jax.tree.map(lambda _: True, tree)
    )
    assert everything.smallest.name != "key/bias"
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), grads)
    exact["key"]["bias"] = 1e-3 * exact["key"]["kernel"][0]
    assert not any(leaf.is_rounding for leaf in gradient_report(exact).leaves)


def test_layers_far_apart_are_not_rounding():
    grads = {f"w{i}": 10.0 ** (-3 * i) * np.eye(4, dtype=np.float32) for i in range(5)}
    report = gradient_report(grads)
    assert not any(leaf.is_rounding for leaf in report.leaves)
    assert report.std_ratio == pytest.approx(1e12)


def stacked_layers():
    kernels = np.stack([10.0 ** (-0.4 * i) * np.eye(4) for i in range(20)])
    return {"kernel": kernels, "bias": np.ones((20, 4)) * [[1.0, -1.0, 1.0, -1.0]]}


def test_stacked_axes_have_a_row_for_each_slice():
    grads = stacked_layers()
    layers = {f"{i:02}": {"kernel": k} for i, k in enumerate(grads["kernel"])}
    apart = gradient_report(layers)
    report = gradient_report(grads, num_stacked_axes=1)
    assert report.verdict == apart.verdict == "unbalanced between layers"
    assert report.std_ratio == pytest.approx(10**7.6)
    assert report.smallest.name == "kernel[19]"
    assert report.smallest.shape == (4, 4)
    rows = [leaf for leaf in report.leaves if leaf.is_weight]
    assert [leaf.std for leaf in rows] == [leaf.std for leaf in apart.leaves]
    assert (
        len(gradient_report(grads, num_stacked_axes={"kernel": 2, "bias": 0}).leaves)
        == 81
    )


def test_a_leaf_that_looks_stacked_is_named():
    report = gradient_report(stacked_layers())
    assert report.looks_stacked == ("kernel",)
    assert "give num_stacked_axes" in " ".join(str(report).split())
    assert gradient_report(stacked_layers(), num_stacked_axes=1).looks_stacked == ()
    members = {"kernel": np.ones((5, 4, 3)), "bias": np.ones((5, 3))}
    assert gradient_report(members).looks_stacked == ()
    members["kernel"][2] = 0
    assert gradient_report(members).looks_stacked == ("kernel",)
    # A convolution, in Flax's and in Equinox's layout, with dead channels.
    flax = {"kernel": np.ones((3, 3, 4, 8)), "bias": np.ones(8)}
    equinox = {"weight": np.ones((8, 4, 3, 3)), "bias": np.ones((8, 1, 1))}
    equinox["weight"][3] = 0
    assert gradient_report({"a": flax, "b": equinox}).looks_stacked == ()


def test_a_dead_member_is_seen():
    members = {"kernel": np.stack([np.eye(3)] * 5), "bias": np.ones((5, 3))}
    members["kernel"][2] = 0
    report = gradient_report(members, num_stacked_axes=1)
    assert report.verdict == "dead weights"
    assert "No gradient: kernel[2]." in str(report)
    assert report.std_ratio == 1


def test_weights_selects_the_weights():
    grads = layers_of(1.0, 1e-5)
    weights = {"layer_0": True, "layer_1": False}
    report = gradient_report(grads, weights=weights)
    assert report.verdict == "no trouble seen"
    assert [leaf.is_weight for leaf in report.leaves] == [True, False]
    with pytest.raises(ValueError, match="weights must be a pytree prefix"):
        gradient_report(grads, weights={"layer_0": True})
    with pytest.raises(ValueError, match="num_stacked_axes of leaf"):
        gradient_report(grads, num_stacked_axes=3)


def test_embeddings_are_named():
    table = np.zeros((100, 8))
    table[:5] = np.random.default_rng(0).normal(size=(5, 8))
    report = gradient_report({"embed": table, **layers_of(0.1)})
    assert report.leaves[0].zero_rows == 0.95
    assert "Most rows zero: embed." in str(report)
    # A kernel behind dead units is no table.
    kernel = gradient_report({"kernel": table[:15], **layers_of(0.1)}).leaves[0]
    assert not kernel.is_row_sparse


def test_the_scale_of_the_loss_alone_would_explain_it():
    small = str(gradient_report(layers_of(1e-10, 1e-9)))
    assert "the loss alone" in " ".join(small.split())
    assert "A loss of large scale alone" in gradient_report(layers_of(1e5, 2e5)).remedy


def test_history_of_synthetic_steps():
    # A factor of exactly 1 is that of a gradient of zero: such steps do not count.
    grads, ones = layers_of(1.0, 2.0), np.full(50, 0.5)

    def after(grads, last):
        history = {"layer_0/kernel": ones, "layer_1/kernel": last}
        return gradient_report(grads, history=history)

    report = after(grads, np.geomspace(5e-6, 0.5, 50))
    assert report.verdict == "exploding at initialization"
    assert report.history.drifted == "layer_1/kernel"
    for zeros in np.s_[:3], np.s_[-10:]:
        factors = 1e-4 * ones
        factors[zeros] = 1
        report = gradient_report(grads, history={"layer_1/kernel": factors})
        assert report.history.drift == 1
    # Unbalanced, or not, at its end, whatever the first gradient said.
    assert after(grads, 1e4 * ones).verdict == "unbalanced between layers"
    assert after(layers_of(1.0, 1e-5), ones).verdict == "no trouble seen"
    for history, message in (
        ({}, "no leaf"),
        ({"other": np.ones(5)}, "'other'"),
        ({"layer_0/kernel": 1.0}, r"got shape \(\) for 'layer_0/kernel'"),
        ({"layer_0/kernel": ones, "layer_1/kernel": ones[1:]}, "got 49 .* and 50"),
    ):
        with pytest.raises(ValueError, match=message):
            gradient_report(grads, history=history)


def test_history_of_a_weight_that_starts_without_a_gradient():
    """A residual branch whose last layer starts at zero."""
    net = {"first": jnp.eye(3), "last": jnp.zeros((3, 3))}
    x = jax.random.normal(jax.random.key(0), (16, 3))

    def loss(net):
        return jnp.mean((x @ net["first"] @ net["last"] - 1e-2 * x) ** 2)

    tx = optax.chain(stablegrad(), optax.sgd(1e-3))

    def step(carry, _):
        net, state = carry
        updates, state = tx.update(jax.grad(loss)(net), state, net)
        return (optax.apply_updates(net, updates), state), state

    (net, _), states = jax.lax.scan(step, (net, tx.init(net)), length=50)
    history = scale_factors(states, net)
    assert history["first"][0] == 1
    grads, first = jax.grad(loss)(net), history["first"]
    whole, rest = (
        gradient_report(grads, history={"first": factors}).history
        for factors in (first, first[1:])
    )
    assert whole.drift == rest.drift


def test_the_history_of_a_single_array_has_its_name():
    grads = jnp.array([[1.0, -2.0], [3.0, 0.5]])
    _, state = stablegrad().update(grads, stablegrad().init(grads))
    (factor,) = scale_factors(state, grads).values()
    report = gradient_report(grads, history={"": [factor, 2 * factor]})
    assert report.history.drifted == "grads"


def test_five_thousand_leaves_in_a_second():
    # Of many shapes: nothing may be compiled for each.
    grads = {f"layer_{i}": np.ones((8 + i % 97, 8), np.float32) for i in range(5000)}
    grads = jax.block_until_ready(jax.device_put(grads))
    seconds = []
    for _ in range(3):  # the best of three, because other processes may use the machine
        start = time.process_time()
        str(gradient_report(grads))
        seconds.append(time.process_time() - start)
    assert min(seconds) < 1.0


def test_bad_arguments():
    with pytest.raises(ValueError, match="grads must have a floating leaf"):
        gradient_report({"step": 1})
    with pytest.raises(ValueError, match="outside jit"):
        jax.jit(lambda g: gradient_report(g).max_std)(jnp.ones(2))
    with pytest.raises(ValueError, match=r"got jax\.ShapeDtypeStruct"):
        gradient_report({"w": jax.ShapeDtypeStruct((2, 2), jnp.float32)})
    for eps in (-1e-8, float("nan"), "1e-8"):
        with pytest.raises(ValueError, match="adam_eps must be"):
            gradient_report(jnp.ones(2), adam_eps=eps)
        with pytest.raises(ValueError, match="muon_eps must be"):
            gradient_report(jnp.ones(2), muon_eps=eps)

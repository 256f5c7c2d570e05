"""`initialize_weights` on the trees of every framework, on stacks and on meshes."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.nn.initializers import glorot_uniform, he_normal, orthogonal
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from stablegrad_optax import activation_aware_normal, initialize_weights

KEY = jax.random.key(7)


def shapes(shape, dtype, key=None):
    """Fills an array with numbers that show the requested shape."""
    return jnp.full(shape, np.prod(shape[:-1]), dtype)


def asked(key, shape, dtype):
    return shapes(shape, dtype)


def structure(tree):
    return jax.tree.structure(tree), [
        (jnp.shape(leaf), getattr(leaf, "dtype", None))
        for leaf in jax.tree.leaves(tree)
    ]


def spread(array):
    return float(jnp.std(array.astype(jnp.float32)))


def mlp():
    return {
        "dense_0": {"kernel": jnp.ones((64, 256)), "bias": jnp.ones(256)},
        "norm": {"scale": jnp.ones(256), "bias": jnp.ones(256)},
        "dense_1": {"kernel": jnp.ones((256, 32)), "bias": jnp.ones(32)},
    }


def test_plain_dictionaries():
    params = mlp()
    new = initialize_weights(params, KEY)
    assert structure(new) == structure(params)
    for name, fans in (("dense_0", 320), ("dense_1", 288)):
        # Of 8,192 draws and more: sampling error of a standard deviation below 1 %.
        assert spread(new[name]["kernel"]) == pytest.approx((2 / fans) ** 0.5, rel=0.03)
        assert not new[name]["bias"].any()
    assert new["norm"]["scale"].all()
    assert new["norm"]["bias"].all()  # parameters of a normalization stay
    assert params["dense_0"]["bias"].all()  # and so does what was given


def test_lists_of_tuples():
    params = [(jnp.ones((8, 16)), jnp.ones(16)), (jnp.ones((16, 1)), jnp.ones(1))]
    new = initialize_weights(params, KEY)
    assert all(spread(w) > 0 and not b.any() for w, b in new)


def test_what_is_no_bias_beside_a_weight():
    params = {
        "w": jnp.ones((4, 4)),
        "b": jnp.ones(4),
        "ln_scale": jnp.ones(4),
        "slope": jnp.float32(1),
        "count": jnp.ones(4, jnp.int32),
    }
    new = initialize_weights(params, KEY)
    assert not new["b"].any()
    assert all(np.all(new[name] == 1) for name in ("ln_scale", "slope", "count"))
    assert initialize_weights(params, KEY, zero_biases=False)["b"].all()


def test_an_equinox_module_as_it_is():
    class Net(eqx.Module):
        conv: eqx.nn.Conv2d
        norm: eqx.nn.LayerNorm
        mlp: eqx.nn.MLP
        scale: float
        name: str = eqx.field(static=True)

    conv, dense = jax.random.split(KEY)
    net = Net(
        eqx.nn.Conv2d(3, 64, 5, key=conv),
        eqx.nn.LayerNorm(64),
        eqx.nn.MLP(64, 32, 128, 2, jax.nn.tanh, key=dense),
        2.0,
        "net",
    )
    new = initialize_weights(net, KEY, he_normal(), out_axis=0)
    assert jax.tree.structure(new) == jax.tree.structure(net)
    assert new.mlp.activation is net.mlp.activation
    assert (new.scale, new.name) == (2.0, "net")
    assert new.norm.weight.all()
    assert not new.conv.bias.any()
    # 4,800 draws: sampling error 1 %.
    assert spread(new.conv.weight) == pytest.approx((2 / 75) ** 0.5, rel=0.05)
    for layer, fan_in in zip(new.mlp.layers, (64, 128, 128), strict=True):
        assert spread(layer.weight) == pytest.approx((2 / fan_in) ** 0.5, rel=0.05)
        assert not layer.bias.any()
    jitted = eqx.filter_jit(initialize_weights)(net, KEY, he_normal(), out_axis=0)
    same = jax.tree.map(
        np.allclose, *(eqx.filter(n, eqx.is_array) for n in (new, jitted))
    )
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("sharded", [False, True])
def test_flax_linen(sharded):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.initializers.ones
            if sharded:
                init = nn.with_partitioning(init, (None, "model"))
            x = nn.Dense(256, kernel_init=init, bias_init=nn.initializers.ones)(x)
            return nn.LayerNorm()(x)

    variables = Net().init(KEY, jnp.ones((1, 64)))
    new = initialize_weights(variables, KEY)
    assert jax.tree.structure(new) == jax.tree.structure(variables)
    params = nn.unbox(new)["params"]
    assert spread(params["Dense_0"]["kernel"]) == pytest.approx(
        320**-0.5 * 2**0.5, 0.03
    )
    assert not params["Dense_0"]["bias"].any()
    assert params["LayerNorm_0"]["scale"].all()


def test_flax_nnx_with_sharding_metadata():
    init = nnx.with_partitioning(nnx.initializers.ones, (None, "model"))
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        model = nnx.Sequential(
            nnx.Linear(64, 256, kernel_init=init, rngs=nnx.Rngs(0)),
            nnx.LayerNorm(256, rngs=nnx.Rngs(0)),
        )
    state = nnx.state(model, nnx.Param)
    new = initialize_weights(state, KEY)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    nnx.update(model, new)
    linear, norm = model.layers
    assert spread(linear.kernel[...]) == pytest.approx((2 / 320) ** 0.5, rel=0.03)
    assert not linear.bias[...].any()
    assert norm.scale[...].all()
    kernel = jax.tree.leaves(state)[1]
    assert jax.tree.leaves(new)[1].sharding == kernel.sharding
    assert linear.kernel.get_metadata() is not None


@pytest.mark.parametrize(
    ("out_axis", "shape", "given"),
    [
        (-1, (4, 6), (4, 6)),
        (-1, (3, 5, 4, 6), (3, 5, 4, 6)),
        (0, (6, 4), (4, 6)),
        (0, (6, 4, 3, 5), (3, 5, 4, 6)),
    ],
)
def test_layouts(out_axis, shape, given):
    """The initializer sees Flax's layout, and each entry lands at its place."""

    def init(key, shape, dtype):
        assert shape == given
        return jnp.arange(np.prod(shape), dtype=dtype).reshape(shape)

    new = initialize_weights({"w": jnp.ones(shape)}, KEY, init, out_axis=out_axis)["w"]
    expected = np.arange(np.prod(given)).reshape(given)
    if out_axis == 0:
        expected = np.moveaxis(expected, (-1, -2), (0, 1))
    np.testing.assert_array_equal(new, expected)


def test_both_layouts_of_a_convolution_have_one_scale():
    flax_like = initialize_weights({"w": jnp.ones((3, 3, 16, 32))}, KEY)["w"]
    torch_like = initialize_weights({"w": jnp.ones((32, 16, 3, 3))}, KEY, out_axis=0)[
        "w"
    ]
    np.testing.assert_array_equal(np.moveaxis(flax_like, (3, 2), (0, 1)), torch_like)
    assert spread(flax_like) == pytest.approx((2 / (9 * 48)) ** 0.5, rel=0.03)


@pytest.mark.parametrize("initializer", [glorot_uniform(), orthogonal()])
def test_stacked_layers_are_drawn_one_by_one(initializer):
    stack = {"kernel": jnp.ones((3, 2, 64, 64)), "bias": jnp.ones((3, 2, 64))}
    new = initialize_weights(stack, KEY, initializer, num_stacked_axes=2)
    layers = new["kernel"].reshape(6, 64, 64)
    one = initialize_weights({"kernel": layers[0]}, KEY, initializer)["kernel"]
    for layer in layers:
        # 4,096 draws: sampling error 1 %.
        assert spread(layer) == pytest.approx(spread(one), rel=0.05)
    assert len({float(layer[0, 0]) for layer in layers}) == 6
    assert not new["bias"].any()


def test_a_layer_elsewhere_changes_no_other():
    params = mlp()
    new = initialize_weights(params, KEY)
    longer = initialize_weights({"a": params["dense_0"], **params}, KEY)
    np.testing.assert_array_equal(longer["dense_0"]["kernel"], new["dense_0"]["kernel"])
    assert np.any(longer["a"]["kernel"] != new["dense_0"]["kernel"])
    other = initialize_weights(params, jax.random.key(8))
    assert np.any(other["dense_0"]["kernel"] != new["dense_0"]["kernel"])


@pytest.mark.parametrize(
    "weights",
    [
        {"dense_0": False, "norm": False, "dense_1": True},
        {
            "dense_0": False,
            "norm": False,
            "dense_1": {"kernel": True, "bias": False},
        },
        lambda params: jax.tree.map_with_path(
            lambda path, p: path[0].key == "dense_1" and p.ndim == 2, params
        ),
    ],
    ids=["prefix", "pytree", "function"],
)
def test_a_layer_that_weights_leaves_out_keeps_its_bias(weights):
    params = mlp()
    if weights["dense_1"] is True if isinstance(weights, dict) else False:
        with pytest.raises(ValueError, match=r"'dense_1/bias' has shape \(32,\)"):
            initialize_weights(params, KEY, weights=weights)
        return
    new = initialize_weights(params, KEY, weights=weights)
    assert new["dense_0"]["kernel"].all()
    assert new["dense_0"]["bias"].all()
    assert spread(new["dense_1"]["kernel"]) > 0
    assert not new["dense_1"]["bias"].any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.complex64])
def test_dtypes_stay(dtype):
    params = {"kernel": jnp.ones((64, 64), dtype), "bias": jnp.ones(64, dtype)}
    assert structure(initialize_weights(params, KEY)) == structure(params)


def test_jit_gives_the_same_and_an_old_key_works():
    params = mlp()
    eager = initialize_weights(params, jax.random.PRNGKey(0))
    jitted = jax.jit(initialize_weights)(params, jax.random.PRNGKey(0))
    jax.tree.map(np.testing.assert_array_equal, eager, jitted)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_shardings_stay(axis_type):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
    columns = NamedSharding(mesh, PartitionSpec(None, "x"))
    vector = NamedSharding(mesh, PartitionSpec("x"))
    plain = {"kernel": jnp.ones((16, 32)), "bias": jnp.ones(32)}
    placed = jax.device_put(plain, {"kernel": columns, "bias": vector})
    expected = initialize_weights(plain, KEY)
    new = initialize_weights(placed, KEY)
    jax.tree.map(np.testing.assert_array_equal, new, expected)
    assert (new["kernel"].sharding, new["bias"].sharding) == (columns, vector)
    if axis_type is AxisType.Explicit:
        with jax.set_mesh(mesh):
            new = jax.jit(initialize_weights)(placed, KEY)
        jax.tree.map(np.testing.assert_array_equal, new, expected)
        assert jax.typeof(new["kernel"]) == jax.typeof(placed["kernel"])
        assert jax.typeof(new["bias"]) == jax.typeof(placed["bias"])
    abstract = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding), placed
    )
    new = initialize_weights(abstract, KEY)
    jax.tree.map(np.testing.assert_array_equal, new, expected)
    assert (new["kernel"].sharding, new["bias"].sharding) == (columns, vector)


def test_arrays_that_were_never_placed_stay_free():
    assert not initialize_weights(mlp(), KEY)["dense_0"]["kernel"].committed


def test_an_initializer_of_this_package():
    init = activation_aware_normal(jnp.tanh, preserve="gradient")
    weight = initialize_weights({"w": jnp.ones((64, 256))}, KEY, init, out_axis=0)["w"]
    assert spread(weight) * 256**0.5 == pytest.approx(1, rel=0.03)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"params": {"b": jnp.ones(3)}}, r"must hold a weight: .* got 'b' \(3,\)"),
        ({"params": {}}, "got no array"),
        ({"params": {"b": None, "f": jnp.tanh}}, "must hold a weight"),
        ({"initializer": "glorot"}, "initializer must be a function"),
        (
            {"initializer": lambda *_: jnp.ones(3)},
            r"shape \(64, 256\) and dtype float32",
        ),
        ({"out_axis": 1}, "out_axis must be -1, .* or 0, .* got 1"),
        ({"out_axis": True}, "out_axis must be"),
        ({"num_stacked_axes": 5}, "num_stacked_axes of leaf"),
        ({"weights": True}, "output axis; 'dense_0/bias' has shape"),
        ({"weights": {"other": True}}, "must be a pytree prefix"),
        (
            {"params": jax.eval_shape(mlp)},
            "must hold the value of 'norm/bias', which is neither",
        ),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        initialize_weights(**{"params": mlp(), "key": KEY, **arguments})

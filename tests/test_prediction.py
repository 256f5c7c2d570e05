"""The prediction gradient's standard deviation: its value, its recipes, its cost."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from benchmarks.tasks.pinn.network import Network
from benchmarks.tasks.pinn.problems import PROBLEMS
from stablegrad_optax import prediction_grad_std, value_and_grad_with_prediction_std

sigma_of = jax.jit(prediction_grad_std)


def true_std(*arrays):
    """Computes the std about the common mean of all entries in double precision."""
    dtype = complex if any(map(np.iscomplexobj, arrays)) else float
    flat = np.concatenate([np.ravel(a).astype(dtype) for a in arrays])
    largest = np.max(np.abs(flat)) or 1.0
    flat = flat / largest
    return largest * np.sqrt(np.mean(np.abs(flat - flat.mean()) ** 2))


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    exponent=st.floats(-35, 36),
    mean=st.floats(-10, 10),
)
def test_equals_numpy_at_any_magnitude(seed, exponent, mean):
    rng = np.random.default_rng(seed)
    tree = {"u": rng.normal(size=(8, 3)) + mean, "v": rng.normal(size=5)}
    tree = jax.tree.map(lambda g: (g * 10.0**exponent).astype(np.float32), tree)
    expected = true_std(*tree.values())
    # The mean is rounded relative to itself, at most 10 std.
    np.testing.assert_allclose(sigma_of(tree), expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "complex64"])
def test_other_dtypes(dtype):
    g = np.random.default_rng(0).normal(size=(8, 3)).astype(jnp.dtype(dtype))
    wide = g if dtype == "complex64" else np.asarray(g, np.float64)
    std = sigma_of(g)
    np.testing.assert_allclose(std, true_std(wide), rtol=1e-6)
    assert std.dtype == jnp.float32


def test_double_precision_and_mixed_trees():
    with jax.enable_x64(True):
        g = np.random.default_rng(0).normal(size=8) * 1e-200
        std = sigma_of({"a": g, "b": np.zeros(3, np.float32)})
        assert std.dtype == jnp.float64
        np.testing.assert_allclose(std, true_std(g, np.zeros(3)), rtol=1e-12)


def test_zero_and_constant_gradients_give_zero():
    assert sigma_of(jnp.zeros(4)) == 0
    assert sigma_of(jnp.ones(4)) == 0


def test_derivative_is_finite_at_zero():
    assert np.isfinite(jax.grad(prediction_grad_std)(jnp.zeros(3))).all()


def test_leaves_without_a_gradient_do_not_count():
    y = {"logits": jnp.array([1.0, 2.0, 4.0]), "token": jnp.array([7])}
    dL_dy = jax.grad(lambda y: jnp.sum(y["logits"] ** 2), allow_int=True)(y)
    np.testing.assert_allclose(
        prediction_grad_std(dL_dy), true_std([2, 4, 8]), rtol=1e-6
    )


# The per-example form.


def network(params, x):
    return jnp.tanh(x @ params["kernel"]) @ params["out"]


def mean_loss(y, target):
    return jnp.mean(jnp.sum((y - target) ** 2, -1))


def regression(num_examples, outputs=64):
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "kernel": jax.random.normal(keys[0], (5, 16)) / 5**0.5,
        "out": jax.random.normal(keys[1], (16, outputs)) / 4,
    }
    x = jax.random.normal(keys[2], (num_examples, 5))
    return params, x, jax.random.normal(keys[3], (num_examples, outputs))


@functools.cache
def measured(per_example):
    return jax.jit(
        value_and_grad_with_prediction_std(network, mean_loss, per_example=per_example)
    )


def test_per_example_form_does_not_depend_on_the_batch_size():
    """The reference is equal for 8 to 512 examples; without the factor it is not."""
    params, x, target = regression(512)
    whole = measured(per_example=True)(params, x, target)[2]
    for size in (8, 32, 128, 512):
        std = measured(per_example=True)(params, x[:size], target[:size])[2]
        # 8 examples of 64 outputs: a standard deviation's own error is 3 %.
        np.testing.assert_allclose(std, whole, rtol=0.05)
        literal = measured(per_example=False)(params, x[:size], target[:size])[2]
        np.testing.assert_allclose(literal * size, std, rtol=1e-6)


def test_per_example_form_of_repeated_examples_is_the_same():
    params, x, target = regression(8)
    few = measured(per_example=True)(params, x, target)[2]
    often = (jnp.tile(x, (4, 1)), jnp.tile(target, (4, 1)))
    np.testing.assert_allclose(
        measured(per_example=True)(params, *often)[2], few, rtol=1e-6
    )


# Batches split over devices.


@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("how", ["pmap", "shard_map", "vmap"])
def test_exact_over_a_mapped_axis(how, per_example):
    """Each device has its part of the batch and its own mean loss."""
    params, x, target = regression(32, outputs=3)
    f = value_and_grad_with_prediction_std(
        network, mean_loss, per_example=per_example, axis_name="batch"
    )
    if how == "shard_map":
        mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
        spec = PartitionSpec("batch")
        mapped = jax.shard_map(
            lambda *args: f(*args)[2],
            mesh=mesh,
            in_specs=(PartitionSpec(), spec, spec),
            out_specs=PartitionSpec(),
        )
        std = jax.jit(mapped)(params, x, target)
    else:
        mapped = {"pmap": jax.pmap, "vmap": jax.vmap}[how](
            f, in_axes=(None, 0, 0), axis_name="batch"
        )
        parts = x.reshape(8, 4, -1), target.reshape(8, 4, -1)
        all_stds = mapped(params, *parts)[2]
        assert (all_stds == all_stds[0]).all()
        std = all_stds[0]
    expected = measured(per_example=per_example)(params, x, target)[2]
    np.testing.assert_allclose(std, expected, rtol=1e-6)


# The gradients beside it.


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_loss_and_gradients_are_bitwise_those_of_jax(compiled):
    params, x, target = regression(16, outputs=3)
    ours = value_and_grad_with_prediction_std(network, mean_loss)
    plain = jax.value_and_grad(lambda p, x, t: mean_loss(network(p, x), t))
    if compiled:
        ours, plain = jax.jit(ours), jax.jit(plain)
    loss, grads, std = ours(params, x, target)
    expected_loss, expected_grads = plain(params, x, target)
    assert loss == expected_loss
    assert jax.tree.map(np.array_equal, grads, expected_grads) == {
        "kernel": True,
        "out": True,
    }
    dL_dy = jax.grad(mean_loss)(network(params, x), target)
    np.testing.assert_allclose(std, true_std(dL_dy), rtol=1e-6)


def test_aux_of_linen_batch_stats():
    class Normalised(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=False)(nn.Dense(4)(x))
            return nn.Dense(3)(x)

    _, x, target = regression(16, outputs=3)
    model = Normalised()
    variables = model.init(jax.random.key(0), x)
    params, stats = variables["params"], variables["batch_stats"]

    def apply_fn(params, x):
        return model.apply(
            {"params": params, "batch_stats": stats}, x, mutable=["batch_stats"]
        )

    def whole(params):
        y, aux = apply_fn(params, x)
        return mean_loss(y, target), aux

    f = value_and_grad_with_prediction_std(apply_fn, mean_loss, has_aux=True)
    (loss, aux), grads, _ = f(params, x, target)
    (expected, expected_aux), expected_grads = jax.value_and_grad(whole, has_aux=True)(
        params
    )
    assert loss == expected
    assert jax.tree.all(jax.tree.map(np.array_equal, grads, expected_grads))
    assert jax.tree.all(jax.tree.map(np.array_equal, aux, expected_aux))


def test_aux_of_nnx_batch_stats():
    class Normalised(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(5, rngs=rngs)
            self.dense = nnx.Linear(5, 3, rngs=rngs)

        def __call__(self, x):
            return self.dense(self.norm(x))

    _, x, target = regression(16, outputs=3)
    model = Normalised(nnx.Rngs(0))
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)

    def apply_fn(params, x):
        model = nnx.merge(graphdef, params, stats, copy=True)
        return model(x), nnx.state(model, nnx.BatchStat)

    f = value_and_grad_with_prediction_std(apply_fn, mean_loss, has_aux=True)
    (loss, aux), grads, _ = f(params, x, target)
    expected, expected_grads = nnx.value_and_grad(
        lambda model: mean_loss(model(x), target)
    )(model)
    assert loss == expected
    assert jax.tree.all(
        jax.tree.map(
            np.array_equal,
            nnx.to_pure_dict(grads),
            nnx.to_pure_dict(nnx.state(expected_grads)),
        )
    )
    mean = nnx.to_pure_dict(aux)["norm"]["mean"]
    np.testing.assert_array_equal(mean, model.norm.mean[...])


# Physics-informed networks: the two recipes of the docstring.

NETWORK = Network(depth=2, width=8)


@functools.cache
def pinn(name):
    """Returns a problem, parameters and points."""
    problem = PROBLEMS[name]()
    params = jax.jit(NETWORK.init)(jax.random.key(0))
    return problem, params, jax.jit(problem.sample)(jax.random.key(1))


def fields(problem, params, points):
    """U and its derivatives at the points of each term."""
    return {
        term.name: NETWORK.derivatives(params, points[term.name], term.second)
        for term in problem.terms
    }


@functools.partial(jax.jit, static_argnums=0)
def residuals_of(problem, fields, points):
    return {
        term.name: term.residual(points[term.name], fields[term.name])
        for term in problem.terms
    }


def loss_of(problem, residuals):
    return sum(
        term.weight * jnp.mean(residuals[term.name] ** 2) for term in problem.terms
    )


PINNS = ["poisson", "helmholtz_1_4", "burgers"]


@pytest.mark.parametrize("name", PINNS)
def test_residual_probe_sees_every_term_at_its_weight(name):
    """dL/dr = 2 weight r / n, pooled over all terms; the gradients stay JAX's own."""
    problem, params, points = pinn(name)

    @jax.jit
    def probe(params, points):
        return value_and_grad_with_prediction_std(
            lambda p, at: residuals_of(problem, fields(problem, p, at), at),
            lambda r: loss_of(problem, r),
        )(params, points)

    loss, grads, std = probe(params, points)
    residuals = residuals_of(problem, fields(problem, params, points), points)
    expected = true_std(
        *(
            2 * term.weight * residuals[term.name] / residuals[term.name].size
            for term in problem.terms
        )
    )
    np.testing.assert_allclose(std, expected, rtol=1e-5)

    def problem_loss(params):
        return problem.loss(
            lambda at, second: NETWORK.derivatives(params, at, second), points
        )

    expected, expected_grads = jax.jit(jax.value_and_grad(problem_loss))(params)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    for a, b in zip(
        jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True
    ):
        # Compiled in two forms: relative to the leaf's largest entry.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(b).max())


@pytest.mark.parametrize("name", PINNS)
def test_field_probe_sees_u_but_not_its_derivatives(name):
    """The std equals that of an additive probe on u, differentiated at zero."""
    problem, params, points = pinn(name)
    values = fields(problem, params, points)
    dL_dy = jax.jit(
        jax.grad(lambda y: loss_of(problem, residuals_of(problem, y, points)))
    )(values)
    by_value = {term: y.value for term, y in dL_dy.items()}

    def probed(probe):
        y = {
            term: derivatives._replace(value=derivatives.value + probe[term])
            for term, derivatives in values.items()
        }
        return loss_of(problem, residuals_of(problem, y, points))

    zero = {term: jnp.zeros_like(y.value) for term, y in values.items()}
    by_probe = jax.jit(jax.grad(probed))(zero)
    for term in by_probe:
        np.testing.assert_allclose(by_value[term], by_probe[term], rtol=1e-6)
    np.testing.assert_allclose(
        prediction_grad_std(by_value), true_std(*by_probe.values()), rtol=1e-5
    )
    interior = np.abs(by_value["equation"])
    if name == "poisson":  # u_xx + u_yy = q does not read u: exactly zero
        assert not interior.any()
    else:
        assert interior.all()


@pytest.mark.parametrize("scale", [1e-36, 1e37, 8.6e37])
def test_eager_and_compiled_agree_at_both_ends_of_the_range(scale):
    y = np.float32(scale) * np.array([1, -1, 0.5, -0.25], np.float32)
    exact = np.asarray(y, np.float64).std()
    for function in (prediction_grad_std, jax.jit(prediction_grad_std)):
        np.testing.assert_allclose(function(y), exact, rtol=1e-6)

"""The kernel K = J P J^T and the step bound, against explicit Jacobians and steps."""

import functools
import itertools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy.sparse.linalg import LinearOperator, eigsh

from stablegrad_optax import scale_factors, stablegrad
from stablegrad_optax.theory import (
    effective_kernel,
    effective_kernel_operator,
    local_decrease_bound,
)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def mlp(key, sizes=(3, 8, 2)):
    keys = jax.random.split(key, len(sizes) - 1)
    return {
        f"dense_{i}": {
            "kernel": jax.random.normal(keys[i], (n, m)) / n**0.5,
            "bias": jnp.full(m, 0.1),
        }
        for i, (n, m) in enumerate(itertools.pairwise(sizes))
    }


def apply_mlp(params, x):
    for i in range(len(params) - 1):
        x = jnp.tanh(x @ params[f"dense_{i}"]["kernel"] + params[f"dense_{i}"]["bias"])
    last = params[f"dense_{len(params) - 1}"]
    return x @ last["kernel"] + last["bias"]


@functools.cache
def scaled_problem():
    """Returns an MLP's loss in float64, its gradient and the scaled gradient."""
    params = mlp(jax.random.key(0))
    x, target = jax.random.normal(jax.random.key(1), (2, 5, 3))
    target = target[:, :2]

    def loss_fn(params):
        return jnp.mean((apply_mlp(params, x) - target) ** 2)

    grads = jax.jit(jax.grad(loss_fn))(params)
    tx = stablegrad()
    updates, state = jax.jit(tx.update)(grads, tx.init(params))
    return params, x, target, loss_fn, grads, updates, scale_factors(state, params)


jit_kernel = jax.jit(effective_kernel, static_argnums=0)
jit_bound = jax.jit(local_decrease_bound, static_argnums=0)


def explicit_kernel(apply_fn, params, inputs, factors):
    """Computes J P J^T in NumPy with every matrix written out."""
    outputs = np.ravel(apply_fn(params, inputs))
    jacobian_of = jax.jacrev(lambda params: apply_fn(params, inputs).ravel())
    jacobians = jax.jit(jacobian_of)(params)
    kernel = np.zeros((outputs.size, outputs.size))
    for path, jacobian in jax.tree.leaves_with_path(jacobians):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        jacobian = np.asarray(jacobian, np.float64)
        factor = np.asarray(factors.get(name, 1.0))
        shape = jacobian.shape[1:]
        factor = factor.reshape(factor.shape + (1,) * (len(shape) - factor.ndim))
        flat = jacobian.reshape(outputs.size, -1)
        kernel += flat * np.broadcast_to(factor, shape).ravel() @ flat.T
    return kernel


def test_flow_decreases_the_loss_at_the_stated_rate(x64):
    """dL/dt = -sum_l p_l |g_l|^2 = -(dL/dy)^T K dL/dy, against finite differences."""
    params, x, target, loss_fn, grads, updates, factors = scaled_problem()
    stated = -sum(
        factors[f"{layer}/{leaf}"] * float(jnp.sum(grad**2))
        for layer, leaves in grads.items()
        for leaf, grad in leaves.items()
    )

    def loss_at(time):
        return loss_fn(jax.tree.map(lambda p, d: p - time * d, params, updates))

    time = 1e-5  # float64: truncation 1e-10, rounding 1e-11
    measured = (loss_at(time) - loss_at(-time)) / (2 * time)
    np.testing.assert_allclose(measured, stated, rtol=1e-4)

    prediction_grad = (2 * (apply_mlp(params, x) - target) / target.size).ravel()
    kernel = jit_kernel(apply_mlp, params, x, factors)
    by_kernel = -prediction_grad @ kernel @ prediction_grad
    np.testing.assert_allclose(by_kernel, stated, rtol=1e-10)


@pytest.mark.parametrize("scaled", [False, True])
def test_kernel_equals_the_explicit_product(scaled, x64):
    params, x, *_, factors = scaled_problem()
    factors = factors if scaled else {}
    kernel = jit_kernel(apply_mlp, params, x, factors)
    expected = explicit_kernel(apply_mlp, params, x, factors)
    np.testing.assert_allclose(kernel, expected, rtol=1e-10)
    np.testing.assert_array_equal(kernel, kernel.T)
    eigenvalues = np.linalg.eigvalsh(kernel)
    assert eigenvalues.min() >= -1e-12 * eigenvalues.max()


@pytest.mark.parametrize("num_stacked", [0, 1, 2])
def test_factors_of_stacked_leaves(num_stacked):
    stack = (2, 3)[:num_stacked]
    params = {"w": jax.random.normal(jax.random.key(0), (2, 3, 4))}
    factors = {"w": 1.0 + np.arange(6.0)[: int(np.prod(stack))]}

    def apply_fn(params, x):
        return jnp.tanh(params["w"] * x).sum(axis=-1)

    expected = explicit_kernel(
        apply_fn, params, 2.0, {"w": factors["w"].reshape(stack)}
    )
    # scale_factors counts the slices over all stacked axes together.
    kernel = jit_kernel(apply_fn, params, 2.0, factors)
    np.testing.assert_allclose(kernel, expected, rtol=1e-5)


def test_operator_is_the_kernel_and_lanczos_finds_its_eigenvalues(x64):
    params, x, *_, factors = scaled_problem()
    kernel = np.asarray(jit_kernel(apply_mlp, params, x, factors))
    multiply = jax.jit(effective_kernel_operator(apply_mlp, params, x, factors))
    vector = jax.random.normal(jax.random.key(2), (10,))
    np.testing.assert_allclose(multiply(vector), kernel @ vector, rtol=1e-8)

    operator = LinearOperator((10, 10), matvec=multiply, dtype=np.float64)
    largest = eigsh(operator, k=3, return_eigenvectors=False)
    np.testing.assert_allclose(largest, np.linalg.eigvalsh(kernel)[-3:], rtol=1e-8)


def test_kernel_is_jittable_in_everything_traced(x64):
    params, x, *_, factors = scaled_problem()
    np.testing.assert_allclose(
        jit_kernel(apply_mlp, params, x, factors),
        effective_kernel(apply_mlp, params, x, factors),
        rtol=1e-8,
    )


def test_kernel_of_complex_parameters(x64):
    """The real and the imaginary part are parameters of their own."""
    w = jax.random.normal(jax.random.key(0), (3, 2))
    x = jax.random.normal(jax.random.key(1), (4, 3))

    def real_outputs(params, x):
        return jnp.abs(x @ jax.lax.complex(*params)) ** 2

    def complex_outputs(params, x):
        return jnp.abs(x @ params["w"]) ** 2

    expected = jit_kernel(real_outputs, [w, 2 * w], x, {"0": 3.0, "1": 3.0})
    params = {"w": jax.lax.complex(w, 2 * w)}
    kernel = jit_kernel(complex_outputs, params, x, {"w": 3.0})
    np.testing.assert_allclose(kernel, expected, rtol=1e-10)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(x)


def linear_model(front_end):
    """Returns a linear layer's function, its parameters and the name of its kernel."""
    if front_end == "linen":
        params = Linen().init(jax.random.key(0), jnp.ones((1, 3)))
        return Linen().apply, params, "params/Dense_0/kernel"
    if front_end == "nnx":
        graph, state = nnx.split(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
        return lambda p, x: nnx.merge(graph, p)(x), state, "kernel"
    if front_end == "equinox":  # has functions among its leaves
        mlp = eqx.nn.MLP(3, 2, 4, 0, key=jax.random.key(0))
        return lambda p, x: jax.vmap(p)(x), mlp, "layers/0/weight"
    mixed = [{"w": np.ones((3, 2), np.float32), "b": np.ones(2), "step": 3, "no": None}]
    return lambda p, x: x @ p[0]["w"] + p[0]["b"], mixed, "0/w"


each_front_end = pytest.mark.parametrize(
    "front_end", ["linen", "nnx", "equinox", "mixed leaves"]
)


@each_front_end
def test_parameters_of_any_kind(front_end):
    """The kernel of a linear layer is (p x x^T + 1) I in every framework."""
    apply_fn, params, name = linear_model(front_end)
    x = jnp.array([[1.0, 2.0, -1.0]])
    kernel = eqx.filter_jit(effective_kernel)(apply_fn, params, x, {name: 10.0})
    np.testing.assert_allclose(kernel, 61 * np.eye(2), rtol=1e-5)


@each_front_end
def test_bound_of_any_kind_of_parameters(front_end):
    """d^T H d = |J d|^2 for half the square of outputs that are linear in them."""
    apply_fn, params, _ = linear_model(front_end)
    x = jnp.array([[1.0, 2.0, -1.0]])
    floating, rest = eqx.partition(params, eqx.is_inexact_array)

    def loss_fn(params):
        return jnp.sum(apply_fn(params, x) ** 2) / 2

    grads = jax.grad(lambda p: loss_fn(eqx.combine(p, rest)))(floating)
    # K = 7 I: the gradient step multiplies the outputs by 1 - 7 eta.
    bound = eqx.filter_jit(local_decrease_bound)(loss_fn, params, grads)
    np.testing.assert_allclose(bound, 2 / 7, rtol=1e-5)


def step_against(loss_fn, params, direction, rate):
    moved = jax.tree.map(lambda p, d: p - rate * d, params, direction)
    return float(loss_fn(moved) - loss_fn(params))


def test_bound_is_exact_on_a_quadratic(x64):
    hessian = jnp.diag(jnp.array([1.0, 10.0, 100.0]))

    def loss_fn(params):
        return params["x"] @ hessian @ params["x"] / 2

    params = {"x": jnp.array([3.0, -1.0, 0.5])}
    direction = {"x": jnp.array([1.0, -2.0, 4.0])}
    bound = jit_bound(loss_fn, params, direction)
    g, d = hessian @ params["x"], direction["x"]
    np.testing.assert_allclose(bound, 2 * (g @ d) / (d @ hessian @ d), rtol=1e-12)

    def change(times):
        return step_against(loss_fn, params, direction, times * bound)

    assert abs(change(1.0)) < 1e-12 * loss_fn(params)
    assert change(0.5) < change(0.99) < 0 < change(1.01) < change(4.0)
    # The model at half the bound: -eta g d + eta^2/2 d H d = -bound g d / 4.
    np.testing.assert_allclose(change(0.5), -bound * (g @ d) / 4, rtol=1e-10)


@pytest.mark.parametrize("direction", ["gradient", "scaled gradient"])
def test_bound_of_a_network(direction, x64):
    """Steps at half the bound decrease the loss and at four times it increase it."""
    params, *_, loss_fn, grads, updates, _ = scaled_problem()
    direction = grads if direction == "gradient" else updates
    bound = jit_bound(loss_fn, params, direction)
    assert step_against(loss_fn, params, direction, 0.5 * bound) < 0
    assert step_against(loss_fn, params, direction, 4 * bound) > 0


def test_bound_scales_with_the_direction_at_any_magnitude():
    """Eta d is what counts: float32 gradients that vanished or exploded included."""
    params = {"x": jnp.array([0.5, -1.0]), "y": jnp.array(2.0)}
    direction = {"x": np.array([0.4, 0.3]), "y": np.array(1.0)}

    def loss_fn(params, size):
        return size * jnp.sum(jnp.cosh(params["x"] * params["y"]))

    @jax.jit
    def bound(params, direction, size):
        return local_decrease_bound(lambda p: loss_fn(p, size), params, direction)

    at_unit_scale = bound(params, direction, 1.0)
    for size in (1e-30, 1e-15, 1e15, 1e30):
        scaled = jax.tree.map(lambda d, size=size: size * d, direction)
        by_size = float(bound(params, scaled, 1.0)) * size
        np.testing.assert_allclose(by_size, at_unit_scale, rtol=1e-5)
        same = bound(params, direction, size)
        np.testing.assert_allclose(same, at_unit_scale, rtol=1e-5)


def test_bound_without_curvature_without_descent_and_without_numbers():
    params = {"x": jnp.array([1.0, 2.0])}
    along = {"x": jnp.array([1.0, 1.0])}
    against = {"x": jnp.array([-1.0, -1.0])}
    nowhere = {"x": jnp.zeros(2)}
    losses = {
        "linear": lambda p: jnp.sum(p["x"]),
        "concave": lambda p: jnp.sum(jnp.log(p["x"])),
        "convex": lambda p: jnp.sum(p["x"] ** 2),
    }
    for name in ("linear", "concave"):
        assert jit_bound(losses[name], params, along) == jnp.inf
    for loss_fn in losses.values():
        assert jit_bound(loss_fn, params, against) == 0
        assert jit_bound(loss_fn, params, nowhere) == 0
        assert jit_bound(loss_fn, params, {"x": None}) == 0
    bad = {"x": jnp.array([jnp.nan, 1.0])}
    assert jnp.isnan(jit_bound(losses["convex"], bad, along))
    assert jnp.isnan(jit_bound(losses["convex"], params, bad))


def test_bound_moves_only_what_the_direction_names():
    def loss_fn(params):
        return params["x"] ** 2 + 50 * params["frozen"] ** 2

    params = {"x": jnp.array(3.0), "frozen": jnp.array(1.0)}
    for still in (None, optax.MaskedNode()):
        direction = {"x": jnp.array(6.0), "frozen": still}
        bound = local_decrease_bound(loss_fn, params, direction)
        np.testing.assert_allclose(bound, 1.0, rtol=1e-6)
    # Integer parameters have gradients without values.
    params = {"x": 3.0, "step": jnp.array(1)}
    grads = jax.grad(lambda p: p["x"] ** 2, allow_int=True)(params)
    bound = local_decrease_bound(lambda p: p["x"] ** 2, params, grads)
    np.testing.assert_allclose(bound, 1.0, rtol=1e-6)


def test_bound_of_complex_parameters():
    """|w|^2 along its own gradient, 2 w: one full overshoot at a rate of 1."""
    params = jnp.array([1.0 + 2.0j, -3.0j])
    direction = jnp.conj(jax.grad(lambda w: jnp.sum(jnp.abs(w) ** 2))(params))
    bound = jit_bound(lambda w: jnp.sum(jnp.abs(w) ** 2), params, direction)
    np.testing.assert_allclose(bound, 1.0, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision(dtype):
    """Parameters in 16 bits; the sums are taken in 32."""
    params = {"x": jnp.full(10_000, 1.0, dtype)}

    def loss_fn(params):
        return jnp.mean(params["x"].astype(jnp.float32) ** 2)

    bound = jit_bound(loss_fn, params, {"x": jnp.full(10_000, 0.5, dtype)})
    assert bound.dtype == jnp.float32
    np.testing.assert_allclose(bound, 4.0, rtol=1e-2)


def test_strict_promotion():
    params = {
        "x": jnp.ones((2, 2), jnp.bfloat16),
        "y": jnp.ones(2, jnp.float32),
    }

    def apply_fn(params, x):
        return x * params["y"] + params["x"].astype(jnp.float32).sum()

    def loss_fn(params):
        return jnp.sum(apply_fn(params, jnp.float32(1)) ** 2)

    with jax.numpy_dtype_promotion("strict"):
        grads = jax.grad(loss_fn)(params)
        bound = jit_bound(loss_fn, params, grads)
        kernel = jit_kernel(apply_fn, params, jnp.float32(1), {"x": 2.0})
    assert bound > 0
    np.testing.assert_allclose(kernel, [[9, 8], [8, 9]], rtol=1e-6)


def test_bad_arguments():
    params, x = {"w": jnp.ones((3, 2))}, jnp.ones((5, 3))

    def apply_fn(params, x):
        return x @ params["w"]

    with pytest.raises(ValueError, match="b"):
        effective_kernel(apply_fn, params, x, {"b": 1.0})
    with pytest.raises(ValueError, match=r"factors\['w'\] must"):
        effective_kernel(apply_fn, params, x, {"w": np.ones(2)})
    for factor in (-1.0, float("nan"), np.float32(-0.5)):
        with pytest.raises(ValueError, match=r"factors\['w'\] must not be negative"):
            effective_kernel(apply_fn, params, x, {"w": factor})
    with pytest.raises(ValueError, match="real floating outputs"):
        effective_kernel(lambda p, x: apply_fn(p, x) > 0, params, x)
    with pytest.raises(ValueError, match="params must"):
        effective_kernel(lambda p, x: x, {"step": 1}, x)
    with pytest.raises(ValueError, match="vector must have shape"):
        effective_kernel_operator(apply_fn, params, x)(jnp.ones(3))
    with pytest.raises(ValueError, match="direction must have the structure"):
        local_decrease_bound(lambda p: p["x"], {"x": 1.0}, {"y": 1.0})
    with pytest.raises(ValueError, match="direction must have a leaf"):
        local_decrease_bound(lambda p: p["x"], {"x": 1.0}, {"x": jnp.ones(2)})

"""Every training loop: the same steps as the plain one, from the same start."""

import functools
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import METHODS, assert_trees_close, each_method, each_with_one
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, PartitionSpec

from stablegrad_optax import (
    prediction_grad_std,
    scale_factors,
    stablegrad,
    value_and_grad_with_prediction_std,
)

STEPS = 3


def initial_params():
    """Returns two dense layers as linen names them."""
    rng = np.random.default_rng(0)
    return {
        f"Dense_{i}": {
            "kernel": jnp.asarray(rng.normal(size=shape), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=shape[1]), jnp.float32),
        }
        for i, shape in enumerate([(3, 4), (4, 2)])
    }


def batches():
    rng = np.random.default_rng(1)
    return [
        (rng.normal(size=(8, 3)).astype("f"), rng.normal(size=(8, 2)).astype("f"))
        for _ in range(STEPS)
    ]


def apply_fn(params, x):
    x = jnp.tanh(x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"])
    return x @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]


def loss_fn(y, target):
    return jnp.mean((y - target) ** 2)


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Dense(4)(x))
        return nn.Dense(2)(x)


def optimizer():
    return optax.chain(stablegrad(reference_std=None), optax.adamw(1e-2))


@functools.cache
def plain_step():
    """Takes the step that every other loop must equal."""
    tx = optimizer()
    value_and_grad = value_and_grad_with_prediction_std(apply_fn, loss_fn)

    @jax.jit
    def step(params, opt_state, x, target):
        loss, grads, sigma = value_and_grad(params, x, target)
        updates, opt_state = tx.update(
            grads, opt_state, params, prediction_grad_std=sigma
        )
        return optax.apply_updates(params, updates), opt_state, loss

    return tx, step


@functools.cache
def expected():
    """Returns the parameters after STEPS plain steps, and the last step's factors."""
    tx, step = plain_step()
    params = initial_params()
    opt_state = tx.init(params)
    for x, target in batches():
        params, opt_state, _ = step(params, opt_state, x, target)
    return params, scale_factors(opt_state, params)


def assert_trained(params, factors=None):
    # Adam divides by sqrt(v), which magnifies the rounding of small entries.
    assert_trees_close(params, expected()[0], rtol=1e-5, atol=1e-6)
    if factors is not None:
        assert factors == pytest.approx(expected()[1], rel=1e-5)


def test_plain_loop_descends():
    tx, step = plain_step()
    params = initial_params()
    opt_state = tx.init(params)
    x, target = batches()[0]
    losses = []
    for _ in range(50):
        params, opt_state, loss = step(params, opt_state, x, target)
        losses.append(loss)
    assert losses[-1] < 0.5 * losses[0]


def test_scan_over_steps():
    tx = optimizer()
    value_and_grad = value_and_grad_with_prediction_std(apply_fn, loss_fn)

    def step(carry, batch):
        params, opt_state = carry
        loss, grads, sigma = value_and_grad(params, *batch)
        updates, opt_state = tx.update(
            grads, opt_state, params, prediction_grad_std=sigma
        )
        return (optax.apply_updates(params, updates), opt_state), (loss, opt_state)

    @jax.jit
    def train(params, data):
        return jax.lax.scan(step, (params, tx.init(params)), data)

    data = jax.tree.map(lambda *xs: jnp.stack(xs), *batches())
    (params, opt_state), (_, states) = train(initial_params(), data)
    assert_trained(params, scale_factors(opt_state, params))
    # The states of all steps read as one series a leaf.
    series = scale_factors(states, params)
    assert {factor.shape for factor in series.values()} == {(STEPS,)}
    last = {name: factor[-1] for name, factor in series.items()}
    assert last == pytest.approx(expected()[1], rel=1e-5)


def test_vmap_over_a_population():
    """Learning rates side by side; each member is scaled by statistics of its own."""
    rates = jnp.array([1e-3, 1e-2, 1e-1])
    value_and_grad = value_and_grad_with_prediction_std(apply_fn, loss_fn)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, 0, None))
    def train(rate, params, data):
        tx = optax.chain(stablegrad(reference_std=None), optax.adamw(rate))
        opt_state = tx.init(params)
        for x, target in data:
            _, grads, sigma = value_and_grad(params, x, target)
            updates, opt_state = tx.update(
                grads, opt_state, params, prediction_grad_std=sigma
            )
            params = optax.apply_updates(params, updates)
        return params, opt_state

    population = jax.tree.map(lambda p: jnp.stack([p] * 3), initial_params())
    params, opt_state = train(rates, population, batches())
    member = jax.tree.map(lambda p: p[1], params)
    factors = scale_factors(opt_state, population)
    assert_trained(member, {name: factor[1] for name, factor in factors.items()})


# Flax linen.


def linen_value_and_grad(model):
    return value_and_grad_with_prediction_std(
        lambda params, x: model.apply({"params": params}, x), loss_fn
    )


def test_linen_train_state_as_it_stands():
    """apply_gradients takes no extra argument: the reference is a hyperparameter."""
    model = MLP()
    value_and_grad = linen_value_and_grad(model)
    scale = optax.inject_hyperparams(stablegrad)(reference_std=1.0)
    tx = optax.chain(scale, optax.adamw(1e-2))
    state = TrainState.create(apply_fn=model.apply, params=initial_params(), tx=tx)

    @jax.jit
    def step(state, x, target):
        loss, grads, sigma = value_and_grad(state.params, x, target)
        opt_state = optax.tree.set(state.opt_state, reference_std=sigma)
        return state.replace(opt_state=opt_state).apply_gradients(grads=grads), loss

    for x, target in batches():
        state, _ = step(state, x, target)
    assert_trained(state.params, scale_factors(state.opt_state, state.params))


class ExtraArgsTrainState(TrainState):
    """Passes extra arguments of apply_gradients to the optimizer."""

    def apply_gradients(self, *, grads, **extra_args):
        updates, opt_state = self.tx.update(
            grads, self.opt_state, self.params, **extra_args
        )
        params = optax.apply_updates(self.params, updates)
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state)


def test_linen_train_state_subclassed():
    model = MLP()
    value_and_grad = linen_value_and_grad(model)
    state = ExtraArgsTrainState.create(
        apply_fn=model.apply, params=initial_params(), tx=optimizer()
    )

    @jax.jit
    def step(state, x, target):
        loss, grads, sigma = value_and_grad(state.params, x, target)
        return state.apply_gradients(grads=grads, prediction_grad_std=sigma), loss

    for x, target in batches():
        state, _ = step(state, x, target)
    assert_trained(state.params, scale_factors(state.opt_state, state.params))


@each_method
def test_linen_partitioning_boxes(case):
    """Boxes stay boxes, and nn.get_partition_spec reads the optimizer's state."""

    def boxed(init):
        return nn.with_partitioning(init, (None, "model"))

    layer = nn.Dense(4, kernel_init=boxed(nn.initializers.lecun_normal()))
    x = jnp.ones((2, 3))
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    params = variables["params"]
    assert isinstance(params["kernel"], nn.Partitioned)
    tx = optax.chain(case.tx, optax.adamw(1e-2))
    state = TrainState.create(apply_fn=layer.apply, params=params, tx=tx)
    specs = nn.get_partition_spec(state)
    assert specs.params["kernel"] == PartitionSpec(None, "model")
    # A moment is sharded as its parameter.
    assert case.has_moments or all(
        spec == PartitionSpec()
        for spec in jax.tree.leaves(
            specs.opt_state[0], is_leaf=lambda s: isinstance(s, PartitionSpec)
        )
    )
    grads = jax.tree.map(lambda p: p + 1, params)
    updates, _ = case.tx.update(grads, state.opt_state[0], params, **case.extra_args)
    plain = case.first_update(nn.unbox(grads))
    assert isinstance(updates["kernel"], nn.Partitioned)
    assert_trees_close(jax.device_get(nn.unbox(updates)), plain)
    if not case.has_moments:
        assert set(scale_factors(state.opt_state, params)) <= {"kernel", "bias"}


# Flax nnx.


class NNXMLP(nnx.Module):
    def __init__(self, rngs):
        self.Dense_0 = nnx.Linear(3, 4, rngs=rngs)
        self.Dense_1 = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.Dense_1(jnp.tanh(self.Dense_0(x)))


def nnx_step(model, optimizer, x, target):
    graphdef, params = nnx.split(model)
    value_and_grad = value_and_grad_with_prediction_std(
        lambda params, x: nnx.merge(graphdef, params)(x), loss_fn
    )
    loss, grads, sigma = value_and_grad(params, x, target)
    optimizer.update(model, grads, prediction_grad_std=sigma)
    return loss


def test_nnx_optimizer():
    model = NNXMLP(nnx.Rngs(0))
    nnx.update(model, nnx.State(initial_params()))
    optimizer_of_model = nnx.Optimizer(model, optimizer(), wrt=nnx.Param)
    step = nnx.jit(nnx_step)
    for x, target in batches():
        step(model, optimizer_of_model, x, target)
    params = nnx.state(model, nnx.Param)
    factors = scale_factors(optimizer_of_model.opt_state, params)
    assert_trained(nnx.to_pure_dict(params), factors)


@each_with_one(METHODS, "axis_type", [AxisType.Auto, AxisType.Explicit])
def test_nnx_optimizer_with_sharding_metadata(case, axis_type):
    """Parameters that carry partition names, on a mesh of two by four devices."""
    if axis_type == AxisType.Explicit and jax.__version_info__ < (0, 10):
        pytest.skip(
            "an older Flax constrains, and jax 0.8 asserts that nothing changes"
        )
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)
    init = nnx.initializers.lecun_normal()
    tx = optax.chain(case.tx, optax.sgd(0.1))
    x = np.random.default_rng(0).normal(size=(8, 4)).astype("f")

    def train(kernel_init):
        """Takes one step and returns the kernel and the optimizer's state."""
        model = nnx.Linear(4, 8, kernel_init=kernel_init, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            grads = nnx.grad(lambda model: jnp.mean(model(x) ** 2))(model)
            optimizer.update(model, grads, **case.extra_args)

        step(model, optimizer)
        return model.kernel[...], nnx.to_pure_dict(nnx.state(optimizer))

    kernel, state = train(init)
    with jax.set_mesh(mesh):
        sharded, sharded_state = train(nnx.with_partitioning(init, (None, "model")))
        assert sharded.sharding.spec == PartitionSpec(None, "model")
    assert_trees_close(jax.device_get(sharded), jax.device_get(kernel), rtol=1e-5)
    # Rounding chooses eigenvectors of a null space, as of this kernel's columns.
    if not case.has_moments:
        state, sharded_state = jax.device_get((state, sharded_state))
        assert_trees_close(sharded_state, state, rtol=1e-5)


# Equinox.


class EquinoxMLP(eqx.Module):
    layers: list[Any]

    def __init__(self, key):
        keys = jax.random.split(key)
        self.layers = [
            eqx.nn.Linear(3, 4, key=keys[0]),
            eqx.nn.Linear(4, 2, key=keys[1]),
        ]

    def __call__(self, x):
        return self.layers[1](jnp.tanh(self.layers[0](x)))


def test_equinox():
    model = EquinoxMLP(jax.random.key(0))
    for i, layer in enumerate(initial_params().values()):
        model = eqx.tree_at(
            lambda m, i=i: (m.layers[i].weight, m.layers[i].bias),
            model,
            (layer["kernel"].T, layer["bias"]),
        )
    tx = optimizer()
    opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, opt_state, x, target):
        params, static = eqx.partition(model, eqx.is_inexact_array)
        value_and_grad = value_and_grad_with_prediction_std(
            lambda params, x: jax.vmap(eqx.combine(params, static))(x), loss_fn
        )
        loss, grads, sigma = value_and_grad(params, x, target)
        updates, opt_state = tx.update(
            grads, opt_state, params, prediction_grad_std=sigma
        )
        return eqx.apply_updates(model, updates), opt_state, loss

    for x, target in batches():
        model, opt_state, _ = step(model, opt_state, x, target)
    trained = {
        f"Dense_{i}": {"kernel": layer.weight.T, "bias": layer.bias}
        for i, layer in enumerate(model.layers)
    }
    assert_trained(trained)
    factors = scale_factors(opt_state, eqx.filter(model, eqx.is_inexact_array))
    names = {"layers/0/weight": "Dense_0/kernel", "layers/1/bias": "Dense_1/bias"}
    for ours, linen in names.items():
        assert factors[ours] == pytest.approx(expected()[1][linen], rel=1e-5)


# optax.MultiSteps.


def test_multi_steps_uses_the_reference_of_the_last_micro_step():
    """The inner update runs only at the last micro-step and sees only its reference."""
    params = initial_params()
    grads = [jax.tree.map(lambda p, k=k: p * k, params) for k in (1.0, 3.0)]
    tx = optax.MultiSteps(stablegrad(reference_std=None), every_k_schedule=2)
    state = tx.init(params)
    _, state = tx.update(grads[0], state, params, prediction_grad_std=jnp.float32(100))
    updates, _ = tx.update(grads[1], state, params, prediction_grad_std=jnp.float32(7))
    inner = stablegrad(7.0)
    mean = jax.tree.map(lambda p: 2.0 * p, params)
    assert_trees_close(updates, inner.update(mean, inner.init(params))[0], rtol=1e-5)


def test_multi_steps_with_the_pooled_reference_equals_the_whole_batch():
    """dL/dy of k micro-batches of equal size, together, over k."""
    k = 4
    tx = optax.MultiSteps(optimizer(), every_k_schedule=k)

    @jax.jit
    def backward(params, x, target):
        y, pull_back = jax.vjp(lambda params: apply_fn(params, x), params)
        dL_dy = jax.grad(loss_fn)(y, target)
        return pull_back(dL_dy)[0], dL_dy

    update = jax.jit(tx.update)
    params = initial_params()
    opt_state = tx.init(params)
    for x, target in batches():
        seen = []
        for part, part_target in zip(np.split(x, k), np.split(target, k), strict=True):
            grads, dL_dy = backward(params, part, part_target)
            seen.append(dL_dy)
            sigma = prediction_grad_std(seen) / k
            updates, opt_state = update(
                grads, opt_state, params, prediction_grad_std=sigma
            )
            params = optax.apply_updates(params, updates)
    assert_trained(params, scale_factors(opt_state, params))


def test_a_scan_over_micro_batches_equals_the_whole_batch():
    """The alternative without MultiSteps: gradients summed, dL/dy stacked."""
    k = 4
    tx, _ = plain_step()

    @jax.jit
    def step(params, opt_state, x, target):
        def backward(total, part):
            y, pull_back = jax.vjp(lambda params: apply_fn(params, part[0]), params)
            dL_dy = jax.grad(loss_fn)(y, part[1])
            return optax.tree.add(total, pull_back(dL_dy)[0]), dL_dy

        parts = x.reshape(k, -1, 3), target.reshape(k, -1, 2)
        total, dL_dy = jax.lax.scan(backward, optax.tree.zeros_like(params), parts)
        updates, opt_state = tx.update(
            optax.tree.scale(1 / k, total),
            opt_state,
            params,
            prediction_grad_std=prediction_grad_std(dL_dy) / k,
        )
        return optax.apply_updates(params, updates), opt_state

    params = initial_params()
    opt_state = tx.init(params)
    for x, target in batches():
        params, opt_state = step(params, opt_state, x, target)
    assert_trained(params, scale_factors(opt_state, params))

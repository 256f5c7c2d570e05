"""SOAP in every kind of program: batches, meshes, threads, checkpoints, eager calls."""

import functools
import pickle
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import assert_trees_close, assert_trees_equal
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from stablegrad_optax import compare_optimizers, scale_by_soap, soap

# Square, so that the first gradient determines all eigenvectors. Those of a null space
# depend on rounding, which differs between programs.
SHAPES = {"a": (4, 4), "b": (4, 4), "bias": (8,)}

# Rotations are sums, which round in another order in another program.
CLOSE = {"rtol": 0, "atol": 2e-5}


def gradients(steps, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return [
        {name: rng.normal(size=shape).astype(dtype) for name, shape in SHAPES.items()}
        for _ in range(steps)
    ]


@functools.cache
def make():
    """One transformation, so that tests share its programs."""
    return scale_by_soap(precondition_frequency=3)


def run(tx, grads, state):
    step, updates = jax.jit(tx.update), []
    for g in grads:
        update, state = step(g, state)
        updates.append(update)
    return updates, state


@pytest.mark.parametrize("offset", [0, 1])
def test_a_batch_of_runs_equals_each_alone(offset):
    """The second run is ``offset`` updates ahead of the first."""
    tx, grads = make(), [gradients(8), gradients(8, seed=1)]
    states = [tx.init(grads[0][0]) for _ in range(2)]
    _, states[1] = run(tx, grads[1][:offset], states[1])
    batched = jax.tree.map(lambda *x: jnp.stack(x), *states)
    step = jax.jit(jax.vmap(tx.update))
    for i in range(7):
        now = [grads[0][i], grads[1][i + offset]]
        updates, batched = step(jax.tree.map(lambda *x: jnp.stack(x), *now), batched)
        for member in range(2):
            alone, states[member] = run(tx, [now[member]], states[member])
            mine = jax.tree.map(lambda x, n=member: x[n], updates)
            assert_trees_close(mine, alone[0], **CLOSE)


def equations(jaxpr, *, in_conditionals):
    """All equations of a program, with or without those of its conditionals."""
    for equation in jaxpr.eqns:
        yield equation
        if in_conditionals or equation.primitive.name != "cond":
            parameters = list(equation.params.values())
            for inner in jax.tree.leaves(parameters, is_leaf=is_jaxpr):
                if is_jaxpr(inner):
                    inner = getattr(inner, "jaxpr", inner)
                    yield from equations(inner, in_conditionals=in_conditionals)


def is_jaxpr(value):
    return isinstance(value, ClosedJaxpr | Jaxpr)


@pytest.mark.parametrize("batched", [False, True])
def test_decompositions_stand_in_conditionals(batched):
    """A batch of runs decides once whether a refresh is due."""
    tx, params = make(), {"kernel": jnp.ones((2, 3, 3))}
    init, update = (jax.vmap(f) if batched else f for f in (tx.init, tx.update))
    jaxpr = jax.make_jaxpr(update)(params, init(params)).jaxpr
    names = [
        {e.primitive.name for e in equations(jaxpr, in_conditionals=inside)}
        for inside in (False, True)
    ]
    decompositions = {"eigh", "qr", "while", "scan"}
    assert not names[0] & decompositions
    assert {"eigh", "qr"} <= names[1]


@pytest.mark.parametrize("batched", [False, True])
def test_no_lapack_call_is_batched_on_a_cpu(batched):
    """XLA's pool of threads may wait for itself in a batched call."""
    tx = make()
    params = {str(i): jnp.ones((4, 3)) for i in range(3)}
    init, update = tx.init, tx.update
    if batched:
        params = jax.tree.map(lambda x: jnp.stack([x] * 5), params)
        init, update = jax.vmap(init), jax.vmap(update)
    program = jax.jit(update).lower(params, init(params)).as_text()
    calls = [line for line in program.splitlines() if "lapack" in line]
    assert calls
    for call in calls:
        operand = call.rsplit("(tensor<", 1)[1].split(">", 1)[0]
        assert operand in ("3x3xf32", "4x4xf32")


MANY_DECOMPOSITIONS = """
import jax, jax.numpy as jnp
from stablegrad_optax._orthogonal import orthonormal_columns
matrices = jax.random.normal(jax.random.key(0), (40, 18, 2, 8, 8))
# Traced once, and inlined forty times.
run = jax.jit(jax.vmap(lambda stack: orthonormal_columns(stack, "highest")))
jax.block_until_ready(jax.jit(lambda stacks: [run(x) for x in stacks])(matrices))
"""
TWO_THREADS = """
import threading
import jax, jax.numpy as jnp
from stablegrad_optax import scale_by_soap
tx = scale_by_soap(precondition_frequency=1)
params = {str(n): jnp.ones((18, n, n)) for n in (16, 32)}
keys = jax.random.split(jax.random.key(0), 50)
@jax.jit
def train():
    def step(state, key):
        grads = jax.tree.map(lambda x: jax.random.normal(key, x.shape), params)
        return jax.vmap(tx.update)(grads, state)[::-1]
    return jax.lax.scan(step, jax.vmap(tx.init)(params), keys)
compiled = train.lower().compile()
def run():
    jax.block_until_ready(compiled())
threads = [threading.Thread(target=run) for _ in range(2)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""


@pytest.mark.parametrize("program", [MANY_DECOMPOSITIONS, TWO_THREADS])
def test_decompositions_on_two_cores_do_not_wait_for_each_other(program):
    """XLA's thread pool deadlocks if batched LAPACK calls take their place.

    The time limit only ends a program that stands still.
    """
    on_two_cores = ["taskset", "-c", "0,1"] if shutil.which("taskset") else []
    command = [*on_two_cores, sys.executable, "-c", program]
    subprocess.run(command, check=True, timeout=240)


def test_the_resumed_run_is_the_uninterrupted_one():
    """Bit for bit, from a state between two refreshes and one just before a refresh."""
    tx, grads = make(), gradients(9)
    updates, state = run(tx, grads, tx.init(grads[0]))
    for steps in (2, 5):
        _, halfway = run(tx, grads[:steps], tx.init(grads[0]))
        halfway = pickle.loads(pickle.dumps(jax.device_get(halfway)))
        resumed, end = run(tx, grads[steps:], halfway)
        assert_trees_equal(resumed, updates[steps:])
        assert_trees_equal(end, state)


def test_the_state_can_be_donated():
    tx, grads = make(), gradients(5)
    step = jax.jit(tx.update, donate_argnums=1)
    expected, _ = run(tx, grads, tx.init(grads[0]))
    state = tx.init(grads[0])
    for g, value in zip(grads, expected, strict=True):
        update, state = step(g, state)
        assert_trees_equal(update, value)


def test_eager_calls_compile_nothing_after_the_second():
    compilations = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(duration)

    tx, grads = soap(1e-3, precondition_frequency=2), gradients(6)
    state = tx.init(grads[0])
    expected, _ = run(tx, grads, state)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for i, g in enumerate(grads):
            update, state = tx.update(g, state)
            assert_trees_close(update, expected[i], **CLOSE)
            if i == 1:
                compilations.clear()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compilations


def sharded(tree, mesh):
    """Rows over the first mesh axis, columns over the second."""

    def put(leaf):
        spec = PartitionSpec(*("rows", "columns")[: leaf.ndim])
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(put, tree)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_four_devices_equal_one(kind):
    """Sharded parameters: over a start, steps and refreshes."""
    tx, grads = make(), gradients(8)
    expected, expected_state = run(tx, grads, tx.init(grads[0]))
    devices = jax.devices()[:4]
    mesh = jax.make_mesh((2, 2), ("rows", "columns"), (kind,) * 2, devices=devices)
    with jax.set_mesh(mesh):
        on_mesh = [sharded(g, mesh) for g in grads]
        state = jax.jit(tx.init)(on_mesh[0])
        updates, new_state = run(tx, on_mesh, state)
        if kind == AxisType.Explicit:
            types = jax.tree.map(jax.typeof, (on_mesh[0], state))
            assert jax.tree.map(jax.typeof, (updates[0], new_state)) == types
    assert_trees_close(jax.device_get(updates), jax.device_get(expected), **CLOSE)
    moments = [s.mu for s in jax.device_get((new_state, expected_state))]
    # The sign of a basis is arbitrary, and that of the mean in it as well.
    assert_trees_close(*jax.tree.map(np.abs, moments), **CLOSE)


def test_shard_map_equals_one_device():
    """Gradients are averaged over the devices before the update."""
    tx, grads = make(), [gradients(8, seed=seed) for seed in range(4)]
    types = (AxisType.Auto,)
    mesh = jax.make_mesh((4,), ("x",), types, devices=jax.devices()[:4])
    whole, split = PartitionSpec(), PartitionSpec("x")

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(split, whole), out_specs=(whole, whole))
    def step(local, state):
        mean = jax.lax.pmean(jax.tree.map(lambda x: x[0], local), "x")
        return tx.update(mean, state)

    state = plain = tx.init(grads[0][0])
    for each in zip(*grads, strict=True):
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *each)
        update, state = step(stacked, state)
        mean = jax.tree.map(lambda x: x.mean(0), stacked)
        (expected,), plain = run(tx, [mean], plain)
        assert_trees_close(jax.device_get(update), jax.device_get(expected), **CLOSE)


def test_hyperparameters_can_be_injected_and_scheduled():
    """All numbers of the signature, with compiled updates and an eager init."""
    grads = gradients(8)
    schedule = optax.linear_schedule(0.1, 0.0, 10)
    arguments = {"weight_decay": 0.1, "precondition_frequency": 3}
    injected = optax.inject_hyperparams(soap)(schedule, **arguments)
    plain = soap(schedule, **arguments)
    states = [tx.init(grads[0]) for tx in (injected, plain)]
    steps = [jax.jit(tx.update) for tx in (injected, plain)]
    for g in grads:
        (one, states[0]), (other, states[1]) = (
            step(g, state, g) for step, state in zip(steps, states, strict=True)
        )
        # Hyperparameters are float32 there: 1 - 0.95 is right to 1e-6.
        assert_trees_close(one, other, rtol=1e-4, atol=1e-5)


def test_an_injected_size_limit_needs_static_args_in_a_compiled_init():
    params = {"kernel": jnp.ones((3, 2))}
    with pytest.raises(ValueError, match=r"max_precondition_size.*static_args"):
        jax.jit(optax.inject_hyperparams(soap)(1e-3).init)(params)
    tx = optax.inject_hyperparams(soap, static_args="max_precondition_size")(1e-3)
    jax.eval_shape(tx.init, params)


def test_weight_decay_is_decoupled_and_masked():
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
    zero = jax.tree.map(jnp.zeros_like, params)
    tx = soap(0.1, weight_decay=0.5, mask={"kernel": True, "bias": False})
    updates, _ = tx.update(zero, tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.05, rtol=1e-6)
    assert not updates["bias"].any()


def test_bfloat16_parameters_have_float32_state():
    grads = gradients(8, dtype=jnp.bfloat16)
    tx = make()
    updates, state = run(tx, grads, tx.init(grads[0]))
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}
    assert {s.dtype for s in jax.tree.leaves((state.mu, state.bases))} == {
        jnp.dtype("float32")
    }
    wide = [jax.tree.map(np.float32, g) for g in grads]
    expected, _ = run(tx, wide, tx.init(wide[0]))
    # 8 bits are left of the same numbers.
    assert_trees_close(optax.tree.cast(expected, jnp.bfloat16), updates, rtol=1e-2)


def through_updates(tx, grads):
    """A function of a factor that grows from one gradient to the next."""

    def total(factor):
        state, total = tx.init(grads[0]), 0.0
        for i, grad in enumerate(grads):
            scaled = jax.tree.map(lambda g, i=i: g * factor**i, grad)
            updates, state = tx.update(scaled, state)
            total += optax.tree.sum(jax.tree.map(jnp.sin, updates))
        return total

    return total


def test_derivatives_through_updates_are_finite():
    """Also over refreshes, and of zero gradients, whose eigenvectors are degenerate."""
    zero = {"zero": np.zeros((2, 2), np.float32)}
    grads = [g | zero for g in gradients(4)]
    total = through_updates(scale_by_soap(precondition_frequency=2), grads)
    assert np.isfinite(jax.jit(jax.grad(total))(1.1))


def test_derivatives_for_fixed_bases_equal_finite_differences():
    """No derivative passes through the choice of a basis, so none is refreshed here."""
    with jax.enable_x64(True):
        total = jax.jit(through_updates(scale_by_soap(), gradients(4, dtype=float)))
        difference = (total(1.1 + 1e-5) - total(1.1 - 1e-5)) / 2e-5
        # The size that eps is relative to counts as a constant.
        np.testing.assert_allclose(jax.grad(total)(1.1), difference, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"b1": 1.0}, "b1 must be a finite number at least 0 and below 1; got 1.0"),
        ({"b2": -0.1}, "b2 must be"),
        ({"eps": -1e-8}, "eps must be"),
        ({"precondition_frequency": 0}, "precondition_frequency must be an integer"),
        ({"max_precondition_size": 2.5}, "max_precondition_size must be an integer"),
        ({"weight_decay": -1.0}, "weight_decay must be"),
    ],
)
def test_arguments_outside_their_range_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        soap(1e-3, **arguments)


def test_dimension_numbers_that_do_not_fit_raise():
    params = {"kernel": jnp.ones((3, 2))}
    twice = optax.contrib.MuonDimensionNumbers((0, 1), 1)
    with pytest.raises(ValueError, match=r"'kernel'.*name each axis once"):
        scale_by_soap(weight_dimension_numbers=twice).init(params)
    with pytest.raises(ValueError, match="must be a pytree prefix"):
        scale_by_soap(weight_dimension_numbers={"other": twice}).init(params)


@pytest.mark.slow
def test_compare_optimizers_takes_soap_at_its_defaults():
    """Fifty layers of width 32, eight runs side by side."""
    batch = jnp.linspace(-1, 1, 32)[:, None] * jnp.ones((1, 32))

    def init(key):
        keys = jax.random.split(key, 50)
        return [jax.random.normal(k, (32, 32)) / 32**0.5 for k in keys]

    def loss(params, batch):
        y = batch
        for kernel in params:
            y = jnp.tanh(y @ kernel)
        return jnp.mean((y - jnp.sin(batch)) ** 2)

    comparison = compare_optimizers(
        loss, init, batch, {"SOAP": soap}, steps=30, key=jax.random.key(0)
    )
    assert not comparison["SOAP"].num_failed

"""Eight devices and two processes give what one device gives, at one all-reduce."""

import functools
import pickle
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training
from cases import assert_trees_close, each_method, each_scaling_case
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from stablegrad_optax import (
    scale_factors,
    stablegrad,
    value_and_grad_with_prediction_std,
)

# Sums over shards round in another order than one sum: a few units in the last place,
# which Adam's division by sqrt(v) magnifies for entries near zero.
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


@functools.cache
def mesh(axis_type=AxisType.Auto):
    return jax.make_mesh((8,), ("x",), axis_types=(axis_type,))


def put(tree, *spec):
    """Puts a tree on the mesh; the spec is that of a leaf's last axes."""

    def sharding(leaf):
        axes = [None] * (leaf.ndim - len(spec)) + list(spec[-leaf.ndim :])
        return NamedSharding(mesh(), PartitionSpec(*axes))

    return jax.tree.map(lambda leaf: jax.device_put(leaf, sharding(leaf)), tree)


def exact(params, opt_state):
    """Leaves out differences of norms, which magnify the rounding of the norms."""
    rounded = {"deviation": 0, "last_deviation": 0}
    return jax.device_get((params, opt_state._replace(**rounded)))


@functools.cache
def one_device():
    """Parameters and state after two steps, on a single device."""
    params = training.initial_params()
    return exact(*training.train(0, 2, params, training.tx.init(params)))


@pytest.mark.parametrize(
    ("of_params", "of_batch"),
    [((None, "x"), ()), ((), (None, "x", None)), ((None, "x"), (None, "x", None))],
    ids=["parameters", "batch", "both"],
)
def test_sharded_jit_equals_one_device(of_params, of_batch):
    params = put(training.initial_params(), *of_params)
    opt_state = jax.jit(training.tx.init)(params)
    for step in range(2):
        data = put(training.batch(step), *of_batch)
        params, opt_state = training.train_step(params, opt_state, data)
    assert_trees_close(exact(params, opt_state), one_device(), **CLOSE)


@pytest.mark.parametrize("how", ["pmap", "shard_map"])
def test_data_parallel_loop_equals_one_device(how):
    """Gradients averaged by hand, the reference pooled over the axis."""
    if how == "shard_map" and not hasattr(jax.lax, "pcast"):
        pytest.skip("jax.lax.pcast came after jax 0.8")
    value_and_grad = value_and_grad_with_prediction_std(
        training.apply_fn,
        lambda y, target: jnp.mean((y - target) ** 2),
        axis_name="x",
    )

    def step(params, opt_state, x, target):
        local = params
        if how == "shard_map":  # else it would sum the gradients over the axis itself
            local = jax.lax.pcast(params, "x", to="varying")
        _, grads, sigma = value_and_grad(local, x, target)
        grads = jax.lax.pmean(grads, "x")
        updates, opt_state = training.tx.update(
            grads, opt_state, params, prediction_grad_std=sigma
        )
        return optax.apply_updates(params, updates), opt_state

    params = training.initial_params()
    opt_state = training.tx.init(params)
    if how == "pmap":
        mapped = jax.pmap(step, "x", in_axes=(None, None, 0, 0), out_axes=None)
    else:
        whole, split = PartitionSpec(), PartitionSpec("x")
        mapped = jax.shard_map(
            step,
            mesh=mesh(),
            in_specs=(whole, whole, split, split),
            out_specs=(whole, whole),
        )
        mapped = jax.jit(mapped)
    for i in range(2):
        x, target = training.batch(i)
        if how == "pmap":
            x, target = x.reshape(8, 2, -1), target.reshape(8, 2, -1)
        params, opt_state = mapped(params, opt_state, x, target)
    assert_trees_close(exact(params, opt_state), one_device(), **CLOSE)


def collectives(tx, grads, extra_args):
    """Returns the collectives that an update always runs, and the conditional ones."""
    state = tx.init(grads)
    program = jax.jit(functools.partial(tx.update, **extra_args)).lower(grads, state)
    branches, always = program.compile().as_text().split("\nENTRY ")
    pattern = r" (all-reduce|all-gather|all-to-all|collective-permute)(?:-start)?\("
    return re.findall(pattern, always), re.findall(pattern, branches)


def many_leaves():
    shapes = [(8, 8), (16, 8), (3, 5, 8), (8, 16), (8,), (16,), (8, 8)]
    return {
        f"layer_{i}": {"kernel": np.ones(shape, np.float32)}
        for i, shape in enumerate(shapes)
    }


@each_scaling_case
def test_one_all_reduce_for_all_statistics_of_sharded_leaves(case):
    always, _ = collectives(case.tx, put(many_leaves(), "x"), case.extra_args)
    # A branch for gradients at the ends of the range may reduce once more.
    assert always == ["all-reduce"]


@each_method
def test_no_all_reduce_for_replicated_gradients(case):
    assert collectives(case.tx, put(many_leaves()), case.extra_args) == ([], [])


def test_sharded_stacks_equal_one_device():
    """The stacked axis itself is sharded: as many layers as devices."""
    rng = np.random.default_rng(0)
    grads = {
        "kernel": rng.normal(size=(8, 4, 4)).astype("f")
        * 10.0 ** np.arange(-4, 4)[:, None, None].astype("f"),
        "bias": rng.normal(size=(8, 4)).astype("f"),
    }
    tx = stablegrad(num_stacked_axes=1)
    expected, expected_state = jax.jit(tx.update)(grads, tx.init(grads))
    sharding = NamedSharding(mesh(), PartitionSpec("x"))
    sharded = jax.device_put(grads, sharding)
    updates, state = jax.jit(tx.update)(sharded, jax.jit(tx.init)(sharded))
    assert_trees_close(jax.device_get(updates), jax.device_get(expected))
    assert_trees_close(jax.device_get(state), jax.device_get(expected_state))
    assert updates["kernel"].sharding.is_equivalent_to(sharding, 3)


def test_explicit_mesh_trains_like_one_device():
    """Parameters replicated and batches sharded in the type system."""
    explicit = mesh(AxisType.Explicit)
    params = training.initial_params()
    with jax.set_mesh(explicit):
        params = jax.device_put(params, NamedSharding(explicit, PartitionSpec()))
        opt_state = training.tx.init(params)
        rows = NamedSharding(explicit, PartitionSpec(None, "x", None))
        for step in range(2):
            data = jax.device_put(training.batch(step), rows)
            params, opt_state = training.train_step(params, opt_state, data)
    assert_trees_close(exact(params, opt_state), one_device(), **CLOSE)


def test_two_processes_equal_one(tmp_path):
    """Four devices over jax.distributed on the loopback, two in each process."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    output = tmp_path / "result.pickle"
    processes = [
        subprocess.Popen(
            [sys.executable, Path(training.__file__), "distributed", output]
            + [str(n) for n in (port, 2, i)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    try:
        logs = [process.communicate(timeout=150)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], logs
    params, state = pickle.loads(output.read_bytes())
    start = training.initial_params()
    expected, opt_state = training.train(0, 5, start, training.tx.init(start))
    assert opt_state.num_skipped == 1
    assert_trees_close(exact(params, state), exact(expected, opt_state), **CLOSE)
    assert scale_factors(state, params).keys() == scale_factors(opt_state, start).keys()

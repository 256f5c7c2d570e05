"""A small training run that tests start as processes of their own.

    python tests/training.py checkpoints DIRECTORY STEPS KILL_BEFORE
    python tests/training.py distributed OUTPUT PORT NUM_PROCESSES PROCESS

The first trains with a checkpoint every other step, resumes from the last one in
DIRECTORY, and kills itself by SIGKILL before step KILL_BEFORE. The second is one of
NUM_PROCESSES processes with four devices together.
"""

import os
import pickle
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from stablegrad_optax import (
    clip_by_history,
    skip_spikes,
    stablegrad,
    value_and_grad_with_prediction_std,
)


def initial_params():
    rng = np.random.default_rng(0)
    return {
        f"dense_{i}": {
            "kernel": rng.normal(size=(8, 8)).astype(np.float32),
            "bias": rng.normal(size=8).astype(np.float32),
        }
        for i in range(2)
    }


def batch(step):
    data = np.random.default_rng(100 + step).normal(size=(2, 16, 8)).astype(np.float32)
    if step == 3:  # one example is broken: only its process has a gradient of NaN
        data[0, 1] = np.nan
    return data


def apply_fn(params, x):
    x = jnp.tanh(x @ params["dense_0"]["kernel"] + params["dense_0"]["bias"])
    return x @ params["dense_1"]["kernel"] + params["dense_1"]["bias"]


value_and_grad = value_and_grad_with_prediction_std(
    apply_fn, lambda y, target: jnp.mean((y - target) ** 2)
)
tx = skip_spikes(
    optax.chain(
        clip_by_history(warmup_steps=1),
        stablegrad(reference_std=None, max_reference_growth=2.0),
        optax.adamw(1e-2),
    ),
    warmup_steps=2,
)


@jax.jit
def train_step(params, opt_state, data):
    x, target = data
    _, grads, sigma = value_and_grad(params, x, target)
    updates, opt_state = tx.update(grads, opt_state, params, prediction_grad_std=sigma)
    return optax.apply_updates(params, updates), opt_state


def train(first, last, params, opt_state):
    for step in range(first, last):
        params, opt_state = train_step(params, opt_state, batch(step))
    return params, opt_state


def with_checkpoints(directory, num_steps, kill_before):
    checkpoints = sorted(Path(directory).glob("*.pickle"))
    step, params = 0, initial_params()
    opt_state = tx.init(params)
    if checkpoints:
        step, params, opt_state = pickle.loads(checkpoints[-1].read_bytes())
    while step < num_steps:
        if step == kill_before:
            os.kill(os.getpid(), signal.SIGKILL)
        params, opt_state = train_step(params, opt_state, batch(step))
        step += 1
        if step % 2 == 0:
            file = Path(directory) / f"{step:04}.partial"
            file.write_bytes(pickle.dumps((step, *jax.device_get((params, opt_state)))))
            file.rename(file.with_suffix(".pickle"))  # whole or not at all


def sharded_setup():
    """Parameters sharded by columns, batches by rows, over all devices."""
    mesh = jax.make_mesh((len(jax.devices()),), ("x",), axis_types=(AxisType.Auto,))

    def put(array, *spec):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.make_array_from_callback(
            array.shape, sharding, lambda index: array[index]
        )

    params = jax.tree.map(
        lambda p: put(p, *[None] * (p.ndim - 1), "x"), initial_params()
    )
    return mesh, params, lambda step: put(batch(step), None, "x", None)


def distributed(output, port, num_processes, process):
    jax.config.update("jax_num_cpu_devices", 4 // num_processes)
    jax.distributed.initialize(
        f"127.0.0.1:{port}", num_processes, process, initialization_timeout=60
    )
    mesh, params, batch_of = sharded_setup()
    opt_state = jax.jit(tx.init)(params)
    for step in range(5):
        params, opt_state = train_step(params, opt_state, batch_of(step))
    whole = jax.jit(lambda t: t, out_shardings=NamedSharding(mesh, PartitionSpec()))
    params, opt_state = jax.device_get(whole((params, opt_state)))
    if process == 0:
        Path(output).write_bytes(pickle.dumps((params, opt_state)))


if __name__ == "__main__":
    mode, path, *numbers = sys.argv[1:]
    run = {"checkpoints": with_checkpoints, "distributed": distributed}[mode]
    run(path, *map(int, numbers))

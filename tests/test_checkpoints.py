"""Nothing is lost: a resumed run equals the uninterrupted one, bit for bit."""

import functools
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import flax.serialization
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import training
from cases import CASES, assert_trees_equal, each_with_one, gradients

from stablegrad_optax import scale_factors


@functools.cache
def steps_of(case):
    """A chain with AdamW, and its steps over the gradients of some seeds."""
    tx = optax.chain(case.tx, optax.adamw(1e-2))

    @jax.jit
    def step(params, opt_state, grads):
        updates, opt_state = tx.update(grads, opt_state, params, **case.extra_args)
        return optax.apply_updates(params, updates), opt_state

    def run(params, opt_state, seeds):
        for seed in seeds:
            params, opt_state = step(params, opt_state, gradients(seed))
        return params, opt_state

    return tx, run


def through_orbax(tree, template, directory):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / "step", tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(
            directory / "step", jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
        )


def through_bytes(tree, template, directory):
    file = directory / "step.msgpack"
    file.write_bytes(flax.serialization.to_bytes(tree))
    return flax.serialization.from_bytes(template, file.read_bytes())


def through_pickle(tree, template, directory):
    return pickle.loads(pickle.dumps(jax.device_get(tree)))


@each_with_one(
    CASES,
    "through",
    [through_orbax, through_bytes, through_pickle],
    ids=["orbax", "bytes", "pickle"],
)
def test_resumed_equals_uninterrupted(case, through, tmp_path):
    """Saved after two of four steps in a chain with AdamW, restored into a new init."""
    tx, run = steps_of(case)
    start = gradients(9), tx.init(gradients(9))
    uninterrupted = run(*start, seeds=range(4))
    halfway = run(*start, seeds=range(2))
    restored = through(halfway, start, tmp_path)
    assert_trees_equal(restored, halfway)
    assert_trees_equal(run(*restored, seeds=range(2, 4)), uninterrupted)
    if not case.has_moments:
        assert scale_factors(restored[1], restored[0]).keys() == (
            scale_factors(halfway[1], halfway[0]).keys()
        )


def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    """SIGKILL at step 5, between the checkpoints after 4 and 6."""

    def run(kill_before):
        script = Path(training.__file__)
        return subprocess.run(
            [sys.executable, script, "checkpoints", tmp_path, "8", str(kill_before)],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    assert run(kill_before=5).returncode == -signal.SIGKILL
    assert [p.name for p in sorted(tmp_path.iterdir())] == [
        "0002.pickle",
        "0004.pickle",
    ]
    resumed = run(kill_before=-1)
    assert resumed.returncode == 0, resumed.stderr
    step, *resumed = pickle.loads((tmp_path / "0008.pickle").read_bytes())
    params = training.initial_params()
    uninterrupted = training.train(0, 8, params, training.tx.init(params))
    assert step == 8
    assert uninterrupted[1].num_skipped == 1
    assert_trees_equal(tuple(resumed), jax.tree.map(np.asarray, uninterrupted))

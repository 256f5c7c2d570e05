"""Counts collectives in a process of its own, which alone sees eight CPU devices.

The other measurements want the machine as it is. `count` starts the process.
"""

import json
import subprocess
import sys

import jax

from benchmarks.overhead.arms import ARMS
from benchmarks.overhead.programs import Kernels, all_reduces

NUM_DEVICES = 8


def count(arms: list[str], num_leaves: int) -> dict[str, Kernels]:
    """All-reduces of a step for leaves that are sharded over the devices."""
    command = [sys.executable, "-m", __spec__.name, json.dumps([arms, num_leaves])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return {arm: Kernels(*counts) for arm, counts in json.loads(done.stdout).items()}


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    wanted, leaves = json.loads(sys.argv[1])
    print(json.dumps({arm: all_reduces(ARMS[arm], leaves) for arm in wanted}))

"""The compilers of XLA for machines that are not here: a TPU v5e and an H100.

Each comes with a package of JAX's and compiles on any computer; nothing is executed.
"""

import os
from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, SingleDeviceSharding

# Else libtpu asks the cloud what machine it is on, and serves one process at a time.
_NO_MACHINE = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def _tpu() -> Any:
    for name, value in _NO_MACHINE.items():
        os.environ.setdefault(name, value)
    return topologies.get_topology_desc("v5e:2x2", "tpu")


def _gpu() -> Any:
    config = (Path(__file__).parent / "h100.txt").read_text()
    return topologies.get_topology_desc(
        "H100", "cuda", target_config=config, topology="1x1x1"
    )


class _Target(NamedTuple):
    title: str
    packages: tuple[str, ...]  # whose versions decide what is compiled
    topology: Callable[[], Any]


TARGETS = {
    "tpu": _Target("TPU v5e", ("libtpu",), _tpu),
    "gpu": _Target("H100", ("jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12"), _gpu),
}


class Compiler(NamedTuple):
    """The compiler of one target.

    Attributes:
        device: its first device, as a sharding.
        mesh: 2 x 2 devices; None for the GPU.
        version: the packages' names and versions.
    """

    device: SingleDeviceSharding
    mesh: Mesh | None
    version: str


def missing(target: str) -> str | None:
    """Names what is not installed, in one line; None if everything is installed."""
    try:
        _version(target)
    except metadata.PackageNotFoundError as error:
        return (
            f"compiling for a {target.upper()} needs {error.name}: "
            f"pip install 'jax[{'tpu' if target == 'tpu' else 'cuda12'}]'"
        )
    return None


def _version(target: str) -> str:
    packages = TARGETS[target].packages
    return ", ".join(f"{name} {metadata.version(name)}" for name in packages)


@cache
def load(target: str) -> Compiler:
    """The compiler of "tpu" or "gpu".

    Raises:
        ValueError: in one line, if its package is not installed.
    """
    if message := missing(target):
        raise ValueError(message)
    # JAX would look for the machine, and forget the compiler of one that is not there.
    jax.config.update("jax_platforms", "cpu")
    topology = TARGETS[target].topology()
    mesh = None
    if target == "tpu":
        mesh = topologies.make_mesh(topology, (2, 2), ("rows", "columns"))
    return Compiler(SingleDeviceSharding(topology.devices[0]), mesh, _version(target))

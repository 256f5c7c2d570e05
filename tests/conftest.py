"""Every test sees eight CPU devices, and most compile without XLA's optimizations."""

import os

import jax
import pytest

# Compilation is most of what the tests cost. These flags halve it: XLA's older emitters
# of loops, and one thread for each program. `XLA_FLAGS= make test` tests without them.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
)
jax.config.update("jax_num_cpu_devices", 8)


def pytest_runtest_setup(item):
    """Turns most optimizations off, and skips what an older XLA does not do."""
    is_recent = item.get_closest_marker("recent_xla") is not None
    if is_recent and jax.__version_info__ < (0, 10):
        pytest.skip(f"XLA of jax {jax.__version__} fuses less on a CPU than 0.10's")
    is_optimized = is_recent or item.get_closest_marker("optimized") is not None
    jax.config.update("jax_disable_most_optimizations", not is_optimized)

"""Every test sees eight CPU devices, and most compile without XLA's optimizations."""

import os

# Compilation is most of what the tests cost. XLA's older emitters of loops, one thread
# for each program, and few optimizations make it several times cheaper. Processes that
# tests start inherit this. `make test-all` tests what users compile.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
)
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
IS_QUICK = jax.config.read("jax_disable_most_optimizations")


def pytest_runtest_setup(item):
    """Turns optimizations on where they matter, and skips what an older XLA lacks."""
    if item.get_closest_marker("recent_xla") and jax.__version_info__ < (0, 10):
        pytest.skip(f"XLA of jax {jax.__version__} fuses less on a CPU than 0.10's")
    is_optimized = item.get_closest_marker("optimized") is not None
    jax.config.update("jax_disable_most_optimizations", IS_QUICK and not is_optimized)

"""Every test sees eight CPU devices, so that sharding is tested anywhere."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="module")
def quick_compilation():
    """Skip most of XLA's optimizations.

    The benchmarks' programs and the manual's snippets take longer to compile than the
    tests run them. Tests of the package do without this: they meet what users meet.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)

"""Every test sees eight CPU devices, so that sharding is tested anywhere."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


def pytest_runtest_setup(item):
    """Skips bounds on the cost for older versions, which compute the same."""
    if item.get_closest_marker("recent_xla") and jax.__version_info__ < (0, 10):
        pytest.skip(f"XLA of jax {jax.__version__} fuses less on a CPU than 0.10's")


@pytest.fixture(scope="module")
def quick_compilation():
    """Skips most of XLA's optimizations.

    The benchmarks' programs and the manual's snippets take longer to compile than the
    tests run them. Tests of the package do without this: they meet what users meet.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)

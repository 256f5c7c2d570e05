"""The origin of numbers: device, versions, date."""

import os
from datetime import UTC, datetime

import jax
import optax

import stablegrad_optax


def device_name() -> str:
    """Returns the device that computes the numbers."""
    device = jax.devices()[0]
    cores = f", {os.cpu_count()} cores" if device.platform == "cpu" else ""
    return f"{device.device_kind}{cores}"


def provenance() -> str:
    """Returns device and versions, for a footer."""
    return (
        f"{device_name()}; jax {jax.__version__}, optax {optax.__version__}, "
        f"stablegrad_optax {stablegrad_optax.__version__}"
    )


def origin() -> dict[str, str]:
    """Returns device, versions and date, for a line of results."""
    return {
        "device": device_name(),
        "jax": jax.__version__,
        "stablegrad_optax": stablegrad_optax.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }

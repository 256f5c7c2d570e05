"""Paths of the reference data, which the repository does not hold."""

import os
from pathlib import Path

import pytest

_BESIDE_THE_REPOSITORY = Path(__file__).parents[2] / "shared" / "data"


def reference_file(name: str) -> Path:
    """Returns a file of $STABLEGRAD_DATA or ../shared/data, or skips the test."""
    folder = Path(os.environ.get("STABLEGRAD_DATA", _BESIDE_THE_REPOSITORY))
    path = folder / name
    if not path.exists():
        pytest.skip(f"no {path}: set STABLEGRAD_DATA to the folder that holds {name}")
    return path

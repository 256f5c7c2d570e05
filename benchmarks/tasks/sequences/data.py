"""Text and series that are installed with Python and statsmodels: no download."""

import sysconfig
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np

Split = Literal["train", "validation", "test"]
# Not the library's own source, or not installed everywhere.
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "lib2to3", "idlelib"}


@cache
def text() -> dict[Split, np.ndarray]:
    """The sources of Python's standard library as bytes u8[n], split by file.

    Of every twenty files, in an order that is always the same, one is for validation
    and one for test. What the files hold depends on Python's version, a little.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(
        path
        for path in root.rglob("*.py")
        if not _LEFT_OUT & set(path.relative_to(root).parts)
    )
    files = [files[i] for i in np.random.default_rng(0).permutation(len(files))]
    of_split: dict[Split, list[Path]] = {
        "train": [path for i, path in enumerate(files) if i % 20 > 1],
        "validation": files[0::20],
        "test": files[1::20],
    }
    return {
        split: np.frombuffer(b"\n".join(p.read_bytes() for p in paths), np.uint8)
        for split, paths in of_split.items()
    }


@cache
def series() -> dict[str, np.ndarray]:
    """Three series of statsmodels: name -> f32[n].

    Yearly sunspots (309), monthly temperatures of El Nino's sea (732), weekly CO2 over
    Mauna Loa (2284, gaps interpolated). Each is shifted and scaled so that its first
    70 %, which train, have mean 0 and range 1.
    """
    from statsmodels.datasets import co2, elnino, sunspots

    raw = {
        "sunspots": sunspots.load_pandas().data["SUNACTIVITY"],
        "elnino": elnino.load_pandas().data.set_index("YEAR").stack(),
        "co2": co2.load_pandas().data["co2"].interpolate(),
    }
    return {name: _scaled(np.asarray(values, float)) for name, values in raw.items()}


def _scaled(values: np.ndarray) -> np.ndarray:
    train = values[: _ends(values)[0]]
    return ((values - train.mean()) / np.ptp(train)).astype(np.float32)


def _ends(values: np.ndarray) -> tuple[int, int]:
    """Returns the ends of training and validation."""
    return round(0.7 * len(values)), round(0.8 * len(values))


def windows(
    values: np.ndarray, context: int, horizon: int
) -> dict[Split, tuple[np.ndarray, np.ndarray]]:
    """All stretches of a series: split -> (past f[n, context], future f[n, horizon]).

    The future of each lies in its split; its past may begin in the split before.
    """
    train, validation = _ends(values)
    parts = {
        "train": values[:train],
        "validation": values[train - context : validation],
        "test": values[validation - context :],
    }
    length = context + horizon
    stretches = {
        split: np.lib.stride_tricks.sliding_window_view(part, length)
        for split, part in parts.items()
    }
    return {split: (s[:, :context], s[:, context:]) for split, s in stretches.items()}

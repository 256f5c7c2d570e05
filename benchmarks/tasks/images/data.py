"""Labelled images, split once and for all into training, validation and test.

Learning rates are chosen on the validation images; the test images score the reported
runs alone. Nothing is downloaded.
"""

import io
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

Split = Literal["train", "validation", "test"]
FOLDER = "STABLEGRAD_DATA"  # names the folder of what no package installs


class Images(NamedTuple):
    """The images of one split."""

    pixels: np.ndarray  # u8[n, h, w, c]
    labels: np.ndarray  # i32[n]


@dataclass(frozen=True, eq=False)
class Data:
    """A data set.

    Attributes:
        splits: disjoint.
        num_classes: labels are below it.
        padding: pixels by which training images are shifted at most, each way.
        flip: whether training images are mirrored at random.
    """

    name: str
    splits: dict[Split, Images]
    num_classes: int
    padding: int = 0
    flip: bool = False

    @property
    def failure_accuracy(self) -> float:
        """A run that gets no further has failed: 1.5 times chance."""
        return 1.5 / self.num_classes


@cache
def load(name: str) -> Data:
    """A data set of `DATASETS`.

    Raises:
        ValueError: in one line, where the data cannot be had.
    """
    return DATASETS[name]()


def _digits() -> Data:
    """1797 images of 8x8: 1197 to train, 200 to validate, 400 to test."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    pixels = (pixels * (255 / 16)).round().reshape(-1, 8, 8, 1)
    test, validation, train = _cut(_images(pixels, labels), 400, 200)
    splits = {"train": train, "validation": validation, "test": test}
    return Data("digits", splits, num_classes=10)


def _cifar10_jpeg() -> Data:
    """CIFAR-10 from lossy JPEG files: not to be compared with CIFAR-10 itself."""
    from PIL import Image

    def pictures(scans: np.ndarray, offsets: np.ndarray) -> Iterator[np.ndarray]:
        for begin, end in itertools.pairwise(offsets):
            scan = scans[begin:end].tobytes()
            yield np.asarray(Image.open(io.BytesIO(header + scan)))

    with np.load(_find("cifar10_jpeg_full.npz")) as file:
        header = file["header"].tobytes()
        train, test = (
            _images(
                np.stack(list(pictures(file[f"bytes_{s}"], file[f"offsets_{s}"]))),
                file[f"y_{s}"],
            )
            for s in ("train", "test")
        )
    validation, rest = _cut(train, 5000)
    splits = {"train": rest, "validation": validation, "test": _cut(test)[0]}
    return Data("cifar10-jpeg", splits, num_classes=10, padding=4, flip=True)


def _images(pixels: np.ndarray, labels: np.ndarray) -> Images:
    return Images(pixels.astype(np.uint8), labels.astype(np.int32))


def _cut(images: Images, *sizes: int) -> list[Images]:
    """Parts of so many images, and the rest, in an order that is always the same."""
    order = np.random.default_rng(0).permutation(len(images.labels))
    parts = np.split(order, np.cumsum(sizes, dtype=int))
    return [Images(images.pixels[part], images.labels[part]) for part in parts]


def _find(file: str) -> Path:
    folder = os.environ.get(FOLDER)
    if folder is None:
        raise ValueError(f"${FOLDER} must name the folder that holds {file}")
    for path in (Path(folder) / file, *sorted(Path(folder).glob(f"*/{file}"))):
        if path.is_file():
            return path
    raise ValueError(
        f"${FOLDER} must hold {file}, itself or one folder below; it is {folder}"
    )


# name in the results -> what loads it
DATASETS: dict[str, Callable[[], Data]] = {
    "digits": _digits,
    "cifar10-jpeg": _cifar10_jpeg,
}

"""Labelled images, split once and for all into training, validation and test.

Learning rates are chosen on the validation images; the test images score the reported
runs alone. Nothing is downloaded but by `cifar10` and `cifar100`.
"""

import io
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

Split = Literal["train", "validation", "test"]
HUB = "the Hugging Face hub"


class Images(NamedTuple):
    """Of one split."""

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


def load(name: str, folder: Path | None = None) -> Data:
    """A data set of `DATASETS`.

    Args:
        name: which.
        folder: holds `mnist.npz` and `cifar10_jpeg_full.npz`, itself or one below it.

    Raises:
        ValueError: in one line, where the data cannot be had.
    """
    return DATASETS[name](folder)


@cache
def _digits(folder: Path | None) -> Data:
    """1797 images of 8x8: 1197 to train, 200 to validate, 400 to test."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    pixels = (pixels * (255 / 16)).round().reshape(-1, 8, 8, 1)
    test, validation, train = _cut(_images(pixels, labels), 400, 200)
    splits = {"train": train, "validation": validation, "test": test}
    return Data("digits", splits, num_classes=10)


@cache
def _mnist(folder: Path | None) -> Data:
    with np.load(_find(folder, "mnist.npz", "mnist")) as file:
        train = _images(file["x_train"][..., None], file["y_train"])
        test = _images(file["x_test"][..., None], file["y_test"])
    return _published("mnist", train, test, padding=2, flip=False)


@cache
def _cifar10_jpeg(folder: Path | None) -> Data:
    """CIFAR-10 from lossy JPEG files: not to be compared with CIFAR-10 itself."""
    from PIL import Image

    def pictures(scans: np.ndarray, offsets: np.ndarray) -> Iterator[np.ndarray]:
        for begin, end in itertools.pairwise(offsets):
            scan = scans[begin:end].tobytes()
            yield np.asarray(Image.open(io.BytesIO(header + scan)))

    with np.load(_find(folder, "cifar10_jpeg_full.npz", "CIFAR-10 (JPEG)")) as file:
        header = file["header"].tobytes()
        train, test = (
            _images(
                np.stack(list(pictures(file[f"bytes_{s}"], file[f"offsets_{s}"]))),
                file[f"y_{s}"],
            )
            for s in ("train", "test")
        )
    return _published("cifar10-jpeg", train, test, padding=4, flip=True)


@cache
def _from_hub(name: str, column: str, label: str, folder: Path | None) -> Data:
    """CIFAR by the `datasets` library; what it has fetched once stays in its cache."""
    try:
        import datasets
    except ModuleNotFoundError:
        raise ValueError(
            f"{name} needs the datasets library: pip install datasets"
        ) from None
    try:
        both = datasets.load_dataset(f"uoft-cs/{name}")
    except Exception as error:  # the library raises many kinds, of others' making
        cause = type(error).__name__
        raise ValueError(
            f"{name} could not be fetched from {HUB} ({cause}); digits needs no "
            "network, cifar10-jpeg and mnist need --data-dir alone"
        ) from None
    train, test = (
        _images(
            np.stack([np.asarray(image) for image in both[split][column]]),
            np.asarray(both[split][label]),
        )
        for split in ("train", "test")
    )
    return _published(name, train, test, padding=4, flip=True)


def _published(
    name: str, train: Images, test: Images, *, padding: int, flip: bool
) -> Data:
    """A set that comes with a test split: 5000 training images validate."""
    validation, rest = _cut(train, 5000)
    splits = {"train": rest, "validation": validation, "test": _cut(test)[0]}
    num_classes = int(train.labels.max()) + 1
    return Data(name, splits, num_classes, padding, flip)


def _images(pixels: np.ndarray, labels: np.ndarray) -> Images:
    return Images(pixels.astype(np.uint8), labels.astype(np.int32))


def _cut(images: Images, *sizes: int) -> list[Images]:
    """Parts of so many images, and the rest, in an order that is always the same."""
    order = np.random.default_rng(0).permutation(len(images.labels))
    parts = np.split(order, np.cumsum(sizes, dtype=int))
    return [Images(images.pixels[part], images.labels[part]) for part in parts]


def _find(folder: Path | None, file: str, name: str) -> Path:
    if folder is None:
        raise ValueError(f"{name} needs --data-dir, the folder of {file}")
    for path in (folder / file, *sorted(folder.glob(f"*/{file}"))):
        if path.is_file():
            return path
    raise ValueError(
        f"--data-dir must hold {file}, itself or one folder below; got {folder}"
    )


# name in the results -> what loads it from --data-dir
DATASETS: dict[str, Callable[[Path | None], Data]] = {
    "digits": _digits,
    "mnist": _mnist,
    "cifar10-jpeg": _cifar10_jpeg,
    "cifar10": lambda folder: _from_hub("cifar10", "img", "label", None),
    "cifar100": lambda folder: _from_hub("cifar100", "img", "fine_label", None),
}

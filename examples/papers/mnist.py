"""The four IDX files of MNIST, from a folder on disk, each as it is or compressed with gzip.

The format, by Y. LeCun: two zero bytes, a byte for the type (8: unsigned bytes), a byte for the
number of axes, a big-endian 32-bit length for each axis, and the values in row-major order.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np

FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


Part = tuple[np.ndarray, np.ndarray]


def parts(folder: Path) -> tuple[Part, Part]:
    """Return the images and labels for training, and those for test.

    Args:
      folder: where the four files are, named as MNIST names them, with or without `.gz`.

    Returns:
      Twice: images `(n, side, side, 1)`, uint8, and labels `(n,)`, int32.

    Raises:
      FileNotFoundError: if a file is missing; it is named.
      ValueError: if a file is cut, is no IDX file, or holds something else; it is named.
    """
    train, test = (_part(folder, *names) for names in FILES.values())
    if train[0].shape[1:] != test[0].shape[1:]:
        shapes = f"training images are {train[0].shape[1:]}, test images {test[0].shape[1:]}"
        raise ValueError(f"{folder}: {shapes}")
    return train, test


def load(folder: Path) -> Part:
    """Return all images as floats in [0, 1], those for training first, and their labels.

    Raises:
      FileNotFoundError, ValueError: as `parts`.
    """
    images, labels = (np.concatenate(both) for both in zip(*parts(folder), strict=True))
    return images.astype(np.float32) / 255, labels


def read_idx(path: Path, axes: int) -> np.ndarray:
    """Return the bytes of an IDX file with this many axes, uint8."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from None
    magic = bytes([0, 0, 8, axes])
    if raw[:4] != magic:
        raise ValueError(
            f"{path} is not an IDX file of bytes with {axes} axes: it begins with "
            f"{raw[:4].hex(' ') or 'nothing'}, not {magic.hex(' ')}"
        )
    header = 4 + 4 * axes
    if len(raw) < header:
        raise ValueError(f"{path} is cut: its header has {header} bytes, there are {len(raw)}")
    shape = tuple(np.frombuffer(raw, ">u4", axes, offset=4).tolist())
    expected, got = int(np.prod(shape, dtype=np.int64)), len(raw) - header
    if got != expected:
        what = "is cut" if got < expected else "has bytes left over"
        raise ValueError(f"{path} {what}: its shape is {shape}, {expected} bytes; there are {got}")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def _part(folder: Path, images: str, labels: str) -> Part:
    x, y = read_idx(_find(folder, images), axes=3), read_idx(_find(folder, labels), axes=1)
    if len(x) != len(y):
        raise ValueError(f"{folder}: {images} has {len(x)} images, {labels} {len(y)} labels")
    if x.shape[1] != x.shape[2] or not len(x):
        raise ValueError(f"{folder}: {images} must hold square images, got shape {x.shape}")
    if y.max() > 9:
        raise ValueError(f"{folder}: {labels} must hold the labels 0 to 9, got {y.max()}")
    return x[..., None], y.astype(np.int32)


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{folder} has neither {name} nor {name}.gz")

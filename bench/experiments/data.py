"""Readers of image sets: the IDX files of MNIST and Fashion-MNIST, and both archives of CIFAR-10.

Whatever is wrong with a file, the error is a `DataError` that names it.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from experiments import pickles

CLASSES = 10
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
_IMAGES, _LABELS = 0x0803, 0x0801  # unsigned bytes, in three dimensions and in one
_CIFAR_SHAPE = (3, 32, 32)
CIFAR_BATCH = 10_000  # images in a file
_CIFAR_TRAIN = [f"data_batch_{i}" for i in range(1, 6)]
_CIFAR_TEST = ["test_batch"]


class DataError(ValueError):
    """A file of data is missing, or not what it should be."""


@dataclass(frozen=True)
class Images:
    """Images, uint8 of shape (N, C, H, W), with their labels, int64 of shape (N,)."""

    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        assert len(self.x) == len(self.y)

    def first(self, count: int | None) -> Images:
        """Return the first `count` images; all of them with None."""
        return Images(self.x[:count], self.y[:count])


@dataclass(frozen=True)
class ImageSet:
    """Images to train on and to test on."""

    train: Images
    test: Images


# -- IDX ------------------------------------------------------------------------------------------------------


def read_idx(path: Path, magic: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes, compressed by gzip or not.

    Args:
        path: the file; compressed if its name ends in .gz.
        magic: its first four bytes as a number; the last of them counts dimensions.

    Raises:
        DataError: if the file cannot be read, starts otherwise, or is shorter or longer than it says.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return _idx_of(path, file, magic)  # type: ignore[arg-type]
    except EOFError as error:
        raise DataError(f"{path} is truncated: its compressed data ends too early") from error
    except (OSError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _idx_of(path: Path, file: BinaryIO, magic: int) -> np.ndarray:
    dimensions = magic & 0xFF
    header = file.read(4 + 4 * dimensions)
    if len(header) < 4 or struct.unpack(">I", header[:4])[0] != magic:
        raise DataError(f"{path} must start with the magic number 0x{magic:08x}, got 0x{header[:4].hex()}")
    if len(header) < 4 + 4 * dimensions:
        raise DataError(f"{path} is truncated: {len(header)} bytes are no whole header")
    shape = struct.unpack(f">{dimensions}I", header[4:])
    size = math.prod(shape)
    data = file.read()  # not read(size): a damaged header may ask for any size
    if len(data) != size:
        what = "truncated" if len(data) < size else "too long"
        raise DataError(f"{path} is {what}: {size} bytes of data should follow its header, got {len(data)}")
    return np.frombuffer(data, np.uint8).reshape(shape)


def read_mnist(folder: Path) -> ImageSet:
    """Read MNIST or Fashion-MNIST from a folder with its four IDX files.

    Raises:
        DataError: if a file is missing or wrong.
    """
    return ImageSet(_mnist_part(folder, "train"), _mnist_part(folder, "t10k"))


def _mnist_part(folder: Path, part: str) -> Images:
    path, label_path = _idx_path(folder, f"{part}-images", 3), _idx_path(folder, f"{part}-labels", 1)
    x, y = read_idx(path, _IMAGES), read_idx(label_path, _LABELS)
    if x.shape[1:] != (28, 28):
        raise DataError(f"{path} must hold images of 28 by 28 pixels, got {x.shape[1]} by {x.shape[2]}")
    if not len(x):
        raise DataError(f"{path} must hold images, got none")
    if len(x) != len(y):
        raise DataError(f"{label_path} must hold a label for each of {len(x)} images, got {len(y)}")
    return _images(x[:, None], y, label_path)


def _idx_path(folder: Path, stem: str, dimensions: int) -> Path:
    names = [f"{stem}{dot}idx{dimensions}-ubyte{end}" for dot in "-." for end in ("", ".gz")]
    return _existing(folder, [folder / name for name in names])


# -- CIFAR-10 -------------------------------------------------------------------------------------------------


def read_cifar10(folder: Path) -> ImageSet:
    """Read CIFAR-10 from a folder with the unpacked "binary" or "python" archive, or with the archive's own folder.

    Raises:
        DataError: if a batch is missing or wrong.
    """
    places = [folder / name for name in ("", "cifar-10-batches-bin", "cifar-10-batches-py")]
    found = [place for place in places if any(place.glob("data_batch_*"))]
    if not found:
        raise DataError(f"{folder} must hold CIFAR-10's batches (data_batch_1.bin or data_batch_1, ...)")
    place = found[0]
    binary = any(place.glob("data_batch_*.bin"))
    return ImageSet(_cifar_part(place, _CIFAR_TRAIN, binary), _cifar_part(place, _CIFAR_TEST, binary))


def _cifar_part(folder: Path, names: Sequence[str], binary: bool) -> Images:
    paths = [_existing(folder, [folder / (name + ".bin" * binary)]) for name in names]
    batches = [(_binary_batch if binary else _python_batch)(path) for path in paths]
    for path, batch in zip(paths, batches, strict=True):
        if len(batch.y) != CIFAR_BATCH:
            raise DataError(f"{path} must hold {CIFAR_BATCH} images, got {len(batch.y)}")
    return Images(torch.cat([batch.x for batch in batches]), torch.cat([batch.y for batch in batches]))


def _binary_batch(path: Path) -> Images:
    """One byte of label, then the image, channel by channel."""
    data = np.frombuffer(_bytes_of(path), np.uint8)
    record = 1 + math.prod(_CIFAR_SHAPE)
    if not len(data) or len(data) % record:
        raise DataError(f"{path} must hold records of {record} bytes, got {len(data)} bytes in all")
    records = data.reshape(-1, record)
    return _images(records[:, 1:].reshape(-1, *_CIFAR_SHAPE), records[:, 0], path)


def _python_batch(path: Path) -> Images:
    """A pickled dict with the images under b'data' and the labels under b'labels'."""
    try:
        batch = pickles.loads(_bytes_of(path))
    except pickles.RefusedError as error:
        raise DataError(f"{path} is not one of CIFAR-10's pickles: {error}") from error
    found = {key: batch.get(key, batch.get(key.decode())) for key in (b"data", b"labels")} if _is_dict(batch) else {}
    x, y = found.get(b"data"), found.get(b"labels")
    if not isinstance(x, np.ndarray) or not isinstance(y, list) or not all(type(label) is int for label in y):
        raise DataError(f"{path} must hold a dict with an array 'data' and a list of numbers 'labels'")
    if x.shape != (len(y), math.prod(_CIFAR_SHAPE)) or x.dtype != np.uint8 or not len(y):
        wanted = f"uint8 of shape ({len(y)}, {math.prod(_CIFAR_SHAPE)}), a row for each label"
        raise DataError(f"{path} must hold data in {wanted}, got {x.dtype} of shape {x.shape}")
    return _images(x.reshape(-1, *_CIFAR_SHAPE), np.array(y).clip(-1, CLASSES), path)


def _is_dict(value: object) -> bool:
    return type(value) is dict


# -- both -----------------------------------------------------------------------------------------------------


def _images(x: np.ndarray, y: np.ndarray, label_path: Path) -> Images:
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < CLASSES:
        raise DataError(f"{label_path} must hold labels from 0 to {CLASSES - 1}, got one outside")
    return Images(torch.from_numpy(x.copy()), torch.from_numpy(y.astype(np.int64)))


def _existing(folder: Path, paths: Sequence[Path]) -> Path:
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise DataError(f"{folder} lacks {' or '.join(path.name for path in paths)}")
    return path


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


READERS = {"fashion-mnist": read_mnist, "mnist": read_mnist, "cifar10": read_cifar10}

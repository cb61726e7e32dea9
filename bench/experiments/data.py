"""Image sets: MNIST and Fashion-MNIST (IDX files), CIFAR-10 (its "binary version"), scikit-learn's digits.

Whatever is wrong with a file, the error is a `DataError` that names it.
"""

from __future__ import annotations

import gzip
import math
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
CIFAR_BATCH = 10_000  # images in a file
_CIFAR_SHAPE = (3, 32, 32)
_MARGIN = 4  # of black around an image that is cropped
Images = tuple[Tensor, Tensor]  # uint8 of shape (N, C, H, W), and labels, int64 of shape (N,)


class DataError(ValueError):
    """A file of data is missing, or not what it should be."""


def _read(folder: Path, *names: str) -> tuple[Path, bytes]:
    """Read the first of some files that is there; decompress it if its name ends in .gz."""
    for path in (folder / name for name in names):
        if path.is_file():
            try:
                data = path.read_bytes()
                return path, gzip.decompress(data) if path.suffix == ".gz" else data
            except (OSError, EOFError, zlib.error) as error:
                raise DataError(f"{path} cannot be read: {error}") from error
    raise DataError(f"{folder} lacks {' or '.join(names)}")


def _images(x: np.ndarray, y: np.ndarray, path: Path) -> Images:
    if not len(x) or len(x) != len(y) or y.max() > 9:
        raise DataError(f"{path} must hold a label from 0 to 9 for each of {len(x)} images")
    return torch.from_numpy(x.copy()), torch.from_numpy(y.astype(np.int64))


def _idx(folder: Path, stem: str, dimensions: int) -> tuple[Path, np.ndarray]:
    names = [f"{stem}{dot}idx{dimensions}-ubyte{end}" for dot in "-." for end in ("", ".gz")]
    path, data = _read(folder, *names)
    start = 4 + 4 * dimensions
    shape = np.frombuffer(data[4:start].ljust(start - 4, b"\0"), ">u4").tolist()
    if data[:4] != bytes([0, 0, 8, dimensions]) or len(data) != start + math.prod(shape):
        raise DataError(f"{path} is no whole IDX file of bytes in {dimensions} dimensions")
    return path, np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def read_mnist(folder: Path) -> tuple[Images, Images]:
    """Read MNIST or Fashion-MNIST from its four IDX files, padded with black to 32×32 as the paper's network has it."""
    parts = []
    for part in ("train", "t10k"):
        path, x = _idx(folder, f"{part}-images", 3)
        if x.shape[1:] != (28, 28):
            raise DataError(f"{path} must hold images of 28 by 28 pixels, got {x.shape[1]} by {x.shape[2]}")
        label_path, y = _idx(folder, f"{part}-labels", 1)
        parts.append(_images(np.pad(x, ((0, 0), (2, 2), (2, 2)))[:, None], y, label_path))
    return parts[0], parts[1]


def read_cifar10(folder: Path) -> tuple[Images, Images]:
    """Read CIFAR-10 from a folder with its binary version, or with that one's own folder."""
    parts = []
    for names in ([f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]):
        batches = []
        for name in names:
            path, data = _read(folder, f"{name}.bin", f"cifar-10-batches-bin/{name}.bin")
            if len(data) != CIFAR_BATCH * (1 + math.prod(_CIFAR_SHAPE)):
                raise DataError(f"{path} must hold {CIFAR_BATCH} images of 3073 bytes, got {len(data)} bytes")
            batches.append(np.frombuffer(data, np.uint8).reshape(CIFAR_BATCH, -1))  # label, then channel by channel
        records = np.concatenate(batches)
        parts.append(_images(records[:, 1:].reshape(-1, *_CIFAR_SHAPE), records[:, 0], path))
    return parts[0], parts[1]


def read_digits(_: Path) -> tuple[Images, Images]:
    """Read scikit-learn's handwritten digits: 1,797 real images of 8×8, a fifth for testing."""
    from sklearn.datasets import load_digits

    found = load_digits()
    x, y = torch.from_numpy(found.images * 15).byte()[:, None], torch.from_numpy(found.target)
    split = len(x) * 4 // 5
    return (x[:split], y[:split]), (x[split:], y[split:])


READERS = {"fashion-mnist": read_mnist, "mnist": read_mnist, "cifar10": read_cifar10, "digits": read_digits}


@cache
def image_set(name: str, folder: Path) -> tuple[Images, Images]:
    """Read images to train on and to test on."""
    return READERS[name](folder)


def normalisation(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of bytes / 255 by channel, (C, 1, 1), exactly: from counts."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in x.unbind(1)])
    shares = counts.double() / counts.sum(1, keepdim=True)
    mean = shares @ levels
    deviation = (shares @ levels.square() - mean.square()).clamp_min(1e-12).sqrt()
    return mean.float().view(-1, 1, 1), deviation.float().view(-1, 1, 1)


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Crop each image at random out of itself with a margin of 4 black pixels, and flip half of them, at random."""
    (count, channels, height, width), device = x.shape, x.device
    top, left = torch.randint(2 * _MARGIN + 1, (2, count, 1), generator=generator, device=device)
    flip = torch.randint(2, (count, 1), generator=generator, device=device).bool()
    columns = torch.arange(width, device=device).expand(count, -1)
    columns = left + torch.where(flip, width - 1 - columns, columns)  # [N, W]
    rows = top + torch.arange(height, device=device)  # [N, H]
    image = torch.arange(count, device=device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=device).view(1, -1, 1, 1)
    return F.pad(x, (_MARGIN,) * 4)[image, channel, rows[:, None, :, None], columns[:, None, None, :]]

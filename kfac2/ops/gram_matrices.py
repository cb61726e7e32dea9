"""Covariances of wide rows by the library's matrix product, where that is faster than the native kernel.

With C channels and K places in a patch, the native kernel reads x once and never forms patches, but multiplies in plain
float32, and channels in tiles; a library's product multiplies by tensor cores, or near the peak of float32. Which is
faster is told by the multiply-adds of each and what was measured of them on an H100 (`bench/large.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac2.ops._batching import multiplies_in_tf32
from kfac2.window import Window

CHUNK = 2**26  # numbers of all rows that are formed at a time
PANELS = 8  # at most, as the native op takes them
# Columns of a panel, at least: half of a product is worth a launch only where products of that size are at the rate of
# the whole one. Strict float32 is from 512 columns on, tensor cores are from 1,536.
PANEL, PANEL_TENSOR_CORES = 512, 1536

# Measured on an H100, in picoseconds: a multiply-add of the library's product by its precision, of the native kernel by
# the channels of its tile, one number of rows that are formed by a copy; a launch.
MULTIPLY = {"fp32": 0.038, "tf32": 0.009, "half": 0.004}
NATIVE_MULTIPLY = {16: 0.16, 32: 0.1}
COPY = {"fp32": 8.0, "tf32": 8.0, "half": 6.5}
LAUNCH = 2.5e6
TILE = 128  # columns of the library's tiles

_HALF = (torch.float16, torch.bfloat16)


def is_faster(x: Tensor, window: Window) -> bool:
    """Tell whether a tensor's rows go to the library's product.

    Args:
        x: (N, C, *spatial).
        window: how rows are taken from it.
    """
    # What does not fit is refused by the native op, in words.
    if not x.is_cuda or window.groups > 1 or window.bias > 1 or x.dtype not in (torch.float32, *_HALF):
        return False
    if x.dim() != 2 + len(window.kernel_size) or min([1, *window.grid(x.shape[2:])]) < 1:
        return False
    return product_is_faster(x.shape, window, _precision(x.dtype), x.stride(1) == 1)


def product_is_faster(shape: Sequence[int], window: Window, precision: str, is_last: bool) -> bool:
    """Compare what the native kernel multiplies, channels filled up to its tile, with what the library does.

    The library multiplies all pairs of a row's numbers, but for the panels that are left out, once a copy has formed
    the rows.

    Args:
        shape: (N, C, *spatial).
        window: how rows are taken; one group.
        precision: `"fp32"`, `"tf32"` or `"half"`.
        is_last: whether channels follow each other in memory.
    """
    channels, rows = shape[1], shape[0] * math.prod(window.grid(shape[2:]))
    tile = 16 if channels <= 16 else 32
    native = rows * distances(window) * _up(channels, tile) ** 2 * NATIVE_MULTIPLY[tile]

    columns = channels * math.prod(window.kernel_size)
    is_padded = any(map(any, window.padding))
    is_copied = not is_last or is_padded or max((*window.kernel_size, *window.stride), default=1) > 1
    panels = math.ceil(columns / panel_rows(columns, precision))
    multiplied = _up(columns, TILE) ** 2 * (0.5 + 0.5 / panels) * MULTIPLY[precision]
    formed = columns * COPY[precision] if is_copied else 0.0
    return rows * (multiplied + formed) + (panels + 1 + is_copied + is_padded) * LAUNCH < native


def distances(window: Window) -> float:
    """Count how often the native kernel multiplies a place with others: `csrc/include/covariance_pieces.h`.

    Once for each distance of two offsets of a kernel and each phase of the stride that it meets; half of them, by
    symmetry. At the edges of a map there are a few more, or in padding fewer.
    """
    count = 0.5
    for k, step in zip(window.kernel_size, window.stride, strict=True):
        count *= sum(min(step, k - abs(distance)) for distance in range(1 - k, k))
    return count


class RowProducts(NamedTuple):
    """The outer products of rows, summed.

    Attributes:
        panels: those of rows without their bias, as `fold_products` takes them; float64 for a float64 tensor, else
            float32.
        last: for a window with a bias the row that it adds, the sums of rows, (width,); else None.
        corner: that row's last number, of rows; without a bias 0.
    """

    panels: list[Tensor]
    last: Tensor | None
    corner: int


def row_products(x: Tensor, window: Window) -> RowProducts:
    """Sum the outer products of rows, as `covariances` does for one tensor whose window has one group.

    Float32 is multiplied at the user's `torch.set_float32_matmul_precision`: with TF32 both operands are rounded alike,
    so that the result is the Gram matrix of rounded rows, and positive semi-definite. Half types are added up in
    float32.

    Args:
        x: (N, C, *spatial).
        window: how rows are taken from it; one group, a bias of 0 or 1.
    """
    panels: list[Tensor] = []
    last, corner = None, 0
    for rows in _rows(x, window):
        products = _products(rows, panel_rows(rows.shape[1], _precision(x.dtype)))
        panels = [a.add_(b) for a, b in zip(panels, products, strict=True)] if panels else products
        if window.bias:
            sums = rows.sum(0, dtype=products[0].dtype)
            last, corner = sums if last is None else last.add_(sums), corner + len(rows)
    return RowProducts(panels, last, corner)


def panel_rows(width: int, precision: str) -> int:
    """Return the rows of each panel of a product but the last, a multiple of 8, as tensor cores like addresses.

    Args:
        width: of the product.
        precision: `"fp32"`, `"tf32"` or `"half"`.
    """
    count = min(PANELS, max(1, width // (PANEL if precision == "fp32" else PANEL_TENSOR_CORES)))
    return _up(math.ceil(width / count), 8)


def _precision(dtype: torch.dtype) -> str:
    if dtype in _HALF:
        return "half"
    return "tf32" if dtype == torch.float32 and multiplies_in_tf32() else "fp32"


def _up(number: int, step: int) -> int:
    return math.ceil(number / step) * step


def _products(rows: Tensor, height: int) -> list[Tensor]:
    """Return the block triangle of RᵀR: its columns from the diagonal on, panel by panel, half types in float32."""
    firsts = range(0, rows.shape[1], height)
    if rows.dtype in _HALF:
        if rows.is_cuda:
            sums = torch.float32
            return [torch.mm(rows[:, i : i + height].mT, rows[:, i:], out_dtype=sums) for i in firsts]
        rows = rows.float()
    return [rows[:, i : i + height].mT @ rows[:, i:] for i in firsts]


def _rows(x: Tensor, window: Window) -> Iterator[Tensor]:
    """Yield rows without the bias, (rows, C · places of the kernel), channels slowest, few samples at a time.

    Patches overlap in memory until one copy writes them as rows; rows that lie there as they are, are not copied.
    """
    padding = [number for pair in reversed(window.padding) for number in pair]
    grid, columns = window.grid(x.shape[2:]), x.shape[1] * math.prod(window.kernel_size)
    places = math.prod(grid)
    for part in x.split(max(1, CHUNK // max(1, places * columns))):
        if any(padding):
            part = F.pad(part, padding)
        of_sample, of_channel, *along = part.stride()
        steps = [s * step for s, step in zip(along, window.stride, strict=True)]
        offsets = [s * spread for s, spread in zip(along, window.dilation, strict=True)]
        patches = part.as_strided(
            (len(part), *grid, x.shape[1], *window.kernel_size), (of_sample, *steps, of_channel, *offsets)
        )
        yield patches.reshape(len(part) * places, columns)

"""Covariances of wide rows by the library's matrix product, where that is faster than the native kernel.

With C channels and K places in a patch, the native kernel reads x once and never forms patches, but multiplies in plain
float32, and channels in tiles; a library's product multiplies by tensor cores, or near the peak of float32. All layers
of a call share the launches of the kernel, and those that fold products; each product has launches of its own. So who
multiplies is decided for all layers of a call together, by what was measured of both ways on an H100
(`bench/large.py`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac2 import _C  # type: ignore[attr-defined]
from kfac2.ops._batching import multiplies_in_tf32
from kfac2.ops.fold_products import Product
from kfac2.ops.layer_maps import sum_dtype
from kfac2.window import Window

CHUNK = 2**26  # numbers of all rows that are formed at a time
# Products that wait for each other, so that one launch folds them: 16 MB. A larger one waits for none.
WAITING_BYTES = 2**24
# Columns of a panel, at least: half of a product is worth a launch only where products of that size are at the rate of
# the whole one. Strict float32 is from 512 columns on, tensor cores are from 1,536.
PANEL, PANEL_TENSOR_CORES = 512, 1536

# Measured on an H100 (one layer and twelve, of 8,192 rows of 64 to 768; convolutions of ResNet-50), in picoseconds. Of
# the library: a multiply-add and the launches of a product, by its precision; one number of rows that are formed by a
# copy, where it moves channels behind places and where it forms patches, which are read again and again; what folds the
# products of a call.
MULTIPLY = {"fp32": 0.038, "tf32": 0.01, "half": 0.004}
PRODUCT = {"fp32": 11e6, "tf32": 9e6, "half": 7.5e6}
COPY = {"fp32": 7.5, "tf32": 7.5, "half": 6.5}
COPY_PATCHES = {"fp32": 4.5, "tf32": 4.5, "half": 2.5}
FOLD = 4.5e6
# Of the native kernel: a multiply-add by the channels of its tile; what all layers of a call share; what each costs
# beyond its multiply-adds.
NATIVE_MULTIPLY = {16: 0.16, 32: 0.09, 64: 0.075}
NATIVE_CALL, NATIVE_LAYER = 19e6, 2e6
LAUNCH = 2.5e6  # any other
TILE = 128  # columns of the library's tiles

_HALF = (torch.float16, torch.bfloat16)


class Costs(NamedTuple):
    """Picoseconds that a layer adds to a call by the native kernel, and by the library's product."""

    native: float
    library: float


def are_faster(tensors: Sequence[Tensor], windows: Sequence[Window]) -> list[bool]:
    """Tell of each tensor of a call whether its rows go to the library's product.

    Args:
        tensors: of each layer, (N, C, *spatial), all on one device.
        windows: how rows are taken from each.
    """
    # While torch.compile traces a function, sizes may be symbols, and how float32 is multiplied cannot be asked.
    if not tensors[0].is_cuda or torch.compiler.is_compiling():
        return [False] * len(tensors)
    precisions = {dtype: _precision(dtype) for dtype in (torch.float32, *_HALF)}
    return products_are_faster([
        _costs_by_shape(x.shape, window, precisions.get(x.dtype), x.dim() > 1 and x.stride(1) == 1)
        for x, window in zip(tensors, windows, strict=True)
    ])  # fmt: skip


def products_are_faster(layers: Sequence[Costs]) -> list[bool]:
    """Choose the library's product for those layers of a call that make the call as short as it can be.

    Where both ways are gone, each layer goes the one that is shorter for itself; but what the layers of a way share is
    spared where none goes it.

    Args:
        layers: of all layers of the call.
    """
    shortest, least = [False] * len(layers), NATIVE_CALL + sum(layer.native for layer in layers)
    each = [layer.library < layer.native for layer in layers]
    for chosen in (each, [True] * len(layers)):
        shared = FOLD * any(chosen) + NATIVE_CALL * (not all(chosen))
        whole = shared + sum(
            layer.library if goes else layer.native for layer, goes in zip(layers, chosen, strict=True)
        )
        if whole < least:
            shortest, least = chosen, whole
    return shortest


def costs(shape: Sequence[int], window: Window, precision: str | None, is_last: bool) -> Costs:
    """Return what a layer costs; by the library infinitely much, where its product does not take such rows.

    The native kernel multiplies channels filled up to its tile. The library multiplies all pairs of a row's numbers,
    but for the panels that are left out, once a copy has formed the rows.

    Args:
        shape: (N, C, *spatial).
        window: how rows are taken.
        precision: `"fp32"`, `"tf32"` or `"half"`; None: of a dtype that only the native kernel takes.
        is_last: whether channels follow each other in memory.
    """
    # What does not fit is refused by the native op, in words.
    if len(shape) != 2 + len(window.kernel_size) or min([*shape, *window.grid(shape[2:])]) < 1:
        return Costs(0.0, math.inf)
    channels, rows = shape[1] // window.groups, shape[0] * math.prod(window.grid(shape[2:]))
    multiplied = window.groups * native_products(channels, window)
    native = rows * multiplied * NATIVE_MULTIPLY[native_tile(channels)] + NATIVE_LAYER
    if precision is None or window.groups > 1 or window.bias > 1:
        return Costs(native, math.inf)

    columns = channels * math.prod(window.kernel_size)
    is_padded = any(map(any, window.padding))
    is_copied = not is_last or is_padded or max((*window.kernel_size, *window.stride), default=1) > 1
    panels = len(panel_shapes(columns, precision))
    multiplied = _up(columns, TILE) ** 2 * (0.5 + 0.5 / panels)
    forming = (COPY if columns == channels else COPY_PATCHES)[precision]
    formed = columns * forming if is_copied else 0.0
    launches = panels * PRODUCT[precision] + (is_copied + is_padded + window.bias) * LAUNCH
    return Costs(native, rows * (multiplied * MULTIPLY[precision] + formed) + launches)


_costs_by_shape = functools.lru_cache(maxsize=4096)(costs)  # a training has few shapes, and many calls


def native_tile(channels: int) -> int:
    """Return the channels of a tile of the native kernel: `tile_of` of `csrc/kernels/covariance_tables.h`, of float32.

    Args:
        channels: of a group.
    """
    is_filled = 3 * _up(channels, 64) ** 2 <= 4 * _up(channels, 32) ** 2
    return 16 if channels <= 16 else 64 if is_filled and channels > 32 else 32


def native_products(channels: int, window: Window) -> float:
    """Count the multiply-adds of a place by the native kernel: `csrc/include/covariance_pieces.h`.

    It multiplies a place with others, once for each distance of two offsets of a kernel and each phase of the stride
    that it meets; half of them, by symmetry, and of a place with itself a triangle of tiles. At the edges of a map
    there are a few more, or in padding fewer.

    Args:
        channels: of a group.
        window: how rows are taken.
    """
    tile = native_tile(channels)
    tiles, all_distances, none = math.ceil(channels / tile), 1, 1
    for k, step in zip(window.kernel_size, window.stride, strict=True):
        all_distances *= sum(min(step, k - abs(distance)) for distance in range(1 - k, k))
        none *= min(step, k)
    return (all_distances * tiles + none) * tiles / 2 * tile**2


def folded_together(sizes: Sequence[int]) -> Iterator[slice]:
    """Split products into runs, each of which one call folds as soon as its products have WAITING_BYTES.

    Args:
        sizes: bytes of each product.
    """
    begin, waiting = 0, 0
    for end, size in enumerate(sizes, 1):
        waiting += size
        if end == len(sizes) or waiting >= WAITING_BYTES:
            yield slice(begin, end)
            begin, waiting = end, 0


def product_bytes(x: Tensor, window: Window) -> int:
    """Return the bytes of the panels that `row_products` returns."""
    width = x.shape[1] * math.prod(window.kernel_size)
    numbers = sum(rows * columns for rows, columns in panel_shapes(width, _precision(x.dtype)))
    return numbers * sum_dtype(x.dtype).itemsize


def row_products(x: Tensor, window: Window) -> Product:
    """Sum the outer products of rows, as `covariances` does for one tensor whose window has one group.

    The last row of the product is what a bias adds: the sums of rows, and how many there are.

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
        products = _products(rows, panel_shapes(rows.shape[1], _precision(x.dtype)))
        panels = [a.add_(b) for a, b in zip(panels, products, strict=True)] if panels else products
        if window.bias:
            sums = rows.sum(0, dtype=products[0].dtype)
            last, corner = sums if last is None else last.add_(sums), corner + len(rows)
    return Product(panels, last, corner)


def panel_shapes(width: int, precision: str) -> list[tuple[int, int]]:
    """Return rows and columns of the panels of a product: all but the last have as many rows.

    Their number is a multiple of 8, as tensor cores like addresses.

    Args:
        width: of the product.
        precision: `"fp32"`, `"tf32"` or `"half"`.
    """
    least = PANEL if precision == "fp32" else PANEL_TENSOR_CORES
    count = min(_C.fold_products_max_panels, max(1, width // least))
    height = _up(math.ceil(width / count), 8)
    return [(min(height, width - first), width - first) for first in range(0, width, height)]


def _precision(dtype: torch.dtype) -> str:
    if dtype in _HALF:
        return "half"
    return "tf32" if dtype == torch.float32 and multiplies_in_tf32() else "fp32"


def _up(number: int, step: int) -> int:
    return math.ceil(number / step) * step


def _products(rows: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Return the block triangle of RᵀR: its columns from the diagonal on, panel by panel, half types in float32."""
    width = rows.shape[1]
    parts = [slice(width - columns, width - columns + height) for height, columns in shapes]
    if rows.dtype in _HALF:
        if rows.is_cuda:
            sums = torch.float32
            return [torch.mm(rows[:, part].mT, rows[:, part.start :], out_dtype=sums) for part in parts]
        rows = rows.float()
    return [rows[:, part].mT @ rows[:, part.start :] for part in parts]


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

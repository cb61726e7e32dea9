"""Covariances of wide rows by the library's matrix product, where that is faster than the native kernel.

With C channels and K places in a patch, the native kernel reads x once and never forms patches, but multiplies in plain
float32; a library's product multiplies by tensor cores, or near the peak of float32. So wide rows on a CUDA device go
there. The numbers below were measured on an H100 (`bench/large.py`): 8,192 rows of 128 take either way the same time; a
3x3 kernel of 128 channels is 1.06 times as fast by the library in bfloat16, 0.58 times in TF32, and one of 256 1.02.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac2.ops._batching import multiplies_in_tf32
from kfac2.window import Window

# Channels from which on the library is faster; in strict float32; in TF32 where patches have to be formed in float32.
CROSSOVER, CROSSOVER_FLOAT32, CROSSOVER_PATCHES = 128, 256, 256
CHUNK = 2**26  # numbers of all rows that are formed at a time

_HALF = (torch.float16, torch.bfloat16)


def is_faster(x: Tensor, window: Window) -> bool:
    """Tell whether a tensor's rows go to the library's product.

    Args:
        x: (N, C, *spatial).
        window: how rows are taken from it.
    """
    # A bias of more than 1 is refused by the native op, in words.
    if not x.is_cuda or window.groups > 1 or window.bias > 1 or x.dtype == torch.float64:
        return False
    is_strict = x.dtype == torch.float32 and not multiplies_in_tf32()
    is_patch = math.prod(window.kernel_size) > 1
    # In strict float32 the native kernel, which multiplies a patch's pairs of channels once for all offsets with the
    # same distance, needs a sixth of the operations for a 3x3 kernel.
    if is_strict:
        return x.shape[1] >= CROSSOVER_FLOAT32 and not is_patch
    return x.shape[1] >= (CROSSOVER_PATCHES if is_patch and x.dtype == torch.float32 else CROSSOVER)


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
        products = [_product(rows)]
        panels = [a.add_(b) for a, b in zip(panels, products, strict=True)] if panels else products
        if window.bias:
            sums = rows.sum(0, dtype=products[0].dtype)
            last, corner = sums if last is None else last.add_(sums), corner + len(rows)
    return RowProducts(panels, last, corner)


def _product(rows: Tensor) -> Tensor:
    """Return RᵀR, added up in float32 for half types."""
    if rows.dtype not in _HALF:
        return rows.mT @ rows
    if rows.is_cuda:
        return torch.mm(rows.mT, rows, out_dtype=torch.float32)
    return rows.mT.float() @ rows.float()


def _rows(x: Tensor, window: Window) -> Iterator[Tensor]:
    """Yield rows without the bias, (rows, C · places of the kernel), channels slowest, few samples at a time."""
    padding = [number for pair in reversed(window.padding) for number in pair]
    places = math.prod(window.kernel_size)
    samples = max(1, CHUNK // max(1, places * math.prod(x.shape[1:])))
    for part in x.split(samples):
        if any(padding):
            part = F.pad(part, padding)
        offsets = [_at(part, window, offset) for offset in itertools.product(*map(range, window.kernel_size))]
        patches = torch.stack(offsets, 2) if places > 1 else offsets[0].unsqueeze(2)
        yield patches.flatten(1, 2).movedim(1, -1).reshape(-1, patches.shape[1] * places)


def _at(x: Tensor, window: Window, offset: Sequence[int]) -> Tensor:
    """View what one place of the kernel sees, (N, C, *grid)."""
    spatial = zip(x.shape[2:], window.kernel_size, window.stride, window.dilation, offset, strict=True)
    for axis, (extent, k, step, spread, place) in enumerate(spatial, start=2):
        last = extent - spread * (k - 1)  # beyond which no patch begins
        x = x.narrow(axis, place * spread, last)[(slice(None),) * axis + (slice(None, None, step),)]
    return x

"""Derivatives of wide layers by the library: the layer itself, applied with a direction as its weight.

Σ_t g_ntᵀ D ā_nt is the sum of g ⊙ (D ā) over all places, and D ā is what a convolution, or a matrix product, gives. The
native kernel multiplies in plain float32 and keeps no product; the library's tensor cores, or the peak of float32, are
far ahead of it where rows are wide. The crossover is expected, not measured.

Where the layer itself is multiplied in bfloat16, so is a direction, whose numbers are then known to 1/256. In nine
trainings of small networks that changed no divergence by more than 0.13 %, and half of them by less than 0.05 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac2.window import Window

CROSSOVER = 64  # numbers of a row, and of a gradient's, from which on the library is faster on a CUDA device
CHUNK = 2**26  # numbers of all products at a time

_CONVOLUTIONS: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)


def is_faster(x: Tensor, window: Window, g: Tensor, directions: Tensor) -> bool:
    """Tell whether a layer goes to the library. One whose shapes do not fit goes to the native op, which says why.

    So do rows of several groups that have no axes: the library has no convolution for them.

    Args:
        x: input of the layer, (N, C, *spatial).
        window: how rows ā are taken from it.
        g: output gradient, (N, C_out, *grid).
        directions: (K, groups, C_out / groups, d_in).
    """
    if not x.is_cuda or x.dtype == torch.float64 or directions.dtype != torch.float32 or directions.dim() != 4:
        return False
    _, groups, d_out, d_in = directions.shape
    fits = (
        groups == window.groups
        and (groups == 1 or window.kernel_size != ())
        and window.bias in (0, 1)
        and x.shape[1] % groups == 0
        and len(directions) > 0
    )
    fits = fits and len(x.shape) == g.dim() == 2 + len(window.kernel_size) and g.is_floating_point() and x.shape[0] > 0
    if not fits or d_in != window.row_length(x.shape[1]):
        return False
    is_grid = g.dtype != torch.float64 and g.shape == (x.shape[0], groups * d_out, *window.grid(x.shape[2:]))
    return is_grid and min(d_in, d_out) >= CROSSOVER


def applied_directions(x: Tensor, window: Window, g: Tensor, directions: Tensor) -> Tensor:
    """Return s[k, n] of one layer, as `directional_derivatives` does.

    Products are float32 at the user's precision of matrix products and convolutions (float64 for float64 inputs,
    bfloat16 for those in bfloat16; what they meet with, and their sums, are not).

    Args:
        x: input of the layer, (N, C, *spatial).
        window: how rows ā are taken from it.
        g: output gradient, (N, C_out, *grid).
        directions: (K, groups, C_out / groups, d_in).
    """
    count, groups, d_out, d_in = directions.shape
    width = d_in - window.bias
    dtype = x.dtype if x.dtype == torch.bfloat16 else directions.dtype  # float16 would lose what is small
    weights = directions[..., :width].reshape(count, groups * d_out, -1, *window.kernel_size).to(dtype)
    s = torch.empty(count, len(x), dtype=torch.float64, device=x.device)
    samples = max(1, CHUNK // max(1, math.prod(g.shape[1:]), math.prod(x.shape[1:])))
    for begin in range(0, len(x), samples):
        some = slice(begin, begin + samples)
        inputs, grads = x[some].to(dtype), g[some].to(directions.dtype)
        for k in range(count):
            s[k, some] = _met(inputs, window, grads, weights[k])
        if window.bias:
            sums = grads.flatten(2).sum(2, dtype=torch.float64) if grads.dim() > 2 else grads.double()
            s[:, some] += directions[..., width].reshape(count, -1).double() @ sums.mT
    return s


def _met(x: Tensor, window: Window, g: Tensor, weight: Tensor) -> Tensor:
    """Return Σ g ⊙ (W ā) of each sample."""
    is_plain = window == Window.places(len(window.kernel_size), bias=window.bias)
    if is_plain:  # rows as they lie in memory where tokens do
        products = F.linear(x.movedim(1, -1), weight.flatten(1)) * g.movedim(1, -1)
    else:
        padded = F.pad(x, [number for pair in reversed(window.padding) for number in pair])
        convolution = _CONVOLUTIONS[x.dim() - 3]
        products = convolution(padded, weight, None, window.stride, 0, window.dilation, window.groups) * g
    return products.flatten(1).sum(1, dtype=torch.float64)

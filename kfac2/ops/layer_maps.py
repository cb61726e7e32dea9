"""Scalar maps of rows: the sum of each row's elements, for all layers in one native call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfac2.ops._checks import check_same_length, check_tensors, detached
from kfac2.window import NUMBERS, IntOrInts, Padding, Window


def layer_maps(tensors: Sequence[Tensor], windows: Sequence[Window]) -> list[Tensor]:
    """Sum each row of each layer, giving one scalar map for each Kronecker block.

    s[n, t] = 1ᵀ row[n, t], row[n, t] being the patch that the window takes at place t of its grid, with its
    bias ones appended. The sum over features of eq. 5-7, done before any product of layers is formed.

    Args:
        tensors: one for each layer, (N, C, *spatial) with up to three spatial axes; float32, float64, float16
            or bfloat16; any strides (contiguous and channels-last are fast).
        windows: one for each tensor.

    Returns:
        One map (N, *grid) for each group of each layer, in order; float64 for float64 tensors, else float32.

    Raises:
        TypeError: if `tensors` is not a list of tensors.
        ValueError: if a list is empty, lengths differ, or tensors are on several devices.
        RuntimeError: if a tensor does not fit its window.
    """
    check_tensors("tensors", tensors)
    check_same_length("windows", windows, "tensors", tensors)
    numbers = [number for window in windows for number in window.encode()]
    return torch.ops.kfac2.layer_maps(detached(tensors), numbers)


def channel_sums(g: Tensor) -> Tensor:
    """Sum the features of an output gradient: s[n, t] = Σ_c g[n, c, t].

    Args:
        g: (N, C, *grid), features at dim 1, up to three grid axes; any dtype of `layer_maps`.

    Returns:
        (N, *grid); float64 for a float64 tensor, else float32.

    Raises:
        ValueError: if `g` has fewer than two or more than five dimensions.
    """
    return layer_maps([g], [Window.places(spatial_rank("g", g))])[0]


def patch_sums(
    x: Tensor,
    kernel_size: IntOrInts,
    stride: IntOrInts = 1,
    padding: Padding = 0,
    dilation: IntOrInts = 1,
    bias: bool = False,
) -> Tensor:
    """Sum each patch of a convolution's input: a box filter over the channel sums, plus 1 for the bias.

    Args:
        x: (N, C, *spatial) with up to three spatial axes; any dtype of `layer_maps`.
        kernel_size: an int or one for each axis.
        stride: an int or one for each axis; default 1.
        padding: an int, one for each axis, `'same'` or `'valid'`; default 0.
        dilation: an int or one for each axis; default 1.
        bias: whether a 1 is appended to each patch; default False.

    Returns:
        (N, *grid), the grid being the output map of that convolution; float64 for a float64 tensor, else
        float32.

    Raises:
        TypeError: if a geometry argument is not made of ints.
        ValueError: if a geometry argument does not fit the number of spatial axes.
        RuntimeError: if the kernel does not fit into the padded map.
    """
    window = Window.of(spatial_rank("x", x), kernel_size, stride, padding, dilation, bias=int(bias))
    return layer_maps([x], [window])[0]


def spatial_rank(name: str, tensor: Tensor) -> int:
    """Return the number of spatial axes of a tensor of shape (N, C, *spatial)."""
    if not 2 <= tensor.dim() <= 5:
        raise ValueError(f"{name} must have shape (N, C) with up to three spatial axes, got {tuple(tensor.shape)}")
    return tensor.dim() - 2


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what numbers of a dtype are summed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def decode_windows(tensors: Sequence[Tensor], numbers: Sequence[int]) -> list[Window]:
    """Read the windows of a native call: what the fake kernels work from."""
    return [
        Window.decode(numbers[i * NUMBERS : (i + 1) * NUMBERS], tensor.dim() - 2) for i, tensor in enumerate(tensors)
    ]


@torch.library.register_fake("kfac2::layer_maps")
def _(tensors: Sequence[Tensor], windows: Sequence[int]) -> list[Tensor]:
    return [
        tensor.new_empty((tensor.shape[0], *window.grid(tensor.shape[2:])), dtype=sum_dtype(tensor.dtype))
        for tensor, window in zip(tensors, decode_windows(tensors, windows), strict=True)
        for _ in range(window.groups)
    ]

"""Uncentred covariances of rows, Σ row rowᵀ: the Kronecker factors, for all layers in one native call.

Wide rows on a CUDA device go to the library's product, see `gram_matrices`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kfac2.ops._checks import check_same_length, check_tensors, detached
from kfac2.ops.fold_products import fold_products, or_empty
from kfac2.ops.gram_matrices import are_faster, folded_together, product_bytes, row_products
from kfac2.ops.layer_maps import decode_windows, spatial_rank, sum_dtype
from kfac2.triangles import packed, packed_shape, unpacked
from kfac2.window import IntOrInts, Padding, Window


def covariances(
    tensors: Sequence[Tensor],
    windows: Sequence[Window],
    *,
    previous: Sequence[Tensor | None] | None = None,
    kept: float = 1.0,
    scales: Sequence[float] | None = None,
) -> list[Tensor]:
    """Sum the outer products of each layer's rows: Σ_n Σ_t row[n, t] row[n, t]ᵀ, without forming patches.

    With `previous`, a running sum or average is updated in the same call: kept · previous + scale · Σ. On a CUDA device
    the order of the sum depends on the shapes of all layers of a call: the same call gives the same bits, and a layer
    by itself other last bits than among others.

    Args:
        tensors: one for each layer, (N, C, *spatial) with up to three spatial axes; float32, float64, float16
            or bfloat16; any strides.
        windows: one for each tensor.
        previous: symmetric sums so far, shaped as the results and in their dtype; None for a layer, or in place of the
            list: none, the default.
        kept: what `previous` is multiplied by; default 1.
        scales: what each layer's new sums are multiplied by; default 1.

    Returns:
        For each layer (groups, d, d): raw sums by default, symmetric to the last bit; d counts channels slowest, then
        kernel offsets, bias last. float64 for float64 tensors, else float32.

    Raises:
        TypeError: if `tensors` is not a list of tensors.
        ValueError: if a list is empty, lengths differ, or tensors are on several devices.
        RuntimeError: if a tensor does not fit its window, or an entry of `previous` its result.
    """
    before = None if previous is None else _folded(tensors, windows, previous)
    triangles = folded_covariances(tensors, windows, previous=before, kept=kept, scales=scales)
    d_of = [window.row_length(x.shape[1]) for x, window in zip(tensors, windows, strict=True)]
    return [unpacked(triangle, d) for triangle, d in zip(triangles, d_of, strict=True)]


def folded_covariances(
    tensors: Sequence[Tensor],
    windows: Sequence[Window],
    *,
    previous: Sequence[Tensor | None] | None = None,
    kept: float = 1.0,
    scales: Sequence[float] | None = None,
) -> list[Tensor]:
    """Do what `covariances` does, each symmetric matrix as half as many numbers, as `triangles.packed` folds it.

    Args:
        tensors: see `covariances`.
        windows: one for each tensor.
        previous: triangles so far, shaped as the results and in their dtype; None: see `covariances`.
        kept: what `previous` is multiplied by; default 1.
        scales: what each layer's new sums are multiplied by; default 1.

    Returns:
        For each layer (groups, h, w), h · w = d (d + 1) / 2; float64 for float64 tensors, else float32.

    Raises:
        TypeError: if `tensors` is not a list of tensors.
        ValueError: if a list is empty, lengths differ, or tensors are on several devices.
        RuntimeError: if a tensor does not fit its window, or an entry of `previous` its result.
    """
    check_tensors("tensors", tensors)
    before = [None] * len(tensors) if previous is None else [None if p is None else p.detach() for p in previous]
    factors = [1.0] * len(tensors) if scales is None else [float(scale) for scale in scales]
    for name, entries in (("windows", windows), ("previous", before), ("scales", factors)):
        check_same_length(name, entries, "tensors", tensors)
    layers = list(zip(detached(tensors), windows, before, factors, strict=True))
    by_library = are_faster(tensors, windows)
    routes = {False: _native, True: _by_library}
    done = {
        goes: iter(route([layer for layer, own in zip(layers, by_library, strict=True) if own == goes], kept))
        for goes, route in routes.items()
    }
    return [next(done[goes]) for goes in by_library]


def _folded(
    tensors: Sequence[Tensor], windows: Sequence[Window], previous: Sequence[Tensor | None]
) -> list[Tensor | None]:
    check_tensors("tensors", tensors)
    for name, entries in (("windows", windows), ("previous", previous)):
        check_same_length(name, entries, "tensors", tensors)
    for i, (x, window, p) in enumerate(zip(tensors, windows, previous, strict=True)):
        d = window.row_length(x.shape[1]) if x.dim() > 1 else 0  # without channels the native call says what is wrong
        if p is not None and d and p.shape != (window.groups, d, d):
            wanted = (window.groups, d, d)
            raise RuntimeError(f"previous[{i}] must have shape {wanted}, got {tuple(p.shape)}")
    return [None if p is None else packed(p.detach()) for p in previous]


_Layer = tuple[Tensor, Window, Tensor | None, float]


def _native(layers: Sequence[_Layer], kept: float) -> list[Tensor]:
    if not layers:
        return []
    tensors, windows, previous, scales = map(list, zip(*layers, strict=True))
    numbers = [number for window in windows for number in window.encode()]
    return torch.ops.kfac2.covariances(tensors, numbers, or_empty(previous), float(kept), scales)


def _by_library(layers: Sequence[_Layer], kept: float) -> list[Tensor]:
    """Fold the library's products: whole matrices, the same on both sides, would cost as much again."""
    results = []
    for part in folded_together([product_bytes(x, window) for x, window, *_ in layers]):
        results += _folded_products(layers[part], kept)
    return results


def _folded_products(layers: Sequence[_Layer], kept: float) -> list[Tensor]:
    products = [row_products(x, window) for x, window, *_ in layers]
    _, _, previous, scales = zip(*layers, strict=True)
    return fold_products(products, previous=previous, kept=kept, scales=scales)


def input_covariance(
    x: Tensor,
    kernel_size: IntOrInts,
    stride: IntOrInts = 1,
    padding: Padding = 0,
    dilation: IntOrInts = 1,
    bias: bool = False,
) -> Tensor:
    """Sum the outer products of a convolution's patches: Σ_n Σ_t ā āᵀ.

    Args:
        x: (N, C, *spatial) with up to three spatial axes. The rows of a Linear layer are (N, C) with
            `kernel_size=()`.
        kernel_size: an int or one for each axis.
        stride: an int or one for each axis; default 1.
        padding: an int, one for each axis, `'same'` or `'valid'`; default 0.
        dilation: an int or one for each axis; default 1.
        bias: whether a 1 is appended to each patch; default False.

    Returns:
        (d, d) raw sums, d = C * kernel places, ordered as `torch.nn.functional.unfold` orders a patch, plus 1
        with bias (last); float64 for a float64 tensor, else float32.

    Raises:
        TypeError: if a geometry argument is not made of ints.
        ValueError: if a geometry argument does not fit the number of spatial axes.
        RuntimeError: if the kernel does not fit into the padded map.
    """
    window = Window.of(spatial_rank("x", x), kernel_size, stride, padding, dilation, bias=int(bias))
    return covariances([x], [window])[0][0]


def grad_covariance(g: Tensor) -> Tensor:
    """Sum the outer products of output-gradient rows: Σ_n Σ_t g gᵀ.

    Args:
        g: (N, C, *grid), features at dim 1, up to three grid axes.

    Returns:
        (C, C) raw sums; float64 for a float64 tensor, else float32.

    Raises:
        ValueError: if `g` has fewer than two or more than five dimensions.
    """
    return covariances([g], [Window.places(spatial_rank("g", g))])[0][0]


@torch.library.register_fake("kfac2::covariances")
def _(tensors: Sequence[Tensor], windows: Sequence[int], *others: Any) -> list[Tensor]:
    results = []
    for tensor, window in zip(tensors, decode_windows(tensors, windows), strict=True):
        d = window.row_length(tensor.shape[1])
        results.append(tensor.new_empty((window.groups, *packed_shape(d)), dtype=sum_dtype(tensor.dtype)))
    return results

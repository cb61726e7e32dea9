"""Inner products of scalar maps, for all pairs of layers in one native call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfac2.ops._checks import check_one_device, check_tensors
from kfac2.ops.layer_maps import sum_dtype

DOWNSAMPLE = ("nearest", "area")


def cross_layer_sums(
    maps: Sequence[Tensor],
    downsample: str = "nearest",
    *,
    previous: Tensor | None = None,
    kept: float = 1.0,
    scale: float = 1.0,
) -> Tensor:
    """Sum the products of every pair of maps over samples and places: S_ij = Σ_n Σ_t s_i[n, t] s_j[n, t].

    t runs over the meeting grid, on each axis the smaller of the two; the larger map is brought onto it axis
    by axis. Grids of different rank meet on one place. With `previous`, a running sum or average is updated in
    the same call: kept · previous + scale · S. This is the sum of all elements of Σ row_i row_jᵀ
    (eq. 5-7) when the maps are the rows' sums.

    Args:
        maps: one for each block, (N, *grid) with up to four grid axes, N the same for all; one floating dtype
            (float16 and bfloat16 are converted to float32).
        downsample: `'nearest'` takes index (t * larger) // smaller, and the first place where ranks differ;
            `'area'` is adaptive average pooling, and the mean of all places where ranks differ.
        previous: (B, B) symmetric sums so far, in the dtype of the result; by default none.
        kept: what `previous` is multiplied by; default 1.
        scale: what the new sums are multiplied by; default 1.

    Returns:
        (B, B), symmetric to the last bit: raw sums by default; float64 for float64 maps, else float32.

    Raises:
        TypeError: if `maps` is not a list of tensors.
        ValueError: if `maps` is empty or on several devices, or `downsample` is another word.
        RuntimeError: if the maps differ in N or dtype, or have more than four grid axes.
    """
    check_tensors("maps", maps)
    if downsample not in DOWNSAMPLE:
        raise ValueError(f"downsample must be 'nearest' or 'area', got {downsample!r}")
    halves = (torch.float16, torch.bfloat16)
    same_type = [s.detach().to(sum_dtype(s.dtype)) if s.dtype in halves else s.detach() for s in maps]
    if previous is not None:
        check_one_device(maps=maps[0], previous=previous)
        previous = previous.detach()
    return torch.ops.kfac2.cross_layer_sums(same_type, downsample == "area", previous, float(kept), float(scale))


@torch.library.register_fake("kfac2::cross_layer_sums")
def _(maps: Sequence[Tensor], area: bool, previous: Tensor | None, kept: float, scale: float) -> Tensor:
    return maps[0].new_empty((len(maps), len(maps)))

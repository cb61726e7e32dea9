"""Every parameter's gradient at its place among the gradient matrices of all layers, in one native call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gather_gradients(
    gradients: Sequence[Tensor], layout: Tensor, layers: int, none_bad: int, matrices: Tensor
) -> Tensor:
    """Copy gradients into the matrices, and find the first that is not finite.

    Args:
        gradients: float32, float64, float16 or bfloat16, any strides, on the device of `matrices`.
        layout: int64 on the CPU, (n, 4): for each gradient the place of its first element among the matrices,
            the row length of its matrix, its layer, and its number; a place of -1 if it is only looked at.
        layers: L.
        none_bad: above all numbers.
        matrices: float32 or float64, one dimension: (d_out, d_in) of all layers, one after the other, the bias in
            the last column. Written in place.

    Returns:
        int32, (1,): the least number of a gradient that holds a NaN or an infinity; `none_bad` where none does.

    Raises:
        RuntimeError: if a gradient does not fit its place; nothing is written then.
    """
    return torch.ops.kfac2.gather_gradients(gradients, layout, layers, none_bad, matrices)


def first_not_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Return the number of the first tensor that holds a NaN or an infinity, int32, (1,); their count where none does.

    Args:
        tensors: as the gradients of `gather_gradients`.
    """
    count = len(tensors)
    layout = torch.full((count, 4), -1, device="cpu")
    layout[:, 3] = torch.arange(count, device="cpu")
    return gather_gradients(tensors, layout, 0, count, tensors[0].new_empty(0, dtype=torch.float32))


@torch.library.register_fake("kfac2::gather_gradients")
def _(gradients: Sequence[Tensor], layout: Tensor, layers: int, none_bad: int, matrices: Tensor) -> Tensor:
    return matrices.new_empty(1, dtype=torch.int32)

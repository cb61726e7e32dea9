"""The sums of all pairs of blocks: their running averages, and the coarse Fisher matrix from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kfac2.ops._checks import check_one_device, check_same_length, check_tensors, detached


class CoarseFisher(NamedTuple):
    """What `average_coarse_sums` returns, in the dtype of the sums.

    Attributes:
        input_sums: (B, B), the averaged sums of A.
        grad_sums: (B, B), the averaged sums of G.
        fisher: (L, L), F_coarse of these averages.
    """

    input_sums: Tensor
    grad_sums: Tensor
    fisher: Tensor


def average_coarse_sums(
    input_sums: Tensor,
    grad_sums: Tensor,
    *,
    input_scales: Tensor | None = None,
    grad_scales: Tensor | None = None,
    previous: tuple[Tensor, Tensor] | None = None,
    kept: float = 0.0,
    layer_of_block: Sequence[int] | None = None,
) -> CoarseFisher:
    """Finish the sums of all pairs of blocks: scale, average, and form the coarse Fisher, in one native call.

    X_qr ← ε X_qr + (1 - ε) s_q s_r (raw sum)_qr for both kinds (Algorithm 1), and
    [F_coarse]_ij = Σ_{q∈i} Σ_{r∈j} X^A_qr · X^G_qr (eq. 7). All results are as symmetric as the arguments.

    Args:
        input_sums: (B, B), raw sums of A over pairs of blocks; float32 or float64.
        grad_sums: (B, B), raw sums of G, of the same dtype and device.
        input_scales: s of the inputs, (B,), float64 on the CPU, wherever the sums are; by default 1.
        grad_scales: s of the gradients, likewise.
        previous: the averages so far, X of both kinds; without them X is the scaled raw sums.
        kept: ε; it means nothing without `previous`.
        layer_of_block: the layer of each block, numbered from 0; by default every block is a layer.

    Returns:
        See `CoarseFisher`, L = max(layer_of_block) + 1. Where `previous` is of another dtype, all are in the wider one.

    Raises:
        TypeError: if `previous` is not made of tensors.
        ValueError: if tensors are on different devices, or `previous` is no pair.
        RuntimeError: if shapes or dtypes do not fit, or a layer number is negative.
    """
    check_one_device(input_sums=input_sums, grad_sums=grad_sums)
    sums = detached((input_sums, grad_sums))
    before: Sequence[Tensor | None] = (None, None)
    if previous is not None:
        check_tensors("previous", previous)
        check_same_length("previous", previous, "(input_sums, grad_sums)", sums)
        check_one_device(input_sums=input_sums, previous=previous[0])
        before = detached(previous)
        if previous[0].dtype != input_sums.dtype:
            sums, before = [raw.double() for raw in sums], [average.double() for average in previous]
    layers = list(range(len(input_sums)) if layer_of_block is None else layer_of_block)
    count = max(layers, default=-1) + 1
    return CoarseFisher(
        *torch.ops.kfac2.coarse_fisher(*sums, input_scales, grad_scales, *before, float(kept), layers, count)
    )


def coarse_fisher(input_sums: Tensor, grad_sums: Tensor, layer_of_block: Sequence[int] | None = None) -> Tensor:
    """Multiply the matrices of sums entry by entry, and add up the blocks of each layer (eq. 7).

    [F_coarse]_ij = Σ_{q∈i} Σ_{r∈j} (sum of A_qr) · (sum of G_qr): the sum of all elements of A_ij ⊗ G_ij.

    Args:
        input_sums: (B, B), sums of A over pairs of blocks; float32 or float64.
        grad_sums: (B, B), sums of G, of the same dtype.
        layer_of_block: the layer of each block, numbered from 0; by default every block is a layer.

    Returns:
        (L, L) in the dtype of the sums, L = max(layer_of_block) + 1.

    Raises:
        ValueError: if the two matrices are on different devices, or differ in shape.
        TypeError: if they differ in dtype.
        RuntimeError: if shapes do not fit `layer_of_block`, or a layer number is negative.
    """
    if layer_of_block is not None:
        return average_coarse_sums(input_sums, grad_sums, layer_of_block=layer_of_block).fisher
    check_one_device(input_sums=input_sums, grad_sums=grad_sums)
    if input_sums.shape != grad_sums.shape:
        raise ValueError(
            f"grad_sums must have the shape of input_sums, {tuple(input_sums.shape)}, got {tuple(grad_sums.shape)}"
        )
    if input_sums.dtype != grad_sums.dtype:
        raise TypeError(f"grad_sums must have the dtype of input_sums, {input_sums.dtype}, got {grad_sums.dtype}")
    return input_sums.detach() * grad_sums.detach()


@torch.library.register_fake("kfac2::coarse_fisher")
def _(
    input_sums: Tensor,
    grad_sums: Tensor,
    input_scales: Tensor | None,
    grad_scales: Tensor | None,
    previous_inputs: Tensor | None,
    previous_grads: Tensor | None,
    kept: float,
    layer_of_block: Sequence[int],
    layers: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        input_sums.new_empty(input_sums.shape),
        input_sums.new_empty(grad_sums.shape),
        input_sums.new_empty((layers, layers)),
    )

"""The coarse Fisher matrix from the two matrices of sums."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfac2.ops._checks import check_one_device


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
        ValueError: if the two matrices are on different devices.
        RuntimeError: if shapes or dtypes do not fit, or a layer number is negative.
    """
    check_one_device(input_sums=input_sums, grad_sums=grad_sums)
    if layer_of_block is None:
        layer_of_block = range(input_sums.shape[0])
    layers = list(layer_of_block)
    return torch.ops.kfac2.coarse_fisher(input_sums.detach(), grad_sums.detach(), layers, max(layers, default=-1) + 1)


@torch.library.register_fake("kfac2::coarse_fisher")
def _(input_sums: Tensor, grad_sums: Tensor, layer_of_block: Sequence[int], layers: int) -> Tensor:
    return input_sums.new_empty((layers, layers))

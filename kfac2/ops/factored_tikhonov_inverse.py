"""Damped inverses of both Kronecker factors (eq. 8, 9), batched by size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kfac2.ops._batching import as_blocks, by_shape, check_damping, check_paired, like
from kfac2.ops._checks import check_one_device, check_same_length, check_tensors


class FactoredInverse(NamedTuple):
    """What `factored_tikhonov_inverse` returns: one entry for each layer, shaped as its factors.

    Attributes:
        A_inv: (A + π√λ I)⁻¹.
        G_inv: (G + √λ/π I)⁻¹.
        status: for each block 0 where both inverses are good; 1 where a damped factor is not positive
            definite or an inverse not finite: the two then hold no meaning.
    """

    A_inv: list[Tensor]
    G_inv: list[Tensor]
    status: list[Tensor]


def factored_tikhonov_inverse(A_list: Sequence[Tensor], G_list: Sequence[Tensor], damping: float) -> FactoredInverse:
    """Invert both factors of every layer with factored Tikhonov damping, by Cholesky.

    (A + π√λ I)⁻¹ and (G + √λ/π I)⁻¹ with π = √((tr A/dim A) / (tr G/dim G)); π = 1 where a trace is not
    positive. λ keeps its meaning only if the factors carry their normalisation.

    Args:
        A_list: input factors, one for each layer: (d_in, d_in), or (q, d_in, d_in) for a layer of q blocks;
            symmetric, float32 or float64.
        G_list: output-gradient factors: (d_out, d_out) or (q, d_out, d_out), in the dtype of A.
        damping: λ ≥ 0.

    Returns:
        A_inv, G_inv and status, see `FactoredInverse`; what to do where status is not 0 is the caller's choice.

    Raises:
        TypeError: if an argument is not made of tensors, a dtype is another, or `damping` is no number.
        ValueError: if a list is empty, lengths or numbers of blocks differ, a matrix is not square, tensors
            are on several devices, or `damping` is negative.
    """
    check_tensors("A_list", A_list)
    check_tensors("G_list", G_list)
    check_same_length("G_list", G_list, "A_list", A_list)
    check_one_device(A_list=A_list[0], G_list=G_list[0])
    check_damping(damping)
    A_blocks, G_blocks = as_blocks("A_list", A_list), as_blocks("G_list", G_list)
    check_paired("A_list", A_blocks, "G_list", G_blocks)

    (A_scale,), (G_scale,) = by_shape(_mean_diagonal, A_blocks), by_shape(_mean_diagonal, G_blocks)
    root = math.sqrt(damping)
    pi = [_pi(a, g) for a, g in zip(A_scale, G_scale, strict=True)]
    A_inv, A_status = by_shape(_inverse, A_blocks, [root * p for p in pi], shapes=A_blocks)
    G_inv, G_status = by_shape(_inverse, G_blocks, [root / p for p in pi], shapes=G_blocks)
    status = [a | g for a, g in zip(A_status, G_status, strict=True)]
    return FactoredInverse(like(A_list, A_inv), like(G_list, G_inv), status)


def _mean_diagonal(factors: Tensor) -> tuple[Tensor]:
    return (factors.diagonal(dim1=-2, dim2=-1).mean(-1),)


def _pi(A_scale: Tensor, G_scale: Tensor) -> Tensor:
    positive = (A_scale > 0) & (G_scale > 0)
    return torch.where(positive, A_scale / G_scale, 1.0).sqrt()


def _inverse(factors: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    damped = factors + torch.diag_embed(damping.unsqueeze(-1).expand(factors.shape[:-1]))
    root, info = torch.linalg.cholesky_ex(damped)
    positive = (root.diagonal(dim1=-2, dim2=-1) > 0).all(-1)  # False for a NaN
    good = (info == 0) & positive & factors.isfinite().flatten(1).all(1)
    identity = torch.eye(factors.shape[-1], dtype=factors.dtype, device=factors.device)
    # cholesky_inverse raises for the whole batch where one root is singular: a bad one is replaced first
    inverse = torch.cholesky_inverse(torch.where(good[:, None, None], root, identity))
    good = good & inverse.isfinite().flatten(1).all(1)
    return inverse, (~good).to(torch.int32)

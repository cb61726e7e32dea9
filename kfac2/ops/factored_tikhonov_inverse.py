"""Damped inverses of both Kronecker factors (eq. 8, 9), batched by size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kfac2.ops._batching import are_finite, blocks_of, by_shape, check_damping, check_paired, checked_matrices
from kfac2.ops._checks import check_one_device, check_same_length, check_tensors

# On a CPU, torch's factorisations use all threads for one matrix, the native op one thread for each: from here on
# it is no faster even on a single thread.
_LARGEST_ON_CPU = 1024


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


def factored_tikhonov_inverse(
    A_list: Sequence[Tensor], G_list: Sequence[Tensor], damping: float, *, overwrites: bool = False
) -> FactoredInverse:
    """Invert both factors of every layer with factored Tikhonov damping, all in one native call.

    (A + π√λ I)⁻¹ and (G + √λ/π I)⁻¹ with π = √((tr A/dim A) / (tr G/dim G)); π = 1 where a trace is not
    positive. λ keeps its meaning only if the factors carry their normalisation. In float32 an inverse is good to
    about 1e-7 times the condition of the damped factor: pass float64 factors where that is not enough.

    Args:
        A_list: input factors, one for each layer: (d_in, d_in), or (q, d_in, d_in) for a layer of q blocks;
            symmetric, float32 or float64.
        G_list: output-gradient factors: (d_out, d_out) or (q, d_out, d_out), in the dtype of A.
        damping: λ ≥ 0.
        overwrites: whether the factors may be written over, which saves memory where they are large; default False.

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
    A_list, G_list = checked_matrices("A_list", A_list), checked_matrices("G_list", G_list)
    check_paired("A_list", A_list, "G_list", G_list)

    A_inv: list[Tensor] = [A_list[0]] * len(A_list)
    G_inv, status = list(A_inv), list(A_inv)
    for members in _classes(A_list, G_list):
        factors = [A_list[i] for i in members], [G_list[i] for i in members]
        is_large = _is_large(A_list[members[0]], G_list[members[0]])
        results = _composed(*factors, damping, not overwrites) if is_large else _native(*factors, damping)
        for i, A, G, failed in zip(members, *results, strict=True):
            A_inv[i], G_inv[i], status[i] = A, G, failed
    return FactoredInverse(A_inv, G_inv, status)


_Inverses = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]


def _is_large(A: Tensor, G: Tensor) -> bool:
    return A.device.type == "cpu" and max(A.shape[-1], G.shape[-1]) > _LARGEST_ON_CPU


def _classes(A_list: Sequence[Tensor], G_list: Sequence[Tensor]) -> list[list[int]]:
    """Layers that one call inverts: of one dtype, and small or large alike. In most models, all."""
    classes: dict[tuple[torch.dtype, bool], list[int]] = {}
    for i, (A, G) in enumerate(zip(A_list, G_list, strict=True)):
        classes.setdefault((A.dtype, _is_large(A, G)), []).append(i)
    return list(classes.values())


def _native(A_list: Sequence[Tensor], G_list: Sequence[Tensor], damping: float) -> _Inverses:
    A_inv, G_inv, status = torch.ops.kfac2.factored_tikhonov_inverse(A_list, G_list, float(damping))
    return A_inv, G_inv, status.split([blocks_of(A) for A in A_list])


def _composed(A_list: Sequence[Tensor], G_list: Sequence[Tensor], damping: float, copies: bool) -> _Inverses:
    """The same from torch's factorisations, batched by size."""
    root = math.sqrt(damping)
    pi = [_pi(_mean_diagonal(A), _mean_diagonal(G)) for A, G in zip(A_list, G_list, strict=True)]
    A_inv, A_status = by_shape(_inverse, A_list, [root * p for p in pi], shapes=A_list, copies=copies)
    G_inv, G_status = by_shape(_inverse, G_list, [root / p for p in pi], shapes=G_list, copies=copies)
    return A_inv, G_inv, [(a | g).reshape(-1) for a, g in zip(A_status, G_status, strict=True)]


@torch.library.register_fake("kfac2::factored_tikhonov_inverse")
def _(A: Sequence[Tensor], G: Sequence[Tensor], damping: float) -> tuple[list[Tensor], list[Tensor], Tensor]:
    status = A[0].new_empty(sum(map(blocks_of, A)), dtype=torch.int32)
    return [stack.new_empty(stack.shape) for stack in A], [stack.new_empty(stack.shape) for stack in G], status


def _mean_diagonal(factors: Tensor) -> Tensor:
    return factors.diagonal(dim1=-2, dim2=-1).mean(-1)


def _pi(A_scale: Tensor, G_scale: Tensor) -> Tensor:
    positive = (A_scale > 0) & (G_scale > 0)
    return torch.where(positive, A_scale / G_scale, 1.0).sqrt()


def _inverse(factors: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """Invert in place: large matrices fill the memory, and `by_shape` says that these may be written over."""
    good = are_finite(factors)
    factors.diagonal(dim1=-2, dim2=-1).add_(damping.unsqueeze(-1))
    columns = factors.mT  # the same matrices in the order of LAPACK, whose results then take their place
    info = torch.empty(len(factors), dtype=torch.int32, device=factors.device)
    torch.linalg.cholesky_ex(columns, out=(columns, info))
    positive = (columns.diagonal(dim1=-2, dim2=-1) > 0).all(-1)  # False for a NaN
    good = good & (info == 0) & positive
    # cholesky_inverse raises for the whole batch where one root is singular: the identity takes a bad one's place
    columns.masked_fill_(~good[:, None, None], 0.0)
    columns.diagonal(dim1=-2, dim2=-1).masked_fill_(~good[:, None], 1.0)
    torch.cholesky_inverse(columns, out=columns)
    good = good & are_finite(factors)
    return factors, (~good).to(torch.int32)

"""Eigendecompositions of both Kronecker factors, batched by size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kfac2.ops._batching import as_blocks, by_shape, check_paired, like
from kfac2.ops._checks import check_one_device, check_same_length, check_tensors


class Eigendecomposition(NamedTuple):
    """What `eigendecompose` returns: one entry for each layer, with a leading q where its factors have one.

    Attributes:
        A_values: eigenvalues of A, ascending, floored at 0: (d_in,).
        A_vectors: its eigenvectors, in columns: (d_in, d_in).
        G_values: eigenvalues of G, ascending, floored at 0: (d_out,).
        G_vectors: its eigenvectors, in columns: (d_out, d_out).
        status: for each block 0 where both factors are finite; 1 elsewhere, where 0 was decomposed instead.
    """

    A_values: list[Tensor]
    A_vectors: list[Tensor]
    G_values: list[Tensor]
    G_vectors: list[Tensor]
    status: list[Tensor]


def eigendecompose(A_list: Sequence[Tensor], G_list: Sequence[Tensor]) -> Eigendecomposition:
    """Decompose both factors of every layer: A = V_A diag(a) V_Aᵀ, G = V_G diag(g) V_Gᵀ.

    Args:
        A_list: input factors, one for each layer: (d_in, d_in), or (q, d_in, d_in) for a layer of q blocks;
            symmetric, float32 or float64.
        G_list: output-gradient factors: (d_out, d_out) or (q, d_out, d_out), in the dtype of A.

    Returns:
        See `Eigendecomposition`; `precondition_eigh` takes its fields.

    Raises:
        TypeError: if an argument is not made of tensors, or a dtype is another.
        ValueError: if a list is empty, lengths or numbers of blocks differ, a matrix is not square, or
            tensors are on several devices.
        torch.linalg.LinAlgError: if LAPACK does not converge on a finite matrix.
    """
    check_tensors("A_list", A_list)
    check_tensors("G_list", G_list)
    check_same_length("G_list", G_list, "A_list", A_list)
    check_one_device(A_list=A_list[0], G_list=G_list[0])
    A_blocks, G_blocks = as_blocks("A_list", A_list), as_blocks("G_list", G_list)
    check_paired("A_list", A_blocks, "G_list", G_blocks)
    A_values, A_vectors, A_status = by_shape(_floored_eigh, A_blocks)
    G_values, G_vectors, G_status = by_shape(_floored_eigh, G_blocks)
    return Eigendecomposition(
        like(A_list, A_values),
        like(A_list, A_vectors),
        like(G_list, G_values),
        like(G_list, G_vectors),
        [a | g for a, g in zip(A_status, G_status, strict=True)],
    )


def _floored_eigh(factors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    finite = factors.isfinite().flatten(1).all(1)
    values, vectors = torch.linalg.eigh(torch.where(finite[:, None, None], factors, 0.0))
    return values.clamp(min=0), vectors, (~finite).to(torch.int32)

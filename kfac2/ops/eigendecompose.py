"""Eigendecompositions of both Kronecker factors: by torch, by size; on CUDA the small ones in one native call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kfac2 import _C  # type: ignore[attr-defined]
from kfac2.ops._batching import are_finite, blocks_of, by_shape, check_paired, checked_matrices
from kfac2.ops._checks import check_one_device, check_same_length, check_tensors

# Sizes up to which the native call is taken on CUDA: by `eigendecompose` a choice that was not measured, by
# `floored_eigh`, which must not wait for the device, all that the kernel can do.
CUDA_LIMIT = 128
CUDA_LIMIT_OF_ONE_STACK: int = _C.eigendecompose_max_size

_Lists = tuple[list[Tensor], list[Tensor], list[Tensor]]


class Eigendecomposition(NamedTuple):
    """What `eigendecompose` returns: one entry for each layer, with a leading q where its factors have one.

    Attributes:
        A_values: eigenvalues of A, ascending, floored at 0: (d_in,).
        A_vectors: its eigenvectors, in columns: (d_in, d_in).
        G_values: eigenvalues of G, ascending, floored at 0: (d_out,).
        G_vectors: its eigenvectors, in columns: (d_out, d_out).
        status: for each block 0 where both decompositions are good. 1 where a factor is not finite: 0 was
            decomposed instead. 2 where a factor is finite, but the native call did not converge on CUDA: the two
            hold no meaning. 3 where there is one of each.
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
        torch.linalg.LinAlgError: if `torch.linalg.eigh`, which takes all on a CPU and the large ones on CUDA, does not
            converge on a finite matrix.
    """
    check_tensors("A_list", A_list)
    check_tensors("G_list", G_list)
    check_same_length("G_list", G_list, "A_list", A_list)
    check_one_device(A_list=A_list[0], G_list=G_list[0])
    A_list, G_list = checked_matrices("A_list", A_list), checked_matrices("G_list", G_list)
    check_paired("A_list", A_list, "G_list", G_list)
    values, vectors, status = _decompose(A_list + G_list, CUDA_LIMIT)
    layers = len(A_list)
    both = torch.cat(status[:layers]) | torch.cat(status[layers:])
    return Eigendecomposition(
        values[:layers],
        vectors[:layers],
        values[layers:],
        vectors[layers:],
        list(both.split([blocks_of(A) for A in A_list])),
    )


def floored_eigh(stack: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose the matrices of one stack; on CUDA without a synchronisation, up to CUDA_LIMIT_OF_ONE_STACK.

    Args:
        stack: (q, d, d), symmetric, float32 or float64.

    Returns:
        Eigenvalues (q, d), ascending, floored at 0; eigenvectors (q, d, d), in columns; status (q), see
        `Eigendecomposition`. Where status is not 0, `torch.where` can choose another result on the device.
    """
    values, vectors, status = _decompose([stack.detach()], CUDA_LIMIT_OF_ONE_STACK)
    return values[0], vectors[0], status[0]


def _decompose(stacks: Sequence[Tensor], limit: int) -> _Lists:
    """Decompose matrices or stacks: on CUDA with d up to `limit` in one native call for each dtype, else by shape."""
    groups: dict[torch.dtype | None, list[int]] = {}
    for i, stack in enumerate(stacks):
        native = stack.is_cuda and 0 < stack.shape[-1] <= limit
        groups.setdefault(stack.dtype if native else None, []).append(i)
    results: _Lists = ([stacks[0]] * len(stacks), [stacks[0]] * len(stacks), [stacks[0]] * len(stacks))
    for dtype, members in groups.items():
        group = [stacks[i] for i in members]
        parts = _by_torch(group) if dtype is None else _native(group)
        for result, part in zip(results, parts, strict=True):
            for i, decomposed in zip(members, part, strict=True):
                result[i] = decomposed
    return results


def _native(stacks: list[Tensor]) -> _Lists:
    values, vectors, status = torch.ops.kfac2.eigendecompose(stacks)
    return values, vectors, list(status.split([blocks_of(stack) for stack in stacks]))


def _by_torch(stacks: list[Tensor]) -> _Lists:
    values, vectors, status = by_shape(_torch_eigh, stacks)
    return values, vectors, [numbers.reshape(-1) for numbers in status]


def _torch_eigh(stack: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    finite = are_finite(stack)
    values, vectors = torch.linalg.eigh(stack.masked_fill_(~finite[:, None, None], 0.0))  # `by_shape` has copied it
    return values.clamp(min=0), vectors, (~finite).to(torch.int32)


@torch.library.register_fake("kfac2::eigendecompose")
def _(matrices: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], Tensor]:
    values = [stack.new_empty(stack.shape[:-1]) for stack in matrices]
    vectors = [stack.new_empty(stack.shape) for stack in matrices]
    return values, vectors, matrices[0].new_empty(sum(map(blocks_of, matrices)), dtype=torch.int32)

"""Gradient matrices multiplied by inverse factors, batched by shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kfac2.ops._batching import by_shape, check_damping, checked_matrices
from kfac2.ops._checks import check_one_device, check_same_length, check_tensors, detached


def precondition(
    grads: Sequence[Tensor],
    A_inv: Sequence[Tensor],
    G_inv: Sequence[Tensor],
    *,
    out: Sequence[Tensor] | None = None,
    work: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Apply factored inverses: G⁻¹ ∇ A⁻¹ for every layer (eq. 8).

    Args:
        grads: gradient matrices ∇, (d_out, d_in) with the bias column last, or (q, d_out, d_in) for a layer
            of q blocks; float32 or float64.
        A_inv: damped inverses of the input factors, (d_in, d_in) or (q, d_in, d_in).
        G_inv: damped inverses of the output-gradient factors, (d_out, d_out) or (q, d_out, d_out).
        out: where the results are written, shaped as `grads`, which are then all stacks; by default new tensors.
        work: with `out`, memory of the same shapes that is overwritten.

    Returns:
        One matrix for each layer, shaped as its gradient; `out` where that is given.

    Raises:
        TypeError: if an argument is not made of tensors, or a dtype is another.
        ValueError: if a list is empty, lengths or shapes do not fit, or tensors are on several devices.
    """
    stacks = _checked(grads, A_inv=A_inv, G_inv=G_inv)

    def solve(grad: Tensor, A: Tensor, G: Tensor, out: Tensor | None, work: Tensor | None) -> Tensor:
        return torch.bmm(torch.bmm(G, grad, out=work), A, out=out)

    return _solved(solve, stacks, out, work)


def precondition_in_basis(
    grads: Sequence[Tensor],
    A_vectors: Sequence[Tensor],
    G_vectors: Sequence[Tensor],
    scales: Sequence[Tensor],
    *,
    out: Sequence[Tensor] | None = None,
    work: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Scale gradients in an eigenbasis: V_G [(V_Gᵀ ∇ V_A) ⊙ scales] V_Aᵀ for every layer.

    With scales 1 / (g aᵀ + λ) this is the exact damped inverse of A ⊗ G + λI, with 1 / (s + λ) that of EKFAC.

    Args:
        grads: gradient matrices ∇, (d_out, d_in) or (q, d_out, d_in).
        A_vectors: eigenvectors V_A of the input factors, in columns: (d_in, d_in) or (q, d_in, d_in).
        G_vectors: eigenvectors V_G of the output-gradient factors: (d_out, d_out) or (q, d_out, d_out).
        scales: shaped as `grads`.
        out: as for `precondition`.
        work: as for `precondition`.

    Returns:
        One matrix for each layer, shaped as its gradient; `out` where that is given.

    Raises:
        TypeError: if an argument is not made of tensors, or a dtype is another.
        ValueError: if a list is empty, lengths or shapes do not fit, or tensors are on several devices.
    """
    stacks = _checked(grads, A_vectors=A_vectors, G_vectors=G_vectors)
    check_tensors("scales", scales)
    check_same_length("scales", scales, "grads", grads)
    for i, (scale, grad) in enumerate(zip(scales, grads, strict=True)):
        if scale.shape != grad.shape:
            raise ValueError(f"scales[{i}] must have shape {tuple(grad.shape)}, got {tuple(scale.shape)}")

    def solve(grad: Tensor, V_A: Tensor, V_G: Tensor, scale: Tensor, out: Tensor | None, work: Tensor | None) -> Tensor:
        rotated = torch.bmm(torch.bmm(V_G.mT, grad, out=work), V_A, out=out).mul_(scale)
        return torch.bmm(torch.bmm(V_G, rotated, out=work), V_A.mT, out=out)

    return _solved(solve, [*stacks, detached(scales)], out, work)


def precondition_eigh(
    grads: Sequence[Tensor],
    A_values: Sequence[Tensor],
    A_vectors: Sequence[Tensor],
    G_values: Sequence[Tensor],
    G_vectors: Sequence[Tensor],
    damping: float,
) -> list[Tensor]:
    """Apply the exact damped inverse (A ⊗ G + λI)⁻¹ for every layer, from eigendecompositions.

    V_G [ (V_Gᵀ ∇ V_A) / (g aᵀ + λ) ] V_Aᵀ.

    Args:
        grads: gradient matrices ∇, (d_out, d_in) or (q, d_out, d_in).
        A_values: eigenvalues a of the input factors, (d_in,) or (q, d_in).
        A_vectors: their eigenvectors V_A, (d_in, d_in) or (q, d_in, d_in).
        G_values: eigenvalues g of the output-gradient factors, (d_out,) or (q, d_out).
        G_vectors: their eigenvectors V_G, (d_out, d_out) or (q, d_out, d_out).
        damping: λ ≥ 0.

    Returns:
        One matrix for each layer, shaped as its gradient.

    Raises:
        TypeError: if an argument is not made of tensors, a dtype is another, or `damping` is no number.
        ValueError: if a list is empty, lengths or shapes do not fit, tensors are on several devices, or
            `damping` is negative.
    """
    check_damping(damping)
    _checked(grads, A_vectors=A_vectors, G_vectors=G_vectors)
    for name, values, vectors in (("A_values", A_values, A_vectors), ("G_values", G_values, G_vectors)):
        check_tensors(name, values)
        check_same_length(name, values, "grads", grads)
        for i, (value, matrix) in enumerate(zip(values, vectors, strict=True)):
            if value.shape != matrix.shape[:-1]:
                raise ValueError(f"{name}[{i}] must have shape {tuple(matrix.shape[:-1])}, got {tuple(value.shape)}")
    scales = [
        (g.unsqueeze(-1) * a.unsqueeze(-2) + damping).reciprocal_()
        for a, g in zip(detached(A_values), detached(G_values), strict=True)
    ]
    return precondition_in_basis(grads, A_vectors, G_vectors, scales)


def _solved(
    solve: Callable[..., Tensor],
    lists: Sequence[Sequence[Tensor]],
    out: Sequence[Tensor] | None,
    work: Sequence[Tensor] | None,
) -> list[Tensor]:
    """Apply a batched solve to each stack, or to all matrices of one shape at once."""
    if out is None:
        return by_shape(lambda *stacks: (solve(*stacks, None, None),), *lists)[0]
    for results in (out, work or ()):
        check_same_length("out and work", results, "grads", lists[0])
    buffers: Sequence[Tensor | None] = work or [None] * len(out)
    for *stacks, result, buffer in zip(*lists, out, buffers, strict=True):
        solve(*stacks, result, buffer)
    return list(out)


def _checked(grads: Sequence[Tensor], **matrices: Sequence[Tensor]) -> list[list[Tensor]]:
    check_tensors("grads", grads)
    result = [checked_matrices("grads", grads, square=False)]
    for (name, matrix_list), axis in zip(matrices.items(), (-1, -2), strict=True):  # A acts on d_in, G on d_out
        check_tensors(name, matrix_list)
        check_same_length(name, matrix_list, "grads", grads)
        check_one_device(**{"grads": grads[0], name: matrix_list[0]})
        blocks = checked_matrices(name, matrix_list)
        for i, (matrix, grad) in enumerate(zip(blocks, grads, strict=True)):
            if matrix.shape[:-2] != grad.shape[:-2] or matrix.shape[-1] != grad.shape[axis]:
                wanted = (*grad.shape[:-2], grad.shape[axis], grad.shape[axis])
                raise ValueError(
                    f"{name}[{i}] must have shape {wanted} for a gradient of shape {tuple(grad.shape)}, "
                    f"got {tuple(matrix.shape)}"
                )
            if matrix.dtype != grad.dtype:
                raise TypeError(f"{name}[{i}] must have the dtype of grads[{i}], {grad.dtype}, got {matrix.dtype}")
        result.append(blocks)
    return result

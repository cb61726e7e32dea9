"""Gradient matrices multiplied by inverse factors, batched by shape."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kfac2.ops._batching import by_shape, check_damping, checked_matrices
from kfac2.ops._checks import check_one_device, check_same_length, check_tensors, detached


def precondition(grads: Sequence[Tensor], A_inv: Sequence[Tensor], G_inv: Sequence[Tensor]) -> list[Tensor]:
    """Apply factored inverses: G⁻¹ ∇ A⁻¹ for every layer (eq. 8).

    Args:
        grads: gradient matrices ∇, (d_out, d_in) with the bias column last, or (q, d_out, d_in) for a layer
            of q blocks; float32 or float64.
        A_inv: damped inverses of the input factors, (d_in, d_in) or (q, d_in, d_in).
        G_inv: damped inverses of the output-gradient factors, (d_out, d_out) or (q, d_out, d_out).

    Returns:
        One matrix for each layer, shaped as its gradient.

    Raises:
        TypeError: if an argument is not made of tensors, or a dtype is another.
        ValueError: if a list is empty, lengths or shapes do not fit, or tensors are on several devices.
    """
    stacks = _checked(grads, A_inv=A_inv, G_inv=G_inv)
    return by_shape(lambda grad, A, G: (G @ grad @ A,), *stacks)[0]


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
    gradients, A_matrices, G_matrices = _checked(grads, A_vectors=A_vectors, G_vectors=G_vectors)
    for name, values, vectors in (("A_values", A_values, A_matrices), ("G_values", G_values, G_matrices)):
        check_tensors(name, values)
        check_same_length(name, values, "grads", grads)
        for i, (value, matrix) in enumerate(zip(values, vectors, strict=True)):
            if value.shape != matrix.shape[:-1]:
                raise ValueError(f"{name}[{i}] must have shape {tuple(matrix.shape[:-1])}, got {tuple(value.shape)}")

    def solve(grad: Tensor, a: Tensor, V_A: Tensor, g: Tensor, V_G: Tensor) -> tuple[Tensor]:
        rotated = V_G.mT @ grad @ V_A
        return (V_G @ (rotated / (g.unsqueeze(-1) * a.unsqueeze(-2) + damping)) @ V_A.mT,)

    return by_shape(solve, gradients, detached(A_values), A_matrices, detached(G_values), G_matrices)[0]


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

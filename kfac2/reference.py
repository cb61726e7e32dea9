"""The same mathematics in plain PyTorch, written to be read beside the paper.

Nothing here is fast: it forms what the kernels avoid forming (patches, A_ij and G_ij of every pair, dense
Kronecker products) and shares no code with them. The tests hold every op against it.

Rows are (N, T, d): N samples, T places of the layer's grid, d numbers. A grid's shape is a tuple.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

# ---------------------------------------------------------------------------------------------------------
# Rows and grids
# ---------------------------------------------------------------------------------------------------------


def _tuple(value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    return (value,) * rank if isinstance(value, int) else tuple(value)


def patches(
    x: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    bias: bool = False,
) -> tuple[Tensor, tuple[int, ...]]:
    """Form the input rows ā of a convolution, by slicing the padded input once for each kernel offset.

    Args:
        x: (N, C, *spatial), any number of spatial axes.
        kernel_size: an int or one for each axis; likewise `stride` and `dilation`.
        stride: step between patches.
        padding: numbers, `'same'` or `'valid'`.
        dilation: step within a patch.
        bias: whether a 1 ends each row.

    Returns:
        Rows (N, T, d), channel slowest, then kernel offsets (as `torch.nn.functional.unfold`), and the grid.
    """
    rank = x.dim() - 2
    kernel, step, spread = (_tuple(value, rank) for value in (kernel_size, stride, dilation))
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(spread, kernel, strict=True)]
        zeros = [(t // 2, t - t // 2) for t in total]
    elif padding == "valid":
        zeros = [(0, 0)] * rank
    else:
        zeros = [(p, p) for p in _tuple(padding, rank)]  # type: ignore[arg-type]
    padded = F.pad(x, [amount for pair in reversed(zeros) for amount in pair])
    grid = tuple(
        (size - d * (k - 1) - 1) // s + 1 for size, k, s, d in zip(padded.shape[2:], kernel, step, spread, strict=True)
    )
    slices = []
    for offset in product(*(range(k) for k in kernel)):
        view = padded
        for axis in range(rank):
            start = offset[axis] * spread[axis]
            index = torch.arange(grid[axis], device=x.device) * step[axis] + start
            view = view.index_select(axis + 2, index)
        slices.append(view.flatten(2) if rank else view.unsqueeze(2))  # (N, C, T)
    rows = torch.stack(slices, dim=2).flatten(1, 2).transpose(1, 2)  # (N, T, C * offsets)
    if bias:
        rows = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], dim=2)
    return rows, grid


def grad_rows(g: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return an output gradient (N, C, *grid) as rows (N, T, C), and its grid."""
    grid = tuple(g.shape[2:])
    return g.reshape(g.shape[0], g.shape[1], math.prod(grid)).transpose(1, 2), grid


def downsample_rows(rows: Tensor, grid: Sequence[int], meeting: Sequence[int], downsample: str) -> Tensor:
    """Bring rows (N, T, d) from their grid onto a meeting grid, axis by axis.

    `'nearest'`: place t takes index (t * larger) // smaller; `'area'`: the mean over adaptive windows.
    A meeting grid of another rank is one place: the first, or with `'area'` the mean of all.
    """
    if len(meeting) != len(grid):
        return rows.mean(1, keepdim=True) if downsample == "area" else rows[:, :1]
    values = rows.reshape(rows.shape[0], *grid, rows.shape[2])
    for axis, (larger, smaller) in enumerate(zip(grid, meeting, strict=True)):
        places = []
        for t in range(smaller):
            begin = (t * larger) // smaller
            end = begin + 1 if downsample == "nearest" else math.ceil((t + 1) * larger / smaller)
            places.append(values.narrow(axis + 1, begin, end - begin).mean(axis + 1))
        values = torch.stack(places, axis + 1)
    return values.reshape(rows.shape[0], -1, rows.shape[2])


def cross_covariance(
    rows_i: Tensor, grid_i: Sequence[int], rows_j: Tensor, grid_j: Sequence[int], downsample: str = "nearest"
) -> Tensor:
    """Form Σ_n Σ_t row_i row_jᵀ over the meeting grid: A_ij or G_ij before normalisation, (d_i, d_j)."""
    if len(grid_i) == len(grid_j):
        meeting = tuple(min(a, b) for a, b in zip(grid_i, grid_j, strict=True))
    else:
        meeting = ()
    on_i = downsample_rows(rows_i, grid_i, meeting, downsample)
    on_j = downsample_rows(rows_j, grid_j, meeting, downsample)
    return torch.einsum("ntd,nte->de", on_i, on_j)


# ---------------------------------------------------------------------------------------------------------
# The twins of kfac2.ops
# ---------------------------------------------------------------------------------------------------------


def channel_sums(g: Tensor) -> Tensor:
    """Sum the features of each row of an output gradient (N, C, *grid)."""
    rows, grid = grad_rows(g)
    return rows.sum(2).reshape(g.shape[0], *grid)


def patch_sums(x: Tensor, kernel_size, stride=1, padding=0, dilation=1, bias=False) -> Tensor:  # type: ignore[no-untyped-def]
    """Sum each patch, having formed it."""
    rows, grid = patches(x, kernel_size, stride, padding, dilation, bias)
    return rows.sum(2).reshape(x.shape[0], *grid)


def input_covariance(x: Tensor, kernel_size, stride=1, padding=0, dilation=1, bias=False) -> Tensor:  # type: ignore[no-untyped-def]
    """Multiply the patch matrix with itself."""
    rows, _ = patches(x, kernel_size, stride, padding, dilation, bias)
    flat = rows.flatten(0, 1)
    return flat.T @ flat


def grad_covariance(g: Tensor) -> Tensor:
    """Multiply the matrix of output-gradient rows with itself."""
    flat = grad_rows(g)[0].flatten(0, 1)
    return flat.T @ flat


def directional_derivatives(
    inputs: Sequence[Sequence[Tensor]], grads: Sequence[Sequence[Tensor]], directions: Sequence[Tensor]
) -> list[Tensor]:
    """Σ over blocks and places of gᵀ D_k ā, (K, N) of each layer, from the gradient of each sample. Takes rows.

    Args:
        inputs: of each layer the rows ā of its blocks, (N, T, d_in) each.
        grads: likewise the rows g, (N, T, d_out).
        directions: (K, blocks, d_out, d_in) of each layer.
    """
    results = []
    for input_blocks, grad_blocks, matrices in zip(inputs, grads, directions, strict=True):
        result = matrices.new_zeros(len(matrices), len(input_blocks[0]))
        for block, (a, g) in enumerate(zip(input_blocks, grad_blocks, strict=True)):
            gradients = torch.einsum("nto,nti->noi", g, a)  # of each sample
            for k, n in product(range(len(matrices)), range(len(a))):
                result[k, n] += (matrices[k, block] * gradients[n]).sum()
        results.append(result)
    return results


def cross_layer_sums(rows: Sequence[Tensor], grids: Sequence[Sequence[int]], downsample: str = "nearest") -> Tensor:
    """Form every A_ij (or G_ij) whole, and sum its elements (eq. 5-7). Takes rows, where the op takes maps."""
    size = len(rows)
    sums = rows[0].new_zeros(size, size)
    for i in range(size):
        for j in range(size):
            sums[i, j] = cross_covariance(rows[i], grids[i], rows[j], grids[j], downsample).sum()
    return sums


def coarse_fisher(
    inputs: Sequence[Sequence[Tensor]], grads: Sequence[Sequence[Tensor]], layer_of_block: Sequence[int]
) -> Tensor:
    """Z F̃ Zᵀ from dense blocks: entry (i, j) sums all elements of A_qr ⊗ G_qr, q in layer i and r in layer j.

    Args:
        inputs: B × B matrices A_qr.
        grads: B × B matrices G_qr.
        layer_of_block: the layer of each block.
    """
    layers = max(layer_of_block) + 1
    fisher = inputs[0][0].new_zeros(layers, layers)
    for q, i in enumerate(layer_of_block):
        for r, j in enumerate(layer_of_block):
            fisher[i, j] += torch.kron(inputs[q][r].contiguous(), grads[q][r].contiguous()).sum()
    return fisher


def average_coarse_sums(
    raw: Tensor, scales: Tensor | None = None, previous: Tensor | None = None, kept: float = 0.0
) -> Tensor:
    """Average the sums of one kind: ε X + (1 - ε) diag(s) raw diag(s), one entry after the other (Algorithm 1)."""
    averages = torch.zeros_like(raw)
    for q, r in product(range(len(raw)), repeat=2):
        new = raw[q, r] if scales is None else scales[q] * scales[r] * raw[q, r]
        averages[q, r] = new if previous is None else kept * previous[q, r] + (1 - kept) * new
    return averages


def _pi(A: Tensor, G: Tensor) -> Tensor:
    trace_a, trace_g = A.trace() / A.shape[0], G.trace() / G.shape[0]
    return (trace_a / trace_g).sqrt() if trace_a > 0 and trace_g > 0 else trace_a.new_ones(())


def factored_tikhonov_inverse(
    A_list: Sequence[Tensor], G_list: Sequence[Tensor], damping: float
) -> tuple[list[Tensor], list[Tensor]]:
    """(A + π√λ I)⁻¹ and (G + √λ/π I)⁻¹ (eq. 8, 9), one layer after the other, by `torch.linalg.inv`."""
    A_inverses, G_inverses = [], []
    for A, G in zip(A_list, G_list, strict=True):
        pi = _pi(A, G)
        A_inverses.append(torch.linalg.inv(A + pi * math.sqrt(damping) * torch.eye(len(A), dtype=A.dtype)))
        G_inverses.append(torch.linalg.inv(G + math.sqrt(damping) / pi * torch.eye(len(G), dtype=G.dtype)))
    return A_inverses, G_inverses


def precondition(grads: Sequence[Tensor], A_inv: Sequence[Tensor], G_inv: Sequence[Tensor]) -> list[Tensor]:
    """(A⁻¹ ⊗ G⁻¹) vec(∇), vec stacking columns, with the Kronecker product formed."""
    results = []
    for grad, A, G in zip(grads, A_inv, G_inv, strict=True):
        vec = grad.T.reshape(-1)
        results.append((torch.kron(A.contiguous(), G.contiguous()) @ vec).reshape(grad.shape[::-1]).T)
    return results


def eigendecompose(A_list: Sequence[Tensor], G_list: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Eigenvalues (floored at 0) and eigenvectors of A, then of G, one layer after the other."""
    results = []
    for A, G in zip(A_list, G_list, strict=True):
        (values_a, vectors_a), (values_g, vectors_g) = torch.linalg.eigh(A), torch.linalg.eigh(G)
        results.append((values_a.clamp(min=0), vectors_a, values_g.clamp(min=0), vectors_g))
    return results


def precondition_eigh(
    grads: Sequence[Tensor], A_list: Sequence[Tensor], G_list: Sequence[Tensor], damping: float
) -> list[Tensor]:
    """(A ⊗ G + λI)⁻¹ vec(∇), with the damped Kronecker product formed and solved. Takes the factors."""
    results = []
    for grad, A, G in zip(grads, A_list, G_list, strict=True):
        fisher = torch.kron(A.contiguous(), G.contiguous())
        fisher = fisher + damping * torch.eye(len(fisher), dtype=fisher.dtype)
        solved = torch.linalg.solve(fisher, grad.T.reshape(-1))
        results.append(solved.reshape(grad.shape[::-1]).T)
    return results


def precondition_in_basis(
    grads: Sequence[Tensor], A_vectors: Sequence[Tensor], G_vectors: Sequence[Tensor], scales: Sequence[Tensor]
) -> list[Tensor]:
    """V diag(vec scales) Vᵀ vec(∇) with V = V_A ⊗ V_G formed."""
    results = []
    for grad, V_A, V_G, scale in zip(grads, A_vectors, G_vectors, scales, strict=True):
        V = torch.kron(V_A.contiguous(), V_G.contiguous())
        vec = V @ torch.diag(scale.T.reshape(-1)) @ V.T @ grad.T.reshape(-1)
        results.append(vec.reshape(grad.shape[::-1]).T)
    return results


def coarse_inverse(fisher: Tensor, damping: float | Tensor) -> Tensor:
    """(F_coarse + diag λ_c)⁻¹, λ_c one number or (L,), as D (D F_coarse D + I)⁻¹ D with D = diag(λ_c^-½).

    By eigendecomposition of D F_coarse D, eigenvalues floored at 0.
    """
    D = torch.diag(torch.as_tensor(damping, dtype=fisher.dtype).rsqrt().expand(len(fisher)))
    values, vectors = torch.linalg.eigh(D @ fisher @ D)
    return D @ vectors @ torch.diag(1 / (values.clamp(min=0) + 1)) @ vectors.T @ D


def shift_and_scale(
    gradients: Sequence[Tensor],
    directions: Sequence[Tensor],
    rates: Sequence[float],
    in_coarse: Sequence[bool],
    usable: Sequence[bool],
    coarse_inverse: Tensor | None,
    coarse_weight: float,
    kl_clip: float | None,
    limits: Sequence[float] | None,
) -> tuple[list[Tensor], list[float], float]:
    """Coarse correction, KL clip (eq. 6, 10), then the limit of each layer's norm, one after the other.

    Args:
        gradients: ∇_i, of any shape.
        directions: G⁻¹ ∇ A⁻¹ of each layer, likewise.
        rates: η_i.
        in_coarse: whether a layer is in the coarse space.
        usable: whether it has an inverse; else it keeps its gradient, outside of both levels and of the clip.
        coarse_inverse: (F_coarse + λ_c I)⁻¹, or None.
        coarse_weight: ω.
        kl_clip: κ, or None.
        limits: of the norms, or None.

    Returns:
        What takes the place of each gradient; its norms before the limits; ν.
    """
    steps = list(directions)
    if coarse_inverse is not None:
        inside = [a and b for a, b in zip(in_coarse, usable, strict=True)]
        y = torch.stack([g.sum() if inside[i] else g.new_zeros(()) for i, g in enumerate(gradients)])
        c = coarse_inverse @ y.to(coarse_inverse)
        steps = [v + coarse_weight * c[i].item() if inside[i] else v for i, v in enumerate(steps)]
    total = sum(
        rates[i] ** 2 * abs((v * g).sum().item())
        for i, (v, g) in enumerate(zip(steps, gradients, strict=True))
        if usable[i]
    )
    nu = 1.0 if kl_clip is None or total == 0 else min(1.0, math.sqrt(kl_clip / total))
    steps = [nu * v if usable[i] else gradients[i] for i, v in enumerate(steps)]
    norms = [v.norm().item() for v in steps]
    if limits is not None:
        steps = [v * min(1.0, limits[i] / norms[i]) if norms[i] else v for i, v in enumerate(steps)]
    return steps, norms, nu

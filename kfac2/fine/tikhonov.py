"""Factored Tikhonov damping: (A + π√λ I)⁻¹ and (G + √λ/π I)⁻¹ (eq. 8, 9)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kfac2 import ops
from kfac2.fine.base import Damping, Fields, FineSolver, decomposed_in_float64
from kfac2.layout import Stacks
from kfac2.padding import with_padding


class Tikhonov(FineSolver):
    """The two damped factors are inverted by Cholesky factorisations; v = G⁻¹ ∇ A⁻¹."""

    fields = {"A_inv": "ii", "G_inv": "oo"}  # noqa: RUF012
    padded = ("A_inv",)
    symmetric = ("A_inv", "G_inv")
    copies = 3

    def invert(self, A: Stacks, G: Stacks, damping: Damping) -> tuple[Fields, Stacks]:
        """Invert both factors of all blocks, in one native call.

        With λ = c (tr A / d_in)(tr G / d_out), what eq. 9 adds to A is √c tr A / d_in: the factors are divided by these
        means, inverted with λ = c, and so are the results. Where c is on the device, √c goes into what they are divided
        by, and λ = 1: nothing is read.
        """
        root, value = (damping.value.sqrt(), 1.0) if isinstance(damping.value, Tensor) else (1.0, damping.value)
        if damping.relative:
            scales = _mean_diagonals([*A, *G], root)
            torch._foreach_div_([*A, *G], scales)
        A_inv, G_inv, status = ops.factored_tikhonov_inverse(A, G, value, overwrites=True)
        if damping.relative:
            torch._foreach_div_([*A_inv, *G_inv], scales)
        return {"A_inv": A_inv, "G_inv": G_inv}, status

    def gains(self, fields: Fields, damping: Damping) -> Stacks:
        """Return |G⁻¹| |A⁻¹|, each at most d times its largest number, whose square might overflow."""
        stacks = fields["G_inv"], fields["A_inv"]
        G, A = (torch.cat([torch.linalg.vector_norm(m, math.inf, (1, 2)) for m in part]).double() for part in stacks)
        gains = (G * A).split([len(m) for m in stacks[0]])
        return list(torch._foreach_mul(gains, [float(g.shape[1] * a.shape[1]) for g, a in zip(*stacks, strict=True)]))

    def mend(self, A: Tensor, G: Tensor, damping: Damping) -> dict[str, Tensor] | None:
        """Invert from eigendecompositions in float64: float32 averages do become indefinite in real runs."""
        decomposed = decomposed_in_float64(A, G)
        if decomposed is None:
            return None
        A_values, A_vectors, G_values, G_vectors = decomposed
        A_scale, G_scale = (M.double().diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True) for M in (A, G))
        root = math.sqrt(float(damping.value))
        if damping.relative:
            A_shift, G_shift = (root * torch.where(scale > 0, scale, 1.0) for scale in (A_scale, G_scale))
        else:
            pi = torch.where((A_scale > 0) & (G_scale > 0), A_scale / G_scale, 1.0).sqrt()
            A_shift, G_shift = root * pi, root / pi
        A_inv = (A_vectors / (A_values + A_shift).unsqueeze(-2)) @ A_vectors.mT
        G_inv = (G_vectors / (G_values + G_shift).unsqueeze(-2)) @ G_vectors.mT
        return {"A_inv": A_inv, "G_inv": G_inv}

    def apply(self, fields: Fields, gradients: Stacks, work: Stacks, out: Stacks) -> None:
        """Multiply from both sides: two batched products for each shape."""
        ops.precondition(gradients, [with_padding(A) for A in fields["A_inv"]], fields["G_inv"], out=out, work=work)


def _mean_diagonals(stacks: Stacks, root: float | Tensor) -> Stacks:
    """Return √c times the means, (blocks, 1, 1) for each stack; 1 in the place of one that is not positive."""
    means = torch.cat([factors.diagonal(dim1=-2, dim2=-1).mean(-1) for factors in stacks])
    scales = root * torch.where(means > 0, means, 1.0)
    return [scale[:, None, None] for scale in scales.split([len(factors) for factors in stacks])]

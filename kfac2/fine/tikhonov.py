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
            A_scales, G_scales = ([root * _mean_diagonal(factors) for factors in stacks] for stacks in (A, G))
            A = [factors.div_(scale) for factors, scale in zip(A, A_scales, strict=True)]
            G = [factors.div_(scale) for factors, scale in zip(G, G_scales, strict=True)]
        A_inv, G_inv, status = ops.factored_tikhonov_inverse(A, G, value, overwrites=True)
        if damping.relative:
            for inverses, scales in ((A_inv, A_scales), (G_inv, G_scales)):
                for inverse, scale in zip(inverses, scales, strict=True):
                    inverse.div_(scale)
        return {"A_inv": A_inv, "G_inv": G_inv}, status

    def gains(self, fields: Fields, damping: Damping) -> Stacks:
        """Return |G⁻¹| |A⁻¹|, each at most d times its largest number, whose square might overflow."""
        norms = (
            [torch.linalg.vector_norm(m, math.inf, (1, 2)).double() * m.shape[1] for m in fields[name]]
            for name in ("G_inv", "A_inv")
        )
        return [g * a for g, a in zip(*norms, strict=True)]

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


def _mean_diagonal(factors: Tensor) -> Tensor:
    """(blocks, 1, 1); 1 where it is not positive."""
    means = factors.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    return torch.where(means > 0, means, 1.0)

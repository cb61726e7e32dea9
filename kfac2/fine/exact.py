"""The exact damped inverse (A ⊗ G + λI)⁻¹, from eigendecompositions of both factors."""

from __future__ import annotations

import torch
from torch import Tensor

from kfac2 import ops
from kfac2.fine.base import Damping, Fields, FineSolver, decomposed_in_float64
from kfac2.layout import Stacks
from kfac2.padding import with_padding


class Exact(FineSolver):
    """v = V_G [(V_Gᵀ ∇ V_A) / (g aᵀ + λ)] V_Aᵀ."""

    fields = {"A_values": "i", "A_vectors": "ii", "G_values": "o", "G_vectors": "oo"}  # noqa: RUF012
    derived = {"scales": "oi"}  # noqa: RUF012
    padded = ("A_vectors", "scales")
    copies = 5

    def invert(self, A: Stacks, G: Stacks, damping: Damping) -> tuple[Fields, Stacks]:
        """Decompose both factors of all blocks."""
        *lists, status = decomposed(A, G)
        return dict(zip(Exact.fields, lists, strict=True)), status

    def gains(self, fields: Fields, damping: Damping) -> Stacks:
        """Return the largest of what is multiplied with in the eigenbasis."""
        return [scales.amax((1, 2)) for scales in self.derive(fields, damping)["scales"]]

    def mend(self, A: Tensor, G: Tensor, damping: Damping) -> dict[str, Tensor] | None:
        """Decompose in float64."""
        parts = decomposed_in_float64(A, G)
        return None if parts is None else dict(zip(Exact.fields, parts, strict=True))

    def derive(self, fields: Fields, damping: Damping) -> Fields:
        """Return what a step multiplies with in the eigenbasis, 1 / (g aᵀ + λ)."""
        scales = []
        for g, a in zip(fields["G_values"], fields["A_values"], strict=True):
            eigenvalues = g.unsqueeze(-1) * a.unsqueeze(-2)
            scales.append(eigenvalues.add_(damping.of(eigenvalues)).reciprocal_())
        return {"scales": scales}

    def apply(self, fields: Fields, gradients: Stacks, work: Stacks, out: Stacks) -> None:
        """Scale in the eigenbasis: four batched products for each shape."""
        A_vectors, scales = ([with_padding(stack) for stack in fields[name]] for name in ("A_vectors", "scales"))
        ops.precondition_in_basis(gradients, A_vectors, fields["G_vectors"], scales, out=out, work=work)


def decomposed(A: Stacks, G: Stacks) -> tuple[Stacks, Stacks, Stacks, Stacks, Stacks]:
    """Decompose all blocks; where one does not converge, block by block, so that the status tells which it is.

    Returns:
        What `ops.eigendecompose` does.
    """
    try:
        return tuple(ops.eigendecompose(A, G))  # type: ignore[return-value]
    except torch.linalg.LinAlgError:
        parts: tuple[Stacks, ...] = ([], [], [], [], [])
        for a, g in zip(A, G, strict=True):
            blocks = [_decomposed_block(a[q : q + 1], g[q : q + 1]) for q in range(len(a))]
            for stacks, entries in zip(parts, zip(*blocks, strict=True), strict=True):
                stacks.append(torch.cat(entries))
        return parts  # type: ignore[return-value]


def _decomposed_block(A: Tensor, G: Tensor) -> tuple[Tensor, ...]:
    try:
        return tuple(stacks[0] for stacks in ops.eigendecompose([A], [G]))
    except torch.linalg.LinAlgError:
        zeros = torch.zeros_like(A), torch.zeros_like(G)
        return zeros[0][..., 0], zeros[0], zeros[1][..., 0], zeros[1], A.new_full((1,), 2, dtype=torch.int32)

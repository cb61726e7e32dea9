"""EKFAC (George et al. 2018): K-FAC's eigenbasis, with the diagonal that the Fisher has in it.

    s = E[(V_Gᵀ ∇_n V_A)²],    v = V_G [(V_Gᵀ ∇ V_A) / (s + λ)] V_Aᵀ,

∇_n the gradient of one sample: of all diagonals, the one that brings the block closest to the Fisher in Frobenius norm
(their theorem 2); K-FAC's own is g aᵀ.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfac2.averaging import mixed_in
from kfac2.fine.base import Damping, Fields, ObservingSolver, decomposed_in_float64
from kfac2.fine.exact import Exact, decomposed
from kfac2.kinds.base import formed
from kfac2.layout import Layout, Stacks
from kfac2.statistics import Pass, Sums, Use

_GRADIENT_NUMBERS = 2**22  # of all gradients of single samples that are alive at a time: 16 MB


class EKFAC(ObservingSolver, Exact):
    """The eigenbasis comes with each inverse update, the diagonal with each statistics update."""

    fields = {"A_vectors": "ii", "G_vectors": "oo", "diagonal": "oi"}  # noqa: RUF012
    copies = 7

    def invert(self, A: Stacks, G: Stacks, damping: Damping) -> tuple[Fields, Stacks]:
        """Decompose both factors of all blocks; the diagonal is K-FAC's for now."""
        A_values, A_vectors, G_values, G_vectors, status = decomposed(A, G)
        diagonal = [_outer(g, a) for g, a in zip(G_values, A_values, strict=True)]
        return {"A_vectors": A_vectors, "G_vectors": G_vectors, "diagonal": diagonal}, status

    def mend(self, A: Tensor, G: Tensor, damping: Damping) -> dict[str, Tensor] | None:
        """Decompose in float64; the diagonal is K-FAC's."""
        parts = decomposed_in_float64(A, G)
        if parts is None:
            return None
        A_values, A_vectors, G_values, G_vectors = parts
        return {"A_vectors": A_vectors, "G_vectors": G_vectors, "diagonal": _outer(G_values, A_values)}

    def derive(self, fields: Fields, damping: Damping) -> Fields:
        """Return what a step multiplies with in the eigenbasis, 1 / (s + λ)."""
        return {"scales": [(s + damping.of(s)).reciprocal_() for s in fields["diagonal"]]}

    def carry_over(self, new: Fields, last: Fields, had: Sequence[Tensor]) -> Fields:
        """Turn the diagonal into the new basis, where a block had one.

        With U_A = V_Aᵀ V_A,last and U_G likewise, the diagonal of U diag(s) Uᵀ is U_G² s (U_A²)ᵀ, squares by element.
        """
        diagonals = []
        for batch, before in enumerate(had):
            turn_a, turn_g = (
                (new[name][batch].to(last[name][batch]).mT @ last[name][batch]).square()
                for name in ("A_vectors", "G_vectors")
            )
            turned = turn_g @ last["diagonal"][batch] @ turn_a.mT
            diagonals.append(torch.where(before[:, None, None], turned, new["diagonal"][batch]))
        return {**new, "diagonal": diagonals}

    def observe(self, layout: Layout, fields: Fields, passed: Pass, uses: Sequence[Use]) -> Tensor:
        """Return Σ_n (V_Gᵀ ∇_n V_A)² of a layer, n counting the samples of the pass.

        The rows of a sample are those of all uses of the weight; in a use that does not fit the samples (an expert's
        share of the batch) each entry of the leading axis is a sample of its own.
        """
        layer = uses[0].layer
        i = layout.number(layer)
        V_A, V_G = (layout.view(fields[name], i).to(layer.factor_dtype) for name in ("A_vectors", "G_vectors"))
        blocks = []
        for q in range(layer.blocks):
            rows = [[formed(part, q).to(V_A.dtype) for part in (use.inputs, use.grads)] for use in uses]
            if all(map(passed.fits, uses)):
                rows = [
                    [torch.cat([m.reshape(passed.samples, -1, m.shape[2]) for m in side], 1)
                     for side in zip(*rows, strict=True)]
                ]  # fmt: skip
            blocks.append(sum((squares_in_basis(a, g, V_A[q], V_G[q]) for a, g in rows), V_A.new_zeros(())))
        return torch.stack(blocks) * passed.scale**2

    def averaged(
        self, layout: Layout, fields: Fields, known: Sequence[bool], sums: Sums, kept: float
    ) -> tuple[Fields, tuple[bool, ...]]:
        """Average the diagonals in; a layer's first one takes the place of K-FAC's."""
        observed = tuple(was or layer in sums.squares for was, layer in zip(known, layout.layers, strict=True))
        diagonal = mixed_in(layout, fields["diagonal"], known, sums.squares, lambda layer: 1 / sums.cases, kept)
        return {"diagonal": diagonal}, observed


def squares_in_basis(a: Tensor, g: Tensor, V_A: Tensor, V_G: Tensor) -> Tensor:
    """Return Σ_n (V_Gᵀ ∇_n V_A)² by element, ∇_n = Σ_t g[n, t] a[n, t]ᵀ.

    Args:
        a: rows (N, T, d_in).
        g: rows (N, T, d_out).
        V_A: (d_in, d_in), eigenvectors in columns.
        V_G: (d_out, d_out).

    Returns:
        (d_out, d_in).
    """
    samples, places, d_in = a.shape
    d_out = g.shape[2]
    if places == 1:  # (g aᵀ)² = g² (a²)ᵀ: no gradient of a single sample is formed
        return (g[:, 0] @ V_G).square().mT @ (a[:, 0] @ V_A).square()
    share = max(1, _GRADIENT_NUMBERS // (d_in * d_out))
    turns_rows = places * (d_in + d_out) < 2 * d_in * d_out  # few places: rows are fewer numbers than the gradient
    total = a.new_zeros(d_out, d_in)
    for begin in range(0, samples, share):
        rows_a, rows_g = a[begin : begin + share], g[begin : begin + share]
        if turns_rows:
            total += torch.bmm((rows_g @ V_G).mT, rows_a @ V_A).square_().sum(0)
        else:
            total += (V_G.mT @ torch.bmm(rows_g.mT, rows_a) @ V_A).square_().sum(0)
    return total


def _outer(g: Tensor, a: Tensor) -> Tensor:
    return g.unsqueeze(-1) * a.unsqueeze(-2)

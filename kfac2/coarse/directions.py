"""The coarse space of two directions of each layer: its fine direction v_i, and its last update d_i.

Layer i moves along α_i v_i + β_i d_i, and c = (α; β), 2L unknowns, minimises the quadratic model m(c) = ½ cᵀQc - bᵀc of
the loss in that space, all layers coupled through the sampled Fisher: a Galerkin projection, and with one layer locally
optimal conjugate gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kfac2.coarse.none import NoSpace

TAU = 3.0  # τ where nothing else is said
WEIGHT_SHARE = 0.1  # ρ: what a step as long as the weights of a layer costs, twice, in units of the loss
KEPT = 0.5  # of the correlations so far, at each step
RIDGE = 1e-6  # of the solve in units of √diag Q


class Directions(NoSpace):
    """The space of directions. It sums nothing up over statistics updates: its Fisher is that of each step's rows."""

    per_layer = 2


class Quadratic(NamedTuple):
    """The quadratic model of the loss in the space of directions, float64 on the device.

    Attributes:
        fisher: Zᵀ F Z = SᵀS/M, (2L, 2L): first v of all layers, then d.
        ridge: R, which has entries within a layer only, (2L, 2L).
        slopes: b = Zᵀ∇, (2L,).
    """

    fisher: Tensor
    ridge: Tensor
    slopes: Tensor


def products(s: Tensor) -> Tensor:
    """Return SᵀS, (2L, 2L), which adds up over samples, wherever these are.

    Args:
        s: derivatives of each sample's log-likelihood along v_i and d_i, (rows, 2, L).
    """
    S = s.flatten(1)
    return S.T @ S


def quadratic(fisher: Tensor, grams: Tensor, slopes: Tensor, weights: Tensor) -> Quadratic:
    """Put the model together.

    Layer i's part of R is ρ / |W_i|² times the Gram matrix of v_i and d_i: where the Fisher is nearly nothing (layers
    that hardly pass a signal, or saturated ones), the model says nothing against a step of any length, and the weights
    are the only scale there is.

    Args:
        fisher: SᵀS/M, see `products`.
        grams: of v_i and d_i, (L, 2, 2).
        slopes: ⟨v_i, ∇_i⟩ and ⟨d_i, ∇_i⟩, (L, 2).
        weights: |W_i|², (L,), above 0.
    """
    ridge = (grams.double() * (WEIGHT_SHARE / weights.double())[:, None, None]).permute(1, 2, 0)
    return Quadratic(
        fisher, torch.diag_embed(ridge).permute(0, 2, 1, 3).reshape(fisher.shape), slopes.double().T.flatten()
    )


def with_correlations(model: Quadratic, last: Tensor | None) -> tuple[Quadratic, Tensor]:
    """Average the correlations of ZᵀFZ with those so far; its diagonal is that of this step.

    2L unknowns are a lot for the few samples of one step, and correlations change little from one step to the next;
    variances do not.

    Args:
        model: of this step.
        last: the correlations so far, of the same layers, or None.

    Returns:
        The model, and the correlations.
    """
    spread = model.fisher.diagonal().sqrt()
    inverse = torch.where(spread > 0, 1 / spread, 0.0)
    new = inverse[:, None] * model.fisher * inverse
    if last is not None:  # where a direction is new, d at the second step: a mean of some entries might be indefinite
        is_same = ((last.diagonal() > 0) == (new.diagonal() > 0)).all()
        new = torch.where(is_same, torch.lerp(new, last, KEPT), new)
    return model._replace(fisher=spread[:, None] * new * spread), new


def coefficients(model: Quadratic, tau: float) -> Tensor:
    """Return c, (2L,): the minimiser, held to the best α and β that all layers share.

    With Q = ZᵀFZ + R, and W, (2, 2L), adding up over layers,

        c_g = Wᵀ(WQWᵀ)⁻¹Wb,        (Q + τ diag Q) c = b + τ diag(Q) c_g,

    so that τ = 0 is free, and τ = ∞ the pair of Martens & Grosse (2015). c minimises m(c) + τ/2 |c - c_g|² in the norm
    of diag Q, and m(c_g) ≤ 0: so m(c) ≤ m(c_g) ≤ 0 and bᵀc ≥ 0, it never ascends. Solved in units of √diag Q.

    Args:
        model: the quadratic model.
        tau: τ.
    """
    Q, b = model.fisher + model.ridge, model.slopes
    count = len(b) // 2
    unit = Q.diagonal().sqrt()
    unit = torch.where(unit > 0, unit, 1.0)  # a direction that is not there has zeros
    Q, b = Q / unit[:, None] / unit, b / unit
    W = torch.zeros(2, len(b), dtype=b.dtype, device=b.device)
    W[0, :count], W[1, count:] = unit[:count], unit[count:]
    W = W / torch.linalg.vector_norm(W, dim=1, keepdim=True)
    shared = W.T @ _solved(W @ Q @ W.T, W @ b, RIDGE)
    if tau == float("inf"):
        return shared / unit
    return (shared + _solved(Q, b - Q @ shared, RIDGE, tau)) / unit


def _solved(Q: Tensor, b: Tensor, ridge: float, tau: float = 0.0) -> Tensor:
    """Return (Q + (ridge + τ) I)⁻¹ b; NaN where that fails, without a word, so that nothing waits."""
    shifted = Q + (ridge + tau) * torch.eye(len(b), dtype=Q.dtype, device=Q.device)
    root, status = torch.linalg.cholesky_ex(shifted)
    solution = torch.cholesky_solve(b[:, None], root)[:, 0]
    return torch.where(status == 0, solution, torch.nan)


def divergence_of(model: Quadratic, c: Tensor, rates: Tensor) -> Tensor:
    """Return (ηc)ᵀ ZᵀFZ (ηc), twice the divergence that a step would bring.

    Args:
        model: the quadratic model.
        c: coefficients.
        rates: η of each, (2L,).
    """
    moved = rates * c
    return moved @ model.fisher @ moved

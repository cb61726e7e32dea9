"""What turns G⁻¹ ∇ A⁻¹ of all layers into the update: coarse correction, KL clip and limits, in one native call."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor


class ShiftAndScale(NamedTuple):
    """What `shift_and_scale` returns, to be written by `write_gradients`.

    Attributes:
        shifts: ω c_i, float64, (L,).
        scale: ν, and Σ_i η_i² |v_i · ∇_i|; float64, (2,).
        found: float32, (1,): 1 where a gradient, a direction or a correction is not finite, or would not be once it is
            written, else 0.
        factors: f_i, float64, (L,).
        norms: ν |v_i + ω c_i|, before the limit, or |∇_i| of a layer without an inverse; float64, (L,), or (0,) where
            there are no limits.
    """

    shifts: Tensor
    scale: Tensor
    found: Tensor
    factors: Tensor
    norms: Tensor


def shift_and_scale(
    gradients: Tensor,
    directions: Tensor,
    spans: Tensor,
    rates: Tensor,
    device_rates: Tensor | None,
    in_coarse: Tensor,
    usable: Tensor,
    coarse_inverse: Tensor | None,
    first_bad: Tensor,
    none_bad: int,
    coarse_weight: float,
    kl_clip: float | None,
    skipped: Tensor,
    limits: Tensor | None = None,
    largest: Tensor | None = None,
) -> ShiftAndScale:
    """Solve the coarse system and compute the factors of v_i ← f_i (v_i + ω c_i) (eq. 6, 10).

    c = (F_coarse + λ_c I)⁻¹ y with y_i the sum of ∇_i; ν = min(1, √(κ / Σ_i η_i² |(v_i + ω c_i) · ∇_i|));
    f_i = ν min(1, limit_i / (ν |v_i + ω c_i|)). A layer that has no inverse keeps its gradient, and
    f_i = min(1, limit_i / |∇_i|) scales that. Nothing is read on the host.

    Args:
        gradients: ∇ of all layers, one dimension; float32 or float64.
        directions: G⁻¹ ∇ A⁻¹, in the same places and dtype.
        spans: int64 on the CPU, (L, 3): begin and end of each layer among them, and how many numbers it has. What is
            between them beyond these is 0 in both, and pads rows.
        rates: η_i, float64 on the CPU, (L,).
        device_rates: what the rates are multiplied by, float64 on the device, (L,); or None.
        in_coarse: float64 on the CPU, (L,): 0 for a layer outside of the coarse space.
        usable: float64 on the device, (L,): 0 for a layer that has no inverse: it counts nowhere.
        coarse_inverse: (F_coarse + λ_c I)⁻¹, float64 on the device, (L, L); or None: no second level.
        first_bad: what `gather_gradients` returned.
        none_bad: as for `gather_gradients`.
        coarse_weight: ω.
        kl_clip: κ, or None.
        skipped: int64 on the device, (2,): where something is not finite its first number is increased by 1,
            and, the first time, the second becomes `first_bad`.
        limits: float64 on the device, (L,), infinity for a layer without one; None: f_i = ν.
        largest: float64 on the CPU, (L,): the largest magnitude that the gradients of a layer hold, where that is less
            than what the directions do, else infinity; None: so everywhere.

    Returns:
        See `ShiftAndScale`.

    Raises:
        RuntimeError: if shapes, dtypes or devices do not fit.
    """
    kappa = math.inf if kl_clip is None else float(kl_clip)
    return ShiftAndScale(
        *torch.ops.kfac2.shift_and_scale(
            gradients,
            directions,
            spans,
            rates,
            device_rates,
            in_coarse,
            usable,
            coarse_inverse,
            first_bad,
            none_bad,
            float(coarse_weight),
            kappa,
            skipped,
            limits,
            largest,
        )
    )


@torch.library.register_fake("kfac2::shift_and_scale")
def _(gradients: Tensor, directions: Tensor, spans: Tensor, rates: Tensor, *others: Any) -> tuple[Tensor, ...]:
    layers, limits = rates.shape[0], others[9] if len(others) > 9 else None
    shifts, scale, factors, norms = (
        gradients.new_empty(size, dtype=torch.float64) for size in (layers, 2, layers, 0 if limits is None else layers)
    )
    return shifts, scale, gradients.new_empty(1, dtype=torch.float32), factors, norms

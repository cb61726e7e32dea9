"""What turns G⁻¹ ∇ A⁻¹ of all layers into the update: the coarse correction and the KL clip, in one native call."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class ShiftAndScale(NamedTuple):
    """What `shift_and_scale` returns, to be written by `write_gradients`.

    Attributes:
        shifts: ω c_i, float64, (L,).
        scale: ν, and Σ_i η_i² |v_i · ∇_i|; float64, (2,).
        found: float32, (1,): 1 where a gradient, a direction or a correction is not finite, else 0.
    """

    shifts: Tensor
    scale: Tensor
    found: Tensor


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
) -> ShiftAndScale:
    """Solve the coarse system and compute the clip of v_i ← ν (v_i + ω c_i) (eq. 6, 10).

    c = (F_coarse + λ_c I)⁻¹ y with y_i the sum of ∇_i; ν = min(1, √(κ / Σ_i η_i² |(v_i + ω c_i) · ∇_i|)). Nothing is
    read on the host.

    Args:
        gradients: ∇ of all layers, one dimension; float32 or float64.
        directions: G⁻¹ ∇ A⁻¹, in the same places and dtype.
        spans: int64 on the CPU, (L, 2): begin and end of each layer among them.
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
        )
    )


@torch.library.register_fake("kfac2::shift_and_scale")
def _(gradients: Tensor, directions: Tensor, spans: Tensor, rates: Tensor, *others: object) -> tuple[Tensor, ...]:
    shifts = gradients.new_empty(rates.shape[0], dtype=torch.float64)
    return shifts, gradients.new_empty(2, dtype=torch.float64), gradients.new_empty(1, dtype=torch.float32)

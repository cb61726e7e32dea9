"""The update back into every parameter's gradient, in one native call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfac2.ops.shift_and_scale import ShiftAndScale


def write_gradients(
    gradients: Sequence[Tensor], layout: Tensor, directions: Tensor, step: ShiftAndScale, usable: Tensor
) -> None:
    """Write f_i (v_i + ω c_i) into the gradients of layer i; where `step.found` is not 0, write 0 into all.

    Args:
        gradients: as for `gather_gradients`; written in place. A gradient that belongs to no layer keeps its numbers.
        layout: as for `gather_gradients`.
        directions: as for `shift_and_scale`.
        step: what `shift_and_scale` returned.
        usable: float64 on the device, (L,): 0 for a layer whose gradients stay, f_i of them.

    Raises:
        RuntimeError: if a gradient does not fit its place; nothing is written then.
    """
    torch.ops.kfac2.write_gradients(gradients, layout, directions, step.shifts, step.factors, step.found, usable)


@torch.library.register_fake("kfac2::write_gradients")
def _(gradients: Sequence[Tensor], *others: object) -> None:
    return None

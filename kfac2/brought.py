"""Few numbers of the host on their way to the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def brought(numbers: Sequence[float], dtype: torch.dtype | None, device: torch.device) -> Tensor:
    """Bring numbers to a device; on a CUDA device nothing waits.

    `torch.tensor(numbers, device=device)` copies from memory that the host may write again at once, and so waits until
    all that the device was given before is done. Pinned memory is kept by its allocator until the copy is made.

    Args:
        numbers: any count of them.
        dtype: of the result; None: torch's own choice.
        device: where they go.
    """
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=dtype, device=device)
    return torch.tensor(numbers, dtype=dtype, device="cpu", pin_memory=True).to(device, non_blocking=True)

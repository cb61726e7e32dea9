"""Many tensors as one of each dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def in_buckets(tensors: Sequence[Tensor], send: Callable[[Tensor], Callable[[], None]]) -> list[Tensor]:
    """Send many tensors as one of each dtype, in place of the copies that are returned.

    Args:
        tensors: on one device.
        send: begins to work on a flat tensor, in place, and returns what waits for that: the next is copied meanwhile.
    """
    by_dtype: dict[torch.dtype, list[int]] = {}
    for number, tensor in enumerate(tensors):
        by_dtype.setdefault(tensor.dtype, []).append(number)
    flat, waits = [], []
    for numbers in by_dtype.values():
        flat.append(torch.cat([tensors[number].reshape(-1) for number in numbers]))
        waits.append(send(flat[-1]))
    result = list(tensors)
    for numbers, whole, wait in zip(by_dtype.values(), flat, waits, strict=True):
        wait()
        parts = whole.split([tensors[number].numel() for number in numbers])
        for number, part in zip(numbers, parts, strict=True):
            result[number] = part.view(tensors[number].shape)
    return result

"""Symmetric matrices as half as many numbers, and many tensors as one of each dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def packed(stack: Tensor) -> Tensor:
    """Fold symmetric matrices (blocks, d, d) into rectangles of d (d + 1) / 2 numbers: the upper triangles.

    The half of the rows that comes first is a rectangle already, but for what its own square has below the diagonal.
    There the lower right triangle fits, and where d is even, one column to the side of it.

    Returns:
        (blocks, h, w), h = ⌈d/2⌉ and w = d + 1 for an even d, else d.
    """
    d = stack.shape[-1]
    h, shift = _half(d)
    result = torch.zeros(len(stack), h, d + shift, dtype=stack.dtype, device=stack.device)
    result[..., shift:] = stack[:, :h]
    result[..., shift : shift + h].triu_()
    below = stack[:, h:, h:].tril()  # (d - h, d - h): where d is odd, one row lower
    result[:, h - below.shape[-1] :, : below.shape[-1]] += below
    return result


def unpacked(rectangles: Tensor, d: int) -> Tensor:
    """Return the symmetric matrices that `packed` was given.

    Args:
        rectangles: (blocks, h, w).
        d: their size.
    """
    h, shift = _half(d)
    rest = d - h
    result = torch.empty(len(rectangles), d, d, dtype=rectangles.dtype, device=rectangles.device)
    result[:, :h, h:] = rectangles[..., shift + h :]
    result[:, h:, :h] = result[:, :h, h:].mT
    result[:, :h, :h] = rectangles[..., shift : shift + h]
    result[:, h:, h:] = rectangles[:, h - rest :, :rest].mT
    for corner in (result[:, :h, :h], result[:, h:, h:]):
        corner.triu_().add_(corner.triu(1).mT)
    return result


def packed_shape(d: int) -> tuple[int, int]:
    """Return the shape of a rectangle."""
    h, shift = _half(d)
    return h, d + shift


def _half(d: int) -> tuple[int, int]:
    return (d + 1) // 2, 1 - d % 2


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

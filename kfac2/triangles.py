"""Symmetric matrices as half as many numbers: one triangle of each, folded into a rectangle.

The half of the rows that comes first is a rectangle already, but for what its own square has below the diagonal. There
the lower right triangle fits, and where d is even, one column to the side of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor


def packed(stack: Tensor) -> Tensor:
    """Fold symmetric matrices (blocks, d, d) into rectangles of d (d + 1) / 2 numbers each.

    Of each matrix the upper triangle is read in the first half of the rows, the lower one in the second.

    Args:
        stack: the matrices.

    Returns:
        (blocks, h, w), h = ⌈d/2⌉ and w = d + 1 for an even d, else d.
    """
    d = stack.shape[-1]
    h, shift = _half(d)
    rest = d - h
    result = torch.empty(len(stack), h, d + shift, dtype=stack.dtype, device=stack.device)
    result[..., :shift] = 0
    result[..., shift:] = stack[:, :h]
    result[..., shift : shift + h].triu_()
    result[:, h - rest :, :rest] += stack[:, h:, h:].tril()  # where d is odd, one row lower
    return result


def unpacked(rectangles: Tensor, d: int, mask: Tensor | None = None) -> Tensor:
    """Return the symmetric matrices that `packed` was given.

    Args:
        rectangles: (blocks, h, w).
        d: their size.
        mask: what `upper_triangle` returns for this size or a larger one, so that few are made for many stacks.
    """
    h, shift = _half(d)
    rest = d - h
    result = torch.empty(len(rectangles), d, d, dtype=rectangles.dtype, device=rectangles.device)
    is_upper = upper_triangle(d, rectangles.device) if mask is None else mask
    upper, lower = rectangles[..., shift : shift + h], rectangles[:, h - rest :, :rest]
    result[:, :h, :h] = torch.where(is_upper[:h, :h], upper, upper.mT)  # torch.compile takes no view as `out`
    result[:, h:, h:] = torch.where(is_upper[:rest, :rest], lower.mT, lower)
    result[:, :h, h:] = rectangles[..., shift + h :]
    result[:, h:, :h] = result[:, :h, h:].mT
    return result


def upper_triangle(d: int, device: torch.device) -> Tensor:
    """Return which elements of the first half of the rows of a matrix, in its own square, are in the upper triangle."""
    h, _ = _half(d)
    return torch.ones(h, h, dtype=torch.bool, device=device).triu_()


def packed_shape(d: int) -> tuple[int, int]:
    """Return the shape of a rectangle."""
    h, shift = _half(d)
    return h, d + shift


def diagonals(rectangles: Tensor) -> Tensor:
    """Return the diagonals of the matrices, (blocks, d)."""
    return torch.cat(_halves_of_diagonals(rectangles), -1)


def all_diagonals(stacks: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the diagonals of the matrices of several stacks, (blocks of all, the largest d); 0 behind shorter ones."""
    halves = [_halves_of_diagonals(rectangles) for rectangles in stacks]
    sizes = [sum(half.shape[-1] for half in pair) for pair in halves]
    result = torch.zeros(sum(map(len, stacks)), max(sizes), dtype=dtype, device=stacks[0].device)
    for pair, d, rows in zip(halves, sizes, result.split([len(stack) for stack in stacks]), strict=True):
        torch.cat(pair, -1, out=rows[:, :d])
    return result


def few_at_a_time(stacks: Sequence[Tensor], needed: Callable[[Sequence[Tensor]], int] | None = None) -> Iterator[slice]:
    """Split stacks into runs that are worked on together: each needs as much memory as the largest stack, at most.

    Args:
        stacks: of numbers.
        needed: gives the bytes that a run needs, no more for one stack than it has itself; by default those of all its
            stacks.
    """
    most = max((stack.nbytes for stack in stacks), default=0)
    begin = 0
    for end in range(1, len(stacks) + 1):
        run = stacks[begin : end + 1]
        if end == len(stacks) or (sum(s.nbytes for s in run) if needed is None else needed(run)) > most:
            yield slice(begin, end)
            begin = end


def bytes_of_diagonals(stacks: Sequence[Tensor]) -> int:
    """Return how many bytes the diagonals of the matrices of several stacks have, shorter ones filled up."""
    longest = max(h.shape[-1] + g.shape[-1] for h, g in map(_halves_of_diagonals, stacks))
    return sum(map(len, stacks)) * longest * stacks[0].itemsize


def _halves_of_diagonals(rectangles: Tensor) -> list[Tensor]:
    h, w = rectangles.shape[-2:]
    shift = int(w == 2 * h + 1)  # where d is even
    return [rectangles.diagonal(offset, dim1=-2, dim2=-1) for offset in (shift, shift - 1)]


def _half(d: int) -> tuple[int, int]:
    return (d + 1) // 2, 1 - d % 2

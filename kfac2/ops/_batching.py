"""Many matrices of few sizes: one batched torch call for each size, in place of one call for each layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def as_blocks(name: str, matrices: Sequence[Tensor], square: bool = True) -> list[Tensor]:
    """View each matrix (n, m), or stack of them (q, n, m), as a stack; check what every solve needs."""
    blocks = []
    for i, matrix in enumerate(matrices):
        if matrix.dim() not in (2, 3) or (square and matrix.shape[-1] != matrix.shape[-2]):
            wanted = "(d, d) or (q, d, d)" if square else "(d_out, d_in) or (q, d_out, d_in)"
            raise ValueError(f"{name}[{i}] must have shape {wanted}, got {tuple(matrix.shape)}")
        if matrix.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name}[{i}] must be float32 or float64, got {matrix.dtype}")
        blocks.append(matrix.detach().unsqueeze(0) if matrix.dim() == 2 else matrix.detach())
    return blocks


def check_paired(first_name: str, first: Sequence[Tensor], second_name: str, second: Sequence[Tensor]) -> None:
    """Check that two lists hold the same number of blocks for each layer, in one dtype."""
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        if a.shape[0] != b.shape[0]:
            raise ValueError(
                f"{second_name}[{i}] must have as many blocks as {first_name}[{i}], {a.shape[0]}, got {b.shape[0]}"
            )
        if a.dtype != b.dtype:
            raise TypeError(f"{second_name}[{i}] must have the dtype of {first_name}[{i}], {a.dtype}, got {b.dtype}")


def check_damping(damping: float) -> None:
    """Check that a damping is a finite number that is not negative."""
    if not isinstance(damping, (int, float)):
        raise TypeError(f"damping must be a float, got {type(damping).__name__}")
    if not 0 <= damping < math.inf:
        raise ValueError(f"damping must be a finite number of at least 0, got {damping}")


def by_shape(
    function: Callable[..., tuple[Tensor, ...]],
    *stacks: Sequence[Tensor],
    shapes: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], ...]:
    """Apply a batched function once for each distinct shape.

    Args:
        function: takes one batch (b, ...) for each of `stacks`, returns a tuple of batches.
        stacks: lists with one stack (q, ...) for each layer.
        shapes: the list whose shapes (and dtypes) tell the classes apart; by default the first of `stacks`.

    Returns:
        For each batch that `function` returns, a list with one stack for each layer.
    """
    key_of = stacks[0] if shapes is None else shapes
    classes: dict[tuple[object, ...], list[int]] = {}
    for i, tensor in enumerate(key_of):
        classes.setdefault((*tensor.shape[1:], tensor.dtype), []).append(i)
    results: list[list[Tensor]] = []
    for members in classes.values():
        sizes = [key_of[i].shape[0] for i in members]
        outputs = function(*(torch.cat([stack[i] for i in members]) for stack in stacks))
        results = results or [[key_of[0]] * len(key_of) for _ in outputs]
        for result, output in zip(results, outputs, strict=True):
            for i, part in zip(members, output.split(sizes), strict=True):
                result[i] = part
    return tuple(results)


def like(matrices: Sequence[Tensor], stacks: Sequence[Tensor]) -> list[Tensor]:
    """Undo `as_blocks`: give each result the number of dimensions of its input."""
    return [stack[0] if matrix.dim() == 2 else stack for matrix, stack in zip(matrices, stacks, strict=True)]

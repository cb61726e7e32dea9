"""Many matrices of few sizes: one batched torch call for each size, in place of one call for each layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kfac2.ops._checks import detached

_DTYPES = (torch.float32, torch.float64)


def checked_matrices(name: str, matrices: Sequence[Tensor], square: bool = True) -> list[Tensor]:
    """Detach matrices (n, m), or stacks of them (q, n, m); check what every solve needs."""
    for i, matrix in enumerate(matrices):
        shape = matrix.shape
        if not 2 <= len(shape) <= 3 or (square and shape[-1] != shape[-2]):
            wanted = "(d, d) or (q, d, d)" if square else "(d_out, d_in) or (q, d_out, d_in)"
            raise ValueError(f"{name}[{i}] must have shape {wanted}, got {tuple(shape)}")
        if matrix.dtype not in _DTYPES:
            raise TypeError(f"{name}[{i}] must be float32 or float64, got {matrix.dtype}")
    return detached(matrices)


def blocks_of(matrix: Tensor) -> int:
    """Return the number of blocks: q of a stack, 1 of a single matrix."""
    return matrix.shape[0] if matrix.dim() == 3 else 1


def are_finite(stack: Tensor) -> Tensor:
    """Tell of each matrix whether it is finite, (q,), without a mask as large as they are."""
    return torch.linalg.vector_norm(stack, math.inf, (-2, -1)).isfinite()


def check_paired(first_name: str, first: Sequence[Tensor], second_name: str, second: Sequence[Tensor]) -> None:
    """Check that two lists hold the same number of blocks for each layer, in one dtype."""
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        if blocks_of(a) != blocks_of(b):
            raise ValueError(
                f"{second_name}[{i}] must have as many blocks as {first_name}[{i}], {blocks_of(a)}, got {blocks_of(b)}"
            )
        if a.dtype != b.dtype:
            raise TypeError(f"{second_name}[{i}] must have the dtype of {first_name}[{i}], {a.dtype}, got {b.dtype}")


def multiplies_in_tf32() -> bool:
    """Tell whether torch multiplies float32 in TF32 on CUDA devices, by whatever name a user has set it."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"  # allow_tf32, the older name, may raise


def check_damping(damping: float) -> None:
    """Check that a damping is a finite number that is not negative."""
    if not isinstance(damping, (int, float)):
        raise TypeError(f"damping must be a float, got {type(damping).__name__}")
    if not 0 <= damping < math.inf:
        raise ValueError(f"damping must be a finite number of at least 0, got {damping}")


def by_shape(
    function: Callable[..., tuple[Tensor, ...]],
    *lists: Sequence[Tensor],
    shapes: Sequence[Tensor] | None = None,
    copies: bool = True,
) -> tuple[list[Tensor], ...]:
    """Apply a batched function once for each distinct shape.

    Args:
        function: takes one batch (b, ...) for each of `lists`, returns a tuple of batches. It may overwrite what it
            takes.
        lists: one entry for each layer: (...), or (q, ...) where that of `shapes` is a stack.
        shapes: matrices (n, m) or stacks (q, n, m), whose sizes and dtypes tell the classes apart; by default the
            first of `lists`.
        copies: whether `function` takes copies in any case; else a stack that is alone in its class is overwritten.

    Returns:
        For each batch that `function` returns, a list with one entry for each layer, with or without q.
    """
    matrices = lists[0] if shapes is None else shapes
    classes: dict[tuple[object, ...], list[int]] = {}
    for i, matrix in enumerate(matrices):
        shape = matrix.shape
        classes.setdefault((len(shape), shape[-2], shape[-1], matrix.dtype), []).append(i)
    results: list[list[Tensor]] = []
    for (dimensions, *_), members in classes.items():
        join = torch.stack if dimensions == 2 else torch.cat
        is_taken = not copies and dimensions == 3 and len(members) == 1
        outputs = function(
            *(entries[members[0]] if is_taken else join([entries[i] for i in members]) for entries in lists)
        )
        results = results or [[matrices[0]] * len(matrices) for _ in outputs]
        for result, output in zip(results, outputs, strict=True):
            parts = output.unbind(0) if dimensions == 2 else output.split([matrices[i].shape[0] for i in members])
            for i, part in zip(members, parts, strict=True):
                result[i] = part
    return tuple(results)

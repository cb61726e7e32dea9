"""Σ row rowᵀ of uses of weights, kept as triangles: of whole matrices there are few at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from kfac2 import ops
from kfac2.kinds import Rows
from kfac2.ops import gram_matrices
from kfac2.triangles import all_packed, packed

# Whole matrices that are there together, so that small ones share a native call: 4 MB, and 64 MB where a call is a
# launch that few layers do not fill. A larger one is there alone.
WHOLE_BYTES = {"cpu": 2**22, "cuda": 2**26}


def outer_products(rows: Sequence[Rows], scale: float = 1.0) -> list[Tensor]:
    """Return the triangle of scale · Σ row rowᵀ of each, as `triangles.packed` folds it.

    Args:
        rows: at least one of each.
        scale: what all sums are multiplied by.
    """
    by_library = [gram_matrices.is_faster(r.tensor, r.window) for r in rows]
    native = [r for r, other in zip(rows, by_library, strict=True) if not other]
    triangles: list[Tensor] = []
    for part in _parts(native):
        tensors, windows = [r.tensor for r in part], [r.window for r in part]
        triangles += all_packed(ops.covariances(tensors, windows, scales=[scale] * len(part)))
    rest = iter(triangles)
    return [_by_library(r, scale) if other else next(rest) for r, other in zip(rows, by_library, strict=True)]


def _by_library(rows: Rows, scale: float) -> Tensor:
    """Fold a library's product as it comes: a whole matrix, the same on both sides, would cost as much again."""
    triangle = packed(*gram_matrices.row_products(rows.tensor.detach(), rows.window))
    return triangle if scale == 1 else triangle.mul_(scale)


def _parts(rows: Sequence[Rows]) -> Iterator[list[Rows]]:
    part: list[Rows] = []
    used = 0
    most = WHOLE_BYTES.get(rows[0].tensor.device.type, WHOLE_BYTES["cpu"]) if rows else 0
    for one in rows:
        d = one.window.row_length(one.tensor.shape[1])
        needed = one.window.groups * d**2 * max(one.tensor.element_size(), 4)
        if part and used + needed > most:
            yield part
            part, used = [], 0
        part.append(one)
        used += needed
    if part:
        yield part

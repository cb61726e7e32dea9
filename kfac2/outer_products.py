"""Σ row rowᵀ of uses of weights, as triangles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from kfac2 import ops
from kfac2.kinds import Rows

CALL_BYTES = 2**26  # of the triangles of one native call, which on a device needs about as much to work in


def outer_products(rows: Sequence[Rows], scale: float = 1.0) -> list[Tensor]:
    """Return the triangle of scale · Σ row rowᵀ of each, as `triangles.packed` folds it.

    Args:
        rows: at least one of each.
        scale: what all sums are multiplied by.
    """
    result: list[Tensor] = []
    for part in _parts(rows):
        tensors, windows = [r.tensor for r in part], [r.window for r in part]
        result += ops.folded_covariances(tensors, windows, scales=[scale] * len(part))
    return result


def _parts(rows: Sequence[Rows]) -> Iterator[list[Rows]]:
    part: list[Rows] = []
    used = 0
    for one in rows:
        d = one.window.row_length(one.tensor.shape[1])
        needed = one.window.groups * d * (d + 1) // 2 * max(one.tensor.element_size(), 4)
        if part and used + needed > CALL_BYTES:
            yield part
            part, used = [], 0
        part.append(one)
        used += needed
    if part:
        yield part

"""Σ row rowᵀ of uses of weights, kept as triangles: of whole matrices there are few at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from kfac2 import ops
from kfac2.kinds import Rows
from kfac2.triangles import all_packed

# Whole matrices that are there together, so that small ones share a native call: 4 MB, and 64 MB where a call is a
# launch that few layers do not fill. A larger one is there alone.
WHOLE_BYTES = {"cpu": 2**22, "cuda": 2**26}


def outer_products(rows: Sequence[Rows], scale: float = 1.0) -> list[Tensor]:
    """Return the triangle of scale · Σ row rowᵀ of each, as `triangles.packed` folds it.

    Args:
        rows: at least one of each.
        scale: what all sums are multiplied by.
    """
    result: list[Tensor] = []
    for part in _parts(rows):
        tensors, windows = [r.tensor for r in part], [r.window for r in part]
        result += all_packed(ops.covariances(tensors, windows, scales=[scale] * len(part)))
    return result


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

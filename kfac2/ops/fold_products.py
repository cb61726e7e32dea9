"""A library's product of rows into the triangle that the kernels of covariances write, in one native call.

It is what `covariances` does with wide rows on a CUDA device, and nothing that a user calls.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfac2.triangles import packed_shape


def fold_products(
    panels: Sequence[Tensor],
    last: Tensor | None = None,
    corner: float = 0.0,
    *,
    previous: Tensor | None = None,
    kept: float = 1.0,
    scale: float = 1.0,
) -> Tensor:
    """Return kept · previous + scale · X as a triangle, X symmetric and given by its upper triangle.

    Args:
        panels: one to eight, float32 or float64: panel p has rows of X, from its own first row on, and their columns
            from that of the diagonal on: (h, d), (h, d - h), (h, d - 2 h) and so on, the last one (r, r), r <= h. What
            they have below the diagonal of X is not read.
        last: a last row of X that is in no panel, without its own last number, (d,); default: none.
        corner: that number; default 0.
        previous: a triangle shaped as the result; default: none.
        kept: what it is multiplied by; default 1.
        scale: what X is multiplied by; default 1.

    Returns:
        (1, h, w), as `triangles.packed` folds X.

    Raises:
        RuntimeError: if shapes, dtypes or devices do not fit.
    """
    return torch.ops.kfac2.fold_products(panels, last, float(corner), previous, float(kept), float(scale))


@torch.library.register_fake("kfac2::fold_products")
def _(panels: Sequence[Tensor], last: Tensor | None, *others: object) -> Tensor:
    return panels[0].new_empty(1, *packed_shape(panels[0].shape[1] + (last is not None)))

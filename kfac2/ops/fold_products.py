"""A library's products of rows into the triangles that the kernels of covariances write, in one native call.

It is what `covariances` does with wide rows on a CUDA device, and nothing that a user calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kfac2.ops._checks import check_same_length
from kfac2.triangles import packed_shape


class Product(NamedTuple):
    """A symmetric matrix X by its upper triangle.

    Attributes:
        panels: one to eight, float32 or float64: panel p has rows of X, from its own first row on, and their columns
            from that of the diagonal on: (h, d), (h, d - h), (h, d - 2 h) and so on, the last one (r, r), r <= h. What
            they have below the diagonal of X is not read.
        last: a last row of X that is in no panel, without its own last number, (d,); default: none.
        corner: that number; default 0.
    """

    panels: list[Tensor]
    last: Tensor | None = None
    corner: float = 0.0


def fold_products(
    products: Sequence[Product],
    *,
    previous: Sequence[Tensor | None] | None = None,
    kept: float = 1.0,
    scales: Sequence[float] | None = None,
) -> list[Tensor]:
    """Return kept · previous + scale · X of each product as a triangle.

    Args:
        products: at least one, all on one device.
        previous: triangles shaped as the results; None for a product, or in place of the list: none, the default.
        kept: what `previous` is multiplied by; default 1.
        scales: what each X is multiplied by; default 1.

    Returns:
        For each product (1, h, w), as `triangles.packed` folds X.

    Raises:
        ValueError: if there is no product, or lengths differ.
        RuntimeError: if shapes, dtypes or devices do not fit.
    """
    if not products:
        raise ValueError("products must hold at least one product, got an empty list")
    for name, entries in (("previous", previous), ("scales", scales)):
        if entries is not None:
            check_same_length(name, entries, "products", products)
    panels = [panel for product in products for panel in product.panels]
    counts, corners = [len(product.panels) for product in products], [float(product.corner) for product in products]
    last = or_empty([product.last for product in products])
    before = or_empty(previous or [])
    factors = [float(scale) for scale in scales or []]
    return torch.ops.kfac2.fold_products(panels, counts, last, corners, before, float(kept), factors)


def or_empty(entries: Sequence[Tensor | None]) -> list[Tensor]:
    """Write a list as native ops take it: an empty tensor stands for none, an empty list for none at all."""
    some = next((entry for entry in entries if entry is not None), None)
    if some is None:
        return []
    none = some.new_empty(0)
    return [none if entry is None else entry for entry in entries]


@torch.library.register_fake("kfac2::fold_products")
def _(panels: Sequence[Tensor], counts: Sequence[int], last: Sequence[Tensor], *others: object) -> list[Tensor]:
    results, first = [], 0
    for i, count in enumerate(counts):
        size = panels[first].shape[1] + int(len(last) > 0 and last[i].numel() > 0)
        results.append(panels[first].new_empty(1, *packed_shape(size)))
        first += count
    return results

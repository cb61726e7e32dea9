"""Whose are the rows of a use?

Sizes say it by coincidence, too: an expert's share of as many tokens as there are samples, a time-major map with as
many steps. Gradients say it for sure. Multiply the gradient at the output of the last use by another number for each of
its leading entries. A row that belongs to one of them alone has then that number times its gradient, whatever is
between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kfac2.kinds import Layer
from kfac2.statistics import Pass, Use

_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-4}  # of a row's gradient, relative; half types tell too little
_GOLDEN = 0.6180339887498949  # n φ mod 1 are numbers far apart from each other

_MOST_SAMPLES = 16  # whose rows are compared: the gradients of all would be as many as all inputs are, twice

Part = Callable[[Use, Tensor], Tensor]
Back = Callable[[Use, Tensor, Part], dict[int, Tensor]]
"""Takes a use and a gradient at its output, samples first, to a part of those of all uses before it, by their order."""


class _Numbers(NamedTuple):
    """By what number the gradients of rows were multiplied: (N, rows of a sample), and of which rows that is known."""

    values: Tensor
    known: Tensor

    def differ(self, others: _Numbers, tolerance: float) -> bool:
        """Tell whether rows in one place have different numbers, or of one sample where places are others."""
        if self.values.shape != others.values.shape:
            self, others = self._of_samples(), others._of_samples()
        both = self.known & others.known
        return bool((~((self.values - others.values).abs() <= tolerance) & both).any())

    def _of_samples(self) -> _Numbers:
        """Return one number for each sample; NaN, which differs from any, where its rows have several."""
        low, high = (torch.where(self.known, self.values, far) for far in (torch.inf, -torch.inf))
        low, high = low.amin(1, keepdim=True), high.amax(1, keepdim=True)
        return _Numbers(torch.where(high - low < 1e-3 * high.abs(), low, torch.nan), self.known.any(1, keepdim=True))


@torch.no_grad()
def misplaced(passed: Pass, back: Back) -> set[Layer]:
    """Return the layers with rows that fit the samples by their number only.

    Where samples are mixed (batch norm), or no path leads to the last use, nobody knows.

    Args:
        passed: the pass.
        back: differentiates from one of its uses.
    """
    *before, last = sorted(passed.uses, key=lambda use: use.order)
    tolerance = _TOLERANCE.get(last.g.dtype)
    before = [use for use in before if passed.fits(use)]
    is_fitting = passed.fits(last)
    if not before or tolerance is None or (is_fitting and passed.samples == 1):
        return set()
    count = passed.samples if is_fitting else last.samples
    w = 1 + torch.arange(count, dtype=torch.float64, device=last.g.device).mul(_GOLDEN).frac()
    of_rows = w.to(last.g.dtype).repeat_interleave(last.samples // count)
    some = torch.linspace(0, passed.samples - 1, min(passed.samples, _MOST_SAMPLES), device=w.device).round().long()

    def of_some(use: Use, g: Tensor) -> Tensor:
        """Return the rows of some samples, evenly spaced."""
        return g.unflatten(0, (passed.samples, -1))[some].flatten(0, 1) if passed.fits(use) else g[:0]

    weighted_g = last.g * of_rows.reshape(-1, *(1,) * (last.g.dim() - 1))
    plain, weighted = back(last, last.g, of_some), back(last, weighted_g, of_some)
    found = {}
    for use in before:
        if use.order in plain:
            numbers = _numbers(use, plain[use.order], weighted[use.order], len(some), w, tolerance)
            if numbers is not None:
                found[use] = numbers
    if not found:
        return set()
    known = torch.ones(len(some), 1, dtype=torch.bool, device=w.device)
    right = _Numbers(w[some, None], known) if is_fitting else [*found.values()][-1]
    return {use.layer for use, numbers in found.items() if numbers.differ(right, 10 * tolerance)}


def _numbers(use: Use, plain: Tensor, weighted: Tensor, samples: int, w: Tensor, tolerance: float) -> _Numbers | None:
    """Return the numbers of the rows of a use, or None where not all rows have one."""
    before, after = (
        part.tensor.double()
        .reshape(*part.tensor.shape[:2], -1)
        .transpose(1, 2)
        .reshape(samples, -1, part.tensor.shape[1])
        for part in (use.layer.rows(use.x, g, use.call)[1] for g in (plain, weighted))
    )  # (N, rows of a sample, d_out)
    if before.shape[2] < 2:  # a single number is parallel to any
        return None
    sizes = before.norm(dim=2)
    known = sizes > 1e-6 * sizes.max()
    ratios = (before * after).sum(2) / sizes.square()
    is_parallel = (after - ratios[..., None] * before).norm(dim=2) <= tolerance * sizes
    order = torch.cat([w.sort().values, w.new_tensor([torch.inf])])
    places = torch.searchsorted(order, ratios.contiguous()).clamp(1, len(order) - 1)
    nearest = torch.minimum((ratios - order[places]).abs(), (ratios - order[places - 1]).abs())
    is_of_one = is_parallel & (nearest <= tolerance)
    return _Numbers(ratios, known) if bool(known.any()) and bool((is_of_one | ~known).all()) else None

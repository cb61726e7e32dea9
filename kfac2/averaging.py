"""Running averages of what one iteration has summed up (Algorithm 1 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfac2 import spread
from kfac2.kinds import Layer
from kfac2.layout import Layout, Stacks
from kfac2.statistics import Averages, Sums, kept_share


def averaged(layout: Layout, old: Averages, sums: Sums, decay: float, follows_spread: bool = False) -> Averages:
    """Average the factors of one iteration in: X ← εX + (1 - ε)X_new. What the coarse space has stays as it is.

    A layer's first statistics are taken as they are; a layer without rows in this iteration keeps its factors. Their
    spread is followed where that is wanted.
    """
    t = old.updates + 1
    kept = kept_share(t, decay)
    A = mixed_in(layout, old.A, old.seen, sums.A, [1 / sums.cases] * len(sums.A), kept)
    G = mixed_in(layout, old.G, old.seen, sums.G, [1 / sums.rows[layer] for layer in sums.G], kept)
    seen = tuple(was or layer in sums.A for was, layer in zip(old.seen, layout.layers, strict=True))
    fits = tuple(layer not in sums.misfits for layer in layout.layers)
    s = None
    if follows_spread:
        again = [was and layer in sums.A for was, layer in zip(old.seen, layout.layers, strict=True)]
        s = spread.followed(layout, old.spread, (old.A, old.G), (A, G), again, kept)
    return Averages(t, A, G, seen, fits, old.coarse, s)


def mixed_in(
    layout: Layout,
    old: Stacks,
    known: Sequence[bool],
    raw: dict[Layer, Tensor],
    scales: Sequence[float],
    kept: float,
) -> Stacks:
    """Return a field with the new sums averaged in; neither `old` nor `raw` is changed.

    Args:
        layout: where the field lies.
        old: the averages so far.
        known: by layer, whether `old` says something; if not, the new sums are taken as they are.
        raw: new sums by layer; a layer without any keeps what it has.
        scales: what these are multiplied by.
        kept: ε.
    """
    numbers = [layout.number(layer) for layer in raw]
    is_whole = len(numbers) == len(layout.layers)
    new = [torch.empty_like(stack) if is_whole else stack.clone() for stack in old]
    of_all = layout.views(new)
    views = [of_all[i] for i in numbers]
    torch._foreach_copy_(views, list(raw.values()))
    torch._foreach_mul_(views, list(scales))
    again = [place for place, i in enumerate(numbers) if known[i]]
    if again:
        before = layout.views(old)
        torch._foreach_lerp_([views[place] for place in again], [before[numbers[place]] for place in again], kept)
    return new

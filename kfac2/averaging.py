"""Running averages of what one iteration has summed up (Algorithm 1 of the paper)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from kfac2 import spread
from kfac2.kinds import Layer
from kfac2.layout import Batch, Layout, Stacks
from kfac2.statistics import Averages, Sums, kept_share
from kfac2.triangles import few_at_a_time


def averaged(layout: Layout, old: Averages, sums: Sums, decay: float, follows_spread: bool = False) -> Averages:
    """Average the factors of one iteration in: X ← εX + (1 - ε)X_new. What the coarse space has stays as it is.

    The sums of factors are let go, few at a time, as averages take their place: these would need as much once more. A
    layer's first statistics are taken as they are; a layer without rows in this iteration keeps its factors. Their
    spread is followed where that is wanted.
    """
    t = old.updates + 1
    kept = kept_share(t, decay)
    is_new = [layer in sums.A for layer in layout.layers]
    A = mixed_in(layout, old.A, old.seen, sums.A, lambda layer: 1 / sums.cases, kept)
    G = mixed_in(layout, old.G, old.seen, sums.G, lambda layer: 1 / sums.rows[layer], kept)
    seen = tuple(was or new for was, new in zip(old.seen, is_new, strict=True))
    fits = tuple(layer not in sums.misfits for layer in layout.layers)
    s = None
    if follows_spread:
        again = [was and new for was, new in zip(old.seen, is_new, strict=True)]
        s = spread.followed(layout, old.spread, (old.A, old.G), (A, G), again, kept)
    return Averages(t, A, G, seen, fits, old.coarse, s)


def mixed_in(
    layout: Layout,
    old: Stacks,
    known: Sequence[bool],
    raw: dict[Layer, Tensor],
    scale_of: Callable[[Layer], float],
    kept: float,
) -> Stacks:
    """Return a field with the new sums averaged in; `old` is not changed, and `raw` is emptied.

    Args:
        layout: where the field lies.
        old: the averages so far.
        known: by layer, whether `old` says something; if not, the new sums are taken as they are.
        raw: new sums by layer; a layer without any keeps what it has.
        scale_of: gives what the sums of a layer are multiplied by.
        kept: ε.
    """
    result: Stacks = []
    for part in few_at_a_time(old):
        stacks = old[part]
        new = [_begun(layout, batch, stack, raw) for batch, stack in zip(layout.batches[part], stacks, strict=True)]
        views, before = (_by_layer(layout.batches[part], of) for of in (new, stacks))
        own = [i for i in views if layout.layers[i] in raw]
        if own:
            layers = [layout.layers[i] for i in own]
            torch._foreach_copy_([views[i] for i in own], [raw.pop(layer) for layer in layers])
            torch._foreach_mul_([views[i] for i in own], [scale_of(layer) for layer in layers])
        again = [i for i in own if known[i]]
        if again:
            torch._foreach_lerp_([views[i] for i in again], [before[i] for i in again], kept)
        result += new
    return result


def _begun(layout: Layout, batch: Batch, stack: Tensor, raw: Collection[Layer]) -> Tensor:
    """Return where new averages of a batch are written; those that there are where none of its layers has new sums."""
    count = sum(layout.layers[i] in raw for i in batch.members)
    if count == len(batch.members):
        return torch.empty_like(stack)
    return stack.clone() if count else stack


def _by_layer(batches: Sequence[Batch], stacks: Stacks) -> dict[int, Tensor]:
    """View the blocks of each layer, by its number."""
    pairs = zip(batches, stacks, strict=True)
    return {i: view for b, stack in pairs for i, view in zip(b.members, stack.split(b.sizes), strict=True)}

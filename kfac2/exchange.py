"""The sums of one iteration over all processes: flat, half of each symmetric matrix, counts and flags among them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kfac2.coarse import CoarseSpace
from kfac2.kinds import Layer
from kfac2.layout import Batch, Layout, Stacks
from kfac2.processes import Processes
from kfac2.statistics import A_shape, G_shape, Sums
from kfac2.triangles import packed, unpacked


class Exchanged(NamedTuple):
    """What all processes have after an exchange.

    Attributes:
        sums: of all; those of layers that leave are left out.
        leaving: the layers that leave in one of them.
        has_kept: whether one of them has kept rows.
    """

    sums: Sums
    leaving: list[Layer]
    has_kept: bool


def exchanged(
    processes: Processes,
    layout: Layout,
    sums: Sums,
    coarse: CoarseSpace,
    observes: bool,
    leaving: Collection[Layer],
    has_kept: bool,
) -> Exchanged:
    """Add up the sums of all processes: one all-reduce for each dtype, of sizes that the layout and options tell.

    What a process has no rows of is zeros there. Counts and flags go along as float64, which adds integers exactly.

    Args:
        processes: that take part, all with the same layout and options.
        layout: of the layers, those that leave among them.
        sums: of this process.
        coarse: the coarse space.
        observes: whether `sums.squares` are looked at.
        leaving: layers that leave in this process.
        has_kept: whether it has kept rows.
    """
    layers = layout.layers
    flags = [float(layer in own) for own in (sums.A, sums.squares, sums.misfits, leaving) for layer in layers]
    rows = [float(sums.rows.get(layer, 0)) for layer in layers]
    counts = torch.tensor([*rows, *flags, float(sums.cases), float(has_kept)], dtype=torch.float64)
    factors = _stacked(layout, sums.A, A_shape) + _stacked(layout, sums.G, G_shape)
    others = _stacked(layout, sums.squares, lambda batch: (batch.d_out, batch.d_in)) if observes else []
    pair_sums = [packed(tensor.to(layout.dtype)[None]) for tensor in sums.coarse or coarse.no_sums(layout)]
    sent = [counts.to(layout.device), *pair_sums, *factors, *others]
    received = iter(processes.added("the statistics", sent))
    del factors, sent  # as large as all factors

    told = _Counts(next(received).tolist(), len(layers))
    pairs = tuple(unpacked(next(received), len(layout.layer_of_map))[0] for _ in pair_sums)
    A, G = ([next(received) for _ in layout.batches] for _ in "AG")
    squares = list(received)
    left = [layer for layer, flag in zip(layers, told.flags(3), strict=True) if flag]
    result = Sums(
        _by_layer(layout, A, told.flags(0)),
        _by_layer(layout, G, told.flags(0)),
        {layer: count for layer, count in zip(layers, told.rows, strict=True) if count},
        told.cases,
        pairs if told.cases else (),
        {layer for layer, flag in zip(layers, told.flags(2), strict=True) if flag},
        _by_layer(layout, squares, told.flags(1)) if observes else {},
    )
    return Exchanged(_without(layout, result, coarse, left), left, told.has_kept)


class _Counts:
    """Reads the counts that were added up."""

    def __init__(self, numbers: Sequence[float], layers: int) -> None:
        self._numbers, self._layers = numbers, layers
        self.rows = [int(number) for number in numbers[:layers]]
        self.cases = int(numbers[-2])
        self.has_kept = bool(numbers[-1])

    def flags(self, which: int) -> list[bool]:
        """Return the flags of all layers, those of some process."""
        begin = (1 + which) * self._layers
        return [bool(number) for number in self._numbers[begin : begin + self._layers]]


def _stacked(layout: Layout, tensors: Mapping[Layer, Tensor], shape_of: Callable[[Batch], tuple[int, int]]) -> Stacks:
    """Return tensors of layers as a field; what is not there is zeros."""
    stacks = layout.stacks(shape_of)
    if tensors:
        views = layout.views(stacks)
        torch._foreach_copy_([views[layout.number(layer)] for layer in tensors], list(tensors.values()))
    return stacks


def _by_layer(layout: Layout, stacks: Stacks, present: Sequence[bool]) -> dict[Layer, Tensor]:
    views = layout.views(stacks) if stacks else []
    return {layer: view for layer, view, there in zip(layout.layers, views, present, strict=True) if there}


def _without(layout: Layout, sums: Sums, coarse: CoarseSpace, leaving: Sequence[Layer]) -> Sums:
    """Leave out the sums of layers that leave."""
    for layer in leaving:
        for own in (sums.A, sums.G, sums.rows, sums.squares):
            own.pop(layer, None)
        sums.misfits.discard(layer)
        sums.coarse = coarse.without(layout, sums.coarse, layout.number(layer))
        layout = layout.without(layer)
    return sums

"""The gradients of a pass as the backward pass comes by them: what is wanted of each is taken, and it is let go.

`torch.autograd.grad` would hold all gradients that it returns until its end, as much memory as all inputs of the
layers. A hook of each graph's node sees them one after the other instead. Only those of the lowest uses, from which no
path leads to another, are returned by it: nothing behind them runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from kfac2.capture import Capture
from kfac2.divergence import Keeps, first_rows
from kfac2.kinds import Layer, Rows
from kfac2.ops.layer_maps import sum_dtype
from kfac2.outer_products import outer_products
from kfac2.reached import Reach, share_reached
from kfac2.self_check import RebuiltGradients
from kfac2.statistics import Pass, Taken, Use
from kfac2.triangles import packed_shape

# Gradients that wait for each other, so that small ones share a native call: 16 MB. A larger one waits for none.
WAITING_BYTES = 2**24

Found = Sequence[tuple[Capture, GradientEdge]]
"""Captures of a graph, and where the gradients of their outputs arrive."""
Arrive = Callable[[tuple[Capture, Tensor]], None]
"""Called with a use that has a gradient, and it, in the shape of the output. To keep it is to hold it."""


class Wanted(NamedTuple):
    """What is wanted of the gradients of a pass.

    Attributes:
        maps_of: gives what a coarse space sums up of uses.
        squares_of: gives what a solver that observes sees of all uses of a layer, or None; None: nobody observes.
        keeps: how much of the rows is kept; None: nothing.
        is_summed: whether the pass is summed up; else its rows are only kept.
    """

    maps_of: Callable[[Sequence[Use]], Sequence[Sequence[Tensor]]]
    squares_of: Callable[[Pass, Sequence[Use]], Tensor | None] | None = None
    keeps: Keeps | None = None
    is_summed: bool = True


class Taking:
    """Takes what is wanted of the uses of a pass, few at a time, and lets their gradients go.

    Args:
        expected: the pass, of whose uses the sizes count.
        wanted: of each; None: they keep their gradients.
        lets_go: whether they are let go, which is not worth its time where there are few.
    """

    def __init__(self, expected: Pass, wanted: Wanted | None, lets_go: bool = True) -> None:
        self._expected = expected
        self._lets_go = lets_go
        self._wanted = wanted
        self._uses: list[Use] = []
        self._squares: dict[Layer, Tensor] = {}
        self._waiting: list[tuple[Use, Use]] = []
        self._bytes = 0
        self._parked: dict[Layer, list[tuple[Use, Use]]] = {}  # a solver that observes wants all uses of a layer
        self._streams = _Streams(expected)
        observes = wanted is not None and wanted.is_summed and wanted.squares_of is not None
        self._counts = Counter(use.layer for use in expected.uses) if observes else Counter()

    def add(self, use: Use, rows: Use | None = None) -> None:
        """Take a use.

        Args:
            use: with its gradients.
            rows: the same without rows that say nothing in Σ g gᵀ.
        """
        if self._wanted is None:
            self._uses.append(use)
            return
        self._streams.note()
        group = [(use, use if rows is None else rows)]
        if self._counts[use.layer] > 1:
            group = self._parked.setdefault(use.layer, []) + group
            if len(group) < self._counts[use.layer]:
                self._parked[use.layer] = group
                return
            del self._parked[use.layer]
        self._waiting += group
        self._bytes += sum(use.g.numel() * use.g.element_size() for use, _ in group)
        if self._bytes >= WAITING_BYTES:
            self._take()

    def finished(self) -> list[Use]:
        """Take what waits; return the uses in the order of the forward pass."""
        for group in self._parked.values():
            self._waiting += group
        self._parked = {}
        if self._waiting:
            self._take()
        self._streams.join([taken for use in self._uses if use.taken is not None for taken in _tensors(use.taken)])
        return sorted(self._uses, key=lambda use: use.order)

    def squares_of(self, uses: Sequence[Use]) -> dict[Layer, Tensor]:
        """Return what was observed, of the layers of these uses."""
        return {use.layer: self._squares[use.layer] for use in uses if use.layer in self._squares}

    def _take(self) -> None:
        waiting, self._waiting, self._bytes = self._waiting, [], 0
        wanted, uses = self._wanted, [use for use, _ in waiting]
        assert wanted is not None
        sums: Sequence[Tensor | None] = [None] * len(uses)
        maps: Sequence[Sequence[Tensor]] = [()] * len(uses)
        if wanted.is_summed:
            sums, maps = _sums([rows for _, rows in waiting], self._expected.scale**2), wanted.maps_of(uses)
            if wanted.squares_of is not None:
                for layer in dict.fromkeys(use.layer for use in uses):
                    own = sorted((use for use in uses if use.layer is layer), key=lambda use: use.order)
                    squares = wanted.squares_of(self._expected, own)
                    if squares is not None:
                        self._squares[layer] = squares
        kept: Sequence[Rows | None] = [None] * len(uses)
        if wanted.keeps is not None:
            count = wanted.keeps.count(self._expected.samples)
            kept = first_rows(self._expected, uses, count, wanted.keeps.rounds)
        for use, G, own_maps, first in zip(uses, sums, maps, kept, strict=True):
            taken = Taken(G, own_maps, first)
            self._uses.append(use.without_gradients(taken) if self._lets_go else replace(use, taken=taken))


class Arrivals:
    """What becomes of the gradients of a pass, one after the other.

    Args:
        expected: the pass, of whose uses the sizes count.
        giving: the captures that give rows.
        mask: which tokens are data, or None.
        wanted: see `Taking`.
        batch_dim: see `Collector`.
        rebuilt: for the self-check, takes all of them; or None.
        lets_go: whether gradients are let go; else the uses of the pass hold them.

    Attributes:
        came: the captures that have a gradient.
        reach: what the loss reaches.
        taking: takes what is wanted of them.
    """

    def __init__(
        self,
        expected: Pass,
        giving: Collection[Capture],
        mask: Tensor | None,
        wanted: Wanted | None,
        batch_dim: int,
        rebuilt: RebuiltGradients | None,
        lets_go: bool = True,
    ) -> None:
        self.came: list[Capture] = []
        self.reach = Reach(expected.uses, expected.samples, mask)
        self._shares: dict[int, float] = {}
        self.taking = Taking(expected, wanted, lets_go)
        self._giving = giving
        self._made = {} if lets_go else {use.order: use for use in expected.uses}
        self._has_sizes = len({use.samples for use in expected.uses}) > 1
        self._batch_dim = batch_dim
        self._rebuilt = rebuilt

    def come(self, pair: tuple[Capture, Tensor]) -> None:
        """Look at a gradient, and take what is wanted of it."""
        capture, g = pair
        self.came.append(capture)
        if capture not in self._giving:
            return
        if self._rebuilt is not None:
            self._rebuilt.add(capture, g)
        if not gives_rows(capture):
            return
        use = self._made.get(capture.order) or use_of(capture, g, self._batch_dim)
        self._shares[use.order] = share_reached(use) if self._has_sizes else 1.0
        use = self.reach.see(use)
        self.taking.add(use, self.reach.without_zeros(use))

    def share(self, use: Use) -> float:
        """Return what `share_reached` said of a use; 1 where all have one size."""
        return self._shares[use.order]


def may_wait(captures: Collection[Capture]) -> bool:
    """Tell whether the gradients of all these are so few that they may wait for each other."""
    return sum(capture.shape.numel() * capture.x.element_size() for capture in captures) < WAITING_BYTES


def gives_rows(capture: Capture) -> bool:
    """Tell whether there are rows at all: an expert without tokens is not used in a pass."""
    return bool(capture.shape.numel() and capture.x.numel())


def use_of(capture: Capture, g: Tensor, batch_dim: int) -> Use:
    """Make rows of a capture and the gradient of its output."""
    layer = capture.layer
    x, g = (layer.samples_first(tensor, batch_dim) for tensor in (capture.x, g))
    return Use.of(layer, x, g, capture.call, capture.order, capture.is_given)


def sizes_of(capture: Capture, batch_dim: int) -> Use:
    """Return a use without numbers: how many rows it will have is known before its gradient comes."""
    layer, x = capture.layer, torch.empty_like(capture.x, device="meta")
    g = torch.empty(capture.shape, dtype=x.dtype, device="meta")
    x, g = (layer.samples_first(tensor, batch_dim) for tensor in (x, g))
    return Use.of(layer, x, g, capture.call, capture.order, capture.is_given)


def places_of(uses: Sequence[Use], samples: int) -> set[int]:
    """Return the numbers of places of the uses whose leading size is N."""
    return {use.places for use in uses if use.samples == samples}


def taken_of(passed: Pass, wanted: Wanted) -> Pass:
    """Return a pass whose gradients are all there with what is wanted of them taken, and them let go."""
    taking = Taking(passed, wanted)
    for use in passed.uses:
        taking.add(use)
    by_order = {use.order: use for use in taking.finished()}
    uses = [by_order[use.order] for use in passed.uses]
    return replace(passed, uses=uses, squares=taking.squares_of(uses))


def _sums(uses: Sequence[Use], scale: float) -> list[Tensor]:
    """Return Σ g gᵀ of each use times a scale, as triangles; 0 where no row is left."""
    rows = [use.counted_grads() for use in uses]
    sums = iter(outer_products([r for r in rows if r.tensor.numel()], scale))
    return [next(sums) if r.tensor.numel() else _zeros(use, r.tensor.dtype) for use, r in zip(uses, rows, strict=True)]


def _zeros(use: Use, dtype: torch.dtype) -> Tensor:
    blocks, d_out, _ = use.layer.matrix_shape
    return torch.zeros(blocks, *packed_shape(d_out), dtype=sum_dtype(dtype), device=use.g.device)


def _tensors(taken: Taken) -> list[Tensor]:
    first = [] if taken.first is None else [taken.first.tensor]
    return [*([] if taken.G is None else [taken.G]), *taken.maps, *first]


class _Streams:
    """On CUDA, autograd runs each node, and its hooks, on the stream of its forward pass.

    A gradient is made and read on that stream, so that it can be let go at once. What was taken of it is read on the
    stream of the caller, which waits for the other on the device; the host waits for nothing.
    """

    def __init__(self, passed: Pass) -> None:
        device = passed.uses[0].layer.weight.device if passed.uses else torch.device("cpu")
        self._device = device if device.type == "cuda" else None
        self._own: Any = None if self._device is None else torch.cuda.current_stream(self._device)
        self._others: set[Any] = set()

    def note(self) -> None:
        """Note the stream of a hook."""
        if self._device is not None:
            stream = torch.cuda.current_stream(self._device)
            if stream != self._own:
                self._others.add(stream)

    def join(self, tensors: Sequence[Tensor]) -> None:
        """Let the caller's stream read what was made on others, and their memory wait for it."""
        for stream in self._others:
            self._own.wait_stream(stream)
        for tensor in tensors if self._others else ():
            tensor.record_stream(self._own)


def come_by(
    found: Found,
    lowest: Found,
    others: Sequence[Tensor],
    differentiate: Callable[[Sequence[Any]], Sequence[Tensor | None]],
    arrive: Arrive,
) -> Sequence[Tensor | None]:
    """Differentiate, and show the gradients of uses as they come.

    Args:
        found: the uses.
        lowest: those from which no path leads to another; all uses where they may be held until the end.
        others: what gradients are to be returned of.
        differentiate: returns gradients with respect to what it is given.
        arrive: called with each use, as its gradient comes.
    """
    came: set[Capture] = set()

    def show(capture: Capture, g: Tensor | None) -> None:
        if g is not None and capture not in came:
            came.add(capture)
            arrive((capture, g if g.shape == capture.shape else g.reshape(capture.shape)))

    def hook(own: Sequence[tuple[Capture, int]]) -> Callable[[Sequence[Tensor | None]], None]:
        def come(gradients: Sequence[Tensor | None]) -> None:
            for capture, number in own:
                show(capture, gradients[number])

        return come

    by_node: dict[Node, list[tuple[Capture, int]]] = {}
    for capture, edge in found if len(lowest) < len(found) else ():
        by_node.setdefault(edge.node, []).append((capture, edge.output_nr))
    handles = [node.register_prehook(hook(own)) for node, own in by_node.items()]
    try:
        gradients = differentiate([*(edge for _, edge in lowest), *others])
    finally:
        for handle in handles:
            handle.remove()
    for (capture, _), g in zip(lowest, gradients, strict=False):
        show(capture, g)
    return gradients[len(lowest) :]

"""Who inverts what, of several processes that train one model, and what they send each other for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kfac2.fine import Fields, FineSolver
from kfac2.kinds import Layer
from kfac2.layout import Batch, Layout
from kfac2.options import check_option
from kfac2.processes import Processes
from kfac2.processes.packing import packed, packed_shape, unpacked

SHARES = ("auto", "all", "inverses", "gradients")
Received = Callable[[], dict[int, Fields]]
WORTH_SHARING = 1e9
"""Σ n³ over all factors from which on inverses are shared out by default. Of two processes on loopback an update with
new inverses took as long either way at 1.1e9, and a quarter less at 2.2e9. By sizes alone: a run can be repeated."""
PIECE = 2**24  # bytes of one owner's inverses that are sent while it computes the next
MOST_PIECES = 8


class Division:
    """Which layers each process inverts: the largest first, each to the one that has least to do so far.

    Args:
        processes: that share the work.
        share: `'all'`: each process inverts everything, and nothing is sent. `'inverses'`: the owner of a layer inverts
            it, and sends the result to all. `'gradients'`: it keeps the result, and sends preconditioned gradients, at
            each step. `'auto'`: the first, or the second where there is a lot to invert.
        layout: of the layers now.

    Attributes:
        share: one of these, not `'auto'`.
    """

    def __init__(self, processes: Processes, share: str, layout: Layout) -> None:
        self._processes = processes
        if share == "auto":
            share = "inverses" if sum(map(work_of, layout.layers)) >= WORTH_SHARING else "all"
        self.share = "all" if processes.is_alone else share
        self._known: tuple[Layout, list[int], dict[int, Layout]] | None = None

    @property
    def is_everyones(self) -> bool:
        """Whether each process inverts everything."""
        return self.share == "all"

    def held(self, layout: Layout) -> Layout:
        """Return the layout of the layers whose inverses this process has."""
        return self.layouts(layout)[self._processes.rank] if self.share == "gradients" else layout

    def layouts(self, layout: Layout) -> dict[int, Layout]:
        """Return the layout of each owner's layers, by rank; of this process in any case."""
        if self._known is None or self._known[0] is not layout:
            owners = owners_of([work_of(layer) for layer in layout.layers], self._processes.size)
            ranks = sorted({*owners, self._processes.rank})
            of_rank = {r: [layer for layer, o in zip(layout.layers, owners, strict=True) if o == r] for r in ranks}
            self._known = layout, owners, {r: Layout(layers, layout.device) for r, layers in of_rank.items()}
        return self._known[2]

    def pieces(self, layout: Layout, fine: FineSolver) -> list[dict[int, Layout]]:
        """Return the layouts of each owner in pieces, of which one is on its way while the next is computed."""
        whole = self.layouts(layout)
        most = max(_bytes(own, fine) for own in whole.values())
        count = max(1, min(MOST_PIECES, most // PIECE, max(len(own.layers) for own in whole.values())))
        if count == 1:
            return [whole]
        return [
            {rank: Layout(_share(own.layers, number, count), layout.device) for rank, own in whole.items()}
            for number in range(count)
        ]

    def send_fields(self, own: dict[int, Layout], fields: Fields, fine: FineSolver) -> Received:
        """Begin to send the fields of this process's layers to all, and to receive those of the others.

        Args:
            own: the layout of each owner.
            fields: of this process's layers.
            fine: the solver.
        """
        flats, waits = {}, []
        for rank, layout in own.items():
            if not layout.layers:
                continue
            if rank == self._processes.rank:
                flats[rank] = torch.cat([t.reshape(-1) for t in _flat_fields(fields, fine)])
            else:
                size = sum(_size(layout, name, fine) for name in fine.fields)
                flats[rank] = torch.empty(size, dtype=layout.dtype, device=layout.device)
            waits.append(self._processes.send("inverses", flats[rank], rank))

        def received() -> dict[int, Fields]:
            for wait in waits:
                wait()
            return {rank: _fields_of(flat, own[rank], fine) for rank, flat in flats.items()}

        return received

    def apply_own(self, layout: Layout, fine: FineSolver, fields: Fields, matrices: Tensor, directions: Tensor) -> None:
        """Multiply by the inverses that each process holds, and bring the directions to all.

        Args:
            layout: of all layers.
            fine: the solver.
            fields: that this process holds, and what is derived of them.
            matrices: gradients of all layers.
            directions: where the result is written.
        """
        parts = self.layouts(layout)
        mine = parts[self._processes.rank]
        gradients, work, out = (torch.zeros(mine.size, dtype=mine.dtype, device=mine.device) for _ in range(3))
        if mine.layers:
            _copy_matrices(mine, gradients, layout, matrices, back=True)
            fine.apply(fields, *(mine.of_batches(m) for m in (gradients, work, out)))
        flats, waits = {}, []
        for rank, part in parts.items():
            if part.layers:
                empty = torch.empty(part.size, dtype=part.dtype, device=part.device)
                flats[rank] = out if part is mine else empty
                waits.append(self._processes.send("preconditioned gradients", flats[rank], rank))
        for wait in waits:
            wait()
        for rank, flat in flats.items():
            _copy_matrices(parts[rank], flat, layout, directions)


def _copy_matrices(part: Layout, matrices: Tensor, whole: Layout, target: Tensor, back: bool = False) -> None:
    """Copy the matrices of some layers to where they lie among all; or `back` from there."""
    spans = whole.spans.tolist()
    here = [matrices[begin:end] for begin, end in part.spans.tolist()]
    there = [target[begin:end] for begin, end in (spans[whole.number(layer)] for layer in part.layers)]
    torch._foreach_copy_(*((here, there) if back else (there, here)))


def check_share(share: object, inverse: str) -> None:
    """Check `share=`, see `KFAC`."""
    check_option("share", share, str, lambda v: v in SHARES, "one of " + ", ".join(map(repr, SHARES)))
    if share == "gradients" and inverse == "ekfac":
        raise ValueError(
            "share must be 'all' or 'inverses' with inverse='ekfac', got 'gradients': each process looks at its rows "
            "in the eigenbases of all layers"
        )


def work_of(layer: Layer) -> int:
    """Return n³ of both factors of a layer, over all its blocks."""
    blocks, d_out, d_in = layer.matrix_shape
    return blocks * (d_in**3 + d_out**3)


def owners_of(work: Sequence[float], size: int) -> list[int]:
    """Return the rank that each piece of work goes to: the largest first, to the one that has least so far."""
    loads, owners = [0.0] * size, [0] * len(work)
    for number in sorted(range(len(work)), key=lambda i: (-work[i], i)):
        owners[number] = loads.index(min(loads))
        loads[owners[number]] += work[number]
    return owners


def _share(layers: Sequence[Layer], number: int, count: int) -> list[Layer]:
    return [layer for place, layer in enumerate(layers) if place % count == number]


def _flat_fields(fields: Fields, fine: FineSolver) -> list[Tensor]:
    return [packed(s) if name in fine.symmetric else s for name, stacks in fields.items() for s in stacks]


def _sent_shape(batch: Batch, name: str, fine: FineSolver) -> tuple[int, ...]:
    """Return the shape in which the entries of a field of a batch are sent."""
    shape = fine.shape(name, batch)
    return batch.blocks, *(packed_shape(shape[0]) if name in fine.symmetric else shape)


def _size(layout: Layout, name: str, fine: FineSolver) -> int:
    """Return how many numbers of a field are sent."""
    return sum(math.prod(_sent_shape(batch, name, fine)) for batch in layout.batches)


def _bytes(layout: Layout, fine: FineSolver) -> int:
    return sum(_size(layout, name, fine) for name in fine.fields) * layout.dtype.itemsize


def _fields_of(flat: Tensor, layout: Layout, fine: FineSolver) -> Fields:
    """Read what `_flat_fields` wrote."""
    fields: Fields = {}
    begin = 0
    for name in fine.fields:
        fields[name] = []
        for batch in layout.batches:
            sent = _sent_shape(batch, name, fine)
            end = begin + math.prod(sent)
            part = flat[begin:end].view(sent)
            fields[name].append(unpacked(part, fine.shape(name, batch)[0]) if name in fine.symmetric else part)
            begin = end
    return fields

"""The inverses of one update: the only place where they are kept, stacked as a step reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from kfac2.brought import brought
from kfac2.coarse import CoarseSpace
from kfac2.division import Division
from kfac2.fine import Damping, Fields, FineSolver
from kfac2.layout import Layout, Stacks
from kfac2.processes import Processes
from kfac2.statistics import Averages
from kfac2.triangles import diagonals, unpacked, upper_triangle

SHARE = 4  # 1 / what a refresh may need above factors and inverses, over what these need
LEAST_BYTES = 2**22  # that a chunk may need in any case: a native call for each of many small layers would cost time
LARGEST_STEP = 1e18  # |v| of a block that an inverse may lead to where a step is not to overflow


class Chunk(NamedTuple):
    """Blocks of one batch that are inverted together.

    Attributes:
        batch: its number.
        begin: of the blocks among those of the batch.
        end: of these.
        first: number of the first among the blocks of all batches.
    """

    batch: int
    begin: int
    end: int
    first: int


class InPlace(NamedTuple):
    """That the last inverses are overwritten: nothing may come up afterwards for which the step is skipped.

    Attributes:
        gradients: a bound of |∇| of each block, by batch, known to be finite. An inverse that could make of it a step
            which overflows has failed. None: the step may be skipped all the same.
        blocked: bool on the device: if so, the last inverses stand, all of them, and new ones are for nothing. None:
            it is known that they do not.
    """

    gradients: Stacks | None
    blocked: Tensor | None = None


@dataclass(frozen=True)
class Inverses:
    """The damped inverses of all layers.

    Attributes:
        damping: of their update.
        fields: what the fine solver keeps, in the dtype of the matrices; of the layers that `Division.held` says.
        usable: float64 on the device, (L,): 1 for a layer that has an inverse; the others keep their gradients.
        coarse: float64, (F_coarse + λ_c I)⁻¹; None without a coarse space.
        derived: what follows from the fields.
        failed: float64 on the device, (L + 1,): 1 for a layer whose new inverse failed, so that the last one stands in
            its place, and last, for the coarse inverse. None once the host has seen to it.
        observations: statistics updates that a solver which observes has seen.
        observed: by layer, whether it has been seen.
    """

    damping: Damping
    fields: Fields
    usable: Tensor
    coarse: Tensor | None
    derived: Fields = field(default_factory=dict)
    failed: Tensor | None = None
    observations: int = 0
    observed: tuple[bool, ...] = ()

    def moved(self, old: Layout, new: Layout, fine: FineSolver) -> Inverses:
        """Return the inverses where another layout of the same layers says."""
        fields = fine.moved(self.fields, old, new)
        coarse, failed = (None if t is None else t.to(new.device) for t in (self.coarse, self.failed))
        damping = self.damping.to(new.device)
        usable, derived = self.usable.to(new.device), fine.derived_of(new, fields, damping)
        return Inverses(damping, fields, usable, coarse, derived, failed, self.observations, self.observed)

    def tensors(self) -> list[Tensor]:
        """Return what a step reads, in an order that depends on the layout and the options only."""
        stacks = [stack for part in (self.fields, self.derived) for stacks in part.values() for stack in stacks]
        return [*stacks, self.usable, *([] if self.coarse is None else [self.coarse])]

    def holding(self, new: Inverses) -> Inverses:
        """Return the new inverses, copied to where these lie: a CUDA graph reads them there."""
        for kept, value in zip(self.tensors(), new.tensors(), strict=True):
            if kept is not value:
                kept.copy_(value)
        return replace(new, fields=self.fields, derived=self.derived, usable=self.usable, coarse=self.coarse)


@dataclass(frozen=True)
class Solvers:
    """What inverses are made with.

    Attributes:
        fine: of the blocks.
        coarse: of the second level.
        processes: that train together.
        division: of the work among them.
    """

    fine: FineSolver
    coarse: CoarseSpace
    processes: Processes
    division: Division


def inverted(
    layout: Layout,
    averages: Averages,
    last: Inverses | None,
    solvers: Solvers,
    damping: Damping,
    coarse_damping: float | None,
    dtype: torch.dtype | None,
    place: InPlace | None = None,
) -> Inverses:
    """Invert all damped blocks and the coarse Fisher; where one fails, the last inverse stands. Reads nothing back.

    Layers are inverted chunk by chunk, see `chunks`: with `place`, the peak is at most a quarter of what factors and
    inverses need above these, or what the largest layer needs alone. All work is on the caller's stream, in the order
    in which it is asked for: memory of one chunk goes to the next without a wait, and without `record_stream`.

    Args:
        layout: of the layers.
        averages: of the factors.
        last: the inverses so far.
        solvers: fine and coarse.
        damping: of the blocks.
        coarse_damping: λ_c; None: as the blocks, see `_coarse_damping`.
        dtype: the factors are inverted in; by default their own.
        place: the fields of the last inverses are overwritten; None: new ones lie beside them.
    """
    fine = solvers.fine
    place = None if last is None else place
    into = fine.zeros(layout) if last is None or place is None else last.fields
    derived = fine.zeros(layout, fine.derived) if last is None or place is None else last.derived
    failed = torch.zeros(len(layout.layers), dtype=torch.float64, device=layout.device)
    seen = brought(averages.seen, failed.dtype, layout.device)
    before = torch.zeros_like(failed) if last is None else last.usable
    blocked = None if place is None else place.blocked
    had, counts = (flags.index_select(0, layout.layer_of_block) > 0 for flags in (before, seen))
    bounds = None if place is None or place.gradients is None else torch.cat(place.gradients).double()
    for chunk in chunks(layout, fine, dtype):
        blocks = slice(chunk[0].first, chunk[-1].first + chunk[-1].end - chunk[-1].begin)
        layers = layout.layer_of_block[blocks]
        standing = None if last is None else {name: _parts(stacks, chunk) for name, stacks in last.fields.items()}
        new, is_bad = _chunk_inverted(
            layout, chunk, fine, damping, averages, dtype, standing, _split(had[blocks], chunk)
        )
        if bounds is not None:
            is_bad |= ~(torch.cat(fine.gains(new, damping)) * bounds[blocks] <= LARGEST_STEP)
        is_bad &= counts[blocks]  # the zeros of a layer without statistics are no failure
        failed.index_add_(0, layers, is_bad.double())  # each layer is in one chunk, with all its blocks
        keeps = failed.index_select(0, layers) > 0
        if blocked is not None:
            keeps |= blocked
        parts = {name: _parts(stacks, chunk) for name, stacks in into.items()}
        _write(parts, _split(keeps, chunk), standing, new)
        for name, stacks in fine.derive(parts, damping).items():
            _replace(_parts(derived[name], chunk), stacks, blocked)
        del new  # before the next chunk is inverted
    failed.clamp_(max=1)
    usable = torch.where(failed > 0, before, seen)

    coarse, coarse_failed = coarse_inverted(layout, averages, last, solvers.coarse, damping, coarse_damping)
    return Inverses(
        damping,
        into,
        usable,
        coarse,
        derived,
        torch.cat([failed, coarse_failed]),
        0 if last is None else last.observations,
        (False,) * len(layout.layers) if last is None else last.observed,
    )


def coarse_inverted(
    layout: Layout,
    averages: Averages,
    last: Inverses | None,
    space: CoarseSpace,
    damping: Damping,
    coarse_damping: float | None,
) -> tuple[Tensor | None, Tensor]:
    """Return the coarse inverse of `inverted`, and whether it failed, (1,); then the last one stands."""
    if not averages.coarse:
        return None, torch.zeros(1, dtype=torch.float64, device=layout.device)
    of_coarse = _coarse_damping(layout, averages, damping) if coarse_damping is None else coarse_damping
    coarse, is_bad = space.invert(averages.coarse, of_coarse)
    standing = torch.zeros_like(coarse) if last is None or last.coarse is None else last.coarse
    return torch.where(is_bad, standing, coarse), is_bad.double().reshape(1)


def _chunk_inverted(
    layout: Layout,
    chunk: Sequence[Chunk],
    fine: FineSolver,
    damping: Damping,
    averages: Averages,
    dtype: torch.dtype | None,
    standing: Fields | None,
    had: Sequence[Tensor],
) -> tuple[Fields, Tensor]:
    """Return the new fields of a chunk, and of which blocks they hold no meaning."""
    A, G = _whole(layout, averages, chunk, dtype)
    fields, status = fine.invert(A, G, damping)
    del A, G  # as large as what they have become
    fields = all_rounded(fields, layout, chunk)
    if standing is not None:
        fields = all_rounded(fine.carry_over(fields, standing, had), layout, chunk)
    return fields, torch.cat(status) != 0


def chunks(layout: Layout, fine: FineSolver, dtype: torch.dtype | None) -> Iterator[list[Chunk]]:
    """Split the blocks into parts that are inverted together, by one native call.

    A chunk has so many layers that what the solver needs for it, `fine.copies` times its factors, is a quarter of what
    all factors and inverses need, or 4 MB; one layer at least.

    Args:
        layout: of the layers.
        fine: the solver.
        dtype: the factors are inverted in; None: their own.
    """
    sizes = [(batch.d_in**2 + batch.d_out**2) * batch.dtype.itemsize for batch in layout.batches]
    # of the factors one triangle is kept
    held = 3 * sum(size * batch.blocks for size, batch in zip(sizes, layout.batches, strict=True)) // 2
    most = max(held // SHARE, LEAST_BYTES) // fine.copies
    chunk: list[Chunk] = []
    used = first = 0
    for number, batch in enumerate(layout.batches):
        size = sizes[number] // batch.dtype.itemsize * (dtype or batch.dtype).itemsize
        block = 0
        for blocks in batch.sizes:
            if chunk and used + size * blocks > most:
                yield chunk
                chunk, used = [], 0
            if chunk and chunk[-1].batch == number:
                chunk[-1] = chunk[-1]._replace(end=block + blocks)
            else:
                chunk.append(Chunk(number, block, block + blocks, first))
            used, block, first = used + size * blocks, block + blocks, first + blocks
    if chunk:
        yield chunk


def _whole(
    layout: Layout, averages: Averages, chunk: Sequence[Chunk], dtype: torch.dtype | None
) -> tuple[Stacks, Stacks]:
    """Return whole factors of a chunk, A and G, in memory of their own."""
    batches = [layout.batches[c.batch] for c in chunk]
    mask = upper_triangle(max(max(batch.d_in, batch.d_out) for batch in batches), layout.device)

    def of(triangles: Stacks, sizes: Sequence[int]) -> Stacks:
        parts = zip(_parts(triangles, chunk), sizes, strict=True)
        return [unpacked(part.to(dtype or part.dtype), d, mask) for part, d in parts]

    return of(averages.A, [batch.d_in for batch in batches]), of(averages.G, [batch.d_out for batch in batches])


def _parts(stacks: Stacks, chunk: Sequence[Chunk]) -> Stacks:
    """View the blocks of a chunk."""
    return [stacks[c.batch][c.begin : c.end] for c in chunk]


def _split(flags: Tensor, chunk: Sequence[Chunk]) -> list[Tensor]:
    """Split flags of the blocks of a chunk by batch."""
    return list(flags.split([c.end - c.begin for c in chunk]))


def _write(into: Fields, failed: Sequence[Tensor], standing: Fields | None, new: Fields) -> None:
    """Write new fields, but where they failed: there the last ones stand, or zeros."""
    for name, stacks in new.items():
        for number, (bad, stack) in enumerate(zip(failed, stacks, strict=True)):
            last = stack.new_zeros(()) if standing is None else standing[name][number]
            torch.where(bad.reshape(-1, *[1] * (stack.dim() - 1)), last, stack, out=into[name][number])


def _replace(into: Stacks, new: Stacks, blocked: Tensor | None) -> None:
    """Write stacks over others, unless that is blocked."""
    if blocked is None:
        torch._foreach_copy_(into, new)
    else:
        for last, stack in zip(into, new, strict=True):
            torch.where(blocked, last, stack, out=last)


def _coarse_damping(layout: Layout, averages: Averages, damping: Damping) -> float | Tensor:
    """Return λ_c: λ; or where that is c times the mean eigenvalue of each block, c Σ_q tr A_q tr G_q of each layer.

    The second is Z (λI) Zᵀ, since a layer's vector of ones has as many elements as its blocks have eigenvalues: c times
    what 1ᵀF1 would be if no two elements went together. F_coarse itself is no measure: where every layer is followed by
    a LayerNorm or the softmax, which cancel what is added to all outputs alike, it is nothing but rounding.
    """
    if not damping.relative:
        return damping.value
    traces = [
        diagonals(A).sum(-1).double() * diagonals(G).sum(-1).double()
        for A, G in zip(averages.A, averages.G, strict=True)
    ]
    scales = torch.zeros(len(layout.layers), dtype=torch.float64, device=layout.device)
    scales = scales.index_add_(0, layout.layer_of_block, torch.cat(traces))
    return damping.value * torch.where(scales > 0, scales, 1.0)


def all_rounded(fields: Fields, layout: Layout, chunk: Sequence[Chunk] | None = None) -> Fields:
    """Round to the dtype of the factors, row by row: so it is saved, and a resumed run computes the same."""
    numbers = range(len(layout.batches)) if chunk is None else [c.batch for c in chunk]
    dtypes = [layout.batches[n].dtype for n in numbers]
    return {
        name: [stack.to(dtype).to(layout.dtype) for stack, dtype in zip(stacks, dtypes, strict=True)]
        for name, stacks in fields.items()
    }

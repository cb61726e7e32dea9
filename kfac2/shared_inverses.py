"""The inverses of one update where processes share the work: each inverts its own layers, and mends them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from kfac2.coarse import NoSpace
from kfac2.division import work_of
from kfac2.fine import Damping, Fields, FineSolver
from kfac2.inverses import SHARE, InPlace, Inverses, Solvers, coarse_inverted, inverted
from kfac2.kinds import Layer
from kfac2.layout import Layout
from kfac2.mending import Warn, mended
from kfac2.sent_fields import flat_fields, read_fields, room
from kfac2.statistics import Averages

LEAST_BYTES = 2**26  # that an update may need in any case: many small messages would cost time
COPIES = 4  # of a piece's factors, beside what the solver needs: factors, last fields, the message, what is read of one
ON_THE_WAY = 4  # 1 / the part that messages on their way have of what an update may need


def inverted_together(
    layout: Layout,
    averages: Averages,
    last: Inverses | None,
    solvers: Solvers,
    damping: Damping,
    coarse_damping: float | None,
    dtype: torch.dtype | None,
    warn: Warn,
    place: InPlace | None = None,
) -> Inverses:
    """Do what `inverted` and `mended` do, each process for its own layers; holders of a layer get the same bits.

    Layers are inverted piece by piece, see `pieces`, and sent while the next are computed: with `place`, the peak is at
    most a quarter of what this process's factors and inverses need above these, or what the largest layer needs, as in
    `inverted`. The messages are the same with `place` and without. Where a process dies in between, the others raise,
    and some layers have new inverses, the rest the last ones.

    Args:
        layout: of all layers.
        averages: of the factors.
        last: the inverses so far.
        solvers: fine and coarse, and the division.
        damping: of the blocks.
        coarse_damping: see `inverted`; the coarse Fisher is so small that each process inverts it.
        dtype: the factors are inverted in.
        warn: called with a key and a message for each layer of this process that fails.
        place: the fields of the last inverses are overwritten; None: new ones lie beside them.
    """
    division, fine, rank = solvers.division, solvers.fine, solvers.processes.rank
    held = division.held(layout)
    is_new = last is None or place is None
    fields = fine.zeros(held) if is_new else last.fields  # type: ignore[union-attr]
    derived = fine.zeros(held, fine.derived) if is_new else last.derived  # type: ignore[union-attr]
    flags = torch.zeros(2, len(layout.layers), dtype=torch.float64, device=layout.device)

    def keep(part: Layout, new: Fields) -> None:
        _put(fields, held, new, part)
        _put(derived, held, fine.derive(new, damping), part)

    most = budget(layout, held, fine)
    on_the_way = _OnTheWay(most // ON_THE_WAY)
    for piece in pieces(division.owned_by(layout), fine, dtype, most):
        own: Fields = {}
        if rank in piece:
            before = _last_of(last, held, layout, piece[rank], fine)
            bound = _bound_of(place, layout, piece[rank])
            own, told = _inverted(piece[rank], layout, averages, before, solvers, damping, dtype, warn, bound)
            flags[:, [layout.number(layer) for layer in piece[rank].layers]] = told
            del before  # it has the new fields now, which are sent and let go
        if division.holders == 1:
            keep(piece[rank], own)
            continue
        for owner, part in piece.items():
            flat = flat_fields(own, part, fine) if owner == rank else room(part, fine)
            own = {} if owner == rank else own
            arrived = partial(_read, keep, part, fine)
            on_the_way.add(flat, division.send_along_column(flat, owner), arrived)
    on_the_way.finish()
    (told,) = solvers.processes.added("which layers have inverses", [flags])
    coarse, coarse_failed = coarse_inverted(layout, averages, last, solvers.coarse, damping, coarse_damping)
    return Inverses(
        damping,
        fields,
        told[0],
        coarse,
        derived,
        torch.cat([torch.zeros_like(told[0]), coarse_failed]),
        0 if last is None else last.observations,
        tuple(bool(flag) for flag in told[1].tolist()),
    )


def _inverted(
    mine: Layout,
    layout: Layout,
    averages: Averages,
    before: Inverses | None,
    solvers: Solvers,
    damping: Damping,
    dtype: torch.dtype | None,
    warn: Warn,
    bound: InPlace,
) -> tuple[Fields, Tensor]:
    """Invert some layers, and mend what fails; return their fields, and which have inverses, which were observed."""
    alone = replace(solvers, coarse=NoSpace())
    of_mine = averages.moved(layout, mine, ())
    new = inverted(mine, of_mine, before, alone, damping, 0.0, dtype, bound)
    new = mended(mine, of_mine, new, alone, warn)
    return new.fields, torch.stack([new.usable, new.usable.new_tensor(new.observed)])


def _read(keep: Callable[[Layout, Fields], None], part: Layout, fine: FineSolver, flat: Tensor) -> None:
    keep(part, read_fields(flat, part, fine))


class _OnTheWay:
    """Messages that are on their way, up to so many bytes; the oldest is waited for where there are more."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._messages: deque[tuple[Tensor, Callable[[], None], Callable[[Tensor], None]]] = deque()

    def add(self, flat: Tensor, wait: Callable[[], None], arrived: Callable[[Tensor], None]) -> None:
        self._messages.append((flat, wait, arrived))
        while len(self._messages) > 1 and sum(flat.nbytes for flat, *_ in self._messages) > self._most:
            self._take()

    def finish(self) -> None:
        while self._messages:
            self._take()

    def _take(self) -> None:
        flat, wait, arrived = self._messages.popleft()
        wait()
        arrived(flat)


def budget(layout: Layout, held: Layout, fine: FineSolver) -> int:
    """Return bytes that an update may need above factors and inverses: the same in all processes of a column.

    Args:
        layout: of all layers, whose factors each process has.
        held: of those whose inverses it has.
        fine: the solver.
    """
    triangles = _factor_bytes(layout.layers) // 2
    return max((triangles + _factor_bytes(held.layers)) // SHARE, LEAST_BYTES)


def pieces(owned: dict[int, Layout], fine: FineSolver, dtype: torch.dtype | None, most: int) -> list[dict[int, Layout]]:
    """Split the layers of each owner into parts, the largest first: the first parts of all, the second, and so on.

    A part is so large that what is needed to invert it and the messages on their way are `most`; one layer at least.

    Args:
        owned: the layers of each owner, by rank.
        fine: the solver.
        dtype: the factors are inverted in; None: their own.
        most: bytes.
    """
    most -= most // ON_THE_WAY
    result: list[dict[int, Layout]] = []
    for rank, layout in owned.items():
        parts: list[list[Layer]] = []
        used = 0
        for layer in sorted(layout.layers, key=work_of, reverse=True):
            needed = _factor_bytes([layer], dtype) * (fine.copies + COPIES)
            if not parts or used + needed > most:
                parts, used = [*parts, []], 0
            parts[-1].append(layer)
            used += needed
        for number, layers in enumerate(parts):
            if number == len(result):
                result.append({})
            result[number][rank] = Layout(layers, layout.device)
    return result


def whole(inverses: Inverses, layout: Layout, solvers: Solvers) -> Inverses:
    """Return the inverses of all layers, where each process holds those of its own; all call it together."""
    division, fine, fields = solvers.division, solvers.fine, solvers.fine.zeros(layout)
    for column, part in division.held_by(layout).items():
        if part.layers:
            is_mine = column == division.column
            flat = flat_fields(inverses.fields, part, fine) if is_mine else room(part, fine)
            division.send_to_all(flat, column)()
            _put(fields, layout, read_fields(flat, part, fine), part)
    return replace(inverses, fields=fields, derived={})


def _last_of(last: Inverses | None, held: Layout, layout: Layout, mine: Layout, fine: FineSolver) -> Inverses | None:
    """Copy the last inverses of some layers, to be overwritten."""
    if last is None:
        return None
    numbers = [layout.number(layer) for layer in mine.layers]
    fields = fine.moved(last.fields, held, mine)
    observed = tuple(last.observed[i] for i in numbers)
    derived = fine.zeros(mine, fine.derived)
    return Inverses(last.damping, fields, last.usable[numbers], None, derived, None, last.observations, observed)


def _bound_of(place: InPlace | None, layout: Layout, mine: Layout) -> InPlace:
    """Return the bound of |∇| of some layers, whose inverses are overwritten in any case: they are copies."""
    if place is None or place.gradients is None:
        return InPlace(None)
    return InPlace(mine.moved(place.gradients, layout, mine.stacks(lambda batch: (), torch.float64)))


def _put(fields: Fields, layout: Layout, part: Fields, of: Layout) -> None:
    """Write the fields of some layers to where those of all lie."""
    for name, stacks in part.items():
        targets: list[Tensor] = [layout.view(fields[name], layout.number(layer)) for layer in of.layers]
        torch._foreach_copy_(targets, of.views(stacks))


def _factor_bytes(layers: Sequence[Layer], dtype: torch.dtype | None = None) -> int:
    shapes = [(layer.matrix_shape, (dtype or layer.factor_dtype).itemsize) for layer in layers]
    return sum(blocks * (d_out**2 + d_in**2) * size for (blocks, d_out, d_in), size in shapes)

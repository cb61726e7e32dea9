"""The inverses of one update where processes share the work: each inverts its own layers, and mends them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kfac2.coarse import NoSpace
from kfac2.fine import Damping, Fields
from kfac2.inverses import Inverses, Solvers, coarse_inverted, inverted
from kfac2.layout import Layout
from kfac2.mending import Warn, mended
from kfac2.statistics import Averages


def inverted_together(
    layout: Layout,
    averages: Averages,
    last: Inverses | None,
    solvers: Solvers,
    damping: Damping,
    coarse_damping: float | None,
    dtype: torch.dtype | None,
    warn: Warn,
) -> Inverses:
    """Do what `inverted` and `mended` do, each process for its own layers; all get the same bits.

    Args:
        layout: of all layers.
        averages: of the factors.
        last: the inverses so far.
        solvers: fine and coarse, and the division.
        damping: of the blocks.
        coarse_damping: see `inverted`; the coarse Fisher is so small that each process inverts it.
        dtype: the factors are inverted in.
        warn: called with a key and a message for each layer of this process that fails.
    """
    division, fine, rank = solvers.division, solvers.fine, solvers.processes.rank
    held, alone = division.held(layout), replace(solvers, coarse=NoSpace())
    flags = torch.zeros(2, len(layout.layers), dtype=torch.float64, device=layout.device)
    fields, sent = fine.zeros(held), []
    for piece in division.pieces(layout, fine):
        mine, own = piece[rank], None
        if mine.layers:
            before = None if last is None else _of(last, held, layout, mine, solvers)
            of_mine = averages.moved(layout, mine, ())
            own = inverted(mine, of_mine, before, alone, damping, coarse_damping, dtype)
            own = mended(mine, of_mine, own, alone, warn)
            numbers = [layout.number(layer) for layer in mine.layers]
            flags[:, numbers] = torch.stack([own.usable, flags.new_tensor(own.observed)])
        if division.share == "inverses":
            sent.append((piece, division.send_fields(piece, {} if own is None else own.fields, fine)))
        elif own is not None:
            _put(fields, held, own.fields, mine)
    for piece, received in sent:
        for owner, part in received().items():
            _put(fields, held, part, piece[owner])
    (told,) = solvers.processes.added("which layers have inverses", [flags])
    coarse, coarse_failed = coarse_inverted(layout, averages, last, solvers.coarse, damping, coarse_damping)
    return Inverses(
        damping,
        fields,
        told[0],
        coarse,
        fine.derive(fields, damping),
        torch.cat([torch.zeros_like(told[0]), coarse_failed]),
        0 if last is None else last.observations,
        tuple(bool(flag) for flag in told[1].tolist()),
    )


def whole(inverses: Inverses, layout: Layout, solvers: Solvers) -> Inverses:
    """Return the inverses of all layers, where each process holds those of its own; all call it together."""
    parts = solvers.division.layouts(layout)
    fields = solvers.fine.zeros(layout)
    for owner, part in solvers.division.send_fields(parts, inverses.fields, solvers.fine)().items():
        _put(fields, layout, part, parts[owner])
    return replace(inverses, fields=fields, derived={})


def of_own(inverses: Inverses, layout: Layout, solvers: Solvers) -> Inverses:
    """Return the inverses that this process holds, given those of all layers."""
    held = solvers.division.held(layout)
    fields = {
        name: held.moved(stacks, layout, lambda b, name=name: solvers.fine.shape(name, b), held.dtype)  # type: ignore[misc]
        for name, stacks in inverses.fields.items()
    }
    return replace(inverses, fields=fields, derived=solvers.fine.derive(fields, inverses.damping))


def _of(inverses: Inverses, held: Layout, layout: Layout, mine: Layout, solvers: Solvers) -> Inverses:
    """Return the inverses of some layers."""
    numbers = [layout.number(layer) for layer in mine.layers]
    part = inverses.moved(held, mine, solvers.fine)
    observed = tuple(inverses.observed[i] for i in numbers)
    return replace(part, usable=inverses.usable[numbers], coarse=None, failed=None, observed=observed)


def _put(fields: Fields, layout: Layout, part: Fields, of: Layout) -> None:
    """Write the fields of some layers to where those of all lie."""
    for name, stacks in part.items():
        targets: list[Tensor] = [layout.view(fields[name], layout.number(layer)) for layer in of.layers]
        torch._foreach_copy_(targets, of.views(stacks))

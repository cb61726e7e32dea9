"""The inverses of one update: the only place where they are kept, stacked as a step reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from kfac2.coarse import CoarseSpace
from kfac2.division import Division
from kfac2.fine import Damping, Fields, FineSolver, ObservingSolver
from kfac2.layout import Layout
from kfac2.processes import Processes
from kfac2.statistics import Averages, Sums, kept_share

Warn = Callable[[str, str], None]


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
        fields = {
            name: new.moved(stacks, old, partial(fine.shape, name), new.dtype) for name, stacks in self.fields.items()
        }
        coarse, failed = (None if t is None else t.to(new.device) for t in (self.coarse, self.failed))
        damping = self.damping.to(new.device)
        usable, derived = self.usable.to(new.device), fine.derive(fields, damping)
        return Inverses(damping, fields, usable, coarse, derived, failed, self.observations, self.observed)

    def tensors(self) -> list[Tensor]:
        """Return what a step reads, in an order that depends on the layout and the options only."""
        stacks = [stack for part in (self.fields, self.derived) for stacks in part.values() for stack in stacks]
        return [*stacks, self.usable, *([] if self.coarse is None else [self.coarse])]

    def holding(self, new: Inverses) -> Inverses:
        """Return the new inverses, copied to where these lie: a CUDA graph reads them there."""
        for kept, value in zip(self.tensors(), new.tensors(), strict=True):
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
) -> Inverses:
    """Invert all damped blocks and the coarse Fisher; where one fails, the last inverse stands. Reads nothing back.

    Args:
        layout: of the layers.
        averages: of the factors.
        last: the inverses so far.
        solvers: fine and coarse.
        damping: of the blocks.
        coarse_damping: λ_c; None: as the blocks, see `_coarse_damping`.
        dtype: the factors are inverted in; by default their own.
    """
    fine = solvers.fine
    A, G = ([stack.to(dtype or stack.dtype) for stack in stacks] for stacks in (averages.A, averages.G))
    fields, status = fine.invert(A, G, damping)
    fields = _all_rounded(fields, layout)
    is_bad = torch.cat(status) != 0
    count = len(layout.layers)
    failed = torch.zeros(count, dtype=torch.float64, device=layout.device)
    failed = failed.index_add_(0, layout.layer_of_block, is_bad.double()).clamp_(max=1)
    seen = failed.new_tensor(averages.seen)
    failed = failed * seen  # the zeros of a layer without statistics are no failure
    before = failed.new_zeros(count) if last is None else last.usable
    if last is not None:
        fields = _all_rounded(fine.carry_over(fields, last.fields, _by_batch(layout, before > 0)), layout)
    fields = _where(_by_batch(layout, failed > 0), last, fields)
    usable = torch.where(failed > 0, before, seen)

    coarse, coarse_failed = coarse_inverted(layout, averages, last, solvers.coarse, damping, coarse_damping)
    return Inverses(
        damping,
        fields,
        usable,
        coarse,
        fine.derive(fields, damping),
        torch.cat([failed, coarse_failed]),
        0 if last is None else last.observations,
        (False,) * count if last is None else last.observed,
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
    nothing = torch.zeros(1, dtype=torch.float64, device=layout.device)
    of_coarse = _coarse_damping(layout, averages, damping) if coarse_damping is None else coarse_damping
    result = space.invert(averages.coarse, of_coarse)
    if result is None:
        return None, nothing
    coarse, is_bad = result
    standing = torch.zeros_like(coarse) if last is None or last.coarse is None else last.coarse
    return torch.where(is_bad, standing, coarse), is_bad.double().reshape(1)


def _coarse_damping(layout: Layout, averages: Averages, damping: Damping) -> float | Tensor:
    """Return λ_c: λ; or where that is c times the mean eigenvalue of each block, c Σ_q tr A_q tr G_q of each layer.

    The second is Z (λI) Zᵀ, since a layer's vector of ones has as many elements as its blocks have eigenvalues: c times
    what 1ᵀF1 would be if no two elements went together. F_coarse itself is no measure: where every layer is followed by
    a LayerNorm or the softmax, which cancel what is added to all outputs alike, it is nothing but rounding.
    """
    if not damping.relative:
        return damping.value
    traces = [
        A.diagonal(dim1=-2, dim2=-1).sum(-1).double() * G.diagonal(dim1=-2, dim2=-1).sum(-1).double()
        for A, G in zip(averages.A, averages.G, strict=True)
    ]
    scales = torch.zeros(len(layout.layers), dtype=torch.float64, device=layout.device)
    scales = scales.index_add_(0, layout.layer_of_block, torch.cat(traces))
    return damping.value * torch.where(scales > 0, scales, 1.0)


def _rounded(stack: Tensor, layout: Layout, batch: int) -> Tensor:
    """Round to the dtype of the factors, row by row: so it is saved, and a resumed run computes the same."""
    return stack.to(layout.batches[batch].dtype).to(layout.dtype).contiguous()


def _all_rounded(fields: Fields, layout: Layout) -> Fields:
    return {name: [_rounded(s, layout, n) for n, s in enumerate(stacks)] for name, stacks in fields.items()}


def _by_batch(layout: Layout, flags: Tensor) -> list[Tensor]:
    """From a flag for each layer to flags for the blocks of each batch."""
    return list(flags[layout.layer_of_block].split([batch.blocks for batch in layout.batches]))


def _where(failed: Sequence[Tensor], last: Inverses | None, new: Fields) -> Fields:
    """Put the last fields, or zeros, in place of those that failed."""
    fields: Fields = {}
    for name, stacks in new.items():
        fields[name] = []
        for number, (bad, stack) in enumerate(zip(failed, stacks, strict=True)):
            standing = stack.new_zeros(()) if last is None else last.fields[name][number]
            fields[name].append(torch.where(bad.reshape(-1, *[1] * (stack.dim() - 1)), standing, stack))
    return fields


def observed(layout: Layout, inverses: Inverses, fine: FineSolver, sums: Sums, decay: float) -> Inverses:
    """Return the inverses with what a solver that observes has seen in this iteration averaged in.

    Args:
        layout: of the layers.
        inverses: in use; they stay as they are.
        fine: the solver.
        sums: of the iteration.
        decay: bound of ε.
    """
    if not isinstance(fine, ObservingSolver) or not sums.squares:
        return inverses
    t = inverses.observations + 1
    fields, known = fine.averaged(layout, inverses.fields, inverses.observed, sums, kept_share(t, decay))
    fields = _all_rounded(fields, layout)
    has = inverses.usable.tolist()  # without an inverse there was no basis to observe it in
    known = tuple(bool(was and there) for was, there in zip(known, has, strict=True))
    derived = fine.derive(fields, inverses.damping)
    return replace(inverses, fields=fields, derived=derived, observations=t, observed=known)


def mended(layout: Layout, averages: Averages, inverses: Inverses, solvers: Solvers, warn: Warn) -> Inverses:
    """Look at what failed, and invert it in float64, in place, with the damping of its update.

    Args:
        layout: of the layers.
        averages: that were inverted.
        inverses: of that update.
        solvers: fine and coarse.
        warn: called with a key and a message for each layer.
    """
    if inverses.failed is None:
        return inverses
    *layers, coarse = inverses.failed.tolist()
    numbers = [i for i, bad in enumerate(layers) if bad]
    known = list(inverses.observed)
    for i in numbers:
        name = layout.layers[i].name
        entry = solvers.fine.mend(layout.view(averages.A, i), layout.view(averages.G, i), inverses.damping)
        if entry is None:
            warn(f"not finite {name}", f"a factor of {name} is not finite; its last inverse is kept")
            continue
        for field_name, value in entry.items():
            layout.view(inverses.fields[field_name], i).copy_(value.to(layout.layers[i].factor_dtype))
        inverses.usable[i] = 1
        known[i] = False  # its fields are new, all of them
        warn(
            f"indefinite {name}",
            f"a factor of {name} is not positive definite (or its eigendecomposition did not converge); "
            "it was decomposed in float64, its eigenvalues floored at 0",
        )
    if coarse:
        warn("not finite coarse", "the coarse Fisher is not finite; its last inverse is kept")
    if numbers:
        for name, stacks in solvers.fine.derive(inverses.fields, inverses.damping).items():
            for kept, value in zip(inverses.derived[name], stacks, strict=True):
                kept.copy_(value)
    return replace(inverses, failed=None, observed=tuple(known))

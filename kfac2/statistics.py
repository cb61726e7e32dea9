"""Sums over the rows of one iteration, and their running averages (Algorithm 1 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kfac2 import ops
from kfac2.kinds import Layer, Rows
from kfac2.layout import Layout, Stacks
from kfac2.ops.gather_gradients import first_not_finite


@dataclass(frozen=True)
class Use:
    """What one layer contributed to one forward-backward pass.

    Attributes:
        layer: the layer.
        x: its input, as the module got it.
        g: the gradient at its output.
        inputs: the rows ā.
        grads: the rows g.
    """

    layer: Layer
    x: Tensor
    g: Tensor
    inputs: Rows
    grads: Rows

    @staticmethod
    def of(layer: Layer, x: Tensor, g: Tensor) -> Use:
        """Make rows of what was captured."""
        return Use(layer, x, g, *layer.rows(x, g))

    def map_rows(self) -> tuple[Rows, Rows]:
        """Return the rows whose sums are the maps of the coarse space."""
        return self.layer.map_rows(self.x, self.g, (self.inputs, self.grads))

    @property
    def samples(self) -> int:
        """The leading size: N, or N·r where it holds r consecutive rows of each sample."""
        return self.inputs.tensor.shape[0]

    @property
    def row_count(self) -> int:
        """Rows g of all samples and places: N · T_i."""
        return self.grads.tensor.numel() // self.grads.tensor.shape[1]


@dataclass(frozen=True)
class Pass:
    """One forward-backward pass.

    Attributes:
        uses: of the layers that took part, each once, in the order of the layout.
        cases: M of this pass.
        scale: what each g is to be multiplied by: M where g is the gradient of a mean.
    """

    uses: list[Use]
    cases: int
    scale: float = 1.0


@dataclass
class Sums:
    """Sums over the rows of one iteration, not yet normalised; those of several passes, or processes, add up.

    Attributes:
        A: Σ ā āᵀ by layer, (blocks, d_in, d_in).
        G: Σ g gᵀ by layer, (blocks, d_out, d_out).
        rows: number of g rows by layer, N · T_i.
        cases: M, independent cases of the loss.
        coarse: what the coarse space has summed up; empty without one.
        misfits: layers whose batch did not fit the coarse space.
        squares: what `inverse="ekfac"` observes, Σ_n (V_Gᵀ ∇_n V_A)² by layer, (blocks, d_out, d_in); else empty.
    """

    A: dict[Layer, Tensor] = field(default_factory=dict)
    G: dict[Layer, Tensor] = field(default_factory=dict)
    rows: dict[Layer, int] = field(default_factory=dict)
    cases: int = 0
    coarse: tuple[Tensor, ...] = ()
    misfits: set[Layer] = field(default_factory=set)
    squares: dict[Layer, Tensor] = field(default_factory=dict)

    def add_factors(self, passed: Pass) -> None:
        """Add the rows of one pass to the sums of both factors, all layers in one native call."""
        sources = [use.inputs for use in passed.uses] + [use.grads for use in passed.uses]
        sums = ops.covariances([rows.tensor for rows in sources], [rows.window for rows in sources])
        count = len(passed.uses)
        for use, A, G in zip(passed.uses, sums[:count], sums[count:], strict=True):
            add_to(self.A, use.layer, A)
            add_to(self.G, use.layer, G * passed.scale**2 if passed.scale != 1 else G)
            self.rows[use.layer] = self.rows.get(use.layer, 0) + use.row_count
        self.cases += passed.cases

    def not_finite(self) -> str | None:
        """Name what holds a NaN or an infinity among the sums, or None."""
        if not self.A:
            return None
        # a sum of features, or a square of a product, may overflow by itself
        sums = [*self.A.values(), *self.G.values(), *self.squares.values(), *self.coarse]
        names = [f"the statistics of {layer.name}" for layer in (*self.A, *self.G, *self.squares)]
        names += ["the coarse sums of inputs", "the coarse sums of output gradients"][: len(self.coarse)]
        first = first_not_finite(sums)
        return None if first == len(sums) else names[first]


def add_to(sums: dict[Layer, Tensor], layer: Layer, new: Tensor) -> None:
    """Add to the sum of a layer, or begin it."""
    sums[layer] = sums[layer] + new if layer in sums else new


@dataclass(frozen=True)
class Averages:
    """Running averages; never changed, only replaced, so that a step that fails leaves them as they were.

    Attributes:
        updates: t, statistics updates so far.
        A: A_ii, (blocks, d_in, d_in) for each batch of the layout.
        G: G_ii, (blocks, d_out, d_out).
        seen: by layer, whether it has had rows: if not, its factors are zeros that say nothing.
        in_coarse: by layer, whether it is in the coarse space.
        coarse: the averages of the coarse space; empty without one.
    """

    updates: int
    A: Stacks
    G: Stacks
    seen: tuple[bool, ...]
    in_coarse: tuple[bool, ...]
    coarse: tuple[Tensor, ...] = ()

    @staticmethod
    def none(layout: Layout) -> Averages:
        """Return the averages before the first update."""
        A, G = layout.stacks(lambda b: (b.d_in, b.d_in)), layout.stacks(lambda b: (b.d_out, b.d_out))
        count = len(layout.layers)
        return Averages(0, A, G, (False,) * count, (True,) * count)

    def moved(self, old: Layout, new: Layout, coarse: tuple[Tensor, ...]) -> Averages:
        """Return the averages where another layout of the same layers, or of fewer, says.

        Args:
            old: where they lie now.
            new: where they are to lie.
            coarse: those of the coarse space, in the new layout.
        """
        A, G = new.moved(self.A, old), new.moved(self.G, old)
        numbers = [old.number(layer) for layer in new.layers]
        seen, in_coarse = (tuple(flags[number] for number in numbers) for flags in (self.seen, self.in_coarse))
        return Averages(self.updates, A, G, seen, in_coarse, coarse)


def kept_share(updates: int, decay: float) -> float:
    """Return ε = min(1 - 1/t, decay), what remains of the old average at update t."""
    return min(1 - 1 / updates, decay)


def averaged(layout: Layout, old: Averages, sums: Sums, decay: float) -> Averages:
    """Average the factors of one iteration in: X ← εX + (1 - ε)X_new. What the coarse space has stays as it is.

    A layer's first statistics are taken as they are; a layer without rows in this iteration keeps its factors.
    """
    t = old.updates + 1
    kept = kept_share(t, decay)
    A = mixed_in(layout, old.A, old.seen, sums.A, [1 / sums.cases] * len(sums.A), kept)
    G = mixed_in(layout, old.G, old.seen, sums.G, [1 / sums.rows[layer] for layer in sums.G], kept)
    seen = tuple(was or layer in sums.A for was, layer in zip(old.seen, layout.layers, strict=True))
    fits = tuple(was and layer not in sums.misfits for was, layer in zip(old.in_coarse, layout.layers, strict=True))
    return Averages(t, A, G, seen, fits, old.coarse)


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

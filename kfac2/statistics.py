"""Uses of weights, passes of rows, their sums over one iteration; and what running averages are (Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from kfac2 import spread
from kfac2.kinds import Call, Layer, Rows
from kfac2.layout import Batch, Layout, Stacks
from kfac2.ops.gather_gradients import first_not_finite
from kfac2.outer_products import outer_products
from kfac2.triangles import packed_shape, unpacked


@dataclass(frozen=True, eq=False)
class Taken:
    """What was taken of the gradients of a use while they were there.

    Attributes:
        G: triangle of Σ g gᵀ of the rows that count, times the squared scale of their pass; None where nothing is
            summed up.
        maps: what a coarse space sums up: 1ᵀg of all rows, one for each map of the layer.
        first: the rows g of the first samples, times the scale of their pass; None where none are kept.
    """

    G: Tensor | None = None
    maps: Sequence[Tensor] = ()
    first: Rows | None = None


@dataclass(frozen=True, eq=False)
class Use:
    """What one use of a weight contributed to a forward-backward pass.

    Attributes:
        layer: whose weight it is.
        x: the input, its samples first.
        g: the gradient at the output, likewise. Once it was let go it is on the device meta, and only has a shape.
        call: how the weight was used.
        inputs: the rows ā.
        grads: the rows g.
        order: of the use in the forward pass.
        is_given: whether the input is the user's own, who may overwrite it before the step.
        reached: bool, (leading size, places): which rows the loss can reach; the others are no rows. None: all.
        taken: what was taken of the gradients; None as long as they are there.
    """

    layer: Layer
    x: Tensor
    g: Tensor
    call: Call
    inputs: Rows
    grads: Rows
    order: int = 0
    is_given: bool = False
    reached: Tensor | None = None
    taken: Taken | None = None

    @staticmethod
    def of(layer: Layer, x: Tensor, g: Tensor, call: Call, order: int = 0, is_given: bool = False) -> Use:
        """Make rows of what was captured."""
        return Use(layer, x, g, call, *layer.rows(x, g, call), order, is_given)

    def without_gradients(self, taken: Taken) -> Use:
        """Return the use with its gradients let go: their shapes are left, and what was taken of them."""
        g = torch.empty_like(self.g, device="meta")
        grads = g if self.grads.tensor is self.g else torch.empty_like(self.grads.tensor, device="meta")
        return replace(self, g=g, grads=Rows(grads, self.grads.window), taken=taken)

    def only(self, reached: Tensor) -> Use:
        """Return the use where just these rows are reached; the gradients of others are left out."""
        if self.reached is not None:
            reached = reached & self.reached
        if self.taken is not None:
            return replace(self, reached=reached)
        mask = _like(self._in_order_of_rows(reached), self.grads.tensor)
        rows = Rows(torch.where(mask, self.grads.tensor, 0), self.grads.window)
        return replace(self, grads=rows, reached=reached)

    def counted_inputs(self) -> Rows:
        """Return the rows ā that count in the factors."""
        return self._counted(self.inputs)

    def counted_grads(self) -> Rows:
        """Return the rows g that count in the factors."""
        return self._counted(self.grads)

    def _counted(self, rows: Rows) -> Rows:
        return rows if self.reached is None else self.layer.rows_at(rows, self._in_order_of_rows(self.reached))

    def _in_order_of_rows(self, reached: Tensor) -> Tensor:
        return reached.flip(1) if self.layer.is_mirrored else reached

    def input_map_rows(self) -> Rows:
        """Return the rows whose sums are the maps of inputs, those that do not count among them."""
        return self.layer.input_map_rows(self.x, self.g, self.call, self.inputs)

    def grad_map_rows(self) -> Rows:
        """Return the rows whose sums are the maps of output gradients, those that do not count among them."""
        return self.layer.grad_map_rows(self.g, self.grads)

    @cached_property
    def samples(self) -> int:
        """The leading size: N, or N·r where it holds r consecutive rows of each sample."""
        return self.inputs.tensor.shape[0]

    @cached_property
    def places(self) -> int:
        """Rows of each of these: T."""
        return math.prod(self.grads.tensor.shape[2:])

    @property
    def row_count(self) -> int:
        """Rows g that count, of all samples and places: N · T where all do."""
        return self.samples * self.places if self.reached is None else int(self.reached.sum())


def _like(mask: Tensor, tensor: Tensor) -> Tensor:
    """View a mask of rows (samples, places) as one of a tensor (samples, channels, *places)."""
    return mask.reshape(tensor.shape[0], 1, *tensor.shape[2:])


@dataclass(frozen=True)
class Pass:
    """One forward-backward pass.

    Attributes:
        uses: of the weights that took part, in the order of the layout; a weight may have several.
        cases: M of this pass.
        samples: N, the leading size that most uses share.
        scale: what each g is to be multiplied by: M where g is the gradient of a mean.
        is_repeated: whether these are further gradients of uses whose inputs, and cases, have been counted.
        misplaced: layers whose rows are known to be others than their number says.
        squares: what a solver that observes has seen of the rows, by layer.
    """

    uses: list[Use]
    cases: int
    samples: int
    scale: float = 1.0
    is_repeated: bool = False
    misplaced: Collection[Layer] = ()
    squares: Mapping[Layer, Tensor] = field(default_factory=dict)

    def fits(self, use: Use) -> bool:
        """Tell whether a use holds rows of all samples, in their order: the leading size is N, or N·r.

        It is N·r where r rows of each sample follow each other, as many as another use has places (flattened tokens,
        windows of a map). Else (another axis first, the share of an expert, a table) nobody knows whose its rows are.
        """
        if use.layer in self.misplaced or use.samples == self.samples:
            return use.layer not in self.misplaced
        places = {other.places for other in self.uses if other.samples == self.samples}
        return is_of_samples(use, places, self.samples)

    def by_layer(self) -> dict[Layer, list[Use]]:
        """Return the uses of each layer."""
        uses: dict[Layer, list[Use]] = {}
        for use in self.uses:
            uses.setdefault(use.layer, []).append(use)
        return uses


def is_of_samples(use: Use, places: Collection[int], samples: int) -> bool:
    """Tell by its sizes whether a use holds rows of all samples, see `Pass.fits`.

    Args:
        use: the use.
        places: that uses of N rows have.
        samples: N.
    """
    r, rest = divmod(use.samples, samples)
    if rest or r == 1:
        return r == 1 and not rest
    return r * use.places in places or r in places


class FirstBad(NamedTuple):
    """The first of some tensors that is not finite, not read yet.

    Attributes:
        number: of it, int32 on the device, (1,); how many there are where all are finite.
        names: of all.
    """

    number: Tensor
    names: list[str]

    @property
    def is_bad(self) -> Tensor:
        """Whether there is one, bool on the device."""
        return self.number.reshape(()) < len(self.names)

    def name(self, number: int) -> str | None:
        """Name the one of this number; None where there is none."""
        return self.names[number] if number < len(self.names) else None


@dataclass
class Sums:
    """Sums over the rows of one iteration, not yet normalised; those of several passes, or processes, add up.

    Attributes:
        A: Σ ā āᵀ by layer, as triangles, see `kfac2.triangles`.
        G: Σ g gᵀ by layer, likewise.
        rows: number of g rows by layer, N · T_i.
        cases: M, independent cases of the loss.
        coarse: what the coarse space has summed up; empty without one.
        misfits: layers with a use that does not fit the samples, see `Pass.fits`.
        squares: what `inverse="ekfac"` observes, Σ_n (V_Gᵀ ∇_n V_A)² by layer, (blocks, d_out, d_in); else empty.
        log_probs: sums of log-probabilities of labels that were drawn unseen: not finite where one of them is not.
    """

    A: dict[Layer, Tensor] = field(default_factory=dict)
    G: dict[Layer, Tensor] = field(default_factory=dict)
    rows: dict[Layer, int] = field(default_factory=dict)
    cases: int = 0
    coarse: tuple[Tensor, ...] = ()
    misfits: set[Layer] = field(default_factory=set)
    squares: dict[Layer, Tensor] = field(default_factory=dict)
    log_probs: list[Tensor] = field(default_factory=list)

    def add_factors(self, passed: Pass) -> None:
        """Add the rows of one pass to the sums of both factors; Σ g gᵀ was taken as the gradients came."""
        for use in passed.uses:
            assert use.taken is not None and use.taken.G is not None
            add_to(self.G, use.layer, use.taken.G)
        for layer, squares in passed.squares.items():
            add_to(self.squares, layer, squares)
        if passed.is_repeated:
            return
        sums = outer_products([use.counted_inputs() for use in passed.uses])
        for use, A in zip(passed.uses, sums, strict=True):
            add_to(self.A, use.layer, A)
            self.rows[use.layer] = self.rows.get(use.layer, 0) + use.row_count
        self.cases += passed.cases

    def add(self, other: Sums) -> None:
        """Add the sums of further passes."""
        for mine, new in ((self.A, other.A), (self.G, other.G), (self.squares, other.squares)):
            for layer, tensor in new.items():
                add_to(mine, layer, tensor)
        for layer, count in other.rows.items():
            self.rows[layer] = self.rows.get(layer, 0) + count
        self.cases += other.cases
        self.coarse = (
            tuple(a + b for a, b in zip(self.coarse, other.coarse, strict=True)) if self.coarse else other.coarse
        )
        self.misfits |= other.misfits
        self.log_probs += other.log_probs

    def first_bad(self) -> FirstBad | None:
        """Find what holds a NaN or an infinity among the sums, if there are any; reads nothing back."""
        if not self.A:
            return None
        # a sum of features, or a square of a product, may overflow by itself
        sums = [*self.A.values(), *self.log_probs, *self.G.values(), *self.squares.values(), *self.coarse]
        names = [f"the statistics of {layer.name}" for layer in self.A]
        names += ["the log-probabilities of the distribution"] * len(self.log_probs)
        names += [f"the statistics of {layer.name}" for layer in (*self.G, *self.squares)]
        names += ["the coarse sums of inputs", "the coarse sums of output gradients"][: len(self.coarse)]
        return FirstBad(first_not_finite(sums), names)

    def not_finite(self) -> str | None:
        """Name what holds a NaN or an infinity among the sums, or None; waits for the device."""
        first = self.first_bad()
        return None if first is None else first.name(int(first.number))


def add_to(sums: dict[Layer, Tensor], layer: Layer, new: Tensor) -> None:
    """Add to the sum of a layer, or begin it."""
    sums[layer] = sums[layer] + new if layer in sums else new


def A_shape(batch: Batch) -> tuple[int, int]:
    """Return the shape in which one block's A is kept."""
    return packed_shape(batch.d_in)


def G_shape(batch: Batch) -> tuple[int, int]:
    """Return the shape in which one block's G is kept."""
    return packed_shape(batch.d_out)


@dataclass(frozen=True)
class Averages:
    """Running averages; never changed, only replaced, so that a step that fails leaves them as they were.

    Attributes:
        updates: t, statistics updates so far.
        A: A_ii of all blocks of each batch of the layout, as triangles, see `kfac2.triangles`.
        G: G_ii, likewise.
        seen: by layer, whether it has had rows: if not, its factors are zeros that say nothing.
        in_coarse: by layer, whether it is in the coarse space: whether it fitted the last update.
        coarse: the averages of the coarse space; empty without one.
        spread: s of each block, see `kfac2.spread`; None where nobody asks for it.
    """

    updates: int
    A: Stacks
    G: Stacks
    seen: tuple[bool, ...]
    in_coarse: tuple[bool, ...]
    coarse: tuple[Tensor, ...] = ()
    spread: Tensor | None = None

    @staticmethod
    def none(layout: Layout) -> Averages:
        """Return the averages before the first update."""
        count = len(layout.layers)
        return Averages(0, layout.stacks(A_shape), layout.stacks(G_shape), (False,) * count, (True,) * count)

    def of_layer(self, layout: Layout, i: int) -> tuple[Tensor, Tensor]:
        """Return whole factors of layer i, (blocks, d_in, d_in) and (blocks, d_out, d_out), in memory of their own."""
        _, d_out, d_in = layout.layers[i].matrix_shape
        return unpacked(layout.view(self.A, i), d_in), unpacked(layout.view(self.G, i), d_out)

    def moved(self, old: Layout, new: Layout, coarse: tuple[Tensor, ...]) -> Averages:
        """Return the averages where another layout says; a layer that was not there has none.

        Args:
            old: where they lie now.
            new: where they are to lie.
            coarse: those of the coarse space, in the new layout.
        """
        A, G = new.moved(self.A, old, new.stacks(A_shape)), new.moved(self.G, old, new.stacks(G_shape))
        numbers = [old.number(layer) if layer in old.layers else None for layer in new.layers]
        seen = tuple(number is not None and self.seen[number] for number in numbers)
        in_coarse = tuple(number is None or self.in_coarse[number] for number in numbers)
        return Averages(self.updates, A, G, seen, in_coarse, coarse, spread.moved(self.spread, old, new))


def kept_share(updates: int, decay: float) -> float:
    """Return ε = min(1 - 1/t, decay), what remains of the old average at update t."""
    return min(1 - 1 / updates, decay)

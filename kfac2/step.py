"""The step of every iteration (eq. 6, 10): gather, fine, coarse, clip, limit, write."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac2 import _C  # type: ignore[attr-defined]
from kfac2.brought import brought
from kfac2.coarse import FineStep
from kfac2.inverses import InPlace, Inverses, Solvers
from kfac2.layout import Layout
from kfac2.ops.gather_gradients import gather_gradients
from kfac2.ops.shift_and_scale import ShiftAndScale
from kfac2.ops.write_gradients import write_gradients

LARGEST_GRADIENT = 1e12  # |∇| of a block; times `inverses.LARGEST_STEP` it is still finite in float32
_GATHERED = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@contextmanager
def products_in(precision: str | None) -> Iterator[None]:
    """Set torch's precision of float32 products on CUDA devices while products are launched; None: leave it."""
    if precision is None:
        yield
        return
    setting = torch.backends.cuda.matmul
    before = setting.fp32_precision  # allow_tf32, the older name, raises where a user has set this one
    setting.fp32_precision = precision
    try:
        yield
    finally:
        setting.fp32_precision = before


@dataclass(frozen=True)
class Gathered:
    """The gradients of one step.

    Attributes:
        gradients: those that the native calls see, those of layers first.
        table: where they belong, see `gather_gradients`.
        first_bad: on the device, the number of the first parameter whose gradient is not finite.
        elsewhere: numbers of parameters whose gradients only the host can look at: sparse ones, say, or on another
            device.
        largest: by layer, on the CPU, the largest number that its gradients hold, where the directions hold larger
            ones, else infinity; None: infinity for all.
    """

    gradients: list[Tensor]
    table: Tensor
    first_bad: Tensor
    elsewhere: list[int]
    largest: Tensor | None


class Step:
    """Computes and writes the update of all layers at once: three native calls, and few products for each shape.

    Args:
        layout: of the layers.
        others: further parameters, whose gradients are looked at for NaNs and infinities.

    Attributes:
        parameters: those of the layers, then the others; their numbers are their places here.
    """

    def __init__(self, layout: Layout, others: Sequence[Tensor]) -> None:
        self._layout = layout
        own = list(dict.fromkeys(part.parameter for layer in layout.layers for part in layer.parts()))
        self.parameters = [*own, *others]
        self._own = len(own)
        numbers = {id(parameter): number for number, parameter in enumerate(own)}
        # Of each part of a layer's matrix: the number of its parameter, the view of its gradient, its row of the table.
        self._parts = [
            (number, part.view, (*layout.place(i, part.row, part.column), i, number))
            for i, layer in enumerate(layout.layers)
            for part in layer.parts()
            for number in [numbers[id(part.parameter)]]
        ]
        self._weights = [numbers[id(layer.weight)] for layer in layout.layers]
        self._matrices: Tensor | None = None
        self._table = torch.zeros(0, 4, dtype=torch.int64, device="cpu")
        # What the table was made for: which own gradients there are, and the numbers of the others.
        self._tabled: tuple[tuple[bool, ...], tuple[int, ...]] | None = None
        self._rate_index: dict[tuple[int, ...], Tensor] = {}  # by layer, which rate on the device it has; 0: none
        self._one = torch.ones((), dtype=torch.float64, device=layout.device)

    @property
    def none_bad(self) -> int:
        """What `first_bad` is where all gradients are finite."""
        return len(self.parameters)

    def gradient(self, i: int) -> Tensor:
        """Return ∇ of layer i as it was gathered last and not let go since, one dimension."""
        assert self._matrices is not None
        return self._layout.matrix(self._matrices, i).flatten()

    def let_go(self) -> None:
        """Free the matrices: between steps activations need the memory."""
        self._matrices = None

    # -- gradients ------------------------------------------------------------------------------------------

    def gather(self, gradients: Sequence[Tensor | None]) -> Gathered:
        """Copy the gradients of all layers into their matrices; what has none is 0 there. Reads nothing back.

        Args:
            gradients: of `parameters`.
        """
        present = tuple(gradient is not None for gradient in gradients[: self._own])
        self._matrices = self._layout.matrices(zeros=not all(present))
        seen = [g if view is None else view(g) for n, view, _ in self._parts if (g := gradients[n]) is not None]
        elsewhere: list[int] = []
        looked_at: list[int] = []
        for number in range(self._own, len(gradients)):
            gradient = gradients[number]
            if gradient is None or not gradient.numel():
                continue
            if self._can_look_at(gradient):
                seen.append(gradient)
                looked_at.append(number)
            else:
                elsewhere.append(number)
        if self._tabled != (present, tuple(looked_at)):
            self._tabled = (present, tuple(looked_at))
            self._table = self._make_table(*self._tabled)
        count = len(self._layout.layers)
        first_bad = gather_gradients(seen, self._table, count, self.none_bad, self._matrices)
        return Gathered(seen, self._table, first_bad, elsewhere, self._largest(seen))

    def _largest(self, seen: Sequence[Tensor]) -> Tensor | None:
        most = torch.finfo(self._layout.dtype).max
        if all(torch.finfo(dtype).max >= most for dtype in {gradient.dtype for gradient in seen}):
            return None
        numbers = torch.full((len(self._layout.layers),), torch.inf, dtype=torch.float64)
        for gradient, layer in zip(seen, self._table[:, 2].tolist(), strict=True):
            if layer >= 0 and torch.finfo(gradient.dtype).max < most:
                numbers[layer] = min(float(numbers[layer]), torch.finfo(gradient.dtype).max)
        return numbers

    def _can_look_at(self, grad: Tensor) -> bool:
        """Tell whether the native call takes a gradient that it only looks at."""
        if grad.is_sparse or grad.dtype not in _GATHERED or grad.device != self._layout.device:
            return False
        return (grad.dim() <= _C.gradient_max_axes or grad.is_contiguous()) and grad.numel() <= _C.gradient_max_elements

    def bad_elsewhere(self, gathered: Gathered) -> int | None:
        """Return the number of a gradient that is not finite among those that only the host can look at."""
        for number in gathered.elsewhere:
            grad = self.parameters[number].grad
            values = grad.coalesce().values() if grad is not None and grad.is_sparse else grad
            if values is not None and not values.isfinite().all():
                return number
        return None

    def room(self, gathered: Gathered) -> InPlace | None:
        """Return what lets new inverses be written over the last ones; reads nothing back.

        Returns:
            A bound that they are held to, so that the step will be finite whatever they are. It is blocked where a
            gradient is not finite, or so large that the step may be skipped. None where gradients are of a type that
            holds so little that it may be, too.
        """
        assert self._matrices is not None
        stacks = self._layout.of_batches(self._matrices)
        if gathered.largest is not None or not stacks:
            return None
        norms = [torch.linalg.vector_norm(m, math.inf, (1, 2)) * m[0].numel() ** 0.5 for m in stacks]
        blocked = ~(torch.cat(norms).amax() <= LARGEST_GRADIENT) | (gathered.first_bad[0] < self.none_bad)
        return InPlace(norms, blocked)

    def _make_table(self, present: tuple[bool, ...], others: tuple[int, ...]) -> Tensor:
        """For each gradient its place, row length, layer and number; -1 for one that is only looked at."""
        rows = []
        for number, _, row in self._parts:
            if present[number]:  # without its weight's gradient a bias keeps its own
                rows.append(row if present[self._weights[row[2]]] else (-1, 0, -1, number))
        rows += [(-1, 0, -1, number) for number in others]
        return torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(-1, 4)

    # -- the update -----------------------------------------------------------------------------------------

    def write(
        self,
        gathered: Gathered,
        inverses: Inverses,
        solvers: Solvers,
        in_coarse: Sequence[bool],
        coarse_weight: float,
        kl_clip: float | None,
        rates: Sequence[float | Tensor],
        skipped: Tensor,
        limits: Tensor | None = None,
        precision: str | None = None,
    ) -> ShiftAndScale:
        """Precondition the gathered gradients in place; where anything is not finite, write zeros. Reads nothing back.

        Args:
            gathered: what `gather` returned.
            inverses: to multiply with.
            solvers: that the inverses were made with.
            in_coarse: by layer, whether it is in the coarse space.
            coarse_weight: ω.
            kl_clip: κ, or None.
            rates: η_i by layer; a tensor on the device is not read.
            skipped: see `Health`.
            limits: of |v_i|, (L,), float64 on the device; None: none.
            precision: of float32 products on a CUDA device, `'ieee'` or `'tf32'`; None: torch's own setting.
        """
        assert self._matrices is not None
        fields, directions = {**inverses.fields, **inverses.derived}, self._layout.matrices()
        with products_in(precision):
            if not solvers.division.holds_all:
                solvers.division.apply_held(self._layout, solvers.fine, fields, self._matrices, directions)
            else:
                work = torch.empty_like(directions)
                solvers.fine.apply(fields, *map(self._layout.of_batches, (self._matrices, work, directions)))
                del work
        host_rates, device_rates = self._rates(rates)
        step = FineStep(
            self._matrices,
            directions,
            self._layout.spans,
            host_rates,
            device_rates,
            inverses.usable,
            gathered.first_bad,
            self.none_bad,
            kl_clip,
            skipped,
            limits,
            gathered.largest,
        )
        mask = torch.tensor(in_coarse, dtype=torch.float64, device="cpu")
        result = solvers.coarse.correct(step, inverses.coarse, mask, coarse_weight)
        write_gradients(gathered.gradients, gathered.table, directions, result, inverses.usable)
        return result

    def _rates(self, rates: Sequence[float | Tensor]) -> tuple[Tensor, Tensor | None]:
        """Split η_i into numbers and, where rates lie on the device, what the numbers are multiplied by."""
        on_device = {id(rate): rate for rate in rates if isinstance(rate, Tensor) and rate.device.type != "cpu"}
        host = torch.tensor([1.0 if id(r) in on_device else float(r) for r in rates], dtype=torch.float64, device="cpu")
        if not on_device:
            return host, None
        order = {key: place for place, key in enumerate(on_device, start=1)}
        places = tuple(order.get(id(rate), 0) for rate in rates)
        if places not in self._rate_index:
            self._rate_index[places] = brought(places, torch.int64, self._layout.device)
        factors = torch.stack([self._one, *(rate.reshape(()).double() for rate in on_device.values())])
        return host, factors[self._rate_index[places]]

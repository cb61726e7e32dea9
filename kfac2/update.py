"""The step of every iteration (eq. 6, 10): three native calls, and a few batched products for each shape of layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac2.inverses import Fields, Inverses
from kfac2.layers import Layer
from kfac2.ops.gather_gradients import gather_gradients
from kfac2.ops.shift_and_scale import ShiftAndScale, shift_and_scale
from kfac2.ops.write_gradients import write_gradients
from kfac2.stacks import Batch, InverseStacks, Stacks, lay_out

_MOST_AXES = 5  # of a tensor of any strides, see csrc/include/gradient_part.h
_TOO_MANY = 2**31
_GATHERED = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass
class Gathered:
    """The gradients of one step.

    Attributes:
        gradients: those that the native calls see, those of layers first.
        layout: where they belong, see `gather_gradients`.
        first_bad: on the device, the number of the first parameter whose gradient is not finite.
        elsewhere: parameters whose gradients only the host can look at: sparse ones, say, or on another device.
    """

    gradients: list[Tensor]
    layout: Tensor
    first_bad: Tensor
    elsewhere: list[Tensor]


class Update:
    """Computes and writes the preconditioned gradients of all layers at once.

    Args:
        layers: the handled layers.
        others: further parameters, whose gradients are looked at for NaNs.
        device: of the layers.
    """

    def __init__(self, layers: Sequence[Layer], others: Sequence[Tensor], device: torch.device) -> None:
        self._layers = layers
        self._own: list[Tensor | None] = [*(layer.weight for layer in layers), *(layer.bias for layer in layers)]
        self._others = others
        self._device = device
        is_double = any(layer.weight.dtype == torch.float64 for layer in layers)
        self._dtype = torch.float64 if is_double else torch.float32
        self._batches = lay_out(layers)
        self._stacks = InverseStacks(layers, self._batches, self._dtype, device)
        self._spans = self._spans_of_layers()
        size = self._batches[-1].end if self._batches else 0
        self._matrices, self._work, self._directions = (
            torch.zeros(size, dtype=self._dtype, device=device) for _ in range(3)
        )
        self._layout = torch.zeros(0, 4, dtype=torch.int64)
        self._laid_out: tuple[tuple[bool, ...], tuple[int, ...]] | None = None
        self._filled: tuple[bool, ...] = ()
        self._rate_index: dict[tuple[int, ...], Tensor] = {}
        self._one = torch.ones((), dtype=torch.float64, device=device)
        self._staged: Stacks | None = None
        self._captured: tuple[bool, ...] | None = None  # which layers a CUDA graph has in the coarse space
        self.skipped = torch.zeros(2, dtype=torch.int64, device=device)

    def _spans_of_layers(self) -> Tensor:
        """Begin and end of each layer among the matrices."""
        spans = torch.zeros(len(self._layers), 2, dtype=torch.int64)
        for batch in self._batches:
            place = batch.begin
            for i in batch.members:
                size = math.prod(self._layers[i].matrix_shape)
                spans[i] = torch.tensor([place, place + size])
                place += size
        return spans

    def fits(self) -> bool:
        """Tell whether the layers are still where, and in the dtype, that this was made for."""
        weights = [parameter for parameter in self._own[: len(self._layers)] if parameter is not None]
        here = not weights or weights[0].device == self._device
        return here and any(weight.dtype == torch.float64 for weight in weights) == (self._dtype == torch.float64)

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph was captured of this update's steps."""
        return self._captured is not None

    @property
    def stale(self) -> bool:
        """Whether a CUDA graph holds what is no longer so."""
        if self._captured is None:
            return False
        return not self._stacks.pinned or self._captured != self._in_coarse()

    def _in_coarse(self) -> tuple[bool, ...]:
        return tuple(layer.in_coarse for layer in self._layers)

    def watch(self, others: Sequence[Tensor]) -> None:
        """Look at the gradients of these further parameters from now on."""
        self._others = others

    # -- gradients ------------------------------------------------------------------------------------------

    def gather(self) -> Gathered:
        """Copy the gradients of all layers into their matrices; what has none is 0 there. Reads nothing back."""
        present = tuple(parameter is not None and parameter.grad is not None for parameter in self._own)
        absent = any(parameter is not None and parameter.grad is None for parameter in self._own)
        # What a captured step leaves out, other steps may fill before it is replayed.
        if present != self._filled or (absent and is_capturing(self._device)):
            self._matrices.zero_()
            self._filled = present
        elsewhere: list[Tensor] = []
        numbers: list[int] = []
        gradients = [parameter.grad for parameter in self._own if parameter is not None and parameter.grad is not None]
        for number, parameter in enumerate(self._others, start=len(self._own)):
            grad = parameter.grad
            if grad is None or not grad.numel():
                continue
            if self._can_look_at(grad):
                gradients.append(grad)
                numbers.append(number)
            else:
                elsewhere.append(parameter)
        if self._laid_out != (present, tuple(numbers)):
            self._laid_out = (present, tuple(numbers))
            self._layout = self._make_layout(*self._laid_out)
        first_bad = gather_gradients(gradients, self._layout, len(self._layers), self.none_bad, self._matrices)
        return Gathered(gradients, self._layout, first_bad, elsewhere)

    def _can_look_at(self, grad: Tensor) -> bool:
        """Tell whether the native call takes a gradient that it only looks at."""
        if grad.is_sparse or grad.dtype not in _GATHERED or grad.device != self._device:
            return False
        return (grad.dim() <= _MOST_AXES or grad.is_contiguous()) and grad.numel() < _TOO_MANY

    def _make_layout(self, present: tuple[bool, ...], others: tuple[int, ...]) -> Tensor:
        """For each gradient its place, row length, layer and number; -1 for one that is only looked at."""
        count = len(self._layers)
        rows = []
        for number in (number for number, here in enumerate(present) if here):
            i = number % count  # weights come first, then biases
            place, length, is_bias = int(self._spans[i, 0]), self._layers[i].matrix_shape[2], number >= count
            if present[i]:
                rows.append((place + (length - 1) * is_bias, length, i, number))
            else:  # without its weight's gradient a bias keeps its own
                rows.append((-1, 0, -1, number))
        rows += [(-1, 0, -1, number) for number in others]
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, 4)

    @property
    def none_bad(self) -> int:
        """What `first_bad` is where all gradients are finite."""
        return len(self._own) + len(self._others)

    def parameter(self, number: int) -> Tensor | None:
        """Return the parameter of a number, None for `none_bad`."""
        return [*self._own, *self._others][number] if number < self.none_bad else None

    # -- the update -----------------------------------------------------------------------------------------

    def compute(
        self,
        gathered: Gathered,
        inverses: Inverses,
        coarse_weight: float,
        kl_clip: float | None,
        rates: Sequence[float | Tensor],
    ) -> ShiftAndScale:
        """Precondition the gathered gradients; neither reads anything back nor writes to `.grad`.

        Args:
            gathered: what `gather` returned.
            inverses: what to multiply with; kept from `write` on.
            coarse_weight: ω; with 0, or without a coarse inverse, there is no second level.
            kl_clip: κ, or None.
            rates: η_i by layer; a tensor on the device is not read.
        """
        in_coarse = self._in_coarse()
        if is_capturing(self._device):
            self._captured, self._stacks.pinned = in_coarse, True
        stacks = self._staged = self._stacks.of(inverses)
        for batch, parts in zip(self._batches, stacks.batches, strict=True):
            self._precondition(batch, parts)
        if stacks.scales is not None:
            self._directions.mul_(stacks.scales)
            for batch, parts in zip(self._batches, stacks.batches, strict=True):
                self._rotate_back(batch, parts)
        host_rates, device_rates = self._rates(rates)
        return shift_and_scale(
            self._matrices,
            self._directions,
            self._spans,
            host_rates,
            device_rates,
            torch.tensor(in_coarse, dtype=torch.float64),
            stacks.usable,
            stacks.coarse if coarse_weight != 0 else None,
            gathered.first_bad,
            self.none_bad,
            coarse_weight,
            kl_clip,
            self.skipped,
        )

    def write(self, gathered: Gathered, step: ShiftAndScale) -> None:
        """Write the update into `.grad`, and keep the inverses that it was made with."""
        assert self._staged is not None
        write_gradients(gathered.gradients, gathered.layout, self._directions, step, self._staged.usable)
        self._stacks.keep(self._staged)
        self._staged = None

    def adopt(self, inverses: Inverses | None) -> None:
        """Take over inverses from elsewhere, and forget what was found and has failed before."""
        self.skipped.zero_()
        if inverses is not None:
            self._stacks.adopt(inverses)

    def failures(self) -> list[Layer]:
        """See `InverseStacks.failures`."""
        return self._stacks.failures()

    def replace(self, layer: Layer, fields: Fields | None) -> bool:
        """See `InverseStacks.replace`."""
        return self._stacks.replace(layer, fields)

    def _precondition(self, batch: Batch, parts: Fields | None) -> None:
        """G⁻¹ ∇ A⁻¹ into the directions; with `'eigh'`, V_Gᵀ ∇ V_A."""
        gradients, work, directions = (batch.of(m) for m in (self._matrices, self._work, self._directions))
        if parts is None:
            directions.zero_()
        elif "A_inv" in parts:
            torch.bmm(torch.bmm(parts["G_inv"], gradients, out=work), parts["A_inv"], out=directions)
        else:
            torch.bmm(torch.bmm(parts["G_vectors"].mT, gradients, out=work), parts["A_vectors"], out=directions)

    def _rotate_back(self, batch: Batch, parts: Fields | None) -> None:
        """V_G [rotated and scaled] V_Aᵀ."""
        if parts is not None:
            work, directions = batch.of(self._work), batch.of(self._directions)
            torch.bmm(torch.bmm(parts["G_vectors"], directions, out=work), parts["A_vectors"].mT, out=directions)

    def _rates(self, rates: Sequence[float | Tensor]) -> tuple[Tensor, Tensor | None]:
        """Split η_i into numbers and, where rates lie on the device, what the numbers are multiplied by."""
        on_device = {id(rate): rate for rate in rates if isinstance(rate, Tensor) and rate.device.type != "cpu"}
        numbers = [1.0 if id(rate) in on_device else float(rate) for rate in rates]
        host = torch.tensor(numbers, dtype=torch.float64)
        if not on_device:
            return host, None
        order = {key: place for place, key in enumerate(on_device, start=1)}
        places = tuple(order.get(id(rate), 0) for rate in rates)
        if places not in self._rate_index:
            self._rate_index[places] = torch.tensor(places, device=self._device)
        factors = torch.stack([self._one, *(rate.reshape(()).double() for rate in on_device.values())])
        return host, factors[self._rate_index[places]]


def is_capturing(device: torch.device) -> bool:
    """Tell whether a CUDA graph is being captured, so that nothing runs yet."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()

"""The step of every iteration (eq. 6, 10): three native calls, and a few batched products for each shape of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kfac2.inverses import Fields, Inverses
from kfac2.layers import Layer
from kfac2.ops.gather_gradients import gather_gradients
from kfac2.ops.shift_and_scale import ShiftAndScale, shift_and_scale
from kfac2.ops.write_gradients import write_gradients

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


class _Batch:
    """All layers of one shape: their part of the matrices, (b, d_out, d_in), b counting blocks."""

    def __init__(self, members: Sequence[int], layers: Sequence[Layer], begin: int) -> None:
        _, self._d_out, self._d_in = layers[members[0]].matrix_shape
        self.members = members
        self.sizes = [layers[i].blocks for i in members]
        self.begin = begin
        self.end = begin + sum(self.sizes) * self._d_out * self._d_in

    def of(self, matrices: Tensor) -> Tensor:
        """View this batch's part of all matrices."""
        return matrices[self.begin : self.end].view(-1, self._d_out, self._d_in)

    def stack(self, fine: Sequence[Fields | None], dtype: torch.dtype) -> Fields | None:
        """Stack the members' inverses, zeros for one without; None where no member has any."""
        example = next((fields for fields in fine if fields is not None), None)
        if example is None:
            return None
        stacks = {}
        for name, value in example.items():
            parts = [
                value.new_zeros(size, *value.shape[1:]) if fields is None else fields[name]
                for fields, size in zip(fine, self.sizes, strict=True)
            ]
            stacks[name] = torch.cat(parts).to(dtype)
        return stacks


@dataclass
class _Stacks:
    """Inverses as the step reads them.

    Attributes:
        source: the inverses that these were made of.
        batches: for each batch its stacks; None where no member has an inverse.
        scales: with `'eigh'`, 1 / (g aᵀ + λ) at the places of the matrices.
        usable: float64, (L,): 1 for a layer that has an inverse.
        coarse: (F_coarse + λ_c I)⁻¹ in float64.
        failed: float64, (L,): 1 for a layer whose new inverse failed, where the host does not know yet.
    """

    source: Inverses
    batches: list[Fields | None]
    scales: Tensor | None
    usable: Tensor
    coarse: Tensor | None
    failed: Tensor | None

    def tensors(self) -> list[Tensor]:
        """What a step reads, in an order that depends on the layers only."""
        optional = [self.scales, self.usable, self.coarse]
        stacks = [stack for batch in self.batches for stack in (batch or {}).values()]
        return stacks + [tensor for tensor in optional if tensor is not None]


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
        self._batches: list[_Batch] = []
        self._spans = torch.zeros(len(layers), 2, dtype=torch.int64)
        self._lay_out()
        size = self._batches[-1].end if self._batches else 0
        self._matrices, self._work, self._directions = (
            torch.zeros(size, dtype=self._dtype, device=device) for _ in range(3)
        )
        order = [
            i for batch in self._batches for i, n in zip(batch.members, batch.sizes, strict=True) for _ in range(n)
        ]
        self._layer_of_block = torch.tensor(order, dtype=torch.int64, device=device)
        self._layout = torch.zeros(0, 4, dtype=torch.int64)
        self._laid_out: tuple[tuple[bool, ...], tuple[int, ...]] | None = None
        self._filled: tuple[bool, ...] = ()
        self._rate_index: dict[tuple[int, ...], Tensor] = {}
        self._one = torch.ones((), dtype=torch.float64, device=device)
        self._stacks: _Stacks | None = None
        self._staged: _Stacks | None = None
        self._captured: tuple[bool, ...] | None = None  # which layers a CUDA graph has in the coarse space
        self.stale = False  # a CUDA graph holds what is no longer so
        self.skipped = torch.zeros(2, dtype=torch.int64, device=device)

    def _lay_out(self) -> None:
        """Give each layer its place among the matrices, layers of one shape side by side."""
        classes: dict[tuple[int, ...], list[int]] = {}
        for i, layer in enumerate(self._layers):
            classes.setdefault(layer.matrix_shape[1:], []).append(i)
        for members in classes.values():
            batch = _Batch(members, self._layers, self._batches[-1].end if self._batches else 0)
            self._batches.append(batch)
            place = batch.begin
            for i in members:
                blocks, d_out, d_in = self._layers[i].matrix_shape
                self._spans[i] = torch.tensor([place, place + blocks * d_out * d_in])
                place += blocks * d_out * d_in

    def fits(self) -> bool:
        """Tell whether the layers are still where, and in the dtype, that this was made for."""
        weights = [parameter for parameter in self._own[: len(self._layers)] if parameter is not None]
        here = not weights or weights[0].device == self._device
        return here and any(weight.dtype == torch.float64 for weight in weights) == (self._dtype == torch.float64)

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph was captured of this update's steps."""
        return self._captured is not None

    def watch(self, others: Sequence[Tensor]) -> None:
        """Look at the gradients of these further parameters from now on."""
        self._others = others

    # -- gradients ------------------------------------------------------------------------------------------

    def gather(self) -> Gathered:
        """Copy the gradients of all layers into their matrices; what has none is 0 there. Reads nothing back."""
        present = tuple(parameter is not None and parameter.grad is not None for parameter in self._own)
        absent = any(parameter is not None and parameter.grad is None for parameter in self._own)
        if present != self._filled or (
            absent and is_capturing(self._device)
        ):  # other steps may fill what a graph has not
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
        in_coarse = tuple(layer.in_coarse for layer in self._layers)
        if is_capturing(self._device):
            self._captured, self.stale = in_coarse, False
        elif self._captured is not None and self._captured != in_coarse:
            self._captured, self.stale = None, True
        stacks = self._stacks
        if stacks is None or stacks.source is not inverses:
            stacks = self._stack(inverses)
        self._staged = stacks
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
        self._keep(self._staged)
        self._staged = None

    def adopt(self, inverses: Inverses | None) -> None:
        """Take over inverses from elsewhere, and forget what was found and has failed before."""
        self.skipped.zero_()
        if inverses is not None:
            self._stacks = replace(self._stacks, failed=None) if self._stacks is not None else None
            self._keep(self._stack(inverses))

    def _keep(self, stacks: _Stacks) -> None:
        if stacks is self._stacks:
            return
        if self._captured is not None and self._stacks is not None:
            # a CUDA graph goes on reading what was there when it was captured
            before, after = self._stacks.tensors(), stacks.tensors()
            if [t.shape for t in before] == [t.shape for t in after]:
                for kept, new in zip(before, after, strict=True):
                    kept.copy_(new)
                stacks = replace(self._stacks, source=stacks.source, failed=stacks.failed)
            else:
                self._captured, self.stale = None, True
        self._stacks = stacks
        for batch, parts in zip(self._batches, stacks.batches, strict=True):
            for name, stack in (parts or {}).items():
                for i, part in zip(batch.members, stack.split(batch.sizes), strict=True):
                    if self._layers[i] in stacks.source.fine:
                        stacks.source.fine[self._layers[i]][name] = part  # the same numbers; so that they are kept once

    def _precondition(self, batch: _Batch, parts: Fields | None) -> None:
        """G⁻¹ ∇ A⁻¹ into the directions; with `'eigh'`, V_Gᵀ ∇ V_A."""
        gradients, work, directions = (batch.of(m) for m in (self._matrices, self._work, self._directions))
        if parts is None:
            directions.zero_()
        elif "A_inv" in parts:
            torch.bmm(torch.bmm(parts["G_inv"], gradients, out=work), parts["A_inv"], out=directions)
        else:
            torch.bmm(torch.bmm(parts["G_vectors"].mT, gradients, out=work), parts["A_vectors"], out=directions)

    def _rotate_back(self, batch: _Batch, parts: Fields | None) -> None:
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

    # -- inverses -------------------------------------------------------------------------------------------

    def _stack(self, inverses: Inverses) -> _Stacks:
        """Put inverses where the step reads them; where one failed, unknown to the host, the last one stays."""
        fine = [inverses.fine.get(layer) for layer in self._layers]
        batches = [batch.stack([fine[i] for i in batch.members], self._dtype) for batch in self._batches]
        usable = torch.ones(len(fine), dtype=torch.float64, device=self._device)
        if None in fine:
            usable = usable.new_tensor([fields is not None for fields in fine])
        failed = None
        if inverses.status is not None:
            failed = self._failed(inverses.status)
            batches = [self._sound(i, parts, failed) for i, parts in enumerate(batches)]
            before = 0.0 if self._stacks is None else self._stacks.usable
            usable = torch.where(failed > 0, before, usable)
        coarse = None if inverses.coarse is None else inverses.coarse.double()
        return _Stacks(inverses, batches, self._scales(batches, inverses.damping), usable, coarse, failed)

    def _failed(self, status: Mapping[Layer, Tensor]) -> Tensor:
        """From the status of blocks to 1 for each layer that has a block without an inverse."""
        good = torch.zeros(len(self._layer_of_block), dtype=torch.int32, device=self._device)
        in_order = [self._layers[i] for batch in self._batches for i in batch.members]
        blocks = [status.get(layer, good[: layer.blocks]) for layer in in_order]
        failed = good.new_zeros(len(in_order), dtype=torch.float64)
        return failed.index_add_(0, self._layer_of_block, torch.cat(blocks).double()).clamp_(max=1)

    def _sound(self, index: int, parts: Fields | None, failed: Tensor) -> Fields | None:
        """Put the last inverses of a batch in place of those that failed, zeros where there is none."""
        if parts is None:
            return None
        begin = sum(sum(batch.sizes) for batch in self._batches[:index])
        blocks = failed[self._layer_of_block[begin : begin + sum(self._batches[index].sizes)]] > 0
        before = None if self._stacks is None else self._stacks.batches[index]
        result = {}
        for name, stack in parts.items():
            mask = blocks.reshape(-1, *[1] * (stack.dim() - 1))
            result[name] = torch.where(mask, stack.new_zeros(()) if before is None else before[name], stack)
        return result

    def _scales(self, batches: Sequence[Fields | None], damping: float) -> Tensor | None:
        """With `'eigh'`, 1 / (g aᵀ + λ) for every element."""
        if not any(parts is not None and "A_values" in parts for parts in batches):
            return None
        scales = torch.zeros_like(self._matrices)
        for batch, parts in zip(self._batches, batches, strict=True):
            if parts is not None:
                g, a = parts["G_values"].unsqueeze(-1), parts["A_values"].unsqueeze(-2)
                batch.of(scales).copy_((g * a + damping).reciprocal_())
        return scales

    def failures(self) -> list[Layer]:
        """Name the layers whose last inverse failed without the host's knowledge; reads them back."""
        if self._stacks is None or self._stacks.failed is None:
            return []
        failed, self._stacks.failed = self._stacks.failed.tolist(), None
        return [layer for layer, bad in zip(self._layers, failed, strict=True) if bad]

    def replace(self, layer: Layer, fields: Fields | None) -> bool:
        """Give a layer another inverse, in place; with None tell whether it has kept one at all."""
        stacks, index = self._stacks, self._layers.index(layer)
        assert stacks is not None
        if fields is None:
            return bool(stacks.usable[index])
        for batch, parts in zip(self._batches, stacks.batches, strict=True):
            if index in batch.members and parts is not None:
                for name, value in fields.items():
                    parts[name].split(batch.sizes)[batch.members.index(index)].copy_(value)
        stacks.usable[index] = 1
        scales = self._scales(stacks.batches, stacks.source.damping)
        if stacks.scales is not None and scales is not None:
            stacks.scales.copy_(scales)
        return True


def is_capturing(device: torch.device) -> bool:
    """Tell whether a CUDA graph is being captured, so that nothing runs yet."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()

"""Inverses laid out as the step reads them: stacked by shape, in one place for as long as a CUDA graph needs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kfac2.inverses import Fields, Inverses
from kfac2.layers import Layer


class Batch:
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


def lay_out(layers: Sequence[Layer]) -> list[Batch]:
    """Give each layer its place among the matrices, layers of one shape side by side."""
    classes: dict[tuple[int, ...], list[int]] = {}
    for i, layer in enumerate(layers):
        classes.setdefault(layer.matrix_shape[1:], []).append(i)
    batches: list[Batch] = []
    for members in classes.values():
        batches.append(Batch(members, layers, batches[-1].end if batches else 0))
    return batches


@dataclass
class Stacks:
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


class InverseStacks:
    """The stacks of the inverses in use.

    Args:
        layers: the handled layers.
        batches: what `lay_out` made of them.
        dtype: of the stacks.
        device: of the stacks.

    Attributes:
        kept: the stacks in use; None before the first.
        pinned: a CUDA graph reads them where they are; False again once it can no longer be served.
    """

    def __init__(self, layers: Sequence[Layer], batches: list[Batch], dtype: torch.dtype, device: torch.device) -> None:
        self._layers = layers
        self._batches = batches
        self._dtype = dtype
        self._device = device
        order = [i for batch in batches for i, n in zip(batch.members, batch.sizes, strict=True) for _ in range(n)]
        self._layer_of_block = torch.tensor(order, dtype=torch.int64, device=device)
        self.kept: Stacks | None = None
        self.pinned = False

    def of(self, inverses: Inverses) -> Stacks:
        """Return the stacks of some inverses, those in use or new ones.

        Where an inverse failed, unknown to the host, the last one stands in its place.
        """
        if self.kept is not None and self.kept.source is inverses:
            return self.kept
        return self._made_of(inverses)

    def adopt(self, inverses: Inverses) -> None:
        """Take over inverses from elsewhere, and forget what has failed before."""
        self.kept = replace(self.kept, failed=None) if self.kept is not None else None
        self.keep(self._made_of(inverses))

    def keep(self, stacks: Stacks) -> None:
        """Go on with these stacks; a CUDA graph finds them where it has read the last ones."""
        if stacks is self.kept:
            return
        if self.pinned and self.kept is not None:
            before, after = self.kept.tensors(), stacks.tensors()
            if [t.shape for t in before] == [t.shape for t in after]:
                for kept, new in zip(before, after, strict=True):
                    kept.copy_(new)
                stacks = replace(self.kept, source=stacks.source, failed=stacks.failed)
            else:
                self.pinned = False
        self.kept = stacks
        for batch, parts in zip(self._batches, stacks.batches, strict=True):
            for name, stack in (parts or {}).items():
                for i, part in zip(batch.members, stack.split(batch.sizes), strict=True):
                    if self._layers[i] in stacks.source.fine:
                        stacks.source.fine[self._layers[i]][name] = part  # the same numbers; so that they are kept once

    def _made_of(self, inverses: Inverses) -> Stacks:
        fine = [inverses.fine.get(layer) for layer in self._layers]
        batches = [batch.stack([fine[i] for i in batch.members], self._dtype) for batch in self._batches]
        usable = torch.ones(len(fine), dtype=torch.float64, device=self._device)
        if None in fine:
            usable = usable.new_tensor([fields is not None for fields in fine])
        failed = None
        if inverses.status is not None:
            failed = self._failed(inverses.status)
            batches = [self._sound(i, parts, failed) for i, parts in enumerate(batches)]
            before = 0.0 if self.kept is None else self.kept.usable
            usable = torch.where(failed > 0, before, usable)
        coarse = None if inverses.coarse is None else inverses.coarse.double()
        return Stacks(inverses, batches, self._scales(batches, inverses.damping), usable, coarse, failed)

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
        before = None if self.kept is None else self.kept.batches[index]
        result = {}
        for name, stack in parts.items():
            mask = blocks.reshape(-1, *[1] * (stack.dim() - 1))
            result[name] = torch.where(mask, stack.new_zeros(()) if before is None else before[name], stack)
        return result

    def _scales(self, batches: Sequence[Fields | None], damping: float) -> Tensor | None:
        """With `'eigh'`, 1 / (g aᵀ + λ) for every element."""
        if not any(parts is not None and "A_values" in parts for parts in batches):
            return None
        scales = torch.zeros(self._batches[-1].end, dtype=self._dtype, device=self._device)
        for batch, parts in zip(self._batches, batches, strict=True):
            if parts is not None:
                g, a = parts["G_values"].unsqueeze(-1), parts["A_values"].unsqueeze(-2)
                batch.of(scales).copy_((g * a + damping).reciprocal_())
        return scales

    def failures(self) -> list[Layer]:
        """Name the layers whose last inverse failed without the host's knowledge; reads them back."""
        if self.kept is None or self.kept.failed is None:
            return []
        failed, self.kept.failed = self.kept.failed.tolist(), None
        return [layer for layer, bad in zip(self._layers, failed, strict=True) if bad]

    def replace(self, layer: Layer, fields: Fields | None) -> bool:
        """Give a layer another inverse, in place; with None tell whether it has kept one at all."""
        stacks, index = self.kept, self._layers.index(layer)
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

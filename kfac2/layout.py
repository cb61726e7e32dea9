"""Where everything of the handled layers lies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kfac2.kinds import Layer
from kfac2.padding import padded_length

Stacks = list[Tensor]
"""A field of all layers, one tensor for each batch of the layout; its first axis counts the blocks of the batch."""


@dataclass(frozen=True)
class Batch:
    """Layers whose blocks have one shape and whose factors have one dtype: they are solved together.

    Attributes:
        members: the numbers of the layers.
        sizes: how many blocks each of them has.
        d_out: rows of a block.
        d_in: its columns, the bias included.
        dtype: of the factors.
        begin: of the batch's part of the matrices.
    """

    members: tuple[int, ...]
    sizes: tuple[int, ...]
    d_out: int
    d_in: int
    dtype: torch.dtype
    begin: int

    @property
    def blocks(self) -> int:
        """Blocks of all members."""
        return sum(self.sizes)

    @property
    def row_length(self) -> int:
        """Numbers of a row of the matrices, the zeros that pad it included."""
        return padded_length(self.d_in)

    @property
    def end(self) -> int:
        """End of the batch's part of the matrices."""
        return self.begin + self.blocks * self.d_out * self.row_length

    def of(self, matrices: Tensor) -> Tensor:
        """View the batch's part of the matrices of all layers, (blocks, d_out, row_length)."""
        return matrices[self.begin : self.end].view(-1, self.d_out, self.row_length)


class Layout:
    """Where a fixed list of layers lies among matrices, stacks of blocks and maps. Never changed, only replaced.

    The *matrices* of all layers, (blocks, d_out, d_in) each, share one tensor, batch after batch, their rows padded by
    zeros, see `kfac2.padding`. A field with one entry for each block is kept as `Stacks`. The *maps* of the coarse
    space are counted in the order of the layers.

    Args:
        layers: the handled layers.
        device: of the layers; what there is where no layer is left.

    Attributes:
        layers: the handled layers; a layer's number is its place here.
        device: of all tensors.
        dtype: of the matrices: float64 if any layer's is, else float32.
        batches: the batches.
        size: elements of all matrices, padding included.
        spans: int64 on the CPU, (L, 3): begin and end of each layer among the matrices, and how many numbers it has
            without what pads them.
        layer_of_block: int64 on the device: the number of the layer of each block, batch after batch.
        layer_of_map: the number of the layer of each map.
        first_map: the first map of each layer.
    """

    def __init__(self, layers: Sequence[Layer], device: torch.device) -> None:
        self.layers = tuple(layers)
        self.device = device
        self.dtype = _widest(self.layers)
        self.batches = _batches(self.layers)
        self.size = self.batches[-1].end if self.batches else 0
        self.spans = torch.zeros(len(self.layers), 3, dtype=torch.int64, device="cpu")
        self._places = {}  # of each layer: its batch, begin and end among the batch's blocks
        for number, batch in enumerate(self.batches):
            block, size = 0, batch.d_out * batch.row_length
            for i, blocks in zip(batch.members, batch.sizes, strict=True):
                self._places[i] = (number, block, block + blocks)
                begin = batch.begin + block * size
                numbers = blocks * batch.d_out * batch.d_in
                self.spans[i] = torch.tensor([begin, begin + blocks * size, numbers], device="cpu")
                block += blocks
        in_order = [
            i for batch in self.batches for i, n in zip(batch.members, batch.sizes, strict=True) for _ in range(n)
        ]
        self.layer_of_block = torch.tensor(in_order, dtype=torch.int64, device=device)
        self.layer_of_map = [i for i, layer in enumerate(self.layers) for _ in range(layer.maps)]
        self.first_map = {i: self.layer_of_map.index(i) for i in range(len(self.layers))}
        self._numbers = {layer: i for i, layer in enumerate(self.layers)}

    def number(self, layer: Layer) -> int:
        """Return the number of a layer."""
        return self._numbers[layer]

    def named(self, name: str) -> int | None:
        """Return the number of the layer of that name, None where no layer has it."""
        return next((i for i, layer in enumerate(self.layers) if layer.name == name), None)

    def fits(self) -> bool:
        """Tell whether the layers are still on the device, and in the dtypes, that this was made for."""
        here = all(layer.weight.device == self.device for layer in self.layers[:1])
        return here and all(self.layers[i].factor_dtype == batch.dtype for batch in self.batches for i in batch.members)

    def without(self, layer: Layer) -> Layout:
        """Return the layout of the other layers."""
        return Layout([other for other in self.layers if other is not layer], self.device)

    # -- stacks ---------------------------------------------------------------------------------------------

    def stacks(self, shape_of: Callable[[Batch], Sequence[int]], dtype: torch.dtype | None = None) -> Stacks:
        """Make a field of zeros.

        Args:
            shape_of: gives the shape of one block's entry.
            dtype: by default that of the factors.
        """
        return [
            torch.zeros(batch.blocks, *shape_of(batch), dtype=dtype or batch.dtype, device=self.device)
            for batch in self.batches
        ]

    def view(self, stacks: Stacks, i: int) -> Tensor:
        """View the entries of layer i, (blocks, ...)."""
        batch, begin, end = self._places[i]
        return stacks[batch][begin:end]

    def views(self, stacks: Stacks) -> list[Tensor]:
        """View the entries of all layers, in their order."""
        views = [stacks[0]] * len(self.layers)
        for batch, stack in zip(self.batches, stacks, strict=True):
            for i, view in zip(batch.members, stack.split(batch.sizes), strict=True):
                views[i] = view
        return views

    def moved(self, stacks: Stacks, old: Layout, new: Stacks) -> Stacks:
        """Copy a field that lies as another layout says; of a layer that is not there nothing.

        Args:
            stacks: the field.
            old: where it lies now.
            new: where it is to lie, in this layout, which is returned.
        """
        for i, layer in enumerate(self.layers):
            if layer in old.layers:
                self.view(new, i).copy_(old.view(stacks, old.number(layer)))
        return new

    # -- matrices -------------------------------------------------------------------------------------------

    def matrices(self, zeros: bool = False) -> Tensor:
        """Make memory for the matrices of all layers: zero what pads them, and with `zeros` all of it."""
        if zeros:
            return torch.zeros(self.size, dtype=self.dtype, device=self.device)
        matrices = torch.empty(self.size, dtype=self.dtype, device=self.device)
        return matrices.index_fill_(0, self._padding, 0) if len(self._padding) else matrices

    @cached_property
    def _padding(self) -> Tensor:
        """The places of all zeros that pad rows."""

        def counted(begin: int, end: int, step: int = 1) -> Tensor:
            return torch.arange(begin, end, step, device=self.device)

        padded = [batch for batch in self.batches if batch.d_in < batch.row_length]
        parts = [counted(b.begin, b.end, b.row_length)[:, None] + counted(b.d_in, b.row_length) for b in padded]
        return torch.cat([part.flatten() for part in parts]) if parts else counted(0, 0)

    def of_batches(self, matrices: Tensor) -> Stacks:
        """View the matrices of all layers by batch, (blocks, d_out, row_length) each."""
        return [batch.of(matrices) for batch in self.batches]

    def padded_matrix(self, matrices: Tensor, i: int) -> Tensor:
        """View the matrices of layer i, (blocks, d_out, row_length)."""
        batch, begin, end = self._places[i]
        return self.batches[batch].of(matrices)[begin:end]

    def matrix(self, matrices: Tensor, i: int) -> Tensor:
        """View the matrices of layer i without what pads them, (blocks, d_out, d_in)."""
        return self.padded_matrix(matrices, i)[..., : self.layers[i].matrix_shape[2]]

    def place(self, i: int, row: int, column: int) -> tuple[int, int]:
        """Return the place of an element of layer i among the matrices, and the length of its rows."""
        length = self.batches[self._places[i][0]].row_length
        return int(self.spans[i, 0]) + row * length + column, length


def _widest(layers: Sequence[Layer]) -> torch.dtype:
    return torch.float64 if any(layer.factor_dtype == torch.float64 for layer in layers) else torch.float32


def _batches(layers: Sequence[Layer]) -> tuple[Batch, ...]:
    classes: dict[tuple[int, int, torch.dtype], list[int]] = {}
    for i, layer in enumerate(layers):
        _, d_out, d_in = layer.matrix_shape
        classes.setdefault((d_out, d_in, layer.factor_dtype), []).append(i)
    batches: list[Batch] = []
    for (d_out, d_in, dtype), members in classes.items():
        sizes = tuple(layers[i].blocks for i in members)
        batches.append(Batch(tuple(members), sizes, d_out, d_in, dtype, batches[-1].end if batches else 0))
    return tuple(batches)

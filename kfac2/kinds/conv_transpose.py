"""`F.conv_transpose1d`, `2d` and `3d`: the convolution of a stuffed input, a patch for each place of the output map.

With s - 1 zeros between the places of x (x̂), and k, p, d the kernel, padding and dilation of an axis,

    y[u] = Σ_o W[o] x̂[u + p - d·o],    o = 0 .. k - 1:

the offsets run backwards. Read from the other end of the map, u' = U - 1 - u and m' = M - 1 - m, they run forwards,

    y'[u'] = Σ_o W[o] x̂'[u' + d·o - (d(k - 1) - p + r)],    r the output padding,

so that rows in the order of the weight's elements are those of an ordinary convolution of stride 1 on mirrored maps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from kfac2.kinds.base import Call, Layer, Part, Rows, places
from kfac2.kinds.conv import batched, other_groups, per_axis
from kfac2.window import Window


class ConvTranspose(Layer):
    """A transposed convolution; each group is a block. The weight is (C_in, C_out / groups, *kernel)."""

    modules = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    functions = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
    arguments = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    is_mirrored = True
    module: nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d

    @property
    def blocks(self) -> int:
        """The groups."""
        return self.module.groups

    @property
    def matrix_shape(self) -> tuple[int, int, int]:
        """(groups, output channels of one group, patch length and bias)."""
        c_in, c_out = self.weight.shape[:2]
        patch = c_in // self.blocks * self.weight[0, 0].numel()
        return self.blocks, c_out, patch + (self.bias is not None)

    def parts(self) -> list[Part]:
        """Return the weight of each group with its first two axes swapped, and the bias in the last column."""
        blocks, d_out, d_in = self.matrix_shape
        step = self.weight.shape[0] // blocks
        parts = [
            Part(self.weight, q * d_out, view=_group_with_outputs_first(q * step, (q + 1) * step))
            for q in range(blocks)
        ]
        if self.bias is not None:
            parts.append(Part(self.bias, column=d_in - 1))
        return parts

    def reason_against(self, call: Call) -> str | None:
        """Return why: the groups are others than the module's."""
        return other_groups(self, call) or super().reason_against(call)

    def rows(self, x: Tensor, g: Tensor, call: Call) -> tuple[Rows, Rows]:
        """Return the patches of the stuffed input, and the output gradients, both of mirrored maps."""
        rank = self.weight.dim() - 2
        g = batched(g, rank)
        mirrored = g.flip(tuple(range(2, 2 + rank)))
        return self._patches(x, g, call, mirrored=True), Rows(mirrored, places(rank, self.blocks))

    def input_map_rows(self, x: Tensor, g: Tensor, call: Call, rows: Rows) -> Rows:
        """Return the rows of a map that is not mirrored: the order of offsets does not count in a sum over a patch."""
        g = batched(g, self.weight.dim() - 2)
        return self._for_maps(self._patches(x, g, call, mirrored=False))

    def grad_map_rows(self, g: Tensor, rows: Rows) -> Rows:
        """Return the rows of a map that is not mirrored."""
        rank = self.weight.dim() - 2
        return self._for_maps(Rows(batched(g, rank), places(rank, self.blocks)))

    def _patches(self, x: Tensor, g: Tensor, call: Call, mirrored: bool) -> Rows:
        """Stuff x with zeros, and pad it so that the patches are at the places of g (`output_size` may choose them)."""
        rank = self.weight.dim() - 2
        kernel_size, given = tuple(self.weight.shape[2:]), dict(call.geometry)
        stride, pad, dilation = (
            _numbers(given.get(name, usual), rank) for name, usual in (("stride", 1), ("padding", 0), ("dilation", 1))
        )
        x = batched(x, rank)
        stuffed = x.new_zeros(*x.shape[:2], *(s * (n - 1) + 1 for n, s in zip(x.shape[2:], stride, strict=True)))
        stuffed[(slice(None), slice(None), *(slice(None, None, s) for s in stride))] = x
        padding = []
        for axis in range(rank):
            low = dilation[axis] * (kernel_size[axis] - 1) - pad[axis]
            high = g.shape[2 + axis] - stuffed.shape[2 + axis] - low
            high += dilation[axis] * (kernel_size[axis] - 1)
            padding.append((low, high))
        if mirrored:
            stuffed = stuffed.flip(tuple(range(2, 2 + rank)))
            padding = [(high, low) for low, high in padding]
        for axis, (low, high) in enumerate(padding):  # a padding larger than the kernel cuts places off
            extent = stuffed.shape[2 + axis]
            begin, end = min(max(0, -low), extent), max(extent - max(0, -high), 0)
            if begin + max(0, -high) > extent or -low > extent:  # nothing but zeros is left
                padding[axis], end = (extent + low + high, 0), begin
            stuffed = stuffed.narrow(2 + axis, begin, end - begin)
        zeros = tuple((max(0, low), max(0, high)) for low, high in padding)
        bias = int(self.bias is not None)
        window = Window(kernel_size, (1,) * rank, zeros, dilation, self.blocks, bias)
        return Rows(stuffed, window)


def _numbers(value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    value = per_axis(value, rank)
    return (value,) * rank if isinstance(value, int) else tuple(value)


def _group_with_outputs_first(begin: int, end: int) -> Callable[[Tensor], Tensor]:
    return lambda gradient: torch.transpose(gradient[begin:end], 0, 1)

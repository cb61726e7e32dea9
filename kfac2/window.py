"""How a convolution reads its input: the geometry that every statistics op needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

SPATIAL_RANK = 3  # D, H, W: what the native ops are written for; fewer axes are padded in front
NUMBERS = 5 * SPATIAL_RANK + 2  # one encoded window, see csrc/torch/row_source.h

IntOrInts = int | Sequence[int]
Padding = int | Sequence[int] | str


def _per_axis(name: str, value: IntOrInts, rank: int, least: int) -> tuple[int, ...]:
    values = (value,) * rank if isinstance(value, int) else tuple(value)
    if not all(isinstance(number, int) for number in values):
        raise TypeError(f"{name} must be an int or a sequence of ints, got {value!r}")
    if len(values) != rank:
        raise ValueError(f"{name} must have one number for each of the {rank} spatial axes, got {value!r}")
    if any(number < least for number in values):
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    return values


@dataclass(frozen=True)
class Window:
    """The rows that a layer takes from a tensor of shape (N, C, *spatial).

    Each tuple has one entry for each spatial axis; none for the input of a Linear layer, (N, C). The default
    is the row of all channels at each place: what an output gradient gives.

    Attributes:
        kernel_size: places of the patch along each axis.
        stride: step between patches.
        padding: zeros before and after the map along each axis.
        dilation: step within a patch.
        groups: blocks of channels, each with rows of its own.
        bias: ones appended to each row: 0 or 1; a layer whose groups are summed into one map has one for
            each of them.
    """

    kernel_size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    bias: int = 0

    @staticmethod
    def places(rank: int, groups: int = 1, bias: int = 0) -> Window:
        """Return the window of single places: an output gradient, or the input of a Linear layer."""
        return Window((1,) * rank, (1,) * rank, ((0, 0),) * rank, (1,) * rank, groups, bias)

    @staticmethod
    def of(
        rank: int,
        kernel_size: IntOrInts,
        stride: IntOrInts = 1,
        padding: Padding = 0,
        dilation: IntOrInts = 1,
        groups: int = 1,
        bias: int = 0,
    ) -> Window:
        """Return the window of a convolution, its arguments written as in `torch.nn.functional.conv2d`.

        Args:
            rank: number of spatial axes, 0 to 3.
            kernel_size: an int or one for each axis.
            stride: an int or one for each axis.
            padding: an int, one for each axis, `'valid'` or `'same'` (which, as in torch, puts the odd zero
                behind the map where the kernel is even).
            dilation: an int or one for each axis.
            groups: blocks of channels.
            bias: ones appended to each row.

        Raises:
            TypeError: if an argument is no int and no sequence of ints.
            ValueError: if a sequence has another length than `rank`, a number is too small, or `padding` is
                a word other than `'valid'` and `'same'`, or `'same'` with a stride other than 1.
        """
        if not 0 <= rank <= SPATIAL_RANK:
            raise ValueError(f"a tensor must have 0 to {SPATIAL_RANK} spatial axes after (N, C), got {rank}")
        kernel = _per_axis("kernel_size", kernel_size, rank, 1)
        steps = _per_axis("stride", stride, rank, 1)
        spread = _per_axis("dilation", dilation, rank, 1)
        if isinstance(padding, str):
            if padding == "valid":
                zeros = [(0, 0)] * rank
            elif padding == "same":
                if any(step != 1 for step in steps):
                    raise ValueError(f"padding='same' must go with stride 1, got stride={stride!r}")
                totals = [d * (k - 1) for d, k in zip(spread, kernel, strict=True)]
                zeros = [(total // 2, total - total // 2) for total in totals]
            else:
                raise ValueError(f"padding must be 'same', 'valid' or numbers, got {padding!r}")
        else:
            zeros = [(number, number) for number in _per_axis("padding", padding, rank, 0)]
        return Window(kernel, steps, tuple(zeros), spread, groups, int(bias))

    def of_all_groups(self) -> Window:
        """Return the window whose rows hold the channels, and the bias ones, of all groups."""
        return dataclasses.replace(self, groups=1, bias=self.bias * self.groups)

    def grid(self, spatial: Sequence[int]) -> list[int]:
        """Return the places of the output map for an input map of shape `spatial`."""
        return [
            (extent + low + high - d * (k - 1) - 1) // step + 1
            for extent, k, step, (low, high), d in zip(
                spatial, self.kernel_size, self.stride, self.padding, self.dilation, strict=True
            )
        ]

    def row_length(self, channels: int) -> int:
        """Return the length of a row (d_in of one block) for an input of so many channels."""
        length = channels // self.groups
        for k in self.kernel_size:
            length *= k
        return length + (1 if self.bias else 0)

    def encode(self) -> list[int]:
        """Write the window as the integers that the native ops take; once, except while torch.compile looks on."""
        known = None if torch.compiler.is_compiling() else self.__dict__.get("_encoded")
        if known is None:
            known = self._encode()
            if not torch.compiler.is_compiling():
                object.__setattr__(self, "_encoded", known)
        return known

    def _encode(self) -> list[int]:
        absent = SPATIAL_RANK - len(self.kernel_size)
        one, zero = [1] * absent, [0] * absent
        return [
            *one, *self.kernel_size,
            *one, *self.stride,
            *zero, *(low for low, _ in self.padding),
            *zero, *(high for _, high in self.padding),
            *one, *self.dilation,
            self.groups, self.bias,
        ]  # fmt: skip

    @staticmethod
    def decode(numbers: Sequence[int], rank: int) -> Window:
        """Read what `encode` wrote, for a tensor with `rank` spatial axes."""
        kernel, stride, low, high, dilation = (
            tuple(numbers[SPATIAL_RANK * (i + 1) - rank : SPATIAL_RANK * (i + 1)]) for i in range(5)
        )
        groups, bias = numbers[5 * SPATIAL_RANK :]
        return Window(kernel, stride, tuple(zip(low, high, strict=True)), dilation, groups, bias)

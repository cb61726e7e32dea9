"""`F.conv1d`, `2d` and `3d`: an im2col patch for each place of the output map (Grosse & Martens 2016)."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from kfac2.kinds.base import Call, Layer, Rows, places
from kfac2.window import Window


class Conv(Layer):
    """A convolution of any stride, padding and dilation; each group is a block."""

    modules = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    functions = (torch.conv1d, torch.conv2d, torch.conv3d)
    arguments = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    module: nn.Conv1d | nn.Conv2d | nn.Conv3d

    @property
    def blocks(self) -> int:
        """The groups."""
        return self.module.groups

    @property
    def matrix_shape(self) -> tuple[int, int, int]:
        """(groups, output channels of one group, patch length and bias)."""
        rows, *patch = self.weight.shape  # a view of the weight would take more time
        return self.blocks, rows // self.blocks, math.prod(patch) + (self.bias is not None)

    def reason_against(self, call: Call) -> str | None:
        """Return why: the groups are others than the module's."""
        return other_groups(self, call) or super().reason_against(call)

    def rows(self, x: Tensor, g: Tensor, call: Call) -> tuple[Rows, Rows]:
        """Return the patches of the input, and the output gradients, at the places of the output map."""
        kernel_size = self.weight.shape[2:]
        rank, geometry = len(kernel_size), tuple((name, _hashable(value)) for name, value in call.geometry)
        window = _window(kernel_size, self.blocks, int(self.bias is not None), geometry)
        return Rows(batched(x, rank), window), Rows(batched(g, rank), places(rank, self.blocks))


@functools.cache
def _window(kernel_size: torch.Size, groups: int, bias: int, geometry: tuple[tuple[str, Any], ...]) -> Window:
    rank = len(kernel_size)
    given = {name: per_axis(value, rank) for name, value in geometry if name != "groups"}
    return Window.of(rank, tuple(kernel_size), groups=groups, bias=bias, **given)


def other_groups(layer: Layer, call: Call) -> str | None:
    """Return a reason where a convolution is used with other groups than its module has."""
    groups = dict(call.geometry).get("groups", 1)
    return f"it is used with {groups} groups, its module has {layer.blocks}" if groups != layer.blocks else None


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def per_axis(value: Any, rank: int) -> Any:
    """Return one number for each axis, where torch takes a list of a single one for all."""
    return tuple(value) * rank if isinstance(value, (list, tuple)) and len(value) == 1 else value


def batched(x: Tensor, rank: int) -> Tensor:
    """View a map (C, *spatial) of one sample as a batch of one."""
    return x if x.dim() == rank + 2 else x.unsqueeze(0)

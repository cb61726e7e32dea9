"""`nn.Conv1d`, `2d` and `3d`: an im2col patch for each place of the output map (Grosse & Martens 2016)."""

from __future__ import annotations

import functools

from torch import Tensor, nn

from kfac2.kinds.base import Layer, Rows, places
from kfac2.window import Window


class Conv(Layer):
    """A convolution of any stride, padding and dilation; each group is a block."""

    modules = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    module: nn.Conv1d | nn.Conv2d | nn.Conv3d

    @classmethod
    def reason_against(cls, module: nn.Module) -> str | None:
        """Return why: the border is padded with something other than zeros."""
        if module.padding_mode != "zeros":
            return f"padding_mode={module.padding_mode!r} is not built"
        return None

    @property
    def blocks(self) -> int:
        """The groups."""
        return self.module.groups

    @property
    def matrix_shape(self) -> tuple[int, int, int]:
        """(groups, output channels of one group, patch length and bias)."""
        return self.blocks, self.weight.shape[0] // self.blocks, self.weight[0].numel() + (self.bias is not None)

    def rows(self, x: Tensor, g: Tensor) -> tuple[Rows, Rows]:
        """Return the patches of the input, and the output gradients, at the places of the output map."""
        rank = len(self.module.kernel_size)
        return Rows(batched(x, rank), self._window), Rows(batched(g, rank), places(rank, self.blocks))

    @functools.cached_property
    def _window(self) -> Window:
        module, bias = self.module, int(self.bias is not None)
        return Window.of(
            len(module.kernel_size),
            module.kernel_size,
            module.stride,
            module.padding,
            module.dilation,
            module.groups,
            bias,
        )


def batched(x: Tensor, rank: int) -> Tensor:
    """View a map (C, *spatial) of one sample as a batch of one."""
    return x if x.dim() == rank + 2 else x.unsqueeze(0)

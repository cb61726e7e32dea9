"""`F.linear`: a row for each position."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from kfac2.kinds.base import Call, Layer, Rows, places


class Linear(Layer):
    """A fully connected layer on (N, d), or at all positions of (N, *positions, d), which are one grid axis."""

    modules = (nn.Linear,)
    functions = (F.linear,)
    arguments = ("input", "weight", "bias")
    has_tokens = True

    @property
    def matrix_shape(self) -> tuple[int, int, int]:
        """(1, d_out, d_in), the bias column included."""
        d_out, d_in = self.weight.shape
        return 1, d_out, d_in + (self.bias is not None)

    def rows(self, x: Tensor, g: Tensor, call: Call) -> tuple[Rows, Rows]:
        """Return the inputs, and the output gradients, of all positions."""
        x, g = _features_second(x), _features_second(g)
        return Rows(x, places(x.dim() - 2, 1, int(self.bias is not None))), Rows(g, places(g.dim() - 2))

    def rows_at(self, rows: Rows, reached: Tensor) -> Rows:
        """Return the rows of those positions that the loss reaches."""
        x, window = rows
        flat = x if x.dim() == 2 else x.transpose(1, 2).flatten(0, 1)
        return Rows(flat[reached.flatten()], places(0, 1, window.bias))

    def samples_first(self, x: Tensor, batch_dim: int) -> Tensor:
        """Bring the axis of samples to the front, where there are positions at all."""
        return x.movedim(batch_dim, 0) if batch_dim and x.dim() > batch_dim + 1 else x

    def samples_last(self, g: Tensor, batch_dim: int) -> Tensor:
        """Undo `samples_first`."""
        return g.movedim(0, batch_dim) if batch_dim and g.dim() > batch_dim + 1 else g


def _features_second(x: Tensor) -> Tensor:
    if x.dim() <= 2:
        return x if x.dim() == 2 else x.unsqueeze(0)
    return x.flatten(1, -2).transpose(1, 2)

"""`nn.Linear`: a row for each position."""

from __future__ import annotations

from torch import Tensor, nn

from kfac2.kinds.base import Layer, Rows, places


class Linear(Layer):
    """A fully connected layer on (N, d), or at all positions of (N, *positions, d), which are one grid axis."""

    modules = (nn.Linear,)

    @property
    def matrix_shape(self) -> tuple[int, int, int]:
        """(1, d_out, d_in), the bias column included."""
        d_out, d_in = self.weight.shape
        return 1, d_out, d_in + (self.bias is not None)

    def rows(self, x: Tensor, g: Tensor) -> tuple[Rows, Rows]:
        """Return the inputs, and the output gradients, of all positions."""
        x, g = _features_second(x), _features_second(g)
        return Rows(x, places(x.dim() - 2, 1, int(self.bias is not None))), Rows(g, places(g.dim() - 2))


def _features_second(x: Tensor) -> Tensor:
    if x.dim() <= 2:
        return x if x.dim() == 2 else x.unsqueeze(0)
    return x.flatten(1, -2).transpose(1, 2)

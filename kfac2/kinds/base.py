"""A kind of layer: how the tensors of one use become rows, and where its parameters lie in its gradient matrix."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from kfac2.window import Window


class Rows(NamedTuple):
    """Rows, not yet formed: the window takes one from each place of the tensor.

    Attributes:
        tensor: (N, C, *spatial), up to three spatial axes.
        window: how rows are taken from it, for each block.
    """

    tensor: Tensor
    window: Window


@dataclass(frozen=True)
class Part:
    """Where the gradient of a parameter, or a slice of it, lies in the matrix of its layer.

    Attributes:
        parameter: the weight or the bias.
        place: of its first element, counted from the first of the layer's matrix.
        view: makes of the parameter's gradient a view whose first axis counts the rows of the matrix; None where
            the gradient is one already.
    """

    parameter: Tensor
    place: int
    view: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Layer(ABC):
    """A handled layer, described once and never changed. A kind of layer is a subclass in a file of its own.

    Attributes:
        name: the module's name in the model.
        module: the module.
        bias: its bias where that is trained, else None (a frozen bias is no part of ā).
        most_maps: a layer of more blocks gives the coarse space one map, the sum over its blocks.
    """

    name: str
    module: nn.Module
    bias: Tensor | None
    most_maps: int

    modules: ClassVar[tuple[type[nn.Module], ...]]
    """The module classes of this kind."""

    @classmethod
    def reason_against(cls, module: nn.Module) -> str | None:
        """Return why a module of this kind cannot be handled, or None where it can."""
        return None

    @property
    def weight(self) -> Tensor:
        """The module's weight."""
        return self.module.weight  # type: ignore[return-value]

    @property
    def factor_dtype(self) -> torch.dtype:
        """What the factors are kept in: float64 for a float64 layer, else float32."""
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    @property
    def blocks(self) -> int:
        """Kronecker blocks: the groups of a convolution, else 1."""
        return 1

    @property
    def maps(self) -> int:
        """Scalar maps that it gives to the coarse space: one for each block, or a single summed one."""
        return self.blocks if self.blocks <= self.most_maps else 1

    @property
    @abstractmethod
    def matrix_shape(self) -> tuple[int, int, int]:
        """Shape of the gradient as matrices: (blocks, d_out, d_in), the bias column included."""

    @abstractmethod
    def rows(self, x: Tensor, g: Tensor) -> tuple[Rows, Rows]:
        """Return the rows ā and g of one use, both at the same places in the same order.

        Args:
            x: the input as the module got it.
            g: the gradient at its output.
        """

    def map_rows(self, x: Tensor, g: Tensor, rows: tuple[Rows, Rows]) -> tuple[Rows, Rows]:
        """Return the rows whose sums are the maps of the coarse space, at the places of the output as they lie.

        Args:
            x: the input as the module got it.
            g: the gradient at its output.
            rows: what `rows` made of them.
        """
        return self._for_maps(rows[0]), self._for_maps(rows[1])

    def _for_maps(self, rows: Rows) -> Rows:
        """With too many groups, sum all of them into one map.

        The channels of all groups then count as one row, and the bias of each group adds its 1.
        """
        return rows if self.maps == self.blocks else Rows(rows.tensor, of_all_groups(rows.window))

    def parts(self) -> list[Part]:
        """Return where weight and bias lie in the matrix: here, the weight row by row, the bias in the last column."""
        parts = [Part(self.weight, 0)]
        if self.bias is not None:
            parts.append(Part(self.bias, self.matrix_shape[2] - 1))
        return parts


# The same few windows are asked for at every statistics update; each encodes itself once.
places = functools.cache(Window.places)
of_all_groups = functools.cache(Window.of_all_groups)

"""What the layers of each network hand to the ops: inputs, output gradients, factors, gradient matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from networks import NETWORKS
from torch import Tensor, nn

from kfac2.ops import Window


@dataclass(frozen=True)
class LayerShape:
    """Shapes of one layer; rows as the ops take them, features at dim 1."""

    input_window: Window  # how its input rows are read
    grad_window: Window  # how its output-gradient rows are read
    x: tuple[int, ...]  # shape of its input
    g: tuple[int, ...]  # shape of its output's gradient
    features_last: bool  # as a Linear layer has them: (N, S, d), only viewed as (N, d, S)

    @property
    def d_in(self) -> int:
        """Length of an input row."""
        return self.input_window.row_length(self.x[-1] if self.features_last else self.x[1])

    @property
    def d_out(self) -> int:
        """Length of an output-gradient row."""
        return self.g[-1] if self.features_last else self.g[1]

    @property
    def rows(self) -> int:
        """Number of rows, N · T."""
        return math.prod(self.g) // self.d_out


def shapes_of(name: str, batch: int) -> list[LayerShape]:
    """Read the shapes off a forward pass on the meta device, which computes nothing."""
    network = NETWORKS[name]
    with torch.device("meta"):
        model = network.make()
    shapes: list[LayerShape] = []

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        bias = int(module.bias is not None)
        rank = (args[0].dim() > 2) * 1 if isinstance(module, nn.Linear) else args[0].dim() - 2
        window = Window.of_module(module, bias) if isinstance(module, nn.Conv2d) else Window.places(rank, bias=bias)
        features_last = isinstance(module, nn.Linear) and rank == 1
        shapes.append(LayerShape(window, Window.places(rank), tuple(args[0].shape), tuple(output.shape), features_last))

    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_hook(note)
    x, _ = network.sample(batch, "meta")
    model(x)
    return shapes


class LayerSet:
    """The layers of one network at one batch size, filled with noise; each list is made when it is first used."""

    def __init__(self, name: str, batch: int, device: str = "cpu") -> None:
        self.name, self.batch, self.device = name, batch, device
        self.title = f"{NETWORKS[name].title}, batch {batch}"
        self.shapes = shapes_of(name, batch)
        self.input_windows = [shape.input_window for shape in self.shapes]
        self.grad_windows = [shape.grad_window for shape in self.shapes]
        self._generator = torch.Generator().manual_seed(0)

    def _noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(self.device)

    def _rows(self, shape: tuple[int, ...], features_last: bool) -> Tensor:
        values = self._noise(*shape)
        return values.transpose(1, 2) if features_last else values

    @cached_property
    def inputs(self) -> list[Tensor]:
        """One input for each layer, (N, C, *spatial)."""
        return [self._rows(shape.x, shape.features_last) for shape in self.shapes]

    @cached_property
    def grads(self) -> list[Tensor]:
        """One gradient of the output for each layer, (N, C, *grid)."""
        return [self._rows(shape.g, shape.features_last) for shape in self.shapes]

    @cached_property
    def factors(self) -> tuple[list[Tensor], list[Tensor]]:
        """Symmetric positive definite A (d_in, d_in) and G (d_out, d_out) of each layer."""
        return [self._factor(shape.d_in) for shape in self.shapes], [self._factor(shape.d_out) for shape in self.shapes]

    def _factor(self, d: int) -> Tensor:
        rows = self._noise(2 * d, d)
        return rows.T @ rows / (2 * d)

    @cached_property
    def grad_matrices(self) -> list[Tensor]:
        """The gradient matrix ∇ of each layer, (d_out, d_in)."""
        return [self._noise(shape.d_out, shape.d_in) for shape in self.shapes]

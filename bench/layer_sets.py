"""What the layers of each network hand to the ops: inputs, output gradients, factors, gradient matrices."""

from __future__ import annotations

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
    d_in: int  # length of an input row
    d_out: int  # length of an output-gradient row
    rows: int  # N · T


def shapes_of(name: str, batch: int) -> list[LayerShape]:
    """Read the shapes off a forward pass on the meta device, which computes nothing."""
    with torch.device("meta"):
        model = NETWORKS[name].make()
    shapes: list[LayerShape] = []

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        bias = int(module.bias is not None)
        linear, rank = isinstance(module, nn.Linear), output.dim() - 2
        window = Window.places(rank, bias=bias)
        if isinstance(module, nn.Conv2d):
            window = Window.of(rank, module.kernel_size, module.stride, module.padding, bias=bias)
        weight = module.get_parameter("weight")
        d_out, d_in = len(weight), weight[0].numel() + bias
        x, g = tuple(args[0].shape), tuple(output.shape)
        rows = output.numel() // d_out
        shapes.append(LayerShape(window, Window.places(rank), x, g, linear and rank > 0, d_in, d_out, rows))

    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_hook(note)
    model(NETWORKS[name].sample(batch, "meta")[0])
    return shapes


class LayerSet:
    """The layers of one network at one batch size, filled with noise; each list is made when it is first used."""

    def __init__(self, name: str, batch: int, device: str = "cpu") -> None:
        self.name, self.batch, self.device = name, batch, device
        self.title = f"{NETWORKS[name].title}, batch {batch}"
        self.shapes = shapes_of(name, batch)
        self.windows = [shape.input_window for shape in self.shapes] + [shape.grad_window for shape in self.shapes]
        self._generator = torch.Generator(device).manual_seed(0)

    def _noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self.device)

    @cached_property
    def tensors(self) -> list[Tensor]:
        """The inputs of all layers, (N, C, *spatial), then the gradients of their outputs, (N, C, *grid)."""
        places = [(s.x, s.features_last) for s in self.shapes] + [(s.g, s.features_last) for s in self.shapes]
        return [self._noise(*shape).transpose(1, 2) if last else self._noise(*shape) for shape, last in places]

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

"""The networks of the model of time: the shapes of all handled layers, and what else a step costs.

ResNet-110 is the one of `networks`; ResNet-50 and GPT-2 small are written down from their papers, since neither is
needed here as a module.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from layer_sets import LayerShape, shapes_of
from networks import NETWORKS

from kfac2.ops import Window


class Source(NamedTuple):
    """Rows: a tensor (N, C, *extent), and the window that takes rows from it."""

    batch: int
    channels: int
    extent: tuple[int, ...]
    window: Window

    @property
    def numbers(self) -> int:
        """Numbers of the tensor."""
        return self.batch * self.channels * math.prod(self.extent)

    @property
    def grid(self) -> tuple[int, ...]:
        """Places of the rows of one sample."""
        return tuple(self.window.grid(self.extent))

    @property
    def rows(self) -> int:
        """Rows of all samples."""
        return self.batch * math.prod(self.grid)

    @property
    def length(self) -> int:
        """Numbers of a row."""
        return self.window.row_length(self.channels)

    @property
    def numbers_of_triangle(self) -> int:
        """Numbers of the covariance, a symmetric matrix."""
        return self.length * (self.length + 1) // 2


def source(shape: Sequence[int], window: Window, features_last: bool) -> Source:
    """Describe the rows of a tensor."""
    if features_last:
        return Source(shape[0], shape[-1], tuple(shape[1:-1]), window)
    return Source(shape[0], shape[1], tuple(shape[2:]), window)


def inputs_of(shapes: Iterable[LayerShape]) -> list[Source]:
    """Return the input rows of layers."""
    return [source(shape.x, shape.input_window, shape.features_last) for shape in shapes]


def grads_of(shapes: Iterable[LayerShape]) -> list[Source]:
    """Return the output-gradient rows of layers."""
    return [source(shape.g, shape.grad_window, shape.features_last) for shape in shapes]


@dataclass(frozen=True)
class Net:
    """A network at one batch size.

    Attributes:
        title: as `LayerSet.title` writes it: network and batch.
        name: key of `networks.NETWORKS`; empty where it is none of these.
        batch: samples.
        shapes: of the handled layers.
        others: numbers of the parameters that are not handled, tensor by tensor.
        other_flop: multiplications and additions of a forward pass outside of the handled layers.
        passes: how often each number of the handled layers' outputs is read or written by what lies between them,
            forward and backward: normalisations, activations, shortcuts.
    """

    title: str
    name: str
    batch: int
    shapes: Sequence[LayerShape]
    others: Sequence[int]
    other_flop: float = 0.0
    passes: int = 16

    @property
    def weights(self) -> int:
        """Numbers in the matrices of the handled layers."""
        return sum(shape.d_in * shape.d_out for shape in self.shapes)

    @property
    def parameters(self) -> int:
        """Numbers of all parameters."""
        return self.weights + sum(self.others)


def known(name: str, batch: int) -> Net:
    """Take a network of `networks.NETWORKS`: every layer there is followed by a norm of as many channels or nothing.

    BatchNorm reads and writes an output 8 times (forward: twice for the mean, read, written; backward: two tensors
    twice, written), ReLU 5 times, a shortcut 3.
    """
    shapes = shapes_of(name, batch)
    norms = [n for shape in shapes[:-1] for n in (shape.d_out, shape.d_out)]
    if name == "transformer":  # two LayerNorms for each block, one at the end, two embeddings
        norms = [128] * 2 * (2 * 4 + 1) + [64 * 128] * 2
    return Net(f"{NETWORKS[name].title}, batch {batch}", name, batch, shapes, norms)


def convolution(batch: int, extent: int, channels: int, out: int, kernel: int, stride: int = 1) -> LayerShape:
    """Describe a convolution without bias whose padding keeps a map of stride 1 as it is."""
    window = Window.of(2, kernel, stride, kernel // 2)
    grid = window.grid((extent, extent))
    x, g = (batch, channels, extent, extent), (batch, out, *grid)
    d_in, rows = channels * kernel**2, batch * math.prod(grid)
    return LayerShape(window, Window.places(2), x, g, False, d_in, out, rows)


def linear(rows: Sequence[int], features: int, out: int) -> LayerShape:
    """Describe a Linear layer with bias, for inputs (*rows, features)."""
    rank = len(rows) - 1
    windows = Window.places(rank, bias=1), Window.places(rank)
    return LayerShape(*windows, (*rows, features), (*rows, out), rank > 0, features + 1, out, math.prod(rows))


def resnet_50(batch: int = 256, extent: int = 224) -> Net:
    """ResNet-50 (He et al. 2016), the stride in the 3x3 convolution as in torchvision: 53 convolutions, one Linear."""
    shapes = [convolution(batch, extent, 3, 64, 7, 2)]
    extent //= 4  # the first convolution, then a pool of stride 2
    channels = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            shapes.append(convolution(batch, extent, channels, width, 1))
            shapes.append(convolution(batch, extent, width, width, 3, stride))
            shapes.append(convolution(batch, extent // stride, width, 4 * width, 1))
            if not block:
                shapes.append(convolution(batch, extent, channels, 4 * width, 1, stride))
            channels, extent = 4 * width, extent // stride
    norms = [n for shape in shapes for n in (shape.d_out, shape.d_out)]
    return Net(f"ResNet-50, batch {batch}", "", batch, [*shapes, linear((batch,), channels, 1000)], norms)


def gpt2_small(batch: int = 8, tokens: int = 1024) -> Net:
    """GPT-2 small (Radford et al. 2019): 12 blocks of width 768. The head is tied to the embedding, and not handled.

    A block's outputs have 9 times the width; LayerNorms (6 times the width each), GELU (5 times 4) and
    shortcuts (6 each) read and write 44 times the width: 5 times the outputs.
    """
    width, blocks, words = 768, 12, 50257
    sizes = ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width))
    shapes = [linear((batch, tokens), *size) for size in sizes] * blocks
    others = [words * width, tokens * width] + [width] * 2 * (2 * blocks + 1)
    rows = batch * tokens
    attention = blocks * 2 * rows * tokens * width  # queries with keys, weights with values: half of them is masked
    return Net(f"GPT-2 small, batch {batch}", "", batch, shapes, others, attention + 2.0 * rows * width * words, 5)


def published() -> list[Net]:
    """Return the three networks of the committed table."""
    return [known("resnet-110", 128), resnet_50(), gpt2_small()]

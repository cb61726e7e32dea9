"""The networks whose steps and kernels are measured, with batches of noise in the shapes of their data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from problems import DeepLinear, ResNet
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Distribution


class Block(nn.Module):
    """Causal attention, then two Linear layers, each after a LayerNorm and around a shortcut.

    Args:
        width: of the stream.
        heads: of the attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.hidden = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Return the stream (N, S, width) after this block."""
        normed = self.norms[0](x)
        parts = [
            layer(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        ]
        attended = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.hidden(self.norms[1](x))


class Transformer(nn.Module):
    """A small language model: 4 blocks, 25 Linear layers.

    Args:
        words: of the vocabulary.
        positions: at most so many.
        width: of the stream.
        blocks: how many.
        heads: of each block.
    """

    def __init__(self, words: int = 64, positions: int = 64, width: int = 128, blocks: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(positions, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)), nn.LayerNorm(width))
        self.head = nn.Linear(width, words)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, S, words) from words (N, S)."""
        return self.head(self.blocks(self.words(x) + self.places.weight[: x.shape[1]]))


@dataclass(frozen=True)
class Network:
    """A network to measure.

    Attributes:
        title: for people.
        make: builds it.
        draw: a batch of inputs and labels from a batch size and a generator.
        loss: mean loss from outputs and labels.
        distribution: what the network predicts; the mean of -log_prob is the loss.
        batch: of its whole steps, as the comparison states it.
    """

    title: str
    make: Callable[[], nn.Module]
    draw: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    distribution: Callable[[Tensor], Distribution]
    batch: int


def _resnet(layers: int, batch: int) -> Network:
    return Network(
        f"ResNet-{layers}",
        lambda: ResNet((layers - 2) // 6),
        lambda n, generator: (
            torch.randn(n, 3, 32, 32, generator=generator),
            torch.randint(10, (n,), generator=generator),
        ),
        F.cross_entropy,
        lambda out: Categorical(logits=out),
        batch,
    )


NETWORKS = {
    "deep-linear": Network(
        "deep linear network",
        DeepLinear,
        lambda n, generator: (
            torch.randn(n, 10, generator=generator),
            torch.randint(2, (n,), generator=generator).float(),
        ),
        F.binary_cross_entropy_with_logits,
        lambda out: Bernoulli(logits=out),
        512,
    ),
    "resnet-8": _resnet(8, 128),
    "resnet-20": _resnet(20, 128),
    "resnet-32": _resnet(32, 128),
    "resnet-56": _resnet(56, 32),
    "resnet-110": _resnet(110, 128),
    "transformer": Network(
        "transformer",
        Transformer,
        lambda n, generator: (
            torch.randint(64, (n, 64), generator=generator),
            torch.randint(64, (n, 64), generator=generator),
        ),
        lambda out, y: F.cross_entropy(out.flatten(0, 1), y.flatten()),
        lambda out: Categorical(logits=out),
        128,
    ),
}


def torch_batch(network: Network, size: int, device: str | torch.device) -> tuple[Tensor, Tensor]:
    """Draw a batch, the same each time."""
    x, y = network.draw(size, torch.Generator().manual_seed(0))
    return x.to(device), y.to(device)

"""The networks: the paper's deep linear one, ResNets for small images, a small transformer, ResNet-50, GPT-2 small."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Distribution


def initialised(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Draw weights by Kaiming's rule, uniformly; biases are 0."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.kaiming_uniform_(module.weight, mode="fan_in", nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


class DeepLinear(nn.Module):
    """`depth` hidden Linear layers without bias, BatchNorm after each, no nonlinearity; one logit."""

    def __init__(self, depth: int = 64, width: int = 10) -> None:
        super().__init__()
        hidden = [(nn.Linear(width, width, bias=False), nn.BatchNorm1d(width)) for _ in range(depth)]
        self.hidden = nn.Sequential(*(module for pair in hidden for module in pair))
        self.head = nn.Linear(width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N,) from inputs (N, width)."""
        return self.head(self.hidden(x)).squeeze(-1)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with BatchNorm, and a shortcut: a 1×1 convolution where the shape changes."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, out_channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(body(x) + shortcut(x))."""
        return F.relu(self.body(x) + self.shortcut(x))


class ResNet(nn.Module):
    """The ResNet of the CIFAR experiments: 6n + 2 layers, n blocks in each of three stages, widths w, 2w, 4w."""

    def __init__(self, layers: int, channels: int = 3, width: int = 16) -> None:
        super().__init__()
        if layers < 8 or layers % 6 != 2:
            raise ValueError(f"a ResNet's layers must be 6n + 2 (8, 14, 20, ... 110), got {layers}")
        modules: list[nn.Module] = [nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)]
        modules.append(nn.ReLU(inplace=True))
        before = width
        for stage in range(3):
            for block in range(layers // 6):
                after = width * 2**stage
                modules.append(BasicBlock(before, after, 2 if stage and not block else 1))
                before = after
        self.features = nn.Sequential(*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(before, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, 10) from images (N, channels, H, W)."""
        return self.head(self.features(x))


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions with BatchNorm, and a shortcut: a 1×1 convolution where the shape changes."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, 4 * width, 1, bias=False),
            nn.BatchNorm2d(4 * width),
        )
        self.shortcut: nn.Module = nn.Identity()
        if channels != 4 * width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(body(x) + shortcut(x))."""
        return F.relu(self.body(x) + self.shortcut(x))


class WideResNet(nn.Module):
    """ResNet-50 (He et al. 2016), the stride in the 3×3 convolution: 53 convolutions, one Linear."""

    def __init__(self, blocks: tuple[int, ...] = (3, 4, 6, 3), width: int = 64, classes: int = 1000) -> None:
        super().__init__()
        stem = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        modules: list[nn.Module] = [*stem, nn.MaxPool2d(3, 2, 1)]
        channels = width
        for stage, count in enumerate(blocks):
            for block in range(count):
                modules.append(Bottleneck(channels, width * 2**stage, 2 if stage and not block else 1))
                channels = 4 * width * 2**stage
        self.features = nn.Sequential(*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, classes) from images (N, 3, H, W)."""
        return self.head(self.features(x))


class Block(nn.Module):
    """Causal attention, then two Linear layers, each after a LayerNorm and around a shortcut."""

    def __init__(self, width: int, heads: int, is_joint: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        if is_joint:
            self.projections = nn.Linear(width, 3 * width)
        else:
            self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.is_joint = is_joint
        self.out = nn.Linear(width, width)
        self.hidden = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Return the stream (N, S, width) after this block."""
        normed = self.norms[0](x)
        if self.is_joint:
            rows = self.projections(normed).chunk(3, -1)
        else:
            rows = tuple(layer(normed) for layer in (self.query, self.key, self.value))
        query, key, value = (row.unflatten(-1, (self.heads, -1)).transpose(1, 2) for row in rows)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.hidden(self.norms[1](x))


class Transformer(nn.Module):
    """A small language model over 64 words and 64 positions: 4 blocks, 25 Linear layers."""

    def __init__(self, width: int = 128, blocks: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(64, width), nn.Embedding(64, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)), nn.LayerNorm(width))
        self.head = nn.Linear(width, 64)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, S, words) from words (N, S)."""
        return self.head(self.blocks(self.words(x) + self.places.weight[: x.shape[1]]))


class GPT2(nn.Module):
    """GPT-2 (Radford et al. 2019), its head tied to the embedding; by default the small one, of 124 M parameters."""

    def __init__(
        self, width: int = 768, blocks: int = 12, heads: int = 12, words: int = 50257, places: int = 1024
    ) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(places, width)
        own = (Block(width, heads, is_joint=True) for _ in range(blocks))
        self.blocks = nn.Sequential(*own, nn.LayerNorm(width))
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.words.weight
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, S, words) from words (N, S)."""
        return self.head(self.blocks(self.words(x) + self.places.weight[: x.shape[1]]))


@dataclass(frozen=True)
class Prediction:
    """What the outputs of a network mean."""

    loss: Callable[[Tensor, Tensor], Tensor]  # mean loss from outputs and labels
    distribution: Callable[[Tensor], Distribution]  # what the network predicts; the mean of -log_prob is the loss
    correct: Callable[[Tensor, Tensor], Tensor]  # which outputs are right


# Arguments are not checked: on a device the check would wait for it.
BINARY = Prediction(
    F.binary_cross_entropy_with_logits,
    lambda out: Bernoulli(logits=out, validate_args=False),
    lambda out, y: (out > 0) == (y > 0.5),
)
CLASSES = Prediction(
    lambda out, y: F.cross_entropy(out.flatten(0, -2), y.flatten()),
    lambda out: Categorical(logits=out, validate_args=False),
    lambda out, y: out.argmax(-1) == y,
)


Draw = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Network:
    """A network to measure, on batches of noise in the shapes of its data."""

    title: str
    make: Callable[[], nn.Module]
    draw: Draw  # inputs and labels
    prediction: Prediction
    batch: int  # of its whole steps, as the comparison states it
    autocast: torch.dtype | None = None  # what forward passes are cast to
    is_large: bool = False  # so that it is measured on a device alone

    def sample(self, size: int, device: str | torch.device) -> tuple[Tensor, Tensor]:
        """Draw a batch, the same each time."""
        x, y = self.draw(size, torch.Generator().manual_seed(0))
        return x.to(device), y.to(device)


_points: Draw = lambda n, g: (torch.randn(n, 10, generator=g), torch.randint(2, (n,), generator=g).float())  # noqa: E731
_images: Draw = lambda n, g: (torch.randn(n, 3, 32, 32, generator=g), torch.randint(10, (n,), generator=g))  # noqa: E731
_words: Draw = lambda n, g: (torch.randint(64, (n, 64), generator=g), torch.randint(64, (n, 64), generator=g))  # noqa: E731
NETWORKS = {
    "deep-linear": Network("deep linear network", DeepLinear, _points, BINARY, 512),
    "transformer": Network("transformer", Transformer, _words, CLASSES, 128),
}
for _depth in (8, 20, 32, 56, 110):
    _make = partial(ResNet, _depth)
    NETWORKS[f"resnet-{_depth}"] = Network(f"ResNet-{_depth}", _make, _images, CLASSES, 32 if _depth == 56 else 128)

# Both are predicted by bench/roofline.py.
_photos: Draw = lambda n, g: (torch.randn(n, 3, 224, 224, generator=g), torch.randint(1000, (n,), generator=g))  # noqa: E731
_texts: Draw = lambda n, g: (torch.randint(50257, (n, 1024), generator=g), torch.randint(50257, (n, 1024), generator=g))  # noqa: E731
TOKENS = Prediction(
    lambda out, y: CLASSES.loss(out.float(), y), lambda out: CLASSES.distribution(out.float()), CLASSES.correct
)
NETWORKS["resnet-50"] = Network("ResNet-50", WideResNet, _photos, CLASSES, 256, is_large=True)
NETWORKS["gpt2-small"] = Network("GPT-2 small", GPT2, _texts, TOKENS, 8, torch.bfloat16, is_large=True)

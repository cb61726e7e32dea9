"""The problems that are trained on: data, model, loss, and the distribution that the model predicts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Distribution


@dataclass
class Problem:
    """One training problem, drawn from a seed.

    Attributes:
        model: freshly initialised.
        train: inputs and labels.
        test: inputs and labels.
        batch: samples of a step.
        loss: mean loss from outputs and labels.
        distribution: what the model predicts; the mean of -log_prob is the loss.
        correct: which outputs are right.
    """

    model: nn.Module
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    batch: int
    loss: Callable[[Tensor, Tensor], Tensor]
    distribution: Callable[[Tensor], Distribution]
    correct: Callable[[Tensor, Tensor], Tensor]


def initialised(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Draw weights by Kaiming's rule, uniformly; biases are 0."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.kaiming_uniform_(module.weight, mode="fan_in", nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


class DeepLinear(nn.Module):
    """Hidden Linear layers without bias, BatchNorm after each, no nonlinearity; one logit.

    Args:
        depth: hidden layers.
        width: units of each, and inputs.
    """

    def __init__(self, depth: int = 64, width: int = 10) -> None:
        super().__init__()
        hidden = [(nn.Linear(width, width, bias=False), nn.BatchNorm1d(width)) for _ in range(depth)]
        self.hidden = nn.Sequential(*(module for pair in hidden for module in pair))
        self.head = nn.Linear(width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N,) from inputs (N, width)."""
        return self.head(self.hidden(x)).squeeze(-1)


def deep_linear(
    seed: int, train: int = 25_000, test: int = 2_500, model: DeepLinear | None = None, batch: int = 512
) -> Problem:
    """The paper's deep linear network (Appendix B.1): labels 1[wᵀx > 0] of Gaussian x, batch 512."""
    generator = torch.Generator().manual_seed(seed)
    model = DeepLinear() if model is None else model
    width = model.head.in_features
    x = torch.randn(train + test, width, generator=generator)
    y = (x @ torch.randn(width, generator=generator) > 0).float()
    return Problem(
        initialised(model, generator),
        (x[:train], y[:train]),
        (x[train:], y[train:]),
        batch,
        F.binary_cross_entropy_with_logits,
        lambda out: Bernoulli(logits=out, validate_args=False),
        lambda out, y: (out > 0) == (y > 0.5),
    )


class PaddingShortcut(nn.Module):
    """Every `stride`-th pixel, with zeros for the channels that are new; no parameters."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride, self.new = stride, out_channels - channels

    def forward(self, x: Tensor) -> Tensor:
        """Return x (N, out_channels, H / stride, W / stride)."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.new // 2, self.new - self.new // 2))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with BatchNorm, and a shortcut: where the shape changes a 1×1 convolution, or padding."""

    def __init__(self, channels: int, out_channels: int, stride: int, pads: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, out_channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride == 1 and channels == out_channels:
            return
        if pads:
            self.shortcut = PaddingShortcut(channels, out_channels, stride)
        else:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(body(x) + shortcut(x))."""
        return F.relu(self.body(x) + self.shortcut(x))


class ResNet(nn.Module):
    """The ResNet of the CIFAR experiments: 6n + 2 layers, widths w, 2w, 4w.

    Args:
        n: blocks of each of the three stages.
        channels: channels of the images.
        width: channels of the first stage.
        classes: outputs.
        pads: whether shortcuts that change shape pad with zeros rather than convolve.
    """

    def __init__(self, n: int, channels: int = 3, width: int = 16, classes: int = 10, pads: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(channels, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        ]
        before = width
        for stage in range(3):
            for block in range(n):
                after = width * 2**stage
                layers.append(BasicBlock(before, after, 2 if stage and not block else 1, pads))
                before = after
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, classes) from images (N, channels, H, W)."""
        return self.head(self.features(x))


def digits(seed: int) -> Problem:
    """A ResNet of 8 layers on scikit-learn's handwritten digits: 1,797 real images of 8×8, a fifth for testing."""
    from sklearn.datasets import load_digits

    data = load_digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.target), generator=generator)
    x = torch.as_tensor(data.images, dtype=torch.float32).unsqueeze(1)[order] / 16 - 0.5
    y = torch.as_tensor(data.target)[order]
    split = len(x) * 4 // 5
    return Problem(
        initialised(ResNet(1, channels=1), generator),
        (x[:split], y[:split]),
        (x[split:], y[split:]),
        64,
        F.cross_entropy,
        lambda out: Categorical(logits=out, validate_args=False),
        lambda out, y: out.argmax(-1) == y,
    )

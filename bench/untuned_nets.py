"""The sixteen networks of `untuned.py`, with their data: with norms and without, of 4 to 32 layers.

Each function that draws data returns a batch of inputs and targets. Weights are drawn as torch draws them where nothing
else is said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import pairwise
from pydoc_data.topics import topics
from typing import NamedTuple

import torch
import torch.nn.functional as F
from experiments.data import FASHION_MNIST, DataError, image_set
from networks import BINARY, CLASSES, Draw, Prediction, ResNet, Transformer, initialised
from torch import Tensor, nn
from torch.distributions import Normal

NUMBERS = Prediction(
    lambda out, y: F.mse_loss(out, y) / 2,
    lambda out: Normal(out, 1.0, validate_args=False),
    lambda out, y: (out - y).abs() < 0.5,
)


@cache
def _fashion() -> tuple[Tensor, Tensor]:
    """Return images (N, 1, 14, 14) from 0 to 1 and labels: Fashion-MNIST, or where it is missing drawn ones."""
    try:
        (x, y), _ = image_set("fashion-mnist", FASHION_MNIST)
        return F.avg_pool2d(x[..., 2:-2, 2:-2].float() / 255, 2), y
    except DataError:
        generator = torch.Generator().manual_seed(0)
        y = torch.randint(10, (10_000,), generator=generator)
        kinds = F.interpolate(torch.randn(10, 3, 5, 5, generator=generator), size=14, mode="bilinear")
        mixed = torch.einsum("nk,nkhw->nhw", 1 + torch.randn(len(y), 3, generator=generator) / 2, kinds[y])
        return torch.sigmoid(mixed + torch.randn(mixed.shape, generator=generator) / 2)[:, None], y


def images(size: int, generator: torch.Generator, flat: bool = False) -> tuple[Tensor, Tensor]:
    x, y = _fashion()
    chosen = torch.randint(len(x), (size,), generator=generator)
    x = (x[chosen] - 0.29) / 0.33  # about mean 0, variance 1
    return (x.flatten(1) if flat else x), y[chosen]


def reproduced(size: int, generator: torch.Generator, flat: bool) -> tuple[Tensor, Tensor]:
    x = images(size, generator, flat)[0] * 0.33 + 0.29
    return x, x


@cache
def text() -> Tensor:
    """Return Python's own help in 64 symbols: the commonest 63 characters, and one for all others."""
    text = "\n".join(topics[name] for name in sorted(topics))
    symbols = {character: i for i, (character, _) in enumerate(Counter(text).most_common(63))}
    return torch.tensor([symbols.get(character, 63) for character in text])


def characters(size: int, generator: torch.Generator, length: int) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(text()) - length, (size, 1), generator=generator)
    pieces = text()[starts + torch.arange(length + 1)]
    return pieces[:, :-1], pieces[:, 1:]


def taught(size: int, generator: torch.Generator, outputs: int) -> tuple[Tensor, Tensor]:
    """Draw points, and the outputs of one fixed network there."""
    teacher, x = torch.Generator().manual_seed(0), torch.randn(size, 16, generator=generator)
    first, second = torch.randn(16, 32, generator=teacher) / 2, torch.randn(32, outputs, generator=teacher) / 32**0.5
    return x, 2 * torch.tanh(x @ first) @ second


def taught_classes(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x, y = taught(size, generator, 10)
    return x, y.argmax(1)


def smooth(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    a, b, c, d = (x := 2 * torch.rand(size, 4, generator=generator) - 1).split(1, 1)
    return x, torch.sin(4 * a) + 2 * b * c + torch.cos(3 * (d + a))


class Residual(nn.Sequential):
    """Modules, and a shortcut around them."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x + body(x)."""
        return x + super().forward(x)


def mlp(
    sizes: Sequence[int], act: Callable[[], nn.Module], norm: Callable[[int], nn.Module] | None = None
) -> nn.Sequential:
    modules: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes[:-1]):
        modules += [nn.Linear(inputs, outputs), *([norm(outputs)] if norm else []), act()]
    return nn.Sequential(*modules, nn.Linear(sizes[-2], sizes[-1]))


def glorot(sizes: Sequence[int]) -> nn.Module:
    model = mlp(sizes, nn.Tanh)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    return model


def kaiming(make: Callable[[], nn.Module]) -> nn.Module:
    return initialised(make(), torch.Generator().manual_seed(torch.initial_seed()))


def residual_mlp(inputs: int, width: int, blocks: int, has_norm: bool) -> nn.Module:
    norm = (lambda: [nn.LayerNorm(width)]) if has_norm else list
    act = nn.GELU if has_norm else nn.ReLU
    bodies = [[*norm(), nn.Linear(width, width), act(), nn.Linear(width, width)] for _ in range(blocks)]
    return nn.Sequential(nn.Linear(inputs, width), *(Residual(*body) for body in bodies), *norm(), nn.Linear(width, 10))


def cnn(widths: Sequence[int], has_norm: bool) -> nn.Module:
    modules: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(pairwise((1, *widths))):
        modules.append(nn.Conv2d(inputs, outputs, 3, 2 if i in (1, 2) else 1, 1))
        modules += [*([nn.BatchNorm2d(outputs)] if has_norm else []), nn.ReLU()]
    return nn.Sequential(*modules, nn.Flatten(), nn.Linear(16 * widths[-1], 10))


def conv_autoencoder() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, 2, 1), nn.ReLU(), nn.Conv2d(12, 24, 3, 2, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(384, 16), nn.Linear(16, 384), nn.Unflatten(1, (24, 4, 4)), nn.ReLU(),
        nn.ConvTranspose2d(24, 12, 3, 2, 1), nn.ReLU(), nn.ConvTranspose2d(12, 1, 4, 2, 1),
    )  # fmt: skip


def tied_transformer() -> nn.Module:
    model = Transformer(width=32, blocks=2, heads=4)
    model.head.weight = model.words.weight
    for embedding in (model.words, model.places):
        nn.init.normal_(embedding.weight, std=0.02)  # as in GPT-2
    return model


class Net(NamedTuple):
    """A network to train, and what on."""

    make: Callable[[], nn.Module]
    draw: Draw
    prediction: Prediction
    batch: int


_flat = partial(images, flat=True)
_code = (196, 96, 48, 24, 8, 24, 48, 96, 196)
NETS = {
    "mlp-4-relu": Net(partial(mlp, (16, 128, 128, 128, 10), nn.ReLU), taught_classes, CLASSES, 64),
    "mlp-8-gelu-layernorm": Net(partial(mlp, (196, *[96] * 7, 10), nn.GELU, nn.LayerNorm), _flat, CLASSES, 128),
    "mlp-16-relu": Net(partial(kaiming, partial(mlp, (196, *[64] * 15, 10), nn.ReLU)), _flat, CLASSES, 256),
    "mlp-16-relu-batchnorm": Net(partial(mlp, (196, *[64] * 15, 10), nn.ReLU, nn.BatchNorm1d), _flat, CLASSES, 256),
    "mlp-12-tanh": Net(partial(glorot, (196, *[64] * 11, 10)), _flat, CLASSES, 256),
    "mlp-32-residual-gelu-layernorm": Net(partial(residual_mlp, 196, 48, 15, True), _flat, CLASSES, 256),
    "mlp-18-residual-relu": Net(partial(residual_mlp, 16, 64, 8, False), taught_classes, CLASSES, 1024),
    "cnn-4-batchnorm": Net(partial(cnn, (12, 16, 16), True), images, CLASSES, 128),
    "cnn-6": Net(partial(kaiming, partial(cnn, (8, 16, 16, 16, 16), False)), images, CLASSES, 128),
    "resnet-8-batchnorm": Net(partial(ResNet, 8, 1, 6), images, CLASSES, 64),
    "autoencoder-8-tanh": Net(partial(glorot, _code), partial(reproduced, flat=True), BINARY, 512),
    "conv-autoencoder-6": Net(conv_autoencoder, partial(reproduced, flat=False), NUMBERS, 128),
    "transformer-tied": Net(tied_transformer, partial(characters, length=32), CLASSES, 32),
    "transformer": Net(partial(Transformer, 32, 2, 4), partial(characters, length=64), CLASSES, 16),
    "regression-4-tanh": Net(partial(glorot, (4, 64, 64, 64, 1)), smooth, NUMBERS, 32),
    "regression-6-relu-layernorm": Net(
        partial(mlp, (16, *[96] * 5, 4), nn.ReLU, nn.LayerNorm), partial(taught, outputs=4), NUMBERS, 1024
    ),
}

"""The networks of `quality.py`: at most 5,000 parameters, so that their Fisher is a dense matrix; real data."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from experiments.data import FASHION_MNIST, image_set
from networks import CLASSES, Block, Prediction, initialised
from torch import Tensor, nn
from torch.distributions import Bernoulli, Independent
from untuned_nets import Net, characters, glorot, kaiming, mlp, residual_mlp

SYMBOLS, LENGTH = 32, 16  # of the text; tokens of a sequence
PIXELS = Prediction(
    lambda out, y: F.binary_cross_entropy_with_logits(out, y, reduction="sum") / len(y),
    lambda out: Independent(Bernoulli(logits=out, validate_args=False), 1),
    lambda out, y: (out > 0) == (y > 0.5),
)


@cache
def _pixels() -> tuple[Tensor, Tensor]:
    """Return Fashion-MNIST's training images as (N, 1, 7, 7) from 0 to 1, and labels; DataError where it is missing."""
    (x, y), _ = image_set("fashion-mnist", FASHION_MNIST)
    return F.avg_pool2d(x[..., 2:-2, 2:-2].double() / 255, 4), y


def images(size: int, generator: torch.Generator, flat: bool = True) -> tuple[Tensor, Tensor]:
    x, y = _pixels()
    chosen = torch.randint(len(x), (size,), generator=generator)
    normed = (x[chosen] - x.mean()) / x.std()
    return (normed.flatten(1) if flat else normed), y[chosen]


def reproduced(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x, _ = _pixels()
    drawn = x[torch.randint(len(x), (size,), generator=generator)].flatten(1)
    return drawn, drawn


def text(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw pieces of Python's own help: its commonest 31 characters, and one symbol for all others."""
    x, y = characters(size, generator, LENGTH)  # the commonest come first
    return x.clamp(max=SYMBOLS - 1), y.clamp(max=SYMBOLS - 1)


class SmallTransformer(nn.Module):
    """`networks.Transformer`, over fewer symbols and places."""

    def __init__(self, width: int, blocks: int, heads: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(SYMBOLS, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)), nn.LayerNorm(width))
        self.head = nn.Linear(width, SYMBOLS)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, S, symbols) from symbols (N, S)."""
        return self.head(self.blocks(self.words(x) + self.places.weight[: x.shape[1]]))


def cnn(channels: int) -> nn.Module:
    modules: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(pairwise((1, *[channels] * 4))):
        modules += [nn.Conv2d(inputs, outputs, 3, 2 if i == 1 else 1, 1), nn.ReLU()]
    model = nn.Sequential(*modules, nn.Flatten(), nn.Linear(16 * channels, 10))
    return initialised(model, torch.Generator().manual_seed(torch.initial_seed()))


_norm: Callable[[int], nn.Module] = partial(nn.BatchNorm1d, track_running_stats=False)  # of the batch, always
_deep, _code = (49, *[16] * 7, 10), (49, 20, 10, 5, 10, 20, 49)
NETS = {
    "tanh-8": Net(partial(glorot, _deep), images, CLASSES, 256),
    "relu-8": Net(partial(kaiming, partial(mlp, _deep, nn.ReLU)), images, CLASSES, 256),
    "autoencoder-6": Net(partial(glorot, _code), reproduced, PIXELS, 256),
    "residual-8-layernorm": Net(partial(residual_mlp, 49, 16, 3, True), images, CLASSES, 256),
    "relu-8-batchnorm": Net(partial(mlp, _deep, nn.ReLU, _norm), images, CLASSES, 256),
    "cnn-5": Net(partial(cnn, 8), partial(images, flat=False), CLASSES, 256),
    "transformer-2": Net(partial(SmallTransformer, 8, 2, 2), text, CLASSES, 256 // LENGTH),
}

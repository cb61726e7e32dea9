"""The problems of `study.py`: Fashion-MNIST at 14×14, Python's help as characters, and two drawn functions.

`nats` says how large a case's loss is beside that of a classification: the autoencoder's case is an image, whose loss
is the sum over 196 pixels; the regression without noise ends far below one nat. Weights are drawn as torch draws them
where nothing else is said.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from experiments.data import FASHION_MNIST, image_set
from networks import BINARY, CLASSES, DeepLinear, Draw, Prediction, ResNet, Transformer, initialised
from torch import Tensor, nn
from torch.distributions import Bernoulli, Independent, Normal
from untuned_nets import cnn, glorot, kaiming, mlp, residual_mlp, text

Data = tuple[Tensor, Tensor]  # inputs and targets
TEST_IMAGES, WHOLE = 2000, 8192  # images to test on; images of the problem whose batch is its whole data
PIXELS = Prediction(
    lambda out, y: F.binary_cross_entropy_with_logits(out, y, reduction="sum") / len(y),
    lambda out: Independent(Bernoulli(logits=out, validate_args=False), 1, validate_args=False),
    lambda out, y: (out > 0) == (y > 0.5),
)
EXACT = Prediction(
    lambda out, y: F.mse_loss(out, y) / 2,
    lambda out: Normal(out, 1.0, validate_args=False),
    lambda out, y: (out - y).abs() < 0.1,
)


class StudyProblem(NamedTuple):
    """What is trained, on batches of which size and for how long."""

    title: str
    make: Callable[[], nn.Module]
    draw: Draw  # a batch of training data
    test: Callable[[], Data]
    prediction: Prediction
    batch: int
    steps: int
    nats: float = 1.0  # the size of a case's loss, a classification being 1: bounds of divergence are in such units


@cache
def images() -> tuple[Data, Data]:
    """Return Fashion-MNIST to train and to test on: (N, 1, 14, 14) from 0 to 1, and labels.

    Raises:
        DataError: if it is not there.
    """
    train, test = image_set("fashion-mnist", FASHION_MNIST)
    smaller = ((F.avg_pool2d(x[..., 2:-2, 2:-2].float() / 255, 2), y) for x, y in (train, test))
    (x, y), (x_test, y_test) = smaller
    return (x, y), (x_test[:TEST_IMAGES], y_test[:TEST_IMAGES])


def shaped(data: Data, flat: bool, is_target: bool) -> Data:
    """Normalise images to about mean 0 and variance 1; with `is_target` they are what is to be predicted, too."""
    x, y = data
    x = x.flatten(1) if flat else x
    return (x, x) if is_target else ((x - 0.29) / 0.33, y)


def drawn(size: int, generator: torch.Generator, flat: bool = True, is_target: bool = False) -> Data:
    x, y = images()[0]
    chosen = torch.randint(len(x), (size,), generator=generator)
    return shaped((x[chosen], y[chosen]), flat, is_target)


def tested(flat: bool = True, is_target: bool = False) -> Data:
    return shaped(images()[1], flat, is_target)


@cache
def _first(size: int) -> Data:
    x, y = images()[0]
    return shaped((x[:size], y[:size]), flat=True, is_target=True)


def whole(size: int, _: torch.Generator) -> Data:
    """Return the first images to be reproduced, the same in each step."""
    return _first(size)


@cache
def _separating() -> Tensor:
    return torch.randn(10, generator=torch.Generator().manual_seed(0))


def separated(size: int, generator: torch.Generator) -> Data:
    """Labels 1[wᵀx > 0] of Gaussian x, as in the paper's Appendix B.1."""
    x = torch.randn(size, 10, generator=generator)
    return x, (x @ _separating() > 0).float()


def characters(size: int, generator: torch.Generator, length: int, is_test: bool = False) -> Data:
    """Draw pieces of Python's help, and what follows each character; the last tenth is to test on."""
    border = len(text()) * 9 // 10
    part = text()[border:] if is_test else text()[:border]
    starts = torch.randint(len(part) - length, (size, 1), generator=generator)
    pieces = part[starts + torch.arange(length + 1)]
    return pieces[:, :-1], pieces[:, 1:]


def oscillating(size: int, generator: torch.Generator) -> Data:
    """Draw points of a square, and a function of several frequencies there; nothing is added to it."""
    a, b = (x := 2 * torch.rand(size, 2, generator=generator) - 1).split(1, 1)
    return x, torch.sin(6 * a + 2 * b) + torch.cos(9 * a * b) + torch.sin(4 * b) / 2


@cache
def _points(size: int) -> Data:
    return oscillating(size, torch.Generator().manual_seed(0))


def _same_each_time(draw: Draw, size: int) -> Callable[[], Data]:
    return lambda: draw(size, torch.Generator().manual_seed(1))


def deep_linear() -> nn.Module:
    return initialised(DeepLinear(64, 10), torch.Generator().manual_seed(torch.initial_seed()))


def linear_mlp() -> nn.Module:
    """Sixteen layers with nothing between them, Glorot's weights, no bias at the start."""
    model = mlp((196, *[48] * 15, 10), nn.Identity)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    return model


def autoencoder(title: str, draw: Draw, batch: int, steps: int) -> StudyProblem:
    make = partial(glorot, (196, 96, 48, 24, 8, 24, 48, 96, 196))
    test = partial(tested, is_target=True)
    return StudyProblem(f"deep autoencoder, {title}", make, draw, test, PIXELS, batch, steps, nats=20.0)


def classifier(title: str, make: Callable[[], nn.Module], batch: int, steps: int, flat: bool = True) -> StudyProblem:
    name = f"{title}, batch {batch}"
    return StudyProblem(name, make, partial(drawn, flat=flat), partial(tested, flat), CLASSES, batch, steps)


def narrow(hidden: int, width: int) -> tuple[int, ...]:
    return (196, *[width] * hidden, 10)


_pixels = partial(drawn, is_target=True)
_words = partial(characters, length=32)
_relu = partial(kaiming, partial(mlp, narrow(15, 48), nn.ReLU))
PROBLEMS = {
    "linear-64-batchnorm": StudyProblem(
        "deep linear network of 64 hidden layers with BatchNorm, batch 512", deep_linear, separated,
        _same_each_time(separated, 2500), BINARY, 512, 200,
    ),
    "linear-16": classifier("deep linear MLP of 16 layers", linear_mlp, 512, 200),
    "autoencoder-256": autoencoder("batch 256", _pixels, 256, 300),
    "autoencoder-1024": autoencoder("batch 1024", _pixels, 1024, 250),
    "autoencoder-8192": autoencoder("batch 8192", _pixels, 8192, 100),
    "autoencoder-whole": autoencoder(f"whole data of {WHOLE} images", whole, WHOLE, 150),
    "tanh-13": classifier("tanh MLP of 13 layers", partial(glorot, narrow(12, 48)), 8192, 100),
    "tanh-32": classifier("tanh MLP of 32 layers", partial(glorot, narrow(31, 48)), 2048, 150),
    "relu-16-256": classifier("ReLU MLP of 16 layers", _relu, 256, 300),
    "relu-16-2048": classifier("ReLU MLP of 16 layers", _relu, 2048, 150),
    "cnn-12": classifier("CNN of 12 convolutions", partial(kaiming, partial(cnn, (6,) * 12, False)), 256, 150, False),
    "residual-layernorm": classifier(
        "residual MLP of 14 layers with LayerNorm", partial(residual_mlp, 196, 48, 6, True), 2048, 150
    ),
    "resnet-20-batchnorm": classifier("ResNet-20 with BatchNorm", partial(ResNet, 20, 1, 4), 128, 200, False),
    "transformer": StudyProblem(
        "causal transformer on characters, 32 pieces of 32", partial(Transformer, 32, 2, 4), _words,
        _same_each_time(partial(_words, is_test=True), 256), CLASSES, 32, 200,
    ),
    "regression-whole": StudyProblem(
        "tanh regression of 9 layers, whole data of 2048 points", partial(glorot, (2, *[32] * 8, 1)),
        lambda size, _: _points(size), _same_each_time(oscillating, 2048), EXACT, 2048, 300, nats=0.05,
    ),
}  # fmt: skip

"""Small float64 models, one for each kind of layer, with inputs, predictions and losses that fit them."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributions import Bernoulli, Categorical, Independent, Normal


@dataclass
class Task:
    model: nn.Module
    x: torch.Tensor
    target: torch.Tensor
    prediction: str = "categorical"

    def distribution(self, out) -> Any:
        return {
            "categorical": lambda: Categorical(logits=out),
            "bernoulli": lambda: Bernoulli(logits=out),
            "normal": lambda: Normal(out, 1.0),
            "independent": lambda: Independent(Normal(out, 1.0), 1),
        }[self.prediction]()

    def loss(self, out):
        if self.prediction == "categorical":
            return F.cross_entropy(out.flatten(0, -2), self.target.flatten())
        return -self.distribution(out).log_prob(self.target).mean()


class Tokens(nn.Module):
    """Attention-like: Linear on (N, S, d), then on flattened tokens (N·S, d), then on (N, d)."""

    def __init__(self, d=4):
        super().__init__()
        self.inner = nn.Linear(3, d)
        self.flat = nn.Linear(d, d, bias=False)
        self.head = nn.Linear(d, 3)

    def forward(self, x):
        h = torch.tanh(self.inner(x))
        h = torch.tanh(self.flat(h.flatten(0, 1))).unflatten(0, x.shape[:2])
        return self.head(h.mean(1))


def _linear(d_out=3):
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6, bias=False), nn.Tanh(), nn.Linear(6, d_out))


def _conv2d():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 2, (2, 1), dilation=(2, 1), bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.LazyLinear(3),
    )


def _grouped():
    return nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Tanh(),
        nn.Conv2d(4, 4, 2, groups=4),
        nn.Tanh(),
        nn.Flatten(),
        nn.LazyLinear(3),
    )


def _transposed():
    return nn.Sequential(
        nn.Conv2d(2, 4, 2, padding=1),
        nn.Tanh(),
        nn.ConvTranspose2d(4, 4, (3, 2), stride=(2, 1), padding=(3, 0), output_padding=(1, 0), groups=2),
        nn.Tanh(),
        nn.ConvTranspose2d(4, 2, 3, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.LazyLinear(3),
    )


def _same(kernel):
    return nn.Sequential(
        nn.Conv2d(2, 3, kernel, padding="same"),
        nn.Tanh(),
        nn.Conv2d(3, 2, kernel, padding="valid"),
        nn.Tanh(),
        nn.Flatten(),
        nn.LazyLinear(3),
    )


_BUILDERS = {
    "linear": (_linear, (4,)),
    "conv1d": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 3, 3, padding=1),
            nn.Tanh(),
            nn.Conv1d(3, 2, 2, stride=2),
            nn.Tanh(),
            nn.Flatten(),
            nn.LazyLinear(3),
        ),
        (2, 6),
    ),
    "conv2d": (_conv2d, (2, 6, 5)),
    "conv3d": (
        lambda: nn.Sequential(
            nn.Conv3d(1, 2, 2, padding=1),
            nn.Tanh(),
            nn.Conv3d(2, 2, (1, 2, 2)),
            nn.Tanh(),
            nn.Flatten(),
            nn.LazyLinear(3),
        ),
        (1, 2, 3, 2),
    ),
    "grouped": (_grouped, (4, 4, 4)),
    "same_odd": (lambda: _same(3), (2, 5, 4)),
    "same_even": (lambda: _same((2, 4)), (2, 5, 5)),
    "transposed1d": (
        lambda: nn.Sequential(
            nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, output_padding=1),
            nn.Tanh(),
            nn.ConvTranspose1d(3, 2, 2, dilation=2, bias=False),
            nn.Tanh(),
            nn.Flatten(),
            nn.LazyLinear(3),
        ),
        (2, 4),
    ),
    "transposed2d": (_transposed, (2, 3, 2)),
    "transposed3d": (
        lambda: nn.Sequential(
            nn.ConvTranspose3d(2, 2, (2, 1, 2), stride=(1, 2, 1)), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)
        ),
        (2, 2, 2, 1),
    ),
    "tokens": (Tokens, (5, 3)),
    "sequence": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), (5, 3)),
    "images": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), (2, 3, 3)),
    "bernoulli": (lambda: _linear(1), (4,)),
    "normal": (_linear, (4,)),
    "independent": (_linear, (4,)),
}
NAMES = tuple(_BUILDERS)


def task(name: str, batch: int = 6) -> Task:
    build, shape = _BUILDERS[name]
    model = build().double()
    x = torch.randn(batch, *shape, dtype=torch.float64)
    out = model(x)  # shapes of lazy layers
    if name == "bernoulli":
        return Task(model, x, torch.randint(0, 2, out.shape).double(), name)
    if name in ("normal", "independent"):
        return Task(model, x, torch.randn_like(out).detach(), name)
    return Task(model, x, torch.randint(0, out.shape[-1], out.shape[:-1]))

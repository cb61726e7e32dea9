"""What decides a run, and the paper's choice of it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

OPTIMIZERS = {"sgd": "SGD", "adam": "Adam", "kfac1": "K-FAC, one level", "kfac2": "K-FAC, two levels"}
INVERSES = {"eigh": "eigendecomposition", "cholesky": "factored Tikhonov"}
DRAWN_SAMPLES = (25_000, 2_500)  # of the deep linear network, for training and for testing (Appendix B.1)
WINDOWS = ((0, None), (0, 0), (0, 100), (500, None))  # of the coarse step: always, never, at first, later


@dataclass(frozen=True)
class Settings:
    """One run. Two runs with equal settings end with equal numbers (on a GPU as far as its sums repeat)."""

    problem: str  # deep-linear or resnet
    optimizer: str  # one of OPTIMIZERS
    seed: int  # of weights, drawn data, order, augmentation, and the labels that K-FAC draws
    epochs: int
    batch: int
    lr: float  # η
    layers: int  # hidden ones of the deep linear network; 6n + 2 of a ResNet
    width: int  # units of a hidden layer; channels of a ResNet's first stage
    device: str = "cpu"
    threads: int = 1  # of torch on the CPU; the last bits depend on it
    milestones: tuple[int, ...] = ()  # epochs after which the rate is divided by 10
    momentum: float = 0.9  # μ; Adam's β₁
    weight_decay: float = 1e-3  # as each optimizer has it; Adam adds it to the gradient
    damping: float | None = None  # λ; K-FAC only, like the next four
    kl_clip: float | None = None  # κ
    cov_every: int | None = None
    inv_every: int | None = None
    inverse: str | None = None  # one of INVERSES
    coarse_from: int = 0  # the step from which the coarse step is taken, counted from 0
    coarse_until: int | None = None  # the step before which it is taken; None: to the end
    follow: bool = False  # whether the coarse step is measured, and taken in its window only
    data: str | None = None  # name of the image set; None for data that is drawn
    train: int | None = None  # training samples; None: all
    test: int | None = None  # test samples; None: all

    @property
    def is_kfac(self) -> bool:
        """Whether the optimizer is one of kfac2's."""
        return self.optimizer in ("kfac1", "kfac2")

    @property
    def key(self) -> str:
        """A hash of all settings."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:10]

    @property
    def label(self) -> str:
        """The optimizer, for people."""
        return OPTIMIZERS[self.optimizer] + (f" ({INVERSES[self.inverse]})" if self.inverse else "")

    @property
    def network(self) -> str:
        """The network and its data, for people."""
        if self.problem == "deep-linear":
            name = f"deep linear network, {self.layers} hidden layers"
            name += f" of {self.width}" if self.width != 10 else ""
        else:
            name = f"ResNet-{self.layers}" + (f", width {self.width}," if self.width != 16 else "") + f" on {self.data}"
        samples = f" ({self.train:,} samples)" if self.train else ""
        return name + samples + (f", {self.device}" if self.device != "cpu" else "")

    @property
    def window(self) -> str:
        """The steps in which the coarse step is taken, for people."""
        first, last = self.coarse_from, self.coarse_until
        if last is None:
            return f"from step {first}" if first else "always (two levels)"
        return f"steps {first} to {last - 1}" if last > first else "never (one level)"

    def rate(self, epoch: int) -> float:
        """η in an epoch, counted from 1: a tenth of it after each milestone."""
        return self.lr / 10 ** sum(epoch > milestone for milestone in self.milestones)

    def of_seed(self, seed: int) -> Settings:
        """Return the same with another seed."""
        return replace(self, seed=seed)


def recipe(problem: str, optimizer: str, inverse: str | None = None) -> Settings:
    """Return the paper's settings: figure 2 (Appendix B.1) or figure 3, the latter on Fashion-MNIST."""
    if problem == "deep-linear":
        settings = Settings(problem, optimizer, seed=0, epochs=50, batch=512, lr=1e-3, layers=64, width=10)
        kfac: dict[str, Any] = {"damping": 1e-2, "kl_clip": 1e-3, "cov_every": 10, "inv_every": 100}
    else:
        lr = 1e-3 if optimizer == "adam" else 1e-2
        settings = Settings(problem, optimizer, seed=0, epochs=100, batch=64, lr=lr, layers=110, width=16)
        settings = replace(settings, milestones=(40, 80), data="fashion-mnist")
        kfac = {"damping": 1e-3, "kl_clip": 1e-2, "cov_every": 200, "inv_every": 2000, "batch": 128}
    usual = "eigh" if problem == "deep-linear" else "cholesky"
    return replace(settings, **kfac, inverse=inverse or usual) if settings.is_kfac else settings


def coarse() -> list[Settings]:
    """Return the deep linear network with two levels, the coarse step taken in windows and measured in all steps."""
    base = replace(recipe("deep-linear", "kfac2"), follow=True)
    return [replace(base, coarse_from=first, coarse_until=last) for first, last in WINDOWS]

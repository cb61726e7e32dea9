"""What decides a run: the network, the data, the optimizer and its numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

OPTIMIZERS = {"sgd": "SGD", "adam": "Adam", "kfac1": "K-FAC, one level", "kfac2": "K-FAC, two levels"}
INVERSES = {"eigh": "eigendecomposition", "cholesky": "factored Tikhonov"}
SHORTCUTS = ("conv", "pad")
DRAWN_SAMPLES = (25_000, 2_500)  # of the deep linear network, for training and for testing (Appendix B.1)


@dataclass(frozen=True)
class Settings:
    """One run. Two runs with equal settings end with equal numbers (on a CPU; on a GPU as far as its sums repeat).

    Attributes:
        problem: `deep-linear` or `resnet`.
        optimizer: one of `OPTIMIZERS`.
        seed: of weights, data that is drawn, order, augmentation, and the labels that K-FAC draws.
        epochs: how many.
        batch: samples of a step.
        device: `cpu` or `cuda`.
        threads: of torch on the CPU; the last bits depend on it.
        lr: η.
        milestones: epochs after which the rate is divided by 10.
        momentum: μ; Adam's β₁.
        weight_decay: as each optimizer has it (Adam adds it to the gradient).
        damping: λ; K-FAC only, like all up to `coarse_until`.
        kl_clip: κ.
        cov_every: steps between statistics.
        inv_every: steps between inverses.
        inverse: one of `INVERSES`.
        coarse_from: the step from which the coarse step is taken, counted from 0.
        coarse_until: the step before which it is; None: to the end.
        follow: whether the coarse step is measured beside.
        data: name of the image set; None for data that is drawn.
        train: training samples; None: all.
        test: test samples; None: all.
        augment: whether images are cropped and flipped.
        layers: of the network: hidden ones of the deep linear network, 6n + 2 of a ResNet.
        width: units of a hidden layer, channels of a ResNet's first stage.
        shortcut: one of `SHORTCUTS`, how a ResNet's shortcuts change shape.
    """

    problem: str
    optimizer: str
    seed: int
    epochs: int
    batch: int
    lr: float
    layers: int
    width: int
    device: str = "cpu"
    threads: int = 1
    milestones: tuple[int, ...] = ()
    momentum: float = 0.9
    weight_decay: float = 1e-3
    damping: float | None = None
    kl_clip: float | None = None
    cov_every: int | None = None
    inv_every: int | None = None
    inverse: str | None = None
    coarse_from: int = 0
    coarse_until: int | None = None
    follow: bool = False
    data: str | None = None
    train: int | None = None
    test: int | None = None
    augment: bool = False
    shortcut: str | None = None

    @property
    def is_kfac(self) -> bool:
        """Whether the optimizer is one of kfac2's."""
        return self.optimizer in ("kfac1", "kfac2")

    @property
    def name(self) -> str:
        """A file name for the run: readable, and another one for other settings."""
        text = json.dumps(asdict(self), sort_keys=True)
        parts = [self.optimizer, self.inverse, f"seed{self.seed}", hashlib.sha256(text.encode()).hexdigest()[:10]]
        return "-".join(part for part in parts if part)

    @property
    def label(self) -> str:
        """The optimizer, for people."""
        return OPTIMIZERS[self.optimizer] + (f" ({INVERSES[self.inverse]})" if self.inverse else "")

    @property
    def network(self) -> str:
        """The network and its data, for people."""
        if self.problem == "deep-linear":
            name = f"deep linear network, {self.layers} hidden layers" + (
                f" of {self.width}" if self.width != 10 else ""
            )
        else:
            name = f"ResNet-{self.layers}" + (f", width {self.width}," if self.width != 16 else "")
            name += (" with padding shortcuts" if self.shortcut == "pad" else "") + f" on {self.data}"
        samples = f" ({self.train:,} samples)" if self.train else ""
        return name + samples + (f", {self.device}" if self.device != "cpu" else "")

    @property
    def window(self) -> str:
        """The steps in which the coarse step is taken, for people."""
        first, last = self.coarse_from, self.coarse_until
        if last is not None and last <= first:
            return "never (one level)"
        if last is None:
            return f"from step {first}" if first else "always (two levels)"
        return f"steps {first} to {last - 1}"

    def rate(self, epoch: int) -> float:
        """η in an epoch, counted from 1: a tenth of it after each milestone."""
        return self.lr / 10 ** sum(epoch > milestone for milestone in self.milestones)

    def of_seed(self, seed: int) -> Settings:
        """Return the same with another seed."""
        return replace(self, seed=seed)

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return asdict(self) | {"milestones": list(self.milestones)}

    @staticmethod
    def of_dict(data: Mapping[str, Any]) -> Settings:
        """Read what `as_dict` returned.

        Raises:
            ValueError: if it is not that.
        """
        known = {field.name for field in fields(Settings)}
        if set(data) != known:
            raise ValueError(f"settings must have the entries {sorted(known)}, got {sorted(data)}")
        if data["optimizer"] not in OPTIMIZERS or data["inverse"] not in (None, *INVERSES):
            raise ValueError(f"there is no optimizer {data['optimizer']!r} with inverse {data['inverse']!r}")
        return Settings(**{**data, "milestones": tuple(data["milestones"])})

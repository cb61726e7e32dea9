"""From settings to a record: problem, optimizer, training."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from networks import BINARY, CLASSES, DeepLinear, ResNet, initialised
from timing import Clock, configure, machine
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from training import PLAIN, Problem, train

import kfac2
from experiments.coarse import Follower
from experiments.data import DataError, augmented, image_set, normalisation
from experiments.records import Record, columns
from experiments.settings import DRAWN_SAMPLES, Settings


def problem_of(settings: Settings, folder: Path) -> Problem:
    """Build what is trained, on its device. Images are in `folder`, which drawn data does not need."""
    return _deep_linear(settings) if settings.problem == "deep-linear" else _resnet(settings, folder)


def _deep_linear(settings: Settings) -> Problem:
    """Labels 1[wᵀx > 0] of Gaussian x (Appendix B.1)."""
    train, test = settings.train or DRAWN_SAMPLES[0], settings.test or DRAWN_SAMPLES[1]
    if train % settings.batch == 1:
        raise DataError(f"{train} samples in batches of {settings.batch} leave one alone, which has no batch variance")
    generator = torch.Generator().manual_seed(settings.seed)
    x = torch.randn(train + test, settings.width, generator=generator)
    y = (x @ torch.randn(settings.width, generator=generator) > 0).float()
    model = initialised(DeepLinear(settings.layers, settings.width), generator).to(settings.device)
    x, y = x.to(settings.device), y.to(settings.device)
    return Problem(model, (x[:train], y[:train]), (x[train:], y[train:]), settings.batch, BINARY)


def _resnet(settings: Settings, folder: Path) -> Problem:
    assert settings.data is not None
    parts = []
    for (x, y), count in zip(image_set(settings.data, folder), (settings.train, settings.test), strict=True):
        if count is not None and count > len(x):
            raise DataError(f"{folder} holds {len(x)} images where {count} are asked for")
        parts.append((x[:count].to(settings.device), y[:count].to(settings.device)))
    mean, deviation = (part.to(settings.device) for part in normalisation(parts[0][0].cpu()))
    model = ResNet(settings.layers, parts[0][0].shape[1], settings.width)
    # Channels last: convolutions on a CPU take two thirds of the time.
    nn.utils.convert_conv2d_weight_memory_format(model, torch.channels_last)
    initialised(model, torch.Generator().manual_seed(settings.seed)).to(settings.device)
    if settings.data == "digits":
        return Problem(model, parts[0], parts[1], settings.batch, CLASSES, lambda x: x.float() / 240 - 0.5)
    prepare: Callable[[Tensor], Tensor] = lambda x: (x.float() / 255 - mean) / deviation  # noqa: E731
    return Problem(model, parts[0], parts[1], settings.batch, CLASSES, prepare, augmented)


def optimizer_of(settings: Settings, model: nn.Module) -> Optimizer:
    """Build the optimizer of a run."""
    lr, momentum, decay = settings.lr, settings.momentum, settings.weight_decay
    if settings.optimizer == "sgd":
        return SGD(model.parameters(), lr, momentum, weight_decay=decay)
    if settings.optimizer == "adam":
        return Adam(model.parameters(), lr, (momentum, 0.999), weight_decay=decay)
    assert settings.damping and settings.cov_every and settings.inv_every and settings.inverse
    return kfac2.KFAC(
        model, lr, momentum=momentum, weight_decay=decay, damping=settings.damping, kl_clip=settings.kl_clip,
        levels=int(settings.optimizer[-1]), inverse=settings.inverse, cov_every=settings.cov_every,
        inv_every=settings.inv_every, **PLAIN,
    )  # fmt: skip


def run(settings: Settings, folder: Path = Path(), on_step: Callable[[], object] = lambda: None) -> Record:
    """Do a run; see `problem_of` for the folder. `on_step` is called after each step."""
    configure(settings.threads)
    torch.backends.cudnn.deterministic = True  # sums in one order
    problem = problem_of(settings, folder)
    optimizer = optimizer_of(settings, problem.model)
    clock = Clock(settings.device, settings.threads)
    arguments = (problem, optimizer, settings.epochs, settings.seed, clock, settings.rate)
    follower = None
    if settings.follow:
        assert isinstance(optimizer, kfac2.KFAC)
        follower = Follower(problem.model, optimizer, settings)
    with warnings.catch_warnings():  # a run that diverges warns thousands of times; its record says so
        warnings.filterwarnings("ignore", "kfac2: .* the step is skipped")
        epochs = list(train(*arguments, follower.step if follower else None, on_step))
    steps = columns(follower.rows) if follower else {}
    return Record(settings, machine(settings.device, settings.threads), columns(epochs), steps)

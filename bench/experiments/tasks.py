"""From settings to what is trained: the problem, what is done to a batch, and the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from problems import DeepLinear, Problem, ResNet, deep_linear, initialised
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.optim import SGD, Adam, Optimizer

import kfac2
from experiments.data import CLASSES, READERS, DataError, Images, ImageSet
from experiments.images import Normalisation, augmented, padded
from experiments.settings import DRAWN_SAMPLES, Settings


@dataclass(frozen=True)
class Task:
    """What is trained.

    Attributes:
        problem: model, data, loss.
        prepare: turns samples as they are kept into inputs of the model.
        augment: changes the samples of a training batch, at random from a generator on their device.
    """

    problem: Problem
    prepare: Callable[[Tensor], Tensor] = lambda x: x
    augment: Callable[[Tensor, torch.Generator], Tensor] = lambda x, _: x


def task_of(settings: Settings, folder: Path | None) -> Task:
    """Build the task of a run, on its device.

    Args:
        settings: of the run.
        folder: where the images are; None for data that is drawn.

    Raises:
        DataError: if a file of data is missing or wrong.
    """
    task = _deep_linear(settings) if settings.problem == "deep-linear" else _resnet(settings, folder)
    problem = task.problem
    problem.model.to(settings.device)
    problem.train, problem.test = (
        (x.to(settings.device), y.to(settings.device)) for x, y in (problem.train, problem.test)
    )
    return task


def steps_of_epoch(settings: Settings, folder: Path | None) -> int:
    """Count the steps of an epoch.

    Raises:
        DataError: if a file of data is missing or wrong.
    """
    if settings.problem == "deep-linear":
        samples = settings.train or DRAWN_SAMPLES[0]
    else:
        samples = len(_parts(settings, folder)[0].y)
    return -(-samples // settings.batch)


def _deep_linear(settings: Settings) -> Task:
    train, test = (given or usual for given, usual in zip((settings.train, settings.test), DRAWN_SAMPLES, strict=True))
    problem = deep_linear(settings.seed, train, test, DeepLinear(settings.layers, settings.width), settings.batch)
    return Task(problem)


@cache
def _image_set(name: str, folder: Path) -> ImageSet:
    images = READERS[name](folder)
    return ImageSet(padded(images.train), padded(images.test))


def _parts(settings: Settings, folder: Path | None) -> tuple[Images, Images]:
    """Read the images to train on and to test on."""
    assert settings.data is not None and folder is not None
    images = _image_set(settings.data, folder)
    for part, count in ((images.train, settings.train), (images.test, settings.test)):
        if count is not None and count > len(part.y):
            raise DataError(f"{folder} holds {len(part.y)} images where {count} are asked for")
    return images.train.first(settings.train), images.test.first(settings.test)


def _resnet(settings: Settings, folder: Path | None) -> Task:
    train, test = _parts(settings, folder)
    network = ResNet(
        (settings.layers - 2) // 6, train.x.shape[1], settings.width, CLASSES, pads=settings.shortcut == "pad"
    )
    # Channels last: convolutions on a CPU take two thirds of the time.
    nn.utils.convert_conv2d_weight_memory_format(network, torch.channels_last)
    problem = Problem(
        initialised(network, torch.Generator().manual_seed(settings.seed)),
        (train.x, train.y),
        (test.x, test.y),
        settings.batch,
        F.cross_entropy,
        lambda out: Categorical(logits=out, validate_args=False),
        lambda out, y: out.argmax(-1) == y,
    )
    normalise = Normalisation.of(train).to(settings.device)
    return Task(problem, normalise, augmented) if settings.augment else Task(problem, normalise)


def optimizer_of(settings: Settings, model: nn.Module) -> Optimizer:
    """Build the optimizer of a run."""
    if settings.optimizer == "sgd":
        return SGD(model.parameters(), settings.lr, settings.momentum, weight_decay=settings.weight_decay)
    if settings.optimizer == "adam":
        betas = (settings.momentum, 0.999)
        return Adam(model.parameters(), settings.lr, betas, weight_decay=settings.weight_decay)
    assert settings.damping and settings.cov_every and settings.inv_every and settings.inverse
    return kfac2.KFAC(
        model,
        settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        damping=settings.damping,
        kl_clip=settings.kl_clip,
        levels=1 if settings.optimizer == "kfac1" else 2,
        inverse=settings.inverse,
        cov_every=settings.cov_every,
        inv_every=settings.inv_every,
    )

"""One training loop, the same for every optimizer, problem and experiment."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from networks import Prediction
from timing import Clock
from torch import Tensor, nn
from torch.optim import Optimizer

import kfac2

# The paper's plain method: what `KFAC` adds to it is off.
PLAIN: dict[str, Any] = {
    "burn_in": 0, "relative_damping": False, "kl_bound": None, "max_change": None, "rest": "sgd",
}  # fmt: skip

_TEST_BATCH = 1000
METRICS = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
Epoch = dict[str, float | None]  # METRICS, seconds, wall_seconds


@dataclass(frozen=True)
class Problem:
    """What is trained, all of it on one device."""

    model: nn.Module  # freshly initialised
    train: tuple[Tensor, Tensor]  # inputs, as they are kept, and labels
    test: tuple[Tensor, Tensor]
    batch: int  # samples of a step
    prediction: Prediction
    prepare: Callable[[Tensor], Tensor] = lambda x: x  # turns inputs as they are kept into inputs of the model
    augment: Callable[[Tensor, torch.Generator], Tensor] = lambda x, _: x  # changes a training batch at random


def finite(number: float) -> float | None:
    """Return a number as JSON can hold it."""
    return number if math.isfinite(number) else None


def train(
    problem: Problem,  # its model is changed
    optimizer: Optimizer,
    epochs: int,
    seed: int,  # of order, augmentation, and the labels that K-FAC draws
    clock: Clock,
    rate: Callable[[int], float],  # learning rate of an epoch, counted from 1
    take_step: Callable[[int, Tensor], object]
    | None = None,  # instead of the optimizer's; gets its number, the outputs
    on_step: Callable[[], object] = lambda: None,  # called after each step
) -> Iterator[Epoch]:
    """Train, and yield after each epoch.

    `train_` numbers are means over the samples of an epoch, each taken before its step and in training mode; `test_`
    numbers are taken after the epoch, in evaluation mode. `seconds` are of training so far, testing left out.
    """
    (x, y), model, prediction = problem.train, problem.model, problem.prediction
    torch.manual_seed(seed + 1000)  # streams apart from each other and from the one that drew weights and data
    order = torch.Generator().manual_seed(seed + 2000)
    generator = torch.Generator(x.device).manual_seed(seed + 3000)
    seconds, wall_seconds, step = 0.0, 0.0, 0
    for epoch in range(1, epochs + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate(epoch)
        losses, right = [], []
        start, wall_start = clock.now(), time.perf_counter()
        for batch in torch.randperm(len(x), generator=order).to(x.device).split(problem.batch):
            optimizer.zero_grad()
            out = model(problem.prepare(problem.augment(x[batch], generator)))
            if isinstance(optimizer, kfac2.KFAC):
                optimizer.accumulate_fisher(prediction.distribution(out))
            loss = prediction.loss(out, y[batch])
            loss.backward()
            if take_step:
                take_step(step, out.detach())
            else:
                optimizer.step()
            losses.append(loss.detach().double() * len(batch))
            right.append(prediction.correct(out.detach(), y[batch]).sum())
            step += 1
            on_step()
        train_loss, train_accuracy = (torch.stack(parts).sum().item() / len(x) for parts in (losses, right))
        seconds, wall_seconds = seconds + clock.now() - start, wall_seconds + time.perf_counter() - wall_start
        numbers = (train_loss, train_accuracy, *evaluate(problem))
        yield {
            **{name: finite(number) for name, number in zip(METRICS, numbers, strict=True)},
            "seconds": seconds,
            "wall_seconds": wall_seconds,
        }


@torch.no_grad()
def evaluate(problem: Problem) -> tuple[float, float]:
    """Return loss and accuracy on the test set, in evaluation mode."""
    loss, right, count = 0.0, 0, len(problem.test[1])
    problem.model.eval()
    for x, y in zip(*(part.split(_TEST_BATCH) for part in problem.test), strict=True):
        out = problem.model(problem.prepare(x))
        loss += problem.prediction.loss(out, y).item() * len(x)
        right += int(problem.prediction.correct(out, y).sum())
    problem.model.train()
    return loss / count, right / count

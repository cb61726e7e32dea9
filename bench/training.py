"""One training run, epoch by epoch, with the same loop for every optimizer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from problems import Problem
from torch import nn
from torch.optim import Optimizer

import kfac2

MakeOptimizer = Callable[[nn.Module], Optimizer]


@dataclass
class Epoch:
    """What one epoch left.

    Attributes:
        epoch: from 1.
        train_loss: mean over the steps of the epoch.
        train_accuracy: mean over the steps of the epoch.
        test_loss: after the epoch.
        test_accuracy: after the epoch.
        seconds: of training since the start, evaluation left out.
    """

    epoch: int
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    seconds: float


@torch.no_grad()
def evaluate(problem: Problem, device: torch.device) -> tuple[float, float]:
    """Return loss and accuracy on the test set, in evaluation mode."""
    problem.model.eval()
    x, y = (part.to(device) for part in problem.test)
    out = problem.model(x)
    problem.model.train()
    return problem.loss(out, y).item(), problem.correct(out, y).float().mean().item()


def train(
    problem: Problem,
    make_optimizer: MakeOptimizer,
    epochs: int,
    seed: int,
    device: str = "cpu",
    on_step: Callable[[], None] = lambda: None,
) -> Iterator[Epoch]:
    """Train, and yield after each epoch.

    Args:
        problem: what to train; its model is changed.
        make_optimizer: builds the optimizer for the model.
        epochs: how many.
        seed: of the order of samples and of the labels that K-FAC draws.
        device: where to train.
        on_step: called after each step.
    """
    torch.manual_seed(seed)
    model = problem.model.to(device)
    x, y = (part.to(device) for part in problem.train)
    optimizer = make_optimizer(model)
    seconds = 0.0
    for epoch in range(1, epochs + 1):
        start = time.perf_counter()
        losses, right = [], []
        for batch in torch.randperm(len(x)).to(device).split(problem.batch):
            optimizer.zero_grad()
            out = model(x[batch])
            if isinstance(optimizer, kfac2.KFAC):
                optimizer.accumulate_fisher(problem.distribution(out))
            loss = problem.loss(out, y[batch])
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            right.append(problem.correct(out.detach(), y[batch]).float().mean())
            on_step()
        train_loss, train_accuracy = torch.stack(losses).mean().item(), torch.stack(right).mean().item()
        seconds += time.perf_counter() - start
        yield Epoch(epoch, train_loss, train_accuracy, *evaluate(problem, torch.device(device)), seconds)

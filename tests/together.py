"""Training in several processes: real ones, on loopback, beside one process on the whole batch."""

import copy
import gc
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import models
import torch
import torch.nn as nn
import torch.nn.functional as F
from compare import assert_equal
from torch import distributed
from torch.distributions import Categorical

import kfac2

TIMEOUT = timedelta(seconds=120)  # far more than a loaded machine takes


def spawn(size: int, work: Callable[..., None], *arguments: object) -> None:
    """Call `work` in so many processes that are a group; what one raises fails the test."""
    with tempfile.TemporaryDirectory() as folder:
        family(size, _member, size, os.path.join(folder, "group"), work, arguments)


def family(size: int, work: Callable[..., None], *arguments: object) -> None:
    """Call `work` with a number in so many processes; what one raises fails the test.

    They are forked by one that has imported everything and done nothing: torch takes seconds to import.
    """
    torch.multiprocessing.spawn(_parent, (size, work, arguments), nprocs=1)


def _parent(_: int, size: int, work: Callable[..., None], arguments: Sequence[object]) -> None:
    torch.set_num_threads(1)
    torch.multiprocessing.start_processes(work, tuple(arguments), nprocs=size, start_method="fork")


def _member(rank: int, size: int, path: str, work: Callable[..., None], arguments: Sequence[object]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=size, timeout=TIMEOUT)
    distributed.barrier()  # work that talks to nobody would leave while others still connect
    try:
        work(*arguments)
    finally:
        gc.collect()  # DistributedDataParallel's reducers go before their group
        distributed.destroy_process_group()


def rank() -> int:
    return distributed.get_rank()


def size() -> int:
    return distributed.get_world_size()


def average_gradients(model: nn.Module) -> None:
    """What a user without a wrapper has to do; a parameter that is not used on one rank has zeros there."""
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        distributed.all_reduce(parameter.grad)
        parameter.grad /= size()


@dataclass
class Batches:
    """Batches of a task and labels for the Fisher, the same in all processes; each has its own part of them."""

    name: str = "linear"
    batch: int = 12
    sizes: tuple[int, ...] | None = None  # of the parts, in place of equal ones

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.task = models.task(self.name, self.batch)
        self.generator = torch.Generator().manual_seed(1)

    def next(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Inputs, targets, and labels that stand for drawn ones."""
        x = torch.randn(self.task.x.shape, generator=self.generator, dtype=self.task.x.dtype)
        order = torch.randperm(self.batch, generator=self.generator)
        target = self.task.target[order]
        return x, target, target[torch.randperm(self.batch, generator=self.generator)]

    def part(self) -> slice:
        """The part of this process."""
        sizes = self.sizes or (self.batch // size(),) * size()
        begin = sum(sizes[: rank()])
        return slice(begin, begin + sizes[rank()])


def train(
    batches: Batches,
    settings: dict,
    steps: int,
    alone: bool,
    micro: int = 1,
    wrap: bool = False,
    look: Callable[[object, int], None] = lambda opt, step: None,
    model: nn.Module | None = None,
) -> tuple[nn.Module, kfac2.KFAC]:
    """Train by the losses' mean over the whole batch, on all of it (alone) or on a part in each process."""
    model = copy.deepcopy(batches.task.model) if model is None else model
    wrapped = nn.parallel.DistributedDataParallel(model) if wrap and not alone else model
    group = {"process_group": None} if alone else {}
    opt = kfac2.KFAC(wrapped, **settings, **group)
    for step in range(steps):
        x, target, labels = batches.next()
        part = slice(None) if alone else batches.part()
        x, target, labels = x[part], target[part], labels[part]
        opt.zero_grad()
        for number in range(micro):
            last = number == micro - 1
            own = slice(number, None, micro)
            with torch.enable_grad() if last or wrapped is model else wrapped.no_sync():
                out = wrapped(x[own])
                if opt.needs_fisher and settings.get("fisher") == "exact":
                    opt.accumulate_fisher(Categorical(logits=out, validate_args=False))
                elif opt.needs_fisher:
                    opt.accumulate_fisher(Categorical(logits=out, validate_args=False).log_prob(labels[own]))
                flat, targets = out.flatten(0, -2), target[own].flatten()
                weight = targets.numel() / (batches.task.target.numel()) * (1 if alone else size())
                loss = F.cross_entropy(flat, targets) * weight if len(targets) else flat.sum() * 0
                loss.backward()
        if not alone and wrapped is model:
            average_gradients(model)
        opt.step()
        look(opt, step)
    return model, opt


def assert_replicas_are_equal(model: nn.Module) -> None:
    """To the last bit."""
    for name, parameter in model.named_parameters():
        others = [torch.empty_like(parameter) for _ in range(size())]
        distributed.all_gather(others, parameter.detach())
        for other in others:
            assert torch.equal(parameter, other), f"{name} differs by {(parameter - other).abs().max():.3g}"


def assert_alike(one: nn.Module, other: nn.Module, tolerance: float = 1e-9) -> None:
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert p.isfinite().all()
        assert_equal(p, q, tolerance)


def assert_trains_as_one(settings: dict, how: dict, steps: int, **batches: object) -> kfac2.KFAC:
    """Train in all processes, and in this one alone on the whole batch; return the optimizer of the former."""
    one, _ = train(Batches(**batches), settings, steps, alone=True, **how)
    together, opt = train(Batches(**batches), settings, steps, alone=False, **how)
    assert_replicas_are_equal(together)
    assert_alike(together, one)
    return opt

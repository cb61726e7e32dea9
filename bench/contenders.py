"""Optimizers whose whole steps are measured, each brought to the kind of step that is wanted.

Kinds: `a` updates statistics, `b` updates statistics and inverses, `c` is an ordinary step. An optimizer has those
that it tells apart: SGD only `c`; a peer with one period `c` and the step that its period brings.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from networks import Network
from timing import Mark
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from training import PLAIN

import kfac2

RATE = 1e-4  # small, so that forty steps on one batch leave the numbers ordinary
COV_EVERY, INV_EVERY = 10, 100


class NotInstalledError(Exception):
    """A peer that this environment does not have."""


@dataclass
class Contender:
    """An optimizer with a network of its own."""

    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizers: list[Optimizer]  # stepped one after the other
    at: Mapping[str, Callable[[], object]]  # for each kind what makes the next step one of that kind
    accumulate: Callable[[Tensor], None] = lambda _: None  # called with the output before the backward pass
    autocast: torch.dtype | None = None  # what the forward pass is cast to

    def step(self, x: Tensor, y: Tensor, mark: Mark) -> None:
        """Take one whole step; `mark` is called at the start and after forward, statistics, backward and step."""
        mark()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        with torch.autocast(x.device.type, self.autocast, enabled=self.autocast is not None):
            out = self.model(x)
        mark()
        self.accumulate(out)
        mark()
        self.loss(out, y).backward()
        mark()
        for optimizer in self.optimizers:
            optimizer.step()
        mark()


def _needed(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise NotInstalledError(f"{module} is not installed") from error


def nothing() -> None:
    """Mark nothing, prepare nothing."""


def _plain(network: Network, model: nn.Module, optimizer: Optimizer) -> Contender:
    return Contender(model, network.prediction.loss, [optimizer], {"c": nothing})


def _sgd(params: Iterable[nn.Parameter]) -> Optimizer:
    return SGD(params, lr=RATE, momentum=0.9, weight_decay=1e-3, foreach=True)


def _muon(network: Network, model: nn.Module) -> Contender:
    """Muon on the weights of Linear layers that it is meant for, AdamW on the rest."""
    if not hasattr(torch.optim, "Muon"):
        raise NotInstalledError(f"torch {torch.__version__} has no torch.optim.Muon")
    words = [id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)]
    own = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and id(m.weight) not in words]
    rest = [p for p in model.parameters() if not any(p is other for other in own)]
    main = torch.optim.Muon(own, lr=RATE)
    return Contender(model, network.prediction.loss, [main, AdamW(rest, lr=RATE, fused=True)], {"c": nothing})


def _kfac2(network: Network, model: nn.Module, levels: int, precision: str | None = None) -> Contender:
    optimizer = kfac2.KFAC(
        model, lr=RATE, momentum=0.9, weight_decay=1e-3, damping=1e-2, kl_clip=1e-2, levels=levels,
        cov_every=COV_EVERY, inv_every=INV_EVERY, step_precision=precision, **PLAIN,
    )  # fmt: skip

    def accumulate(out: Tensor) -> None:
        if optimizer.needs_fisher:  # else even a distribution that nobody asks takes its time
            optimizer.accumulate_fisher(network.prediction.distribution(out))

    iterations = {"b": INV_EVERY, "a": COV_EVERY, "c": 1}
    kinds = {k: partial(setattr, optimizer.preconditioner, "iteration", number) for k, number in iterations.items()}
    return Contender(model, network.prediction.loss, [optimizer], kinds, accumulate)


def _singd(network: Network, model: nn.Module, structure: str) -> Contender:
    """SINGD on the layers it knows, SGD on the rest. It has statistics steps only: no inverses."""
    singd = _needed("singd.optim.optimizer")
    handled = [p for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)) for p in m.parameters()]
    rest = [p for p in model.parameters() if not any(p is other for other in handled)]
    average = "batch+sequence" if network.title == "transformer" else "batch"
    main = singd.SINGD(
        model, handled, lr=RATE, weight_decay=1e-3, structures=(structure, structure), loss_average=average
    )

    statistics_each = main.param_groups[0].update
    kinds = {"a": partial(statistics_each, T=1), "c": partial(statistics_each, T=10**9)}
    return Contender(model, network.prediction.loss, [main, _sgd(rest)], kinds)


def _periodic(network: Network, model: nn.Module, optimizer: Optimizer, renewing: int) -> Contender:
    """An optimizer of `pytorch_optimizer`, which renews what it inverts where its groups' counter is `renewing`."""

    def count(number: int) -> Callable[[], object]:
        return lambda: [group.update(step=number) for group in optimizer.param_groups]

    kinds = {"b": count(renewing), "c": count(renewing + 1)}
    return Contender(model, network.prediction.loss, [optimizer], kinds)


def _soap(network: Network, model: nn.Module) -> Contender:
    """SOAP updates its statistics in each step; every tenth renews the eigenbases (`b`)."""
    soap = _needed("pytorch_optimizer").SOAP(model.parameters(), lr=RATE, precondition_frequency=COV_EVERY)
    return _periodic(network, model, soap, COV_EVERY)


def _shampoo(network: Network, model: nn.Module) -> Contender:
    """Blockwise Shampoo updates its statistics in each step; every tenth computes the roots (`b`).

    Each axis is preconditioned, as SOAP does: merging axes, its default, leaves small weights without a preconditioner.
    """
    shampoo = _needed("pytorch_optimizer").ScalableShampoo(
        model.parameters(), lr=RATE, start_preconditioning_step=1, preconditioning_compute_steps=COV_EVERY,
        shape_interpretation=False,
    )  # fmt: skip
    return _periodic(network, model, shampoo, COV_EVERY - 1)


BUILDERS: dict[str, Callable[[Network, nn.Module], Contender]] = {
    "sgd": lambda network, model: _plain(network, model, _sgd(model.parameters())),
    "adamw": lambda network, model: _plain(network, model, AdamW(model.parameters(), lr=RATE, foreach=True)),
    "adamw-fused": lambda network, model: _plain(network, model, AdamW(model.parameters(), lr=RATE, fused=True)),
    "muon": _muon,
    "kfac2-1": lambda network, model: _kfac2(network, model, levels=1),
    "kfac2-1-tf32": lambda network, model: _kfac2(network, model, levels=1, precision="tf32"),
    "kfac2-2": lambda network, model: _kfac2(network, model, levels=2),
    "singd-dense": lambda network, model: _singd(network, model, "dense"),
    "singd-diagonal": lambda network, model: _singd(network, model, "diagonal"),
    "soap": _soap,
    "shampoo": _shampoo,
}
ON_DEVICES = ("adamw-fused", "muon", "kfac2-1-tf32")
ALL = [name for name in BUILDERS if name not in ON_DEVICES]
OWN = ["sgd", "adamw", "kfac2-1", "kfac2-2"]
LARGE = ["adamw-fused", "muon", "soap", "kfac2-1", "kfac2-1-tf32", "kfac2-2"]  # of large networks, on a device


def shares(kinds: Any, cov_every: int, inv_every: int) -> dict[str, float]:
    """Return how often each kind comes at a schedule; a peer with one period has it every `cov_every` steps."""
    often = {kind: 1 / cov_every for kind in "ab" if kind in kinds}
    if len(often) == 2:
        often = {"b": 1 / inv_every, "a": 1 / cov_every - 1 / inv_every}
    return {**often, "c": 1 - sum(often.values())}


def prepared(name: str, network: Network, batch: int, device: str) -> tuple[Contender, Tensor, Tensor]:
    """Build a contender and its batch, and take a step of each kind twice, so that all state is there.

    Raises:
        NotInstalledError: if it is a peer that this environment does not have.
    """
    torch.manual_seed(0)  # the same weights for each
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what peers say about torch's deprecations
        with torch.device(device):  # where large networks are drawn sooner
            model = network.make()
        contender = BUILDERS[name](network, model)
        contender.autocast = network.autocast
    x, y = network.sample(batch, device)
    for _ in range(2):
        for prepare in contender.at.values():
            prepare()
            contender.step(x, y, nothing)
    return contender, x, y

"""A bound on the step that is measured: η² dᵀFd, with the Fisher of the rows at hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kfac2.kinds import Call, Layer
from kfac2.statistics import Pass

Direction = Callable[[Tensor], Tensor | None]


class KeptUse(NamedTuple):
    """What is kept of a use until the step is known: the first samples of its input and output gradient."""

    layer: Layer
    x: Tensor
    g: Tensor
    samples: int
    call: Call


class KeptPass(NamedTuple):
    """What is kept of a pass.

    Attributes:
        uses: of its layers.
        samples: how many samples were kept.
        cases: M of these.
    """

    uses: list[KeptUse]
    samples: int
    cases: float


def kept_of(passed: Pass, share: float = 0.25, least: int = 32) -> KeptPass:
    """Keep a share of the samples of a pass, and at least so many."""
    whole = passed.samples
    count = min(whole, max(least, int(whole * share)))
    uses = []
    for use in passed.uses:
        x, g, samples = use.x, use.g, use.samples
        if count < whole and samples > 1:
            samples = max(1, samples * count // whole)
            x, g = x[:samples], g[:samples].clone()  # without the clone all of g would stay
        uses.append(KeptUse(use.layer, x, g * passed.scale if passed.scale != 1 else g, samples, use.call))
    return KeptPass(uses, count, passed.cases * count / whole)


def divergence(passes: Sequence[KeptPass], direction: Direction) -> Tensor:
    """Return dᵀFd = 1/M Σ_n (Σ_i s_ni)², s_ni = Σ_t g_ntᵀ D_i ā_nt: twice the divergence that a step d would bring.

    D_i ā_nt is what the layer makes of its input with D_i in place of its weight: one product for each layer. All
    layers are coupled, where the KL clip sees each for itself. A layer whose leading size is no multiple of the batch
    counts for itself here, too.

    Args:
        passes: kept rows of this iteration.
        direction: gives d of a parameter; None where it does not move.

    Returns:
        float64, one number on the device.
    """
    total, cases = None, 0.0
    for kept in passes:
        cases += kept.cases
        products = []
        for use in kept.uses:
            weight, bias = direction(use.layer.weight), None if use.layer.bias is None else direction(use.layer.bias)
            if weight is None:
                continue
            moved = use.call.repeated(use.x.to(weight.dtype), weight, bias)
            s = (moved * use.g.to(weight.dtype)).reshape(use.samples, -1).sum(1).double()
            if use.samples % kept.samples:
                total = s.square().sum() if total is None else total + s.square().sum()
            else:
                products.append(s.reshape(kept.samples, -1).sum(1))
        if products:
            square = torch.stack(products).sum(0).square().sum()
            total = square if total is None else total + square
    assert total is not None
    return total / cases


class Bound:
    """The factor that holds the step to the bound. It falls at once, and rises slowly.

    Attributes:
        factor: by which the learning rate is multiplied: a number, or on a CUDA device a tensor, so that nothing waits.
        squared: the last measurement, or None.
    """

    RISE = 1.5  # the factor grows by this at most from one measurement to the next

    def __init__(self) -> None:
        self.factor: float | Tensor = 1.0
        self.squared: Tensor | None = None

    def go_on_with(self, factor: float) -> None:
        """Take a factor, to where a CUDA graph reads the last one."""
        if isinstance(self.factor, Tensor):
            self.factor.fill_(factor)
        else:
            self.factor = factor

    def measured(self, squared: Tensor, bound: float, at_once: bool) -> None:
        """Take a measurement into account.

        Args:
            squared: η² dᵀFd of the step as it would be with the factor 1.
            bound: K.
            at_once: whether the host may wait for it.
        """
        self.squared = squared
        wanted = (bound / squared.clamp(min=1e-300)).sqrt().nan_to_num(nan=1.0).clamp(max=1.0)
        if at_once:
            self.factor = min(float(wanted), self.RISE * float(self.factor))
        elif isinstance(self.factor, Tensor):  # where a CUDA graph reads it
            self.factor.copy_(torch.minimum(wanted.to(self.factor), self.RISE * self.factor))
        else:
            self.factor = wanted.clamp(max=self.RISE * self.factor).float()

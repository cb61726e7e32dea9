"""What holds a step: a measured divergence, and a share of each layer's weights."""

from __future__ import annotations

import torch
from torch import Tensor


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

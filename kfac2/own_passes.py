"""Forward passes of statistics: those that are trained with, or passes of their own, of some of the samples."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kfac2.curvature import Curvature
from kfac2.likelihood import Prediction
from kfac2.running_statistics import without_running_statistics

Predict = Callable[[slice], Prediction]


class Passes:
    """Collects passes of either kind.

    Args:
        curvature: of the model.

    Attributes:
        are_own: whether the last one was a pass of its own, so that no other forward pass is looked at.
    """

    def __init__(self, curvature: Curvature) -> None:
        self._curvature = curvature
        self.are_own = False

    def collect(self, distribution: Prediction, mask: Tensor | None, is_summed: bool) -> None:
        """Collect a forward pass that is trained with, see `Curvature.collect`."""
        had_own, self.are_own = self.are_own, False
        if had_own:
            self._curvature.collector.captures.turn(True)
        try:
            self._curvature.collect(distribution, mask, is_summed=is_summed)
        except ValueError as error:
            if not had_own:
                raise
            raise ValueError(
                f"{error}. The last call was given a function, so that the forward passes since then were not looked "
                "at; those from now on are"
            ) from error

    def collect_own(self, predict: Predict, mask: Tensor | None, samples: int, count: int, is_summed: bool) -> None:
        """Make a forward pass of evenly spaced samples, since those of a batch may be sorted, and collect it.

        Args:
            predict: makes it.
            mask: of all samples, or None.
            samples: how many there are.
            count: how many of them it has.
            is_summed: see `Curvature.collect`.
        """
        stride = samples // count
        part = slice(0, count * stride, stride)
        captures = self._curvature.collector.captures
        captures.turn(True)
        captures.has_loss = False
        with without_running_statistics(self._curvature.handled.model):  # checkpoints run again as it is differentiated
            try:
                with torch.enable_grad():
                    prediction = predict(part)
            finally:  # no other forward pass is looked at from now on
                self.are_own = captures.has_loss = True
                captures.turn(False)
            of_part = None if mask is None else mask[part]
            self._curvature.collect(prediction, of_part, has_loss=False, is_summed=is_summed)

"""Forward passes of statistics: those that are trained with, or passes of their own, of some of the samples."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from kfac2.curvature import Curvature
from kfac2.draws import drawn_apart
from kfac2.likelihood import Prediction
from kfac2.options import check_option
from kfac2.running_statistics import without_running_statistics
from kfac2.schedule import Schedule

Predict = Callable[[slice], Prediction]


class Passes:
    """Collects passes of either kind.

    Args:
        curvature: of the model.
        schedule: what each iteration wants.
    """

    def __init__(self, curvature: Curvature, schedule: Schedule) -> None:
        self._curvature = curvature
        self._schedule = schedule

    def collect(self, of: Prediction | Predict, mask: Tensor | None, samples: int | None) -> None:
        """Collect a pass of this iteration; its rows are only kept where no statistics are wanted.

        Args:
            of: the distribution that a forward pass has predicted; or a function that makes a pass of its own.
            mask: of all samples, or None.
            samples: how many there are, with a function.
        """
        is_summed = self._schedule.wants_statistics
        changes_nothing = not is_summed and self._schedule.own_steps.only_looks
        with drawn_apart(torch.initial_seed(), self._schedule.iteration) if changes_nothing else nullcontext():
            if callable(of):
                check_option("samples", samples, int, lambda v: v >= 1, "an int of at least 1 with a function")
                self._collect_own(of, mask, samples, is_summed)  # type: ignore[arg-type]
            else:
                self._collect_trained(of, mask, is_summed)

    def _collect_trained(self, distribution: Prediction, mask: Tensor | None, is_summed: bool) -> None:
        """Collect a forward pass that is trained with, see `Curvature.collect`."""
        had_own, self._schedule.has_own_passes = self._schedule.has_own_passes, False
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

    def _collect_own(self, predict: Predict, mask: Tensor | None, samples: int, is_summed: bool) -> None:
        """Make a forward pass of evenly spaced samples, since those of a batch may be sorted, and collect it."""
        count = min(samples, self._schedule.own_steps.part(samples))
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
                self._schedule.has_own_passes = captures.has_loss = True
                captures.turn(False)
            of_part = None if mask is None else mask[part]
            self._curvature.collect(prediction, of_part, has_loss=False, is_summed=is_summed)

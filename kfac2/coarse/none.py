"""One level: no coarse space."""

from __future__ import annotations

from torch import Tensor

from kfac2.coarse.base import CoarseSpace
from kfac2.layout import Layout
from kfac2.statistics import Averages, Pass, Sums


class NoSpace(CoarseSpace):
    """Plain K-FAC: sums nothing, and leaves the fine directions as they are."""

    per_layer = 0

    def add(self, layout: Layout, sums: Sums, passed: Pass) -> None:
        """Add nothing."""

    def averaged(self, layout: Layout, averages: Averages, sums: Sums, kept: float) -> tuple[Tensor, ...]:
        """Return nothing."""
        return ()

    def without(self, layout: Layout, averages: tuple[Tensor, ...], number: int) -> tuple[Tensor, ...]:
        """Return nothing."""
        return ()

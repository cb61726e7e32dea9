"""How several processes that train one model share the work of the statistics and of the inverses."""

from __future__ import annotations

from abc import ABC, abstractmethod

from kfac2.fine import Fields
from kfac2.layout import Stacks
from kfac2.statistics import Sums


class Processes(ABC):
    """The processes that train one model, each on its own part of every batch."""

    @abstractmethod
    def add_up(self, sums: Sums) -> Sums:
        """Return the sums of all processes."""

    @abstractmethod
    def owns(self, batch: int) -> bool:
        """Tell whether this process inverts a batch of the layout."""

    @abstractmethod
    def share(self, fields: Fields, status: Stacks) -> tuple[Fields, Stacks]:
        """Return fields and status of all batches, given those of the batches that this process owns."""

    @abstractmethod
    def agree(self, flag: bool) -> bool:
        """Tell whether the flag is set in any process, so that all decide alike."""

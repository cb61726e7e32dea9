"""How several processes that train one model share the work of the statistics and of the inverses."""

from __future__ import annotations

from abc import ABC, abstractmethod

from kfac2.statistics import Sums


class Processes(ABC):
    """The processes that train one model, each on its own part of every batch."""

    @abstractmethod
    def add_up(self, sums: Sums) -> Sums:
        """Return the sums of all processes."""

    @abstractmethod
    def agree(self, flag: bool) -> bool:
        """Tell whether the flag is set in any process, so that all decide alike."""

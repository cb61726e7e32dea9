"""One process."""

from __future__ import annotations

from kfac2.fine import Fields
from kfac2.layout import Stacks
from kfac2.processes.base import Processes
from kfac2.statistics import Sums


class Alone(Processes):
    """All work is its own."""

    def add_up(self, sums: Sums) -> Sums:
        """Return the sums."""
        return sums

    def owns(self, batch: int) -> bool:
        """Return True."""
        return True

    def share(self, fields: Fields, status: Stacks) -> tuple[Fields, Stacks]:
        """Return what was given."""
        return fields, status

    def agree(self, flag: bool) -> bool:
        """Return the flag."""
        return flag

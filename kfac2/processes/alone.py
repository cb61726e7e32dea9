"""One process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

from torch import distributed

from kfac2.processes.base import Processes, Told


class Alone(Processes):
    """All work is its own.

    Args:
        as_asked: whether `process_group=None` said so; else there were no other processes when the optimizer was built.
    """

    def __init__(self, as_asked: bool = False) -> None:
        self._as_asked = as_asked

    def labels(self, moment: int, number: int) -> AbstractContextManager[None]:
        """Do nothing: labels are drawn from torch's global generator."""
        return nullcontext()

    def meet(self, occasion: str, facts: Callable[[], Mapping[str, object]], own: Mapping[str, float]) -> Told:
        """Return its own numbers; check that there is still no other process that it does not know of."""
        if not self._as_asked and world_size() > 1:
            raise RuntimeError(
                f"the optimizer was built before torch.distributed had its {world_size()} processes, so that it would "
                "train in one: call init_process_group first, or give process_group=None if that is what you want"
            )
        return Told({name: [value] for name, value in own.items()})

    def check_alike(self, facts: Callable[[], Mapping[str, object]]) -> None:
        """Do nothing: there is nothing to compare with."""


ALONE = Alone(as_asked=True)


def world_size() -> int:
    """Return how many processes torch.distributed has; 1 where there is no group."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1

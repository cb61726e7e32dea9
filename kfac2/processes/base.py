"""How the processes that train one model, each on its own part of every batch, work as one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

from torch import Tensor

Part = object  # some of the processes, as `Processes.parts` has made them a group; None: all of them


class Told(NamedTuple):
    """What the processes have told each other at a meeting.

    Attributes:
        numbers: by name, one for each rank.
    """

    numbers: Mapping[str, Sequence[float]]

    def any(self, name: str) -> bool:
        """Tell whether a number is not 0 on any rank."""
        return any(self.numbers[name])

    def all(self, name: str) -> bool:
        """Tell whether a number is not 0 on all ranks."""
        return all(self.numbers[name])


class Processes(ABC):
    """The processes that train one model.

    A *meeting* is an iteration in which they talk to each other. All know beforehand which is the next one, so that
    none waits for another that does not come; between two meetings none says a word.

    One that is alone has nobody to add up with, or to send to: nobody asks it to.

    Attributes:
        rank: of this process among them.
        size: how many there are.
        seed: that labels are drawn with; None: they are drawn from torch's global generator.
    """

    rank: int = 0
    size: int = 1
    seed: int | None = None

    @property
    def is_alone(self) -> bool:
        """Whether there is no other process."""
        return self.size == 1

    @abstractmethod
    def labels(self, moment: int, number: int) -> AbstractContextManager[None]:
        """Draw numbers inside of this that no other process draws, nor this one at another time.

        Args:
            moment: the iteration.
            number: counts the draws of an iteration.
        """

    @abstractmethod
    def meet(self, occasion: str, facts: Callable[[], Mapping[str, object]], own: Mapping[str, float]) -> Told:
        """Tell each other some numbers: one message of a few of them, whatever the model.

        Args:
            occasion: a word of `group.OCCASIONS`.
            facts: gives what must be the same in all processes, see `check_alike`; one that is alone does not ask.
            own: what may differ.

        Raises:
            RuntimeError: in all processes, if the occasion or a fact is another in one of them; or, if these are not
                all processes any more.
        """

    @abstractmethod
    def check_alike(self, facts: Callable[[], Mapping[str, object]]) -> None:
        """Check that facts are the same in all processes; a ValueError names those that are not, and their values.

        Args:
            facts: gives them by name, what `pickle` takes; they are the same if they print alike.
        """

    # -- where there are several ------------------------------------------------------------------------------

    def added(self, what: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Add up tensors of all processes, one message for each dtype; all get the same bits.

        Args:
            what: for errors.
            tensors: of the same shapes and dtypes in all processes.
        """
        raise NotImplementedError

    def parts(self, ranks: Sequence[Sequence[int]]) -> Part:
        """Make groups of some processes each, that `send` takes; all processes call it together, with the same.

        Args:
            ranks: of each group; each process is in one of them.

        Returns:
            The group that this process is in.

        Raises:
            ValueError: if there are further processes, which would have to take part.
        """
        raise NotImplementedError

    def send(self, what: str, flat: Tensor, owner: int, part: Part = None) -> Callable[[], None]:
        """Begin to send a tensor of one process to others, in place; return what waits for it.

        Args:
            what: for errors.
            flat: what is sent, or where it is received; of one size in all processes.
            owner: the rank that sends, among all.
            part: those it is sent to, of `parts`; None: all. They call it in the same order.
        """
        raise NotImplementedError

"""What was found, skipped and not yet reported; and whether a captured CUDA graph still holds."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor


class Health:
    """The one place that knows what went wrong, and who has been told.

    The rules:

    - A step that comes upon a NaN or an infinity changes nothing but the iteration count. The kernels decide that on
      the device: they write zeros into all gradients, and count the step in `skipped`.
    - On a CPU each step is reported at once. On a CUDA device an ordinary step reads nothing back; what it found is
      reported at the end of the next step that takes statistics, or by `check`. That step looks once: its own flags
      come in the same copy, and decide whether its averages and inverses are committed.
    - An inverse that failed is replaced by the last one on the device. It is mended, and the warning given, when the
      host next looks: at once on a CPU.
    - Of steps that are skipped one after the other the first is told, then their number each time that it has doubled,
      and what has not been told by then when one is not skipped, or `check` asks.
    - Another warning that would come again and again is given once.
    - A captured CUDA graph holds the layout and the layers of the coarse space as they were at its capture. It is
      stale once either is another; new inverses do not make it so, since they are copied to where it reads them.

    Args:
        device: of the layers.

    Attributes:
        at_once: whether the host looks after each step.
        skipped: int64 on the device, (2,): the steps skipped since the last report, and the number of the first
            parameter whose gradient was not finite in the first of them.
        found: on the device, 1 where the last step came upon something that the host does not know of; else None.
    """

    def __init__(self, device: torch.device) -> None:
        self.at_once = device.type == "cpu"
        self.skipped = torch.zeros(2, dtype=torch.int64, device=device)
        self.found: Tensor | None = None
        self._captured: object | None = None
        self._warned: set[str] = set()
        self._streak = self._told = 0  # steps skipped one after the other, and how many of them were told
        self._lately = (0, "")  # iteration and cause of the last of them

    # -- reports --------------------------------------------------------------------------------------------

    def warn(self, message: str, stacklevel: int = 4) -> None:
        """Warn of something that the user has to know each time."""
        warnings.warn(f"kfac2: {message}", RuntimeWarning, stacklevel=stacklevel)

    def warn_once(self, key: str, message: str) -> None:
        """Warn of something that would be said again and again."""
        if key not in self._warned:
            self._warned.add(key)
            self.warn(message, stacklevel=5)

    def skip(self, iteration: int, cause: str) -> None:
        """Count a step that the host knows to be skipped, and warn unless that was just said.

        Args:
            iteration: of the step.
            cause: what was not finite.
        """
        self._count(
            1, iteration, cause, f"a NaN or an infinity in {cause} at iteration {iteration}; the step is skipped"
        )

    def _count(self, count: int, iteration: int, cause: str, first: str) -> None:
        self._streak += count
        self._lately = (iteration, cause)
        if not self._told:
            self._told = self._streak
            self.warn(first, stacklevel=6)
        elif self._streak >= 2 * self._told:
            self.tell_skipped()

    def tell_skipped(self) -> None:
        """Warn of skipped steps that were counted and not told."""
        if self._streak > self._told:
            self._told, (iteration, cause) = self._streak, self._lately
            self.warn(
                f"{self._streak} steps up to iteration {iteration} were skipped, lately for a NaN or an infinity in "
                f"{cause}",
                stacklevel=7,
            )

    def went_on(self) -> None:
        """Note that a step was not skipped: what was not told before is told now."""
        self.tell_skipped()
        self._streak = self._told = 0

    def take_skipped(self) -> tuple[int, int]:
        """Wait for the device; return how many steps were skipped, and the number of the first bad gradient; forget."""
        count, first = self.skipped.tolist()
        if count:
            self.skipped.zero_()
        self.found = None
        return count, first

    def report_skipped(self, iteration: int, name_of: Callable[[int], str]) -> int:
        """Wait for the device, and warn of steps that were skipped without a report.

        Args:
            iteration: that of now.
            name_of: names what was not finite by the number of the gradient.

        Returns:
            How many there were.
        """
        count, number = self.take_skipped()
        self.report(count, number, iteration, name_of)
        return count

    def report(self, count: int, number: int, iteration: int, name_of: Callable[[int], str]) -> None:
        """Warn of steps before this iteration that were skipped, now that the host knows of them.

        Args:
            count: how many, maybe none.
            number: of what was not finite in the first of them.
            iteration: that of now.
            name_of: names it by that number.
        """
        if count:
            cause, skipped = name_of(number), f"{count} steps before iteration {iteration} were skipped"
            self._count(count, iteration - 1, cause, f"{skipped}; the first for a NaN or an infinity in {cause}")
        elif not self.at_once:
            self.went_on()

    def move(self, device: torch.device) -> None:
        """Go on with another device, what was found and said before still known."""
        self.at_once = device.type == "cpu"
        self.skipped = self.skipped.to(device)
        self.found = None

    def forget(self) -> None:
        """Forget what a run has found that is given up for another state."""
        self.skipped.zero_()
        self.found = None
        self._streak = self._told = 0

    # -- CUDA graphs ----------------------------------------------------------------------------------------

    @property
    def is_captured(self) -> bool:
        """Whether a CUDA graph may read the inverses where they are."""
        return self._captured is not None

    def capture(self, held: object) -> None:
        """Note what a graph that is captured now holds."""
        self._captured = held

    def is_stale(self, held: object) -> bool:
        """Tell whether a captured graph holds something else than is so now."""
        return self._captured is not None and self._captured != held


def read_together(**flags: Tensor | None) -> dict[str, list[float]]:
    """Read small tensors of one device in one copy, and with one wait; of one that is None there is nothing."""
    there = {name: flag.reshape(-1).double() for name, flag in flags.items() if flag is not None}
    numbers = iter(torch.cat([*there.values()]).tolist())
    return {name: [next(numbers) for _ in range(len(there.get(name, ())))] for name in flags}


def is_capturing(device: torch.device) -> bool:
    """Tell whether a CUDA graph is being captured, so that nothing runs yet."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()

"""What a second level that takes steps of its own asks of an iteration."""

from __future__ import annotations


class OwnSteps:
    """Asks for nothing: all steps are one level's."""

    reads_gradients = False
    """Whether the gathered gradients of an iteration are read after it; else they are let go."""

    @property
    def waits(self) -> bool:
        """Whether an iteration whose step is ordinary is looked at all the same."""
        return False

    @property
    def only_looks(self) -> bool:
        """Whether the rows that are wanted now change nothing but what is known of such steps."""
        return False

    def wants_step(self, iteration: int) -> bool:
        """Tell whether an iteration's rows are wanted, for a step of its own or to see what one would be like."""
        return False

    def part(self, samples: int) -> int:
        """Return how many of so many samples a forward pass of statistics has, if it is one of its own."""
        return samples

    def decide(self) -> None:
        """Called when statistics were taken, which waits for the device, and the step was not skipped."""

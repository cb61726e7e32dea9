"""Passes whose loss has not gone backward yet: a batch that is thrown away takes its statistics with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kfac2.capture import Trace
from kfac2.divergence import KeptPass
from kfac2.kinds import Layer
from kfac2.statistics import Pass, Sums


@dataclass
class Pending:
    """What a call of `accumulate_fisher` has left.

    Attributes:
        traces: of the uses in its graph.
        sums: its sums.
        kept: what is kept of its rows, or nothing.
        bad: what was not finite, so that there are no sums; or None.
        has_loss: whether it is the forward pass of a loss; one of its own counts in any case.
    """

    traces: list[Trace]
    sums: Sums = field(default_factory=Sums)
    kept: list[KeptPass] = field(default_factory=list)
    bad: str | None = None
    has_loss: bool = True

    @property
    def went_backward(self) -> bool:
        """Whether a backward pass of the user's has come by any of the uses."""
        return any(trace.went_backward for trace in self.traces)


def that_count(pending: Sequence[Pending], warn_once: Callable[[str, str], None]) -> list[Pending]:
    """Return those whose loss has gone backward; where none has, all: the loss then has a forward pass of its own."""
    gone = [one for one in pending if one.went_backward or not one.has_loss]
    if pending and not gone:
        warn_once(
            "apart",
            "no backward pass has come by the forward passes of accumulate_fisher; their statistics count all the "
            "same, those of a batch that was thrown away, too",
        )
    return gone or list(pending)


def misfit(passed: Pass, layer: Layer) -> str:
    """Say which rows do not fit the samples of a pass, and what follows."""
    size = passed.by_layer()[layer][0].samples
    return (
        f"{layer.title} has rows that do not belong to the {passed.samples} samples one by one (leading "
        f"size {size}); it keeps its own block, and is out of the coarse space where that is so. If another axis "
        "counts the samples, say batch_dim="
    )

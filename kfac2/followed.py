"""The layers that are followed: their captures, how their rows are checked, and which have to leave."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from kfac2.capture import Capture, Captures
from kfac2.kinds import Layer
from kfac2.processes import ALONE, Processes
from kfac2.self_check import Reached, SelfCheck
from kfac2.statistics import Use


class Followed:
    """Layers whose uses are captured; one whose rows are wrong, or cannot be made, leaves.

    Args:
        layers: the layers to watch.
        follow_backward: whether the ordinary backward pass brings the gradients (the empirical Fisher).
        drop: called with a layer that has to leave, and why.
        batch_dim: the axis of samples of what has positions.
        check_every: passes from one self-check to the next; 0: none.
        processes: that train together. Where there are several, a layer that has to leave waits for their meeting.

    Attributes:
        captures: the uses captured so far.
        batch_dim: as above.
        check: the self-check.
        leaving: layers that wait, and why; they have no rows any more.
        all: the layers, those that wait among them.
        processes: as above.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        follow_backward: bool,
        drop: Callable[[Layer, str], None],
        batch_dim: int = 0,
        check_every: int = 100,
        processes: Processes = ALONE,
    ) -> None:
        self.captures = Captures(layers, follow_backward)
        self.batch_dim = batch_dim
        self.check = SelfCheck(check_every)
        self.leaving: dict[Layer, str] = {}
        self.all = list(layers)
        self.processes = processes
        self._drop = drop

    @property
    def layers(self) -> list[Layer]:
        """The layers that have rows."""
        return [layer for layer in self.all if layer not in self.leaving] if self.leaving else self.all

    def follow(self, layers: Sequence[Layer]) -> None:
        """Watch these layers from now on."""
        self.all = list(layers)
        self.leaving = {layer: reason for layer, reason in self.leaving.items() if layer in self.all}
        self.captures.follow(layers)

    def in_order(self, uses: Sequence[Use]) -> list[Use]:
        """Sort uses by layer; those of one stay in the order of the forward pass."""
        order = {layer: number for number, layer in enumerate(self.layers)}
        return sorted(uses, key=lambda use: order[use.layer])

    def why_no_rows(self, capture: Capture) -> str | None:
        """Return why no rows can be made of a capture, or None."""
        if capture.x._version != capture.version:
            return "its input was overwritten in place before its statistics were taken"
        return capture.layer.reason_against(capture.call)

    def leave(self, failed: Mapping[Layer, str]) -> None:
        """Let layers leave whose rows do not rebuild their gradient, each with the reason."""
        for layer, reason in failed.items():
            self._leaves(layer, reason)

    def leave_without_rows(self, captures: Sequence[Capture]) -> None:
        """Let layers leave of which there is a capture that gives no rows."""
        for capture in captures:
            reason = self.why_no_rows(capture)
            if reason is not None:
                self._leaves(capture.layer, reason)

    def that_give_rows(self, reached: Reached) -> list[tuple[Capture, Tensor]]:
        """Return the captures of which rows can be made; a layer that has another one leaves."""
        self.leave_without_rows([capture for capture, _ in reached])
        return [(capture, g) for capture, g in reached if capture.layer in self.layers]

    def _leaves(self, layer: Layer, reason: str) -> None:
        if layer not in self.layers:
            return
        if self.processes.is_alone:
            self._drop(layer, reason)
        else:
            self.leaving[layer] = reason

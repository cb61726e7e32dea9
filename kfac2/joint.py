"""What the curvatures of all processes agree on and add up; one that is alone goes the same way by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from kfac2.collector import Collector
from kfac2.estimates import Estimates
from kfac2.exchange import exchanged
from kfac2.fine import ObservingSolver
from kfac2.handled import Handled
from kfac2.inverses import Inverses
from kfac2.iteration import Iteration
from kfac2.kinds import Layer
from kfac2.options import CurvatureOptions
from kfac2.processes import Told, checksum
from kfac2.shared_inverses import whole

Facts = Callable[[], Mapping[str, object]]
"""Gives what must be the same in all processes, by name; asked only where there are several."""


class Parts(Protocol):
    """What a process brings: a `Curvature`."""

    options: CurvatureOptions
    handled: Handled
    estimates: Estimates
    collector: Collector
    iteration: Iteration

    def collect_backward(self) -> None:
        """Sum up ordinary backward passes."""

    def drop(self, layer: Layer, reason: str = "") -> None:
        """Leave a layer alone."""


class Joint:
    """What one curvature does together with those of the other processes.

    Args:
        own: that of this process.
    """

    def __init__(self, own: Parts) -> None:
        self._own = own

    def facts(self) -> dict[str, object]:
        """Return what must be the same in all processes, by name."""
        own, params, estimates = self._own, self._own.handled.params, self._own.estimates
        return {
            **own.options.as_dict(),
            "share": estimates.solvers.division.share,
            "the list of layers": [(layer.name, layer.matrix_shape) for layer in estimates.layout.layers],
            "the list of parameters' shapes": [tuple(parameter.shape) for parameter in params],
            "the checksum of the parameters": checksum(params),
            "the number of statistics updates": estimates.averages.updates,
            "whether there are inverses": estimates.inverses is not None,
        }

    def meet(self, occasion: str, own: Mapping[str, float], facts: Facts = dict) -> Told:
        """Tell the other processes some numbers, see `Processes.meet`; these facts and `facts()` must be alike."""
        return self._own.estimates.solvers.processes.meet(occasion, lambda: {**self.facts(), **facts()}, own)

    def take(self, occasion: str, facts: Facts = dict, must_go_backward: bool = True) -> str | None:
        """Add up what this iteration has collected, over its passes and over all processes.

        Args:
            occasion: of the meeting of the processes.
            facts: what else must be alike.
            must_go_backward: see `Iteration.settle`.

        Returns:
            What is not finite in one of the passes of some process, so that nothing was added up; or None.
        """
        own, is_empirical = self._own, self._own.options.fisher == "empirical"
        bad = None if is_empirical else own.iteration.settle(must_go_backward)
        if self.meet(occasion, {"bad": bad is not None}, facts).any("bad"):
            return bad or "another process"
        if is_empirical:  # after the meeting, since processes rebuild gradients together
            own.collect_backward()
        if not own.estimates.solvers.processes.is_alone:
            self._add_up()
        return None

    def _add_up(self) -> None:
        """Add up the sums of all processes; a layer that leaves in one of them leaves in all."""
        iteration, reasons, estimates = self._own.iteration, self._own.collector.leaving, self._own.estimates
        observes = isinstance(estimates.solvers.fine, ObservingSolver) and estimates.inverses is not None
        own = iteration.sums, estimates.solvers.coarse, observes, reasons, bool(iteration.kept)
        sums, leaving, has_kept = exchanged(estimates.solvers.processes, estimates.layout, *own)
        kept = iteration.kept
        for layer in leaving:
            self._own.drop(layer, reasons.get(layer, "its rows were found to be wrong in another process"))
        iteration.sums, iteration.kept, iteration.others_kept = sums, kept, has_kept

    def whole_inverses(self) -> Inverses | None:
        """Return the inverses of all layers; where each process holds its own, all call it together."""
        own = self._own.estimates
        if own.inverses is None or own.solvers.division.holds_all:
            return own.inverses
        self.meet("state_dict", {})
        return whole(own.inverses, own.layout, own.solvers)

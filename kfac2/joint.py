"""What a curvature does together with those of the other processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol

from torch import nn

from kfac2.collector import Collector
from kfac2.exchange import alike, exchanged
from kfac2.fine import ObservingSolver
from kfac2.inverses import Inverses, Solvers
from kfac2.iteration import Iteration
from kfac2.kinds import Layer
from kfac2.layout import Layout
from kfac2.options import CurvatureOptions
from kfac2.processes import Told, checksum
from kfac2.shared_inverses import whole
from kfac2.statistics import Averages


class Parts(Protocol):
    """What it is made of: a `Curvature`."""

    options: CurvatureOptions
    params: list[nn.Parameter]
    solvers: Solvers
    layout: Layout
    averages: Averages
    inverses: Inverses | None
    collector: Collector
    iteration: Iteration

    def collect_backward(self) -> None:
        """Sum up ordinary backward passes."""

    def drop(self, layer: Layer, reason: str = "") -> None:
        """Leave a layer alone."""


class Joint:
    """Adds up, compares and collects; alone, it does what there is to be done by itself."""

    @property
    def _parts(self) -> Parts:
        raise NotImplementedError

    def take(
        self,
        occasion: str,
        facts: Mapping[str, float] = MappingProxyType({}),
        describe: Callable[[], Mapping[str, object]] = dict,
        must_go_backward: bool = True,
    ) -> str | None:
        """Add up what this iteration has collected, over its passes and over all processes.

        Args:
            occasion: of the meeting of the processes.
            facts: further numbers that must be alike in all of them.
            describe: gives what is behind these.
            must_go_backward: see `Iteration.settle`.

        Returns:
            What is not finite in one of the passes of some process, so that nothing was added up; or None.
        """
        processes, is_empirical = self._parts.solvers.processes, self._parts.options.fisher == "empirical"
        processes.check()
        if processes.is_alone:
            if is_empirical:
                self._parts.collect_backward()
            return self._parts.iteration.settle(must_go_backward)
        bad = None if is_empirical else self._parts.iteration.settle(must_go_backward)
        found = self.meet(occasion, facts, {"bad": bad is not None}, describe)
        if found.any("bad"):
            return bad or "another process"
        if is_empirical:
            self._parts.collect_backward()
            self._parts.iteration.settle(must_go_backward)
        self._add_up()
        return None

    def meet(
        self,
        occasion: str,
        facts: Mapping[str, float],
        own: Mapping[str, float],
        describe: Callable[[], Mapping[str, object]] = dict,
    ) -> Told:
        """Tell the other processes some numbers, see `Processes.meet`; model, options, averages must be alike, too."""
        parts = self._parts
        has_inverses = parts.inverses is not None
        known = alike(parts.options, parts.layout, parts.params, parts.averages, has_inverses)
        return parts.solvers.processes.meet(
            occasion, {**known, **facts}, own, lambda: {**self.described(), **describe()}
        )

    def _add_up(self) -> None:
        """Add up the sums of all processes; a layer that leaves in one of them leaves in all."""
        parts, iteration, reasons = self._parts, self._parts.iteration, self._parts.collector.leaving
        observes = isinstance(parts.solvers.fine, ObservingSolver) and parts.inverses is not None
        own = iteration.sums, parts.solvers.coarse, observes, reasons, bool(iteration.kept)
        sums, leaving, has_kept = exchanged(parts.solvers.processes, parts.layout, *own)
        kept = iteration.kept
        for layer in leaving:
            parts.drop(layer, reasons.get(layer, "its rows were found to be wrong in another process"))
        iteration.sums, iteration.kept, iteration.others_kept = sums, kept, has_kept

    def described(self) -> dict[str, object]:
        """Return what must be the same in all processes, by name, for people."""
        return {
            **self._parts.options.as_dict(),
            "share": self._parts.solvers.division.share,
            "the list of layers": [(layer.name, layer.matrix_shape) for layer in self._parts.layout.layers],
            "the list of parameters' shapes": [tuple(parameter.shape) for parameter in self._parts.params],
            "the checksum of the parameters": checksum(self._parts.params),
            "the number of statistics updates": self._parts.averages.updates,
        }

    def _whole_inverses(self) -> Inverses | None:
        if self._parts.inverses is None or self._parts.solvers.division.holds_all:
            return self._parts.inverses
        self.meet("state_dict", {}, {})
        return whole(self._parts.inverses, self._parts.layout, self._parts.solvers)

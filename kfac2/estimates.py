"""The running averages and inverses of the layers: what they are now, and what comes next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from kfac2 import state
from kfac2.averaging import averaged
from kfac2.fine import Damping, ObservingSolver
from kfac2.health import Health
from kfac2.inverses import InPlace, Inverses, Solvers, inverted
from kfac2.kinds import Layer
from kfac2.layout import Layout
from kfac2.mending import mended, observed
from kfac2.options import CurvatureOptions
from kfac2.shared_inverses import inverted_together
from kfac2.statistics import Averages, Pass, Sums, Use, kept_share


class Estimates:
    """Owns the averages and inverses; what comes next lies beside them until it is committed.

    Args:
        layout: of the layers.
        options: as they are when something is made.
        solvers: that make inverses.
        health: is told what failed.

    Attributes:
        layout: of the layers now.
        averages: of now.
        inverses: in use, of the layers that `Division.held` says; None: there are none.
        solvers: as above.
    """

    def __init__(self, layout: Layout, options: CurvatureOptions, solvers: Solvers, health: Health) -> None:
        self.layout = layout
        self.averages = Averages.none(layout)
        self.inverses: Inverses | None = None
        self.solvers = solvers
        self._options = options
        self._health = health
        self._solved: tuple[Averages, float, float | None, Inverses] | None = None

    @property
    def looks_at_once(self) -> bool:
        """Whether the host looks at each number as it comes: on a CPU; and else one process might before others."""
        return self._health.at_once or not self.solvers.processes.is_alone

    def layers_that(self, seen: bool) -> list[Layer]:
        """Return the layers that have had rows; or those that have not."""
        return [layer for layer, had in zip(self.layout.layers, self.averages.seen, strict=True) if had == seen]

    def observe(self, passed: Pass, uses: Sequence[Use]) -> Tensor | None:
        """Let the solver that observes see all rows of a layer, in the basis that what it sees is averaged in."""
        fine = self.solvers.fine
        if not isinstance(fine, ObservingSolver) or self.inverses is None:
            return None
        self.mend()
        return fine.observe(self.layout, self.inverses.fields, passed, uses)

    # -- what comes next ------------------------------------------------------------------------------------

    def averaged(self, sums: Sums) -> tuple[Averages, Inverses | None]:
        """Return the averages with the sums of an iteration, and the inverses in use; commit neither.

        Args:
            sums: of the iteration, whose factors are let go as averages take their place; without any, all goes on.
        """
        averages, inverses = self.averages, self.inverses
        if not sums.A:
            return averages, inverses
        decay = self._options.stat_decay
        averages = averaged(self.layout, averages, sums, decay, self._options.follows_spread)
        kept = kept_share(averages.updates, decay)
        averages = replace(averages, coarse=self.solvers.coarse.averaged(self.layout, averages, sums, kept))
        if inverses is not None:
            inverses = observed(self.layout, inverses, self.solvers.fine, sums, decay)
        return averages, inverses

    def inverted(
        self, averages: Averages, last: Inverses | None, damping: Damping, place: InPlace | None = None
    ) -> Inverses:
        """Return inverses of averages, made here or shared out among processes; mended where the host looks at once.

        Args:
            averages: of the factors.
            last: the inverses so far.
            damping: of the blocks.
            place: new inverses take the place of the last, as nothing will come up for which the step is skipped.
        """
        options, solvers = self._options, self.solvers
        arguments = (averages, last, solvers, damping, options.coarse_damping, options.inverse_dtype)
        if solvers.division.is_everyones:
            new = inverted(self.layout, *arguments, place)
        else:
            new = inverted_together(self.layout, *arguments, self._health.warn_once, place)
        return self._mended(averages, new) if self.looks_at_once else new

    def inverted_for_solves(self, damping: float, commits: bool) -> Inverses:
        """Return mended inverses with a damping λ; the last ones where neither averages nor damping are others.

        Args:
            damping: λ.
            commits: whether they are the inverses in use from now on.
        """
        settings = (damping, self._options.coarse_damping)
        if self._solved is None or self._solved[0] is not self.averages or self._solved[1:3] != settings:
            new = self._mended(self.averages, self.inverted(self.averages, self.inverses, Damping(damping)))
            self._solved = (self.averages, *settings, new)
            if commits:
                self.commit(self.averages, new)
        return self._solved[3]

    def commit(self, averages: Averages, inverses: Inverses | None) -> None:
        """Go on with these; a CUDA graph finds the inverses where it has read the last ones."""
        self.averages = averages
        if inverses is not None and inverses is not self.inverses:
            pinned = self._health.is_captured and self.inverses is not None
            self.inverses = self.inverses.holding(inverses) if pinned else inverses  # type: ignore[union-attr]

    def mend(self) -> None:
        """Look at the inverses in use, and mend those that failed."""
        if self.inverses is not None:
            self.inverses = self._mended(self.averages, self.inverses)

    def _mended(self, averages: Averages, inverses: Inverses) -> Inverses:
        return mended(self.layout, averages, inverses, self.solvers, self._health.warn_once)

    # -- other layers, or elsewhere -------------------------------------------------------------------------

    def drop(self, layer: Layer) -> None:
        """Go on without a layer; the next inverses are new ones."""
        old, self.layout = self.layout, self.layout.without(layer)
        coarse = self.solvers.coarse.without(old, self.averages.coarse, old.number(layer))
        self.averages, self.inverses = self.averages.moved(old, self.layout, coarse), None

    def move(self, layout: Layout) -> bool:
        """Lie as another layout says; return whether the layers are the same, so that there still are inverses."""
        old, self.layout = self.layout, layout
        is_same = layout.layers == old.layers
        coarse = tuple(tensor.to(layout.device) for tensor in self.averages.coarse) if is_same else ()
        self.averages = self.averages.moved(old, layout, coarse)
        if self.inverses is not None:
            held = self.solvers.division.held(old), self.solvers.division.held(layout)
            self.inverses = self.inverses.moved(*held, self.solvers.fine) if is_same else None
        return is_same

    # -- state ----------------------------------------------------------------------------------------------

    def state(self, held: Layout, inverses: Inverses | None) -> dict[str, Any]:
        """Return what is saved, with inverses of the layers of `held`."""
        in_coarse = zip(self.layout.layers, self.averages.in_coarse, strict=True)
        return {
            "layers": {layer.name: {"in_coarse": inside} for layer, inside in in_coarse},
            "statistics": state.from_averages(self.layout, self.averages, self.solvers),
            "inverses": state.from_inverses(held, inverses, self.layout),
        }

    def load(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        inverses = state.to_inverses(saved["inverses"], self.layout, self.solvers)
        self.commit(state.to_averages(saved, self.layout, self.solvers), inverses)
        if inverses is None:
            self.inverses = None

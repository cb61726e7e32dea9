"""One update of the gradients: inverses, the step, and the one look at what the device has found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from kfac2.change_limit import ChangeLimit, Limits
from kfac2.curvature import Curvature
from kfac2.health import read_together
from kfac2.inverses import InPlace, Inverses
from kfac2.ops.shift_and_scale import ShiftAndScale
from kfac2.options import Options
from kfac2.schedule import Schedule
from kfac2.statistics import Averages, FirstBad
from kfac2.step import Gathered, Step


class _Found(NamedTuple):
    """What the host has read of gradients that were written.

    Attributes:
        bad: what is not finite, or None.
        is_blocked: whether new inverses were to be written over the last ones, which stand.
        has_failed: whether an inverse failed, as far as the host knows.
    """

    bad: str | None = None
    is_blocked: bool = False
    has_failed: bool = True


class Update:
    """Writes the new gradients of an iteration, and commits what they were made with where the step is taken.

    On a CPU the host looks after each step, on a CUDA device where statistics come: once, at the end. Steps that were
    skipped before, gradients, sums and directions that are not finite, inverses that failed: their flags are one copy.

    Args:
        curvature: of the model.
        options: of the step.
        schedule: says what is due.

    Attributes:
        scale: on the device, ν of the last step, and the sum that it bounds.
        change_limit: of each layer's direction.
    """

    def __init__(self, curvature: Curvature, options: Options, schedule: Schedule) -> None:
        self.scale = torch.ones(2, dtype=torch.float64, device="cpu")
        self.change_limit = ChangeLimit()
        self._curvature = curvature
        self._options = options
        self._schedule = schedule

    def run(
        self,
        step: Step,
        gathered: Gathered,
        rates: Sequence[float | Tensor],
        capturing: bool,
    ) -> str | None:
        """Write the new gradients, and commit.

        Args:
            step: of the layers.
            gathered: their gradients.
            rates: η_i by layer.
            capturing: whether a CUDA graph of the step is captured.

        Returns:
            What the host finds not finite, so that nothing was committed; or None.
        """
        bad = self._bad_before(step, gathered)
        if bad is not None:
            return bad
        curvature, health = self._curvature, self._curvature.health
        has_new = bool(curvature.iteration.sums.A)
        looks = health.at_once or has_new
        if looks:
            curvature.estimates.mend()  # inverses that were made since the host last looked
        sums = curvature.iteration.sums.first_bad() if looks and not curvature.estimates.looks_at_once else None
        wants_inverses = self._schedule.wants_inverses
        place = self._place(step, gathered, sums, looks) if wants_inverses else None
        averages, last = curvature.estimates.averaged(curvature.iteration.sums)
        has_factors = averages.updates > 0 and bool(curvature.layout.layers)
        new = self._schedule.damping(averages) if wants_inverses and has_factors else None
        if last is None and new is None:  # no layer is left: plain SGD
            first = int(gathered.first_bad)
            return curvature.source(first) if first < step.none_bad else None
        if capturing:
            health.capture((step, averages.in_coarse))
        limits = self.change_limit.prepared(curvature.layout, self._options.max_change, averages.seen, has_new)
        while True:
            inverses = last if new is None else curvature.estimates.inverted(averages, last, new, place)
            assert inverses is not None
            result = self._write(step, gathered, rates, averages, inverses, limits)
            self.scale, health.found = result.scale, None if looks else result.found
            found = self._read(gathered, result, inverses, place, sums) if looks else _Found()
            if found.bad is not None:
                curvature.estimates.mend()
                return found.bad
            if not found.is_blocked:
                break
            place = None  # it is taken all the same: again, with new inverses beside the last ones
        if inverses.failed is not None and not found.has_failed:
            inverses = replace(inverses, failed=None)
        curvature.estimates.commit(averages, inverses)
        self.change_limit.commit(limits, result.norms)
        if looks and found.has_failed:
            curvature.estimates.mend()
        return None

    def look(self) -> int:
        """Wait for the device, without an update; warn of the steps that were skipped before, and mend inverses.

        Returns:
            How many steps those are.
        """
        count = self._curvature.health.report_skipped(self._schedule.iteration, self._curvature.source)
        self._curvature.estimates.mend()
        return count

    def _bad_before(self, step: Step, gathered: Gathered) -> str | None:
        """Name what the host finds not finite before the step is computed; all processes find the same."""
        curvature = self._curvature
        bad = curvature.iteration.sums.not_finite() if curvature.estimates.looks_at_once else None
        if bad is None and (number := step.bad_elsewhere(gathered)) is not None:
            bad = curvature.source(number)
        return bad

    def _place(self, step: Step, gathered: Gathered, sums: FirstBad | None, looks: bool) -> InPlace | None:
        """Return where new inverses are written: over the last ones, unless the step may be skipped."""
        if not looks:
            return InPlace(None)
        place = step.room(gathered)
        if place is None or place.blocked is None:
            return None
        if self._curvature.estimates.looks_at_once:
            return None if bool(place.blocked) else place._replace(blocked=None)
        return place if sums is None else place._replace(blocked=place.blocked | sums.is_bad)

    def _write(
        self,
        step: Step,
        gathered: Gathered,
        rates: Sequence[float | Tensor],
        averages: Averages,
        inverses: Inverses,
        limits: Limits | None,
    ) -> ShiftAndScale:
        """Write the gradients; commit nothing."""
        curvature, options = self._curvature, self._options
        return step.write(
            gathered,
            inverses,
            curvature.solvers,
            averages.in_coarse,
            options.coarse_weight,
            self._schedule.now("kl_clip"),
            rates,
            curvature.health.skipped,
            None if limits is None else limits.values,
            options.step_precision,
        )

    def _read(
        self,
        gathered: Gathered,
        result: ShiftAndScale,
        inverses: Inverses,
        place: InPlace | None,
        sums: FirstBad | None,
    ) -> _Found:
        """Wait for the device, once; tell of the steps that were skipped before."""
        curvature, health = self._curvature, self._curvature.health
        told = read_together(
            skipped=health.skipped,
            found=result.found,
            number=gathered.first_bad,
            sums=None if sums is None else sums.number,
            blocked=None if place is None else place.blocked,
            failed=inverses.failed,
        )
        (count, first), is_bad = told["skipped"], bool(told["found"][0])
        if count:
            health.skipped.zero_()
        if not health.at_once:
            health.report(int(count) - is_bad, int(first), self._schedule.iteration, curvature.source)
        bad = curvature.source(int(told["number"][0])) if is_bad else None
        if sums is not None:
            bad = sums.name(int(told["sums"][0])) or bad
        return _Found(bad, any(told["blocked"]), any(told["failed"]))

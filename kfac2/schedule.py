"""What an iteration wants: statistics, rows, inverses; and which forward passes are looked at for it."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from kfac2 import spread
from kfac2.curvature import Curvature
from kfac2.fine import Damping
from kfac2.options import Options
from kfac2.own_steps import OwnSteps
from kfac2.statistics import Averages, kept_share

FURTHEST = 1000  # iterations from one meeting of processes to the next, at most
LOOKING = 100  # iterations in a row that look for the first use of a layer without statistics


class Schedule:
    """Counts iterations and decides.

    Args:
        curvature: of the model: what there is so far.
        options: the intervals and the damping.

    Attributes:
        iteration: k, from 0.
        most_damping: a relative damping is at most this.
        meeting: the iteration in which several processes meet next; before it nothing is due that they must all do.
            None: this one is alone.
        own_steps: what a second level that takes steps of its own asks of an iteration.
        has_own_passes: whether statistics come from forward passes of their own: no other one is looked at then.
    """

    def __init__(self, curvature: Curvature, options: Options) -> None:
        self.iteration = 0
        self.most_damping = math.inf
        self.meeting: int | None = None
        self.own_steps = OwnSteps()
        self.has_own_passes = False
        self._curvature = curvature
        self._options = options
        self._due = True
        self._looking_since = 0

    def now(self, name: str) -> Any:
        """Return an option of this iteration."""
        return self._options.at(name, self.iteration)

    def go_on_at(self, iteration: int) -> None:
        """Begin an iteration. Its forward passes come first: whether they are looked at, and why, is settled now."""
        self.iteration = iteration
        self._due = self.meets and iteration % self.now("cov_every") == 0
        self._curvature.collector.captures.turn(self._looks and not self.has_own_passes)

    @property
    def meets(self) -> bool:
        """Whether all processes meet in this iteration; one that is alone always does."""
        return self.meeting is None or self.iteration >= self.meeting

    @property
    def waits_for_others(self) -> bool:
        """Whether there are other processes, and all meet in this iteration."""
        return self.meeting is not None and self.meets

    def next_due(self, interval: str) -> int:
        """Return when something is due next, by the options of now; a while ahead if that is far.

        Args:
            interval: `cov_every` or `inv_every`.
        """
        later = range(self.iteration + 1, self.iteration + FURTHEST)
        every = getattr(self._options, interval)
        if not callable(every):
            return min(self.iteration // every * every + every, later.stop)
        return next((k for k in later if k % self._options.at(interval, k) == 0), later.stop)

    # -- what is wanted of this iteration -----------------------------------------------------------------------

    @property
    def wants_statistics(self) -> bool:
        """Each `cov_every`-th iteration, each one while there is nothing yet, and one that uses a new layer."""
        return self._can_look and (self._statistics_are_due or self._uses_new_layer)

    @property
    def wants_rows(self) -> bool:
        """Whether rows are wanted for a step that the second level takes or looks at."""
        return self._can_look and self.own_steps.wants_step(self.iteration)

    @property
    def wants_inverses(self) -> bool:
        """Each `inv_every`-th iteration, with each of the first statistics updates, and for a damping that is new."""
        averages, inverses, options = self._curvature.averages, self._curvature.inverses, self._options
        if not (self._curvature.solvers.division.is_everyones or self.meets):
            return False  # processes that share them out wait for each other
        if inverses is None or self.iteration % self.now("inv_every") == 0:
            return True
        if averages.updates < options.burn_in and self.wants_statistics:
            return True
        return not inverses.damping.is_as_set(self._set_damping(), options.relative_damping)

    @property
    def is_ordinary(self) -> bool:
        """Whether nothing is wanted of it but a step with the inverses that there are."""
        wants = self.wants_statistics or self.wants_rows or self.wants_inverses
        return not (wants or self.own_steps.waits or self.waits_for_others)

    @property
    def _can_look(self) -> bool:
        return bool(self._curvature.layout.layers) and not self._curvature.collector.captures.is_closed

    @property
    def _statistics_are_due(self) -> bool:
        return self._curvature.averages.updates == 0 or self._due

    @property
    def _uses_new_layer(self) -> bool:
        """Whether a layer that has no statistics yet was used in a forward pass of this iteration.

        Several processes do not look, since another may have no such use: it waits for the next statistics.
        """
        captures, estimates = self._curvature.collector.captures, self._curvature.estimates
        is_alone = self.meeting is None
        return is_alone and captures.count > 0 and any(map(captures.uses, estimates.layers_that(seen=False)))

    # -- which forward passes are looked at -----------------------------------------------------------------------

    @property
    def _looks(self) -> bool:
        """Whether they are: for statistics, for rows, or for the first use of a new layer."""
        if not self._curvature.layout.layers:
            return False
        is_looking = self.meeting is None and self.iteration - self._looking_since < LOOKING
        has_new_layer = not all(self._curvature.averages.seen)
        return self._statistics_are_due or (is_looking and has_new_layer) or self.own_steps.wants_step(self.iteration)

    def look_again(self) -> None:
        """Look for first uses of new layers, those without statistics, from now on."""
        self._looking_since = self.iteration

    # -- the damping ----------------------------------------------------------------------------------------------

    def damping(self, averages: Averages) -> Damping:
        """Return the damping of inverses of these averages."""
        value: float | str | Tensor = self._set_damping()
        if isinstance(value, str):
            kept = kept_share(averages.updates, self._options.stat_decay)
            value = spread.damping(self._curvature.layout, averages.spread, kept).clamp(max=self.most_damping)
        return Damping(value, self._options.relative_damping)

    def _set_damping(self) -> float | str:
        value = self.now("damping")
        return min(value, self.most_damping) if value != "auto" and self._options.relative_damping else value

"""When statistics are due, when inverses, and which forward passes are looked at."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from kfac2 import spread
from kfac2.fine import Damping
from kfac2.inverses import Inverses
from kfac2.layout import Layout
from kfac2.options import Options
from kfac2.statistics import Averages, kept_share

FURTHEST = 1000  # iterations from one meeting of processes to the next, at most
LOOKING = 100  # iterations in a row that look for the first use of a layer without statistics


class Schedule:
    """Counts iterations and decides.

    Args:
        options: the intervals and the damping.

    Attributes:
        iteration: k, from 0.
        most_damping: a relative damping is at most this.
        meeting: the iteration in which several processes meet next; before it nothing is due that they must all do.
            None: this one is alone.
    """

    def __init__(self, options: Options) -> None:
        self.iteration = 0
        self.most_damping = math.inf
        self.meeting: int | None = None
        self._options = options
        self._due = True
        self._looking_since = 0

    def now(self, name: str) -> Any:
        """Return an option of this iteration."""
        return self._options.at(name, self.iteration)

    def go_on_at(self, iteration: int) -> None:
        """Begin an iteration. Whether its statistics are due is settled now, since its forward passes come first."""
        self.iteration = iteration
        self._due = self.meets and iteration % self.now("cov_every") == 0

    @property
    def meets(self) -> bool:
        """Whether all processes meet in this iteration; one that is alone always does."""
        return self.meeting is None or self.iteration >= self.meeting

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

    def statistics_are_due(self, averages: Averages) -> bool:
        """Each `cov_every`-th iteration, and each one while there is nothing yet."""
        return averages.updates == 0 or self._due

    def looks(self, averages: Averages) -> bool:
        """Tell whether forward passes are looked at: for statistics, or for the first use of a layer without any."""
        is_looking = self.meeting is None and self.iteration - self._looking_since < LOOKING
        return self.statistics_are_due(averages) or (is_looking and not all(averages.seen))

    def look_again(self) -> None:
        """Look for such first uses from now on."""
        self._looking_since = self.iteration

    def damping(self, layout: Layout, averages: Averages) -> Damping:
        """Return the damping of inverses of these averages."""
        value: float | str | Tensor = self._set_damping()
        if isinstance(value, str):
            value = spread.damping(layout, averages.spread, kept_share(averages.updates, self._options.stat_decay))
            value = value.clamp(max=self.most_damping)
        return Damping(value, self._options.relative_damping)

    def wants_inverses(self, averages: Averages, inverses: Inverses | None, with_statistics: bool) -> bool:
        """Each `inv_every`-th iteration, with each of the first statistics updates, and for a damping that is new."""
        if inverses is None or self.iteration % self.now("inv_every") == 0:
            return True
        if averages.updates < self._options.burn_in and with_statistics:
            return True
        return not inverses.damping.is_as_set(self._set_damping(), self._options.relative_damping)

    def _set_damping(self) -> float | str:
        value = self.now("damping")
        return min(value, self.most_damping) if value != "auto" and self._options.relative_damping else value

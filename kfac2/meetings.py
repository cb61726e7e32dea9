"""When the processes of one optimizer meet, and what they tell each other then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from kfac2.curvature import Curvature
from kfac2.options import SCHEDULED
from kfac2.schedule import Schedule


class Meetings:
    """The meetings of the processes that train one model; alone, there are none.

    The next one is settled at the end of each, from what all have alike, so that no process ever waits for another that
    does not come: options that are set on some ranks only are found out at the next meeting, and then all raise.

    Args:
        curvature: of the model.
        schedule: says what is due.
    """

    def __init__(self, curvature: Curvature, schedule: Schedule) -> None:
        self._curvature = curvature
        self._schedule = schedule
        self._settings: Callable[[], dict[str, object]] = dict
        if not curvature.solvers.processes.is_alone:
            schedule.meeting = 0
            curvature.moment = lambda: schedule.iteration

    def take(self) -> str | None:
        """Add up the statistics of all, or keep rows, as the schedule wants; else only see that all train alike.

        Returns:
            What was not finite in statistics, so that there are none; or None.
        """
        if self._schedule.wants_statistics:
            return self._curvature.joint.take("statistics", self._facts)
        if self._schedule.wants_rows:
            self._take_rows()
        elif self._schedule.waits_for_others:
            self._curvature.joint.meet("nothing", {}, self._facts)
        return None

    def _take_rows(self) -> None:
        """Keep rows of this iteration, of which no statistics are due; none where something was not finite."""
        iteration = self._curvature.iteration
        is_bad = iteration.settle() is not None
        if self._schedule.waits_for_others:
            own = {"bad": is_bad, "kept": bool(iteration.kept)}
            found = self._curvature.joint.meet("rows", own, self._facts)
            is_bad, iteration.others_kept = found.any("bad"), found.any("kept")
        if is_bad:
            iteration.drop_kept()  # a step without them is one level's

    def settle_next(self) -> None:
        """Settle when the processes meet next; at the end of a meeting, when all know the same."""
        now, averages = self._schedule.iteration, self._curvature.averages
        has_to_begin = averages.updates == 0 and self._curvature.layout.layers
        last = now + 1 if has_to_begin else self._schedule.next_due("cov_every")
        if not self._curvature.solvers.division.is_everyones:
            last = min(last, self._schedule.next_due("inv_every"))
        with_rows = filter(self._schedule.own_steps.wants_step, range(now + 1, last))
        self._schedule.meeting = next(with_rows, last)

    def begin_at(self, iteration: int) -> None:
        """Meet in this iteration next, since all go on from another state."""
        if self._schedule.meeting is not None:
            self._schedule.meeting = iteration

    def agree_on(self, settings: Callable[[], dict[str, object]]) -> None:
        """Take settings that must be alike from now on, and check that they are."""
        self._settings = settings
        self._curvature.solvers.processes.check_alike(settings)

    def mean_loss(self, loss: Any) -> Any:
        """Return the mean of the losses of all processes, which the mean of their gradients is the gradient of.

        Of an optimizer that is given a closure, each step is a meeting.
        """
        if self._schedule.meeting is None:
            return loss
        is_number = isinstance(loss, (int, float)) or (isinstance(loss, Tensor) and loss.numel() == 1)
        own = {"is a number": is_number, "loss": float(loss) if is_number else 0.0}
        found = self._curvature.joint.meet("closure", own, self._facts)
        return sum(found.numbers["loss"]) / len(found.numbers["loss"]) if found.all("is a number") else None

    def _facts(self) -> dict[str, object]:
        return {
            **{name: self._schedule.now(name) for name in SCHEDULED},
            **self._settings(),
            "the iteration": self._schedule.iteration,
            "when statistics are due next": self._schedule.next_due("cov_every"),
            "when inverses are due next": self._schedule.next_due("inv_every"),
            "whether inverses are due": self._schedule.wants_inverses,
        }

"""A whole step, from new gradients to new parameters: who moves which of them, and what holds the step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from kfac2.bound import Bound
from kfac2.descent import Rate, State, adamw_step, next_steps, sgd_step, times
from kfac2.directed import MOST_DAMPING, PER_LAYER, Directed
from kfac2.directed_work import Work
from kfac2.divergence import Keeps, Matrices, divergence, first_of, quarter, rounded
from kfac2.kinds import Layer
from kfac2.last_step import LastStep
from kfac2.options import OptimizerOptions
from kfac2.preconditioner import Preconditioner
from kfac2.rise import Rise

Groups = Sequence[Mapping[str, Any]]


class WholeStep:
    """Moves K-FAC's layers along their directions, by SGD with momentum or in the space of directions, and the rest.

    Args:
        preconditioner: whose gradients it follows.
        options: `coarse`, `coarse_damping`, `coarse_samples` and `kl_bound`.
        rest: what trains the parameters that K-FAC does not handle.

    Attributes:
        bound: the factor that holds the step to K.
        rise: the factor by which a rise of the losses that closures return shortens it.
        directed: the steps in the space of directions, if there are any.
    """

    def __init__(self, preconditioner: Preconditioner, options: OptimizerOptions, rest: str) -> None:
        self.bound, self.rise = Bound(), Rise()
        self.directed = Directed(self._samples_of_rows)
        self._preconditioner = preconditioner
        self._curvature = preconditioner.curvature
        self._options = options
        self._rest = rest
        self._matrices: Matrices | None = None
        self._is_directed = options.coarse == "directions"
        if self._is_directed:
            preconditioner.schedule.own_steps = self.directed
            preconditioner.schedule.go_on_at(0)  # its forward passes are looked at for such a step
        self.begin()

    def _samples_of_rows(self) -> int:
        return self._options.coarse_samples or max(1, PER_LAYER * len(self._curvature.layout.layers))

    def _kept_for_both(self, samples: int) -> int:
        """Return how many of so many samples are kept: for the space, and for the bound where that is not taken."""
        part = self.directed.part(samples)
        has_bound = self._options.kl_bound is not None and self.directed.only_looks
        return max(part, min(samples, quarter(samples))) if has_bound else part

    def begin(self) -> None:
        """Say which rows are kept, and how blocks are damped, in the iteration that begins."""
        schedule = self._preconditioner.schedule
        wants_rows = schedule.own_steps.wants_step(schedule.iteration)
        bounded = Keeps(quarter, rounds=True) if self._options.kl_bound is not None else None
        self._curvature.iteration.keeps = Keeps(self._kept_for_both) if wants_rows else bounded
        is_taken = self._is_directed and self.directed.signal.is_on
        schedule.most_damping = MOST_DAMPING if is_taken else math.inf

    def follow(self, loss: Any) -> None:
        """Take a loss into account, which a closure has returned; of several processes the mean of theirs."""
        loss = self._preconditioner.meetings.mean_loss(loss)
        self.rise.follow(loss, self._curvature.layout.device, self._curvature.health.at_once)

    def take(self, groups: Groups, state: State) -> None:
        """Move all parameters that have a gradient.

        Args:
            groups: of the optimizer.
            state: the optimizer's.
        """
        seen = self._curvature.estimates.layers_that(seen=True)
        moved = self._take_directed(seen, groups, state) if self._is_directed else set()
        if not moved:
            self._measure(seen, groups, state)
            self.directed.signal.shortened(self._bounded(1.0))
        with_weights = ((weight, layer.bias) for layer in seen if (weight := layer.weight).grad is not None)
        along = {id(parameter) for pair in with_weights for parameter in pair}
        for group in groups:
            self._descend(group, state, along, moved)

    def make_state(self, groups: Groups, state: State, along: set[int]) -> None:
        """Take a step that is only for its state, as `torch.distributed` does before it loads one.

        Args:
            groups: of the optimizer.
            state: the optimizer's.
            along: ids of the parameters that K-FAC handles.
        """
        for group in groups:
            self._descend(group, state, along, set())

    def _descend(self, group: Mapping[str, Any], state: State, along: set[int], moved: set[int]) -> None:
        """Step the parameters of a group that were not moved yet: those with a direction of K-FAC, and the others."""
        params = [p for p in group["params"] if p.grad is not None and id(p) not in moved]
        found = self._preconditioner.found
        if self._rest == "sgd":
            sgd_step(params, state, group, self._bounded(group["lr"]), found)
        elif group["method"] == "adamw":
            adamw_step(params, state, group, group["lr"], found)
        else:  # a layer that was dropped, or has no statistics yet, has a plain gradient: not for the rate of K-FAC;
            # so has a bias whose weight has no gradient
            own = [p for p in params if id(p) in along]
            sgd_step(own, state, group, self._bounded(group["lr"]), found)
            others = [p for p in params if id(p) not in along]
            if others:
                scheduled = group["lr"] / group["first_lr"] if group["first_lr"] else 0.0
                adamw_step(others, state, group, group["rest_lr"] * scheduled, found)

    # -- what holds it ----------------------------------------------------------------------------------------

    def _bounded(self, lr: Rate) -> Rate:
        of_bound = 1.0 if self._options.kl_bound is None else self.bound.factor
        return times(lr, of_bound, self._rise_factor())

    def _rise_factor(self) -> Rate:
        return self.rise.factor(self._curvature.health.at_once)

    def _measure(self, layers: Iterable[Layer], groups: Groups, state: State) -> None:
        """At a statistics update, hold the step d that is about to be taken to η² dᵀFd ≤ K."""
        iteration, bound = self._curvature.iteration, self._options.kl_bound
        if bound is None or not iteration.has_kept or not self._preconditioner.took_statistics:
            return
        moving = {id(p) for layer in layers for p in (layer.weight, layer.bias)}
        steps: dict[int, Tensor] = {}
        for group in groups:
            own = [p for p in group["params"] if p.grad is not None and id(p) in moving]
            steps |= zip(map(id, own), next_steps(own, state, group), strict=True)
        kept = [rounded(first_of(one, quarter(one.whole))) for one in iteration.kept]  # however they were kept
        squared = divergence(kept, lambda p: steps.get(id(p)), self._curvature.solvers.processes, self._matrices_of)
        self.bound.measured(squared, bound, self._curvature.health.at_once)

    def _matrices_of(self, layers: Sequence[Layer]) -> Matrices:
        """Return what writes steps of these layers as matrices: the last one, as long as they are the same."""
        if self._matrices is None or not self._matrices.fits(layers):
            self._matrices = Matrices(layers, 1)
        return self._matrices

    # -- the space of directions --------------------------------------------------------------------------------

    def _take_directed(self, seen: Sequence[Layer], groups: Groups, state: State) -> set[int]:
        """Take a step in the space of directions where this iteration has its rows; return ids of what has moved."""
        curvature, layout, iteration = self._curvature, self._curvature.layout, self._curvature.iteration
        step = curvature.prepared()
        is_wanted = self.directed.wants_step(self._preconditioner.iteration - 1)  # this one is counted already
        work = Work(
            passes=[first_of(one, self._samples_of_rows()) for one in iteration.kept] if is_wanted else [],
            layers=[layer for layer in seen if layer.weight.grad is not None],
            gradient=lambda layer: step.gradient(layout.number(layer)),
            groups=groups,
            state=state,
            tau=self._options.coarse_damping,
            bound=self._options.kl_bound,
            factor=self._rise_factor(),
            found=self._preconditioner.found,
            processes=curvature.solvers.processes,
            has_rows=is_wanted and iteration.has_kept,
        )
        return self.directed.step(work)

    # -- what it was like, and its state --------------------------------------------------------------------------

    def last(self) -> LastStep:
        """Tell what the last step was like."""
        inverses, limit = self._curvature.inverses, self._preconditioner.change_limit
        return LastStep(
            _damping=float("nan") if inverses is None else inverses.damping.value,
            _scale=self._preconditioner.scale,
            _squared=self.bound.squared,
            _factor=self.bound.factor,
            _rise=self._rise_factor(),
            _norms=limit.norms,
            _limits=limit.current,
            _names=limit.names,
            _directed=self.directed,
        )

    def save(self, state: dict[str, Any]) -> None:
        """Write into a state of the preconditioner what the steps go on from."""
        state["bounds"] |= {"factor": float(self.bound.factor), "rise": self.rise.state()}
        state["directed"] = self.directed.state()

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `save` wrote; earlier versions wrote less."""
        self.bound.go_on_with(state["bounds"]["factor"])
        self.rise.load(state["bounds"].get("rise"))
        self.directed.load(state.get("directed"), self._curvature.layout.device)
        schedule = self._preconditioner.schedule
        schedule.go_on_at(schedule.iteration)  # what such steps want of it is known only now

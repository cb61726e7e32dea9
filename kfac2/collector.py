"""From captured uses to passes of rows: those of a sampled log-likelihood, or of the ordinary backward passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kfac2.arrivals import Wanted, gives_rows, use_of
from kfac2.capture import Capture, Captures, Trace
from kfac2.followed import Followed
from kfac2.kinds import Layer
from kfac2.likelihood import Scores
from kfac2.reached import batch_size, counted_cases, with_reached
from kfac2.sampled import Sampled
from kfac2.self_check import Reached, check_are_means
from kfac2.statistics import Pass, Use


class Collector:
    """Makes passes of the captured uses of an iteration.

    Args:
        followed: the layers to watch, and their captures.
        is_by_sample: whether it counts which sample a row is of: then that is looked at with each self-check.
    """

    def __init__(self, followed: Followed, is_by_sample: bool = False) -> None:
        self._followed = followed
        self._sampled = Sampled(followed, is_by_sample)
        self._processes = followed.processes

    @property
    def captures(self) -> Captures:
        """The uses captured so far."""
        return self._followed.captures

    @property
    def leaving(self) -> dict[Layer, str]:
        """Layers that wait for a meeting to leave, and why; they have no rows any more."""
        return self._followed.leaving

    def follow(self, layers: Sequence[Layer]) -> None:
        """Watch these layers from now on."""
        self._followed.follow(layers)

    # -- the sampled log-likelihood -------------------------------------------------------------------------

    def traces_of(self, *tensors: Tensor) -> list[Trace]:
        """Return the traces of the captures that are in the graphs of tensors."""
        return [capture.trace for tensor in tensors for capture, _ in self.captures.reached_from(tensor.grad_fn)]

    def not_finite_input(self) -> str | None:
        """Name the first captured input that is not finite, or None."""
        for capture in self.captures.in_order():
            if not capture.x.isfinite().all():
                return f"the input of {capture.layer.title}"
        return None

    def sample(
        self, scores: Scores, mask: Tensor | None = None, wanted: Wanted | None = None
    ) -> tuple[list[Pass], list[Trace]]:
        """Differentiate with respect to the captured outputs.

        Args:
            scores: what to differentiate.
            mask: bool, (N, S): which tokens are data. None: what the loss cannot reach is none.
            wanted: what is taken of the gradients, which are then let go. None: they are all kept.

        Returns:
            A pass, and one more for each further direction, none where there are no rows; and the traces of its uses.

        Raises:
            ValueError: if the graph holds no captured output, or `mask` fits no layer.
            RuntimeError: if the graph cannot be differentiated so.
        """
        return self._sampled.passes(scores, mask, wanted)

    # -- the ordinary backward passes -----------------------------------------------------------------------

    def followed_backward(self, cases: int | str | None) -> list[Pass]:
        """Return the passes that the ordinary backward passes of this iteration left (the empirical Fisher).

        Args:
            cases: M of one pass, see `KFAC`.
        """
        rounds: dict[int, list[tuple[Capture, Tensor]]] = {}
        for capture in sorted(self.captures.received, key=lambda capture: capture.order):
            assert capture.g is not None
            rounds.setdefault(capture.round, []).append((capture, capture.g))
        rounds = {number: self._followed.that_give_rows(reached) for number, reached in rounds.items()}
        everything = [pair for reached in rounds.values() for pair in reached]
        factor = self._checked_backward(everything)
        passes = [
            self._pass_of(reached, lambda last, samples: counted_cases(last, samples, cases))
            for reached in rounds.values()
        ]
        made = [passed for passed in passes if passed is not None]
        # The losses of all passes add up to the mean over all their cases: that is what M multiplies.
        scale = factor * self._mean_cases(sum(passed.cases for passed in made))
        if not isinstance(cases, int):
            check_are_means([(_last_use(passed), passed.cases) for passed in made], scale, self._processes)
        return [replace(passed, scale=scale) for passed in made]

    def _checked_backward(self, everything: Reached) -> float:
        """Let layers leave whose rows do not rebuild `.grad`; return by what it differs from all of them alike."""
        if not self._followed.check.every or not (everything or not self._processes.is_alone):
            return 1.0
        watched = self._followed.all
        if self._processes.is_alone:
            watched = [
                layer for layer in self._followed.layers if self.captures.was_watched(layer, everything[0][0].order)
            ]
        failed, factor = self._followed.check.of_backward(watched, everything, self._processes)
        self._followed.leave(failed)
        return factor

    def _mean_cases(self, cases: int) -> float:
        """Return M: of several processes, whose losses are averaged, the mean."""
        if self._processes.is_alone:
            return cases
        (total,) = self._processes.added("the cases", [torch.tensor(float(cases), dtype=torch.float64)])
        return float(total) / self._processes.size

    def _pass_of(self, reached: Reached, count_cases: Callable[[Use, int], int]) -> Pass | None:
        """Make a pass of captures and gradients."""
        # A layer without rows (an expert without tokens) is not used in this pass.
        own = [(capture, g) for capture, g in reached if capture.layer in self._followed.layers and gives_rows(capture)]
        uses = [use_of(capture, g, self._followed.batch_dim) for capture, g in own]
        if not uses:
            return None
        samples = batch_size(uses, ())
        uses = with_reached(uses, samples, None)
        cases = count_cases(uses[-1], samples) if uses else 0
        return Pass(self._followed.in_order(uses), cases, samples) if cases else None


def _last_use(passed: Pass) -> Use:
    return max(passed.uses, key=lambda use: use.order)

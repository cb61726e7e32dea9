"""What one iteration has found: passes that wait for their loss, the sums of those that count, rows that are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from torch import Tensor

from kfac2.arrivals import Wanted, taken_of
from kfac2.capture import Trace
from kfac2.coarse import CoarseSpace
from kfac2.collector import Collector
from kfac2.divergence import Keeps, KeptPass, kept_of
from kfac2.layout import Layout
from kfac2.likelihood import NotFiniteError, Prediction, scores_of, tensors_of
from kfac2.options import CurvatureOptions
from kfac2.pending import Pending, misfit, that_count
from kfac2.statistics import Pass, Sums, Use


class Iteration:
    """The statistics of one iteration, from captured uses to sums.

    Args:
        layout: gives that of the layers, which may become fewer as a pass is made.
        collector: makes passes of captured uses.
        coarse: adds up its own part.
        options: `fisher`, `samples` and `cases`.
        observe: gives what a solver that looks at the rows sees of a layer's uses; None without such a solver.
        warn_once: called with what would be said again and again.
        labels: given how many passes of this iteration there were before, draws labels as its processes are to.
        looks: tells whether the host looks for NaNs and infinities as they come; else a flag of sums waits for it.

    Attributes:
        pending: passes that wait for their loss to go backward.
        sums: of those that count.
        kept: what is kept of their rows, until who asked for it clears the list.
        keeps: how much is kept of a pass; None: nothing.
        others_kept: whether another process has kept rows.
    """

    def __init__(
        self,
        layout: Callable[[], Layout],
        collector: Collector,
        coarse: CoarseSpace,
        options: CurvatureOptions,
        observe: Callable[[Pass, Sequence[Use]], Tensor | None] | None,
        warn_once: Callable[[str, str], None],
        labels: Callable[[int], AbstractContextManager[None]],
        looks: Callable[[], bool],
    ) -> None:
        self.pending: list[Pending] = []
        self.sums = Sums()
        self.kept: list[KeptPass] = []
        self.others_kept = False
        self.keeps: Keeps | None = None
        self._layout = layout
        self._collector = collector
        self._coarse = coarse
        self._options = options
        self._observe = observe
        self._warn_once = warn_once
        self._labels = labels
        self._looks = looks
        self._draws = 0

    @property
    def has_kept(self) -> bool:
        """Whether there are kept rows, in any process."""
        return bool(self.kept) or self.others_kept

    def drop_kept(self) -> None:
        """Free what is kept of rows."""
        self.kept, self.others_kept = [], False

    def collect(
        self, prediction: Prediction, mask: Tensor | None, has_loss: bool = True, is_summed: bool = True
    ) -> None:
        """Sum up one pass, which waits; raises what `scores_of` and `Collector.sample` do. A NaN waits, too.

        Args:
            prediction: the model's predictive distribution.
            mask: which tokens are data, or None.
            has_loss: whether a loss of the same forward pass goes backward; else the pass counts in any case.
            is_summed: whether the pass is summed up; else its rows are only kept.
        """
        if any(one.went_backward for one in self.pending) and not _has_gradient(self._layout()):
            self.pending = [one for one in self.pending if not one.went_backward]  # their gradients were thrown away
        self._draws += 1
        try:
            with self._labels(self._draws):
                looks = not is_summed or self._looks()
                scores = scores_of(prediction, self._options.fisher == "exact", self._options.samples, looks)
                passes, traces = self._collector.sample(scores, mask, self._wanted(is_summed))
        except NotFiniteError as error:
            traces = self._collector.traces_of(*tensors_of(prediction))
            bad = self._collector.not_finite_input() or error.source
            self.pending.append(Pending(traces, bad=bad, has_loss=has_loss))
            return
        if passes:
            summed = self._summed(passes, traces, is_summed)
            if scores.total is not None:
                summed.sums.log_probs.append(scores.total)
            self.pending.append(replace(summed, has_loss=has_loss))

    def collect_backward(self) -> None:
        """Sum up the ordinary backward passes (the empirical Fisher), which count at once."""
        wanted = self._wanted(is_summed=True)
        for passed in self._collector.followed_backward(self._options.cases):
            self._take([self._summed([taken_of(passed, wanted)], [])])

    def settle(self, must_go_backward: bool = True) -> str | None:
        """Add up the passes that count; return what is not finite in one of them, or None.

        Args:
            must_go_backward: whether only those count whose loss has gone backward.
        """
        return self._take(that_count(self.pending, self._warn_once) if must_go_backward else self.pending)

    def _wanted(self, is_summed: bool) -> Wanted:
        return Wanted(self._coarse.maps_of, self._observe, self.keeps, is_summed)

    def _take(self, passes: Iterable[Pending]) -> str | None:
        bad = None
        for one in passes:
            bad = bad or one.bad
            self.sums.add(one.sums)
            self.kept += one.kept
        self.pending = []
        return bad

    def _summed(self, passes: Sequence[Pass], traces: list[Trace], is_summed: bool = True) -> Pending:
        sums = Sums()
        for passed in passes if is_summed else ():
            sums.add_factors(passed)
            self._coarse.add(self._layout(), sums, passed)
        for layer in sums.misfits:
            self._warn_once(f"misfit {layer.name}", misfit(passes[0], layer))
        keeps = self.keeps
        kept = [] if keeps is None else [kept_of(one, keeps.count(one.samples), keeps.rounds) for one in passes]
        return Pending(traces, sums, kept)

    def discard(self) -> None:
        """Free what was captured and summed; what is kept of rows stays."""
        self._collector.captures.clear()
        self._draws = 0
        self.forget()

    def forget(self) -> None:
        """Free what was summed."""
        self.sums, self.pending = Sums(), []


def _has_gradient(layout: Layout) -> bool:
    gradients = (layer.weight.grad for layer in layout.layers)
    return any(gradient is not None and bool(gradient.any()) for gradient in gradients)

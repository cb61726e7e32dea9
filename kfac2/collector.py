"""From captured uses to the rows of a pass: gradients, samples, and what the loss can reach."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from kfac2.arrivals import (
    Arrivals,
    Arrive,
    Found,
    Taking,
    Wanted,
    come_by,
    gives_rows,
    may_wait,
    places_of,
    sizes_of,
    use_of,
)
from kfac2.belonging import Part, misplaced
from kfac2.capture import Capture, Captures, Trace, lowest_of
from kfac2.kinds import Layer
from kfac2.likelihood import Scores
from kfac2.processes import ALONE, Processes
from kfac2.reached import batch_size, counted_cases, with_reached
from kfac2.self_check import Reached, Rebuilt, RebuiltGradients, SelfCheck, check_are_means
from kfac2.statistics import Pass, Use


class Collector:
    """Makes passes of the captured uses of an iteration.

    Args:
        layers: the layers to watch.
        follow_backward: whether the ordinary backward pass brings the gradients (the empirical Fisher).
        drop: called with a layer that has to leave, and why.
        batch_dim: the axis of samples of what has positions.
        check_every: passes from one self-check to the next; 0: none.
        is_by_sample: whether it counts which sample a row is of: then that is looked at with each self-check.
        processes: that train together. Where there are several, a layer that has to leave waits for their meeting.

    Attributes:
        captures: the uses captured so far.
        batch_dim: as above.
        check: the self-check.
        leaving: layers that wait, and why; they have no rows any more.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        follow_backward: bool,
        drop: Callable[[Layer, str], None],
        batch_dim: int = 0,
        check_every: int = 100,
        is_by_sample: bool = False,
        processes: Processes = ALONE,
    ) -> None:
        self.captures = Captures(layers, follow_backward)
        self.batch_dim = batch_dim
        self.check = SelfCheck(check_every)
        self.leaving: dict[Layer, str] = {}
        self._watched = list(layers)
        self._drop = drop
        self._is_by_sample = is_by_sample
        self._processes = processes
        self._misplaced: frozenset[Layer] = frozenset()
        self._samples = 0  # of the last pass

    @property
    def _layers(self) -> list[Layer]:
        return [layer for layer in self._watched if layer not in self.leaving] if self.leaving else self._watched

    def follow(self, layers: Sequence[Layer]) -> None:
        """Watch these layers from now on."""
        self._watched = list(layers)
        self.leaving = {layer: reason for layer, reason in self.leaving.items() if layer in self._watched}
        self.captures.follow(layers)

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
        found = self.captures.reached_from(scores.drawn.grad_fn)
        traces = [capture.trace for capture, _ in found]
        all_wait = may_wait([capture for capture, _ in found])
        graph = _Graph(found, found if all_wait else lowest_of(found, scores.drawn.grad_fn))
        first = self._first_pass(graph, scores, mask, wanted, all_wait)
        if first is None:
            return [], traces
        further = [self._again(graph, first, one(), wanted) for one in scores.directions]
        return [first, *further], traces

    def _first_pass(
        self, graph: _Graph, scores: Scores, mask: Tensor | None, wanted: Wanted | None, all_wait: bool
    ) -> Pass | None:
        """Make the pass of the drawn labels. How many samples it has is guessed by sizes, and looked at afterwards."""
        first_use = graph.found[0][0].order if graph.found else 0
        layers = [layer for layer in self._layers if self.captures.was_watched(layer, first_use)]
        is_checked = self.check.is_due(Counter(capture.layer for capture, _ in graph.found))
        giving = {capture for capture, _ in graph.found if self._why_no_rows(capture) is None}
        parameters = self.check.parameters(layers) if is_checked else []
        rebuilt = RebuiltGradients() if is_checked else None
        held: list[tuple[Capture, Tensor]] | None = None
        gradients: Sequence[Tensor | None] = ()
        if all_wait:
            held = []  # then sizes need not be guessed
            gradients = self._come_by(graph, scores.drawn, held.append, parameters)
            uses = [use_of(*pair, self.batch_dim) for pair in held if pair[0] in giving and gives_rows(pair[0])]
            samples = batch_size(uses, scores.leading) if uses else 1
        else:
            uses = [sizes_of(c, self.batch_dim) for c, _ in graph.found if c in giving and gives_rows(c)]
            samples = self._guessed(uses, scores.leading)
        while True:
            expected = Pass(self._in_order(uses), scores.cases, samples, scores.weight, misplaced=self._misplaced)
            if is_checked and self._is_by_sample:
                new = self._misplaced_in(graph, scores.drawn, expected)
                expected = replace(expected, misplaced=self._misplaced | new)
            arrivals = Arrivals(expected, giving, mask, wanted, self.batch_dim, rebuilt, lets_go=held is None)
            if held is None:
                gradients = self._come_by(graph, scores.drawn, arrivals.come, parameters if rebuilt else ())
            else:
                for pair in reversed(held):
                    arrivals.come(pair)
            self._check_reached(arrivals.came)
            if rebuilt is not None:
                self._leave(self.check.of_sample(layers, rebuilt, gradients))
            uses = [use for use in arrivals.taking.finished() if use.layer in self._layers]
            if not uses:
                return None
            samples, rebuilt = batch_size(uses, scores.leading, arrivals.share), None
            if samples == expected.samples and places_of(uses, samples) == places_of(expected.uses, samples):
                break
        self._misplaced, self._samples = frozenset(expected.misplaced), samples
        uses = arrivals.reach.applied(uses)
        squares = arrivals.taking.squares_of(uses)
        return replace(expected, uses=self._in_order(uses), squares=squares) if uses and scores.cases else None

    def _guessed(self, uses: Sequence[Use], leading: Sequence[int]) -> int:
        sizes = {use.samples for use in uses}
        if len(sizes) > 1 and self._samples in sizes:
            return self._samples
        return batch_size(uses, leading, lambda use: 1.0) if uses else 1

    def _come_by(
        self, graph: _Graph, of: Tensor, arrive: Arrive, parameters: Sequence[Tensor] = ()
    ) -> Sequence[Tensor | None]:
        return come_by(graph.found, graph.lowest, parameters, lambda inputs: self._differentiated(of, inputs), arrive)

    def _check_reached(self, came: Sequence[Capture]) -> None:
        """Check that the loss reaches a use at all; a layer with one that gives no rows leaves."""
        if not came:
            raise ValueError(
                "distribution must come from a forward pass of the model in this iteration, with grad enabled, and in "
                "the thread that has built the optimizer, or called its last step(); "
                "got one whose graph holds no use of a handled layer's weight"
            )
        self._leave_without_rows(sorted(came, key=lambda capture: capture.order))

    def _again(self, graph: _Graph, first: Pass, direction: Tensor, wanted: Wanted | None) -> Pass:
        """Make a pass of other gradients of the same uses: what counts is known, and the inputs have been counted."""
        known = {use.order: use for use in first.uses}
        expected = Pass(first.uses, 0, first.samples, is_repeated=True, misplaced=first.misplaced)
        taking = Taking(expected, wanted)

        def come(pair: tuple[Capture, Tensor]) -> None:
            capture, g = pair
            use = known.get(capture.order)
            if use is not None:
                new = use_of(capture, g, self.batch_dim)
                taking.add(new if use.reached is None else new.only(use.reached))

        self._come_by(graph, direction, come)
        uses = taking.finished()
        return replace(expected, uses=self._in_order(uses), squares=taking.squares_of(uses))

    def _misplaced_in(self, graph: _Graph, drawn: Tensor, expected: Pass) -> set[Layer]:
        """Find layers whose rows fit the samples by their number only, with gradients from the last use on."""
        captures = {capture.order: (capture, edge) for capture, edge in graph.found}
        uses = sorted(expected.uses, key=lambda use: use.order)
        while uses:
            capture, edge = captures[uses[-1].order]
            g = self._differentiated(drawn, [edge])[0]
            if g is not None:
                uses[-1] = use_of(capture, g.reshape(capture.shape), self.batch_dim)
                return misplaced(replace(expected, uses=uses), lambda *given: self._back(graph, uses, *given))
            uses.pop()
        return set()

    def _back(self, graph: _Graph, uses: Sequence[Use], base: Use, g: Tensor, part: Part) -> dict[int, Tensor]:
        """Differentiate from the output of one use to those of the others; samples first, here and there."""
        by_order = {use.order: use for use in uses}
        edge = next(edge for capture, edge in graph.found if capture.order == base.order)
        others, lowest = ([pair for pair in some if pair[1].node is not edge.node] for some in graph)
        g = base.layer.samples_last(g, self.batch_dim).reshape(edge.node._input_metadata[edge.output_nr].shape)
        parts: dict[int, Tensor] = {}

        def arrive(pair: tuple[Capture, Tensor]) -> None:
            capture, gradient = pair
            if capture.order in by_order:
                gradient = capture.layer.samples_first(gradient, self.batch_dim)
                parts[capture.order] = part(by_order[capture.order], gradient).clone()

        come_by(others, lowest, (), lambda inputs: self._differentiated(edge, inputs, g), arrive)
        return parts

    def _differentiated(
        self, of: Tensor | GradientEdge, inputs: Sequence[object], g: Tensor | None = None
    ) -> Sequence[Tensor | None]:
        """Return the gradients of a negative score, or those that follow from a gradient g at an edge."""
        if not inputs:
            return ()
        if isinstance(of, Tensor):
            g = -torch.ones_like(of)
        self.captures.is_paused = True  # activation checkpointing runs parts of the model again
        try:
            with torch.enable_grad():
                return torch.autograd.grad(of, inputs, g, retain_graph=True, allow_unused=True)  # type: ignore[arg-type]
        finally:
            self.captures.is_paused = False

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
        rounds = {number: self._that_give_rows(reached) for number, reached in rounds.items()}
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
        if not self.check.every or not (everything or not self._processes.is_alone):
            return 1.0
        watched = self._watched
        if self._processes.is_alone:
            watched = [layer for layer in self._layers if self.captures.was_watched(layer, everything[0][0].order)]
        failed, factor = self.check.of_backward(watched, everything, self._processes)
        self._leave(failed)
        return factor

    def _mean_cases(self, cases: int) -> float:
        """Return M: of several processes, whose losses are averaged, the mean."""
        if self._processes.is_alone:
            return cases
        (total,) = self._processes.added("the cases", [torch.tensor(float(cases), dtype=torch.float64)])
        return float(total) / self._processes.size

    def _leave(self, failed: Mapping[Layer, Rebuilt]) -> None:
        for layer, rebuilt in failed.items():
            self._leaves(layer, rebuilt.reason)

    def _leaves(self, layer: Layer, reason: str) -> None:
        if layer not in self._layers:
            return
        if self._processes.is_alone:
            self._drop(layer, reason)
        else:
            self.leaving[layer] = reason

    # -- rows -----------------------------------------------------------------------------------------------

    def _why_no_rows(self, capture: Capture) -> str | None:
        """Return why no rows can be made of a capture, or None."""
        if capture.x._version != capture.version:
            return "its input was overwritten in place before its statistics were taken"
        return capture.layer.reason_against(capture.call)

    def _leave_without_rows(self, captures: Sequence[Capture]) -> None:
        """Let layers leave of which there is a capture that gives no rows."""
        for capture in captures:
            reason = self._why_no_rows(capture)
            if reason is not None:
                self._leaves(capture.layer, reason)

    def _that_give_rows(self, reached: Reached) -> list[tuple[Capture, Tensor]]:
        """Return the captures of which rows can be made; a layer that has another one leaves."""
        self._leave_without_rows([capture for capture, _ in reached])
        return [(capture, g) for capture, g in reached if capture.layer in self._layers]

    def _pass_of(self, reached: Reached, count_cases: Callable[[Use, int], int]) -> Pass | None:
        """Make a pass of captures and gradients."""
        # A layer without rows (an expert without tokens) is not used in this pass.
        own = [(capture, g) for capture, g in reached if capture.layer in self._layers and gives_rows(capture)]
        uses = [use_of(capture, g, self.batch_dim) for capture, g in own]
        if not uses:
            return None
        samples = batch_size(uses, ())
        uses = with_reached(uses, samples, None)
        cases = count_cases(uses[-1], samples) if uses else 0
        return Pass(self._in_order(uses), cases, samples) if cases else None

    def _in_order(self, uses: Sequence[Use]) -> list[Use]:
        """Sort uses by layer; those of one stay in the order of the forward pass."""
        order = {layer: number for number, layer in enumerate(self._layers)}
        return sorted(uses, key=lambda use: order[use.layer])


def _last_use(passed: Pass) -> Use:
    return max(passed.uses, key=lambda use: use.order)


class _Graph(NamedTuple):
    """The captures of a graph.

    Attributes:
        found: all of them, in the order of their uses.
        lowest: those from which no path leads to another; all where they may wait for each other.
    """

    found: Found
    lowest: Found

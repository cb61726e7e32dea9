"""From captured uses to the passes of a sampled log-likelihood: gradients, samples, and what the loss can reach."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
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
from kfac2.capture import Capture, Trace, lowest_of
from kfac2.followed import Followed
from kfac2.kinds import Layer
from kfac2.likelihood import Scores
from kfac2.reached import batch_size
from kfac2.self_check import RebuiltGradients
from kfac2.statistics import Pass, Use


class _Graph(NamedTuple):
    """The captures of a graph.

    Attributes:
        found: all of them, in the order of their uses.
        lowest: those from which no path leads to another; all where they may wait for each other.
    """

    found: Found
    lowest: Found


class _Gradients(NamedTuple):
    """The gradients of a pass, which may be asked for more than once.

    Attributes:
        uses: with their sizes.
        samples: how many it has, as far as that is known before.
        show: shows them one after the other, the last uses first; returns those of parameters, if these are wanted.
        are_held: whether all are there; else each is let go once it was seen.
    """

    uses: list[Use]
    samples: int
    show: Callable[[Arrive, bool], Sequence[Tensor | None]]
    are_held: bool


class Sampled:
    """Makes passes of what log-probabilities of drawn labels are differentiated to.

    Args:
        followed: the layers, and their captures.
        is_by_sample: whether it counts which sample a row is of: then that is looked at with each self-check.
    """

    def __init__(self, followed: Followed, is_by_sample: bool) -> None:
        self._followed = followed
        self._is_by_sample = is_by_sample
        self._misplaced: frozenset[Layer] = frozenset()
        self._samples = 0  # of the last pass

    def passes(self, scores: Scores, mask: Tensor | None, wanted: Wanted | None) -> tuple[list[Pass], list[Trace]]:
        """Differentiate with respect to the captured outputs, see `Collector.sample`."""
        found = self._followed.captures.reached_from(scores.drawn.grad_fn)
        traces = [capture.trace for capture, _ in found]
        are_held = may_wait([capture for capture, _ in found])
        graph = _Graph(found, found if are_held else lowest_of(found))
        first = self._first_pass(graph, scores, mask, wanted, are_held)
        if first is None:
            return [], traces
        further = [self._again(graph, first, one(), wanted) for one in scores.directions]
        return [first, *further], traces

    def _first_pass(
        self, graph: _Graph, scores: Scores, mask: Tensor | None, wanted: Wanted | None, are_held: bool
    ) -> Pass | None:
        """Make the pass of the drawn labels: again, where it turns out to have other samples than was thought."""
        followed = self._followed
        first_use = graph.found[0][0].order if graph.found else 0
        layers = [layer for layer in followed.layers if followed.captures.was_watched(layer, first_use)]
        is_checked = followed.check.is_due(Counter(capture.layer for capture, _ in graph.found))
        giving = {capture for capture, _ in graph.found if followed.why_no_rows(capture) is None}
        parameters = followed.check.parameters(layers) if is_checked else []
        gradients = (self._held if are_held else self._coming)(graph, scores, giving, parameters)
        uses, samples, rebuilt = gradients.uses, gradients.samples, RebuiltGradients() if is_checked else None
        while True:
            expected = Pass(followed.in_order(uses), scores.cases, samples, scores.weight, misplaced=self._misplaced)
            if is_checked and self._is_by_sample:
                new = self._misplaced_in(graph, scores.drawn, expected)
                expected = replace(expected, misplaced=self._misplaced | new)
            arrivals = Arrivals(expected, giving, mask, wanted, followed.batch_dim, rebuilt, not gradients.are_held)
            of_parameters = gradients.show(arrivals.come, rebuilt is not None)
            self._check_reached(arrivals.came)
            if rebuilt is not None:
                followed.leave(followed.check.of_sample(layers, rebuilt, of_parameters))
            uses = [use for use in arrivals.taking.finished() if use.layer in followed.layers]
            if not uses:
                return None
            samples, rebuilt = batch_size(uses, scores.leading, arrivals.share), None
            if samples == expected.samples and places_of(uses, samples) == places_of(expected.uses, samples):
                break
        self._misplaced, self._samples = frozenset(expected.misplaced), samples
        uses = arrivals.reach.applied(uses)
        squares = arrivals.taking.squares_of(uses)
        return replace(expected, uses=followed.in_order(uses), squares=squares) if uses and scores.cases else None

    def _held(self, graph: _Graph, scores: Scores, giving: set[Capture], parameters: Sequence[Tensor]) -> _Gradients:
        """Differentiate once, and hold all gradients: how many samples there are need not be guessed."""
        held: list[tuple[Capture, Tensor]] = []
        of_parameters = self._come_by(graph, scores.drawn, held.append, parameters)
        batch_dim = self._followed.batch_dim
        uses = [use_of(*pair, batch_dim) for pair in held if pair[0] in giving and gives_rows(pair[0])]

        def show(arrive: Arrive, with_parameters: bool) -> Sequence[Tensor | None]:
            for pair in reversed(held):
                arrive(pair)
            return of_parameters if with_parameters else ()

        return _Gradients(uses, batch_size(uses, scores.leading) if uses else 1, show, are_held=True)

    def _coming(self, graph: _Graph, scores: Scores, giving: set[Capture], parameters: Sequence[Tensor]) -> _Gradients:
        """Differentiate each time that gradients are asked for; how many samples there are is guessed by sizes."""
        batch_dim = self._followed.batch_dim
        uses = [sizes_of(c, batch_dim) for c, _ in graph.found if c in giving and gives_rows(c)]

        def show(arrive: Arrive, with_parameters: bool) -> Sequence[Tensor | None]:
            return self._come_by(graph, scores.drawn, arrive, parameters if with_parameters else ())

        return _Gradients(uses, self._guessed(uses, scores.leading), show, are_held=False)

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
        self._followed.leave_without_rows(sorted(came, key=lambda capture: capture.order))

    def _again(self, graph: _Graph, first: Pass, direction: Tensor, wanted: Wanted | None) -> Pass:
        """Make a pass of other gradients of the same uses: what counts is known, and the inputs have been counted."""
        known = {use.order: use for use in first.uses}
        expected = Pass(first.uses, 0, first.samples, is_repeated=True, misplaced=first.misplaced)
        taking = Taking(expected, wanted)

        def come(pair: tuple[Capture, Tensor]) -> None:
            capture, g = pair
            use = known.get(capture.order)
            if use is not None:
                new = use_of(capture, g, self._followed.batch_dim)
                taking.add(new if use.reached is None else new.only(use.reached))

        self._come_by(graph, direction, come)
        uses = taking.finished()
        return replace(expected, uses=self._followed.in_order(uses), squares=taking.squares_of(uses))

    def _misplaced_in(self, graph: _Graph, drawn: Tensor, expected: Pass) -> set[Layer]:
        """Find layers whose rows fit the samples by their number only, with gradients from the last use on."""
        captures = {capture.order: (capture, edge) for capture, edge in graph.found}
        uses = sorted(expected.uses, key=lambda use: use.order)
        while uses:
            capture, edge = captures[uses[-1].order]
            g = self._differentiated(drawn, [edge])[0]
            if g is not None:
                uses[-1] = use_of(capture, g.reshape(capture.shape), self._followed.batch_dim)
                return misplaced(replace(expected, uses=uses), lambda *given: self._back(graph, uses, *given))
            uses.pop()
        return set()

    def _back(self, graph: _Graph, uses: Sequence[Use], base: Use, g: Tensor, part: Part) -> dict[int, Tensor]:
        """Differentiate from the output of one use to those of the others; samples first, here and there."""
        by_order = {use.order: use for use in uses}
        edge = next(edge for capture, edge in graph.found if capture.order == base.order)
        others, lowest = ([pair for pair in some if pair[1].node is not edge.node] for some in graph)
        g = base.layer.samples_last(g, self._followed.batch_dim).reshape(
            edge.node._input_metadata[edge.output_nr].shape
        )
        parts: dict[int, Tensor] = {}

        def arrive(pair: tuple[Capture, Tensor]) -> None:
            capture, gradient = pair
            if capture.order in by_order:
                gradient = capture.layer.samples_first(gradient, self._followed.batch_dim)
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
        self._followed.captures.is_paused = True  # activation checkpointing runs parts of the model again
        try:
            with torch.enable_grad():
                return torch.autograd.grad(of, inputs, g, retain_graph=True, allow_unused=True)  # type: ignore[arg-type]
        finally:
            self._followed.captures.is_paused = False

"""From captured uses to the rows of a pass: gradients, samples, and what the loss can reach."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from kfac2.belonging import misplaced
from kfac2.capture import Capture, Captures, Trace
from kfac2.kinds import Layer
from kfac2.likelihood import Scores
from kfac2.processes import ALONE, Processes
from kfac2.self_check import Reached, Rebuilt, SelfCheck, check_are_means
from kfac2.statistics import Pass, Use, is_of_samples


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
        self._misplaced: set[Layer] = set()

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

    def sample(self, scores: Scores, mask: Tensor | None = None) -> tuple[list[Pass], list[Trace]]:
        """Differentiate with respect to the captured outputs.

        Args:
            scores: what to differentiate.
            mask: bool, (N, S): which tokens are data. None: what the loss cannot reach is none.

        Returns:
            A pass, and one more for each further direction, none where there are no rows; and the traces of its uses.

        Raises:
            ValueError: if the graph holds no captured output, or `mask` fits no layer.
            RuntimeError: if the graph cannot be differentiated so.
        """
        found = self.captures.reached_from(scores.drawn.grad_fn)
        first_use = found[0][0].order if found else 0
        layers = [layer for layer in self._layers if self.captures.was_watched(layer, first_use)]
        is_checked = self.check.is_due(Counter(capture.layer for capture, _ in found))
        parameters = self.check.parameters(layers) if is_checked else []
        edges = [edge for _, edge in found]
        gradients = self._differentiated(scores.drawn, [*edges, *parameters])
        reached = _with_gradients(found, gradients[: len(edges)])
        if not reached:
            raise ValueError(
                "distribution must come from a forward pass of the model in this iteration, with grad enabled, and in "
                "the thread that has built the optimizer, or called its last step(); "
                "got one whose graph holds no use of a handled layer's weight"
            )
        reached = self._that_give_rows(reached)
        if is_checked:
            self._leave(self.check.of_sample(layers, reached, gradients[len(edges) :]))
        first = self._pass_of(reached, lambda last, samples: scores.cases, scores.leading, mask)
        traces = [capture.trace for capture, _ in found]
        if first is None:
            return [], traces
        if is_checked and self._is_by_sample:
            by_order = {capture.order: (capture, edge) for capture, edge in found}
            self._misplaced |= misplaced(first, lambda use, g: self._back(by_order, use, g))
        first = replace(first, misplaced=frozenset(self._misplaced))
        passes = [replace(first, scale=scores.weight)]
        for direction in scores.directions:
            passes.append(self._again(first, _with_gradients(found, self._differentiated(direction(), edges))))
        return passes, traces

    def _again(self, first: Pass, reached: Reached) -> Pass:
        """Make a pass of other gradients of the same uses: what counts is known, and the inputs have been counted."""
        known = {use.order: use for use in first.uses}
        uses = []
        for capture, g in reached:
            use = known.get(capture.order)
            if use is not None:
                new = self._use_of(capture, g)
                uses.append(new if use.reached is None else new.only(use.reached))
        return Pass(self._in_order(uses), 0, first.samples, is_repeated=True, misplaced=first.misplaced)

    def _back(self, captures: Mapping[int, tuple[Capture, GradientEdge]], base: Use, g: Tensor) -> dict[int, Tensor]:
        """Differentiate from the output of one use to those of the others; samples first, here and there."""
        others = [pair for order, pair in captures.items() if order != base.order]
        _, edge = captures[base.order]
        g = base.layer.samples_last(g, self.batch_dim).reshape(edge.node._input_metadata[edge.output_nr].shape)
        gradients = self._differentiated(edge, [other for _, other in others], g)
        return {
            c.order: c.layer.samples_first(gradient, self.batch_dim)
            for c, gradient in _with_gradients(others, gradients)
        }

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
            self._pass_of(reached, lambda last, samples: counted_cases(last, samples, cases), (), None)
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

    def _that_give_rows(self, reached: Reached) -> list[tuple[Capture, Tensor]]:
        """Return the captures of which rows can be made; a layer that has another one leaves."""
        for capture, _ in reached:
            reason = capture.layer.reason_against(capture.call)
            if capture.x._version != capture.version:
                reason = "its input was overwritten in place before its statistics were taken"
            if reason is not None:
                self._leaves(capture.layer, reason)
        return [(capture, g) for capture, g in reached if capture.layer in self._layers]

    def _pass_of(
        self,
        reached: Reached,
        count_cases: Callable[[Use, int], int],
        leading: Sequence[int],
        mask: Tensor | None,
    ) -> Pass | None:
        """Make a pass of captures and gradients."""
        # A layer without rows (an expert without tokens) is not used in this pass.
        own = [(c, g) for c, g in reached if c.layer in self._layers and g.numel() and c.x.numel()]
        uses = [self._use_of(capture, g) for capture, g in own]
        if not uses:
            return None
        samples = batch_size(uses, leading)
        uses = with_reached(uses, samples, mask)
        cases = count_cases(uses[-1], samples) if uses else 0
        return Pass(self._in_order(uses), cases, samples) if cases else None

    def _use_of(self, capture: Capture, g: Tensor) -> Use:
        layer = capture.layer
        x, g = (layer.samples_first(tensor, self.batch_dim) for tensor in (capture.x, g))
        return Use.of(layer, x, g, capture.call, capture.order)

    def _in_order(self, uses: Sequence[Use]) -> list[Use]:
        """Sort uses by layer; those of one stay in the order of the forward pass."""
        order = {layer: number for number, layer in enumerate(self._layers)}
        return sorted(uses, key=lambda use: order[use.layer])


def _with_gradients(
    found: Sequence[tuple[Capture, object]], gradients: Sequence[Tensor | None]
) -> list[tuple[Capture, Tensor]]:
    """Return the captures that have a gradient, and it in the shape of the output."""
    pairs = zip(found, gradients, strict=True)
    return [(capture, g.reshape(capture.shape)) for (capture, _), g in pairs if g is not None]


def _last_use(passed: Pass) -> Use:
    return max(passed.uses, key=lambda use: use.order)


def batch_size(uses: Sequence[Use], leading: Sequence[int]) -> int:
    """Return N, the leading size that most uses share; of two, that of the log-probabilities, then the last use's.

    Where they differ, a use has a vote as large as the share of its leading entries that the loss reaches: experts have
    slots that stay empty.
    """
    votes = dict.fromkeys((use.samples for use in uses), 0.0)
    for use in uses:
        reached = 1.0 if len(votes) == 1 else float((use.g != 0).reshape(use.samples, -1).any(1).double().mean())
        votes[use.samples] += reached
    most = max(votes.values())
    shared = [size for size, count in votes.items() if count > most - 1e-9]
    return next(size for size in (*leading, *(use.samples for use in reversed(uses))) if size in shared)


def counted_cases(last: Use, samples: int, cases: int | str | None) -> int:
    """Return M of an ordinary backward pass, whose loss says no M.

    Args:
        last: the last use of its forward pass.
        samples: N.
        cases: see `KFAC`.

    Raises:
        ValueError: if nobody says whether the loss is a mean over samples or over rows.
    """
    rows = last.row_count
    if cases is None and rows != samples:
        raise ValueError(
            "cases must be given with fisher='empirical' where the last layer has another number of rows than there "
            f"are samples, got None with {rows} rows of {last.layer.title} and {samples} samples: "
            "cases='rows' if the loss is a mean over all of them (a token loss), 'samples' if it is one over samples, "
            "or the number of its terms"
        )
    return {"rows": rows, "samples": samples, None: samples}.get(cases, cases)  # type: ignore[arg-type,return-value]


def with_reached(uses: Sequence[Use], samples: int, mask: Tensor | None) -> list[Use]:
    """Leave out the rows that the loss cannot reach, and those that `mask` does.

    A row cannot be reached if g is exactly 0 there in every use on its grid. Where the last use has none such, as in
    most passes, nothing else is looked at. A use that does not fit the samples (an expert, some of its slots empty)
    is a grid of its own: others of that size hold other rows.

    Args:
        uses: in the order of the forward pass.
        samples: N.
        mask: bool, (N, S), or None.
    """
    result = list(uses)
    if mask is not None:
        result = _masked(result, mask)
    grids: dict[tuple[int, ...], list[int]] = {}
    for number, use in enumerate(result):
        if use.layer.has_tokens:
            own = () if is_of_samples(use, result, samples) else (number,)
            grids.setdefault((use.samples, use.places, *own), []).append(number)
    dead_samples = _unreached([use for use in result if use.samples == samples], whole_samples=True)
    for number, use in enumerate(result):
        if dead_samples is not None and use.samples == samples:
            result[number] = use.only(~dead_samples.expand(-1, use.places))
    for numbers in grids.values():
        dead = _unreached([uses[number] for number in numbers], whole_samples=False)
        if dead is not None:
            for number in numbers:
                result[number] = result[number].only(~dead)
    return [use for use in result if use.reached is None or use.row_count]


def _unreached(uses: Sequence[Use], whole_samples: bool) -> Tensor | None:
    """Return which rows, (leading size, places), or samples, (N, 1), have no gradient in any use; None if all have."""
    dead: Tensor | None = None
    for use in reversed(uses):
        none = (use.grads.tensor == 0).all(1).reshape(use.samples, -1)
        none = none.all(1, keepdim=True) if whole_samples else none
        dead = none if dead is None else dead & none
        if not bool(dead.any()):
            return None
    return dead


def _masked(uses: Sequence[Use], mask: Tensor) -> list[Use]:
    if mask.dtype != torch.bool or mask.dim() != 2:
        raise ValueError(f"mask must be a bool tensor of shape (N, S), got {mask.dtype} of shape {tuple(mask.shape)}")
    shapes = {tuple(mask.shape), (mask.numel(), 1)}
    if not any((use.samples, use.places) in shapes for use in uses):
        raise ValueError(
            f"mask must have the shape (N, S) of the tokens of a layer, got {tuple(mask.shape)}; "
            f"the layers have {sorted({(use.samples, use.places) for use in uses})}"
        )
    return [
        use.only(mask.to(use.g.device).reshape(use.samples, use.places)) if (use.samples, use.places) in shapes else use
        for use in uses
    ]

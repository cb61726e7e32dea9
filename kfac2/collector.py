"""What one iteration brings to the statistics: captured calls and their gradients become passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.distributions import Distribution

from kfac2.capture import Capture, Captures
from kfac2.kinds import Layer
from kfac2.layers import logger
from kfac2.statistics import Pass, Use


class NotFiniteError(ValueError):
    """Statistics cannot be taken for a NaN or an infinity.

    Attributes:
        source: what holds it.
    """

    def __init__(self, source: str) -> None:
        super().__init__(f"statistics must be finite, got a NaN or an infinity in {source}")
        self.source = source


class Collector:
    """Makes passes of the captured calls of an iteration.

    Args:
        layers: the layers to watch.
        wanted: whether forwards are to be captured now.
        follow_backward: whether the ordinary backward pass brings the gradients (the empirical Fisher).
        drop: called with a layer that was called twice in one pass.

    Attributes:
        captures: the calls captured so far.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        wanted: Callable[[], bool],
        follow_backward: bool,
        drop: Callable[[Layer], None],
    ) -> None:
        self.captures = Captures(layers, wanted, follow_backward)
        self._drop = drop

    def sample(self, distribution: Distribution) -> Pass | None:
        """Draw labels, and differentiate -log_prob with respect to the captured outputs.

        Returns:
            The pass; None where it has no rows.

        Raises:
            TypeError: if it is no distribution.
            ValueError: if it carries no graph, or none that holds a captured output.
            NotFiniteError: if no labels can be drawn for a NaN or an infinity.
        """
        if not isinstance(distribution, Distribution):
            raise TypeError(
                f"distribution must be a torch.distributions.Distribution, got {type(distribution).__name__}"
            )
        log_prob = self._log_prob_of_drawn_labels(distribution)
        if not log_prob.requires_grad:
            raise ValueError(
                f"distribution must carry the model's graph, got a {type(distribution).__name__} of detached "
                "parameters: build it from the model's output, outside torch.no_grad()"
            )
        records = list(self.captures.records)
        # M times the gradient of the mean is the gradient of the sum
        edges = [record.edge for record in records]
        with torch.enable_grad():
            loss = -log_prob.sum()
        grads = torch.autograd.grad(loss, edges, retain_graph=True, allow_unused=True) if edges else ()
        self.captures.records = records  # without what activation checkpointing ran, and captured, again
        reached = [(record, g) for record, g in zip(records, grads, strict=True) if g is not None]
        if not reached:
            raise ValueError(
                "distribution must come from a forward pass of the model in this iteration, with grad enabled; "
                "got one whose graph holds no output of a handled layer (if the model was compiled and run before "
                "the optimizer was built: build it first, or call torch._dynamo.reset())"
            )
        uses = self._uses(reached)
        return Pass(uses, log_prob.numel()) if uses and log_prob.numel() else None

    def followed_backward(self, cases: int | None) -> list[Pass]:
        """Return the passes that the ordinary backward passes of this iteration left (the empirical Fisher).

        Args:
            cases: M of one pass; by default its number of samples.
        """
        rounds: dict[int, list[tuple[Capture, Tensor]]] = {}
        for record in self.captures.records:
            if record.g is not None:
                rounds.setdefault(record.round, []).append((record, record.g))
        passes = [self._uses(reached) for reached in rounds.values()]
        passes = [[use for use in uses if use.layer in self.captures.layers] for uses in passes]  # some dropped since
        counts = [cases or uses[0].samples for uses in passes if uses]
        # The losses of all passes add up to the mean over all their cases: that is what M multiplies.
        return [
            Pass(uses, count, scale=float(sum(counts)))
            for uses, count in zip([uses for uses in passes if uses], counts, strict=True)
        ]

    def _log_prob_of_drawn_labels(self, distribution: Distribution) -> Tensor:
        if any(_has_nan(value) for _, value in _parameters(distribution)):
            # Not drawn from: on a CUDA device that fails an assertion, after which the process can use it no more.
            raise NotFiniteError(self._not_finite_source(distribution) or "the distribution")
        try:
            with torch.no_grad():
                labels = distribution.sample()
            with torch.enable_grad():
                return distribution.log_prob(labels)
        except (RuntimeError, ValueError) as error:  # what sampling from NaNs raises
            source = self._not_finite_source(distribution)
            if source is None:
                raise
            raise NotFiniteError(source) from error

    def _uses(self, reached: Sequence[tuple[Capture, Tensor]]) -> list[Use]:
        """Order captures as the layers are, and drop layers that were called twice."""
        by_layer: dict[Layer, list[Use]] = {}
        for record, g in reached:
            # Without rows (an expert without tokens) it is not used in this pass; an earlier pass may have dropped it.
            if record.layer in self.captures.layers and g.numel() and record.x.numel():
                by_layer.setdefault(record.layer, []).append(Use.of(record.layer, record.x, g))
        for layer, uses in by_layer.items():
            if len(uses) > 1:
                logger.warning("%s is left to SGD: it is called %d times in one forward pass", layer.name, len(uses))
                self._drop(layer)
        return [by_layer[layer][0] for layer in self.captures.layers if layer in by_layer]

    def _not_finite_source(self, distribution: Distribution) -> str | None:
        """Name what is not finite where drawing labels failed: a layer's input, or a parameter of the distribution."""
        for record in self.captures.records:
            if not record.x.isfinite().all():
                return f"the input of {record.layer.name}"
        for name, value in _parameters(distribution):
            if not value.isfinite().all():
                return f"{name.lstrip('_')} of the distribution"
        return None


def _parameters(distribution: Distribution) -> Iterator[tuple[str, Tensor]]:
    """Find the tensors of a distribution, and of those that it is made of."""
    for name, value in vars(distribution).items():
        if isinstance(value, Distribution):
            yield from _parameters(value)
        elif isinstance(value, Tensor) and value.is_floating_point():
            yield name, value


def _has_nan(values: Tensor) -> bool:
    """Tell by the greatest number, which is NaN if any is: no mask as large as a language model's logits."""
    return bool(values.numel()) and bool(values.detach().amax().isnan())

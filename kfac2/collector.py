"""What one iteration brings to the statistics: from captured calls and their gradients to raw sums."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.distributions import Distribution

from kfac2.capture import Capture, Captures
from kfac2.layers import Layer, logger
from kfac2.options import Options
from kfac2.statistics import RawSums, Rows


class Collector:
    """Collects the rows of all passes of an iteration, and sums them.

    Args:
        layers: the handled layers.
        options: `fisher`, `levels`, `downsample` and `cases`.
        wanted: whether this iteration wants statistics.
        drop: called with a layer that was called twice in one pass.

    Attributes:
        captures: the calls captured so far.
        raw: the sums so far.
        poisoned: what was not finite where labels were drawn; the step is skipped then.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        options: Options,
        wanted: Callable[[], bool],
        drop: Callable[[Layer], None],
    ) -> None:
        self._layers = list(layers)
        self._options = options
        self._drop = drop
        self.captures = Captures(layers, wanted, options.fisher == "empirical")
        self.clear()

    def clear(self) -> None:
        """Free what this iteration captured and summed."""
        self.captures.clear()
        self.raw = RawSums()
        self.poisoned: str | None = None

    def forget(self, layer: Layer) -> None:
        """Collect from a layer no longer; what was summed so far goes with it."""
        self._layers = [other for other in self._layers if other is not layer]
        self.captures.forget(layer)
        self.raw = RawSums()

    def sample(self, distribution: Distribution) -> None:
        """Draw labels, differentiate -log_prob with respect to the captured outputs, and add up this pass.

        Raises:
            ValueError: if the distribution carries no graph, or none that holds a captured output.
        """
        if any(_has_nan(value) for _, value in _parameters(distribution)):
            # Not drawn from: on a CUDA device that fails an assertion, after which the process can use it no more.
            self.poisoned = self._not_finite_source(distribution)
            return
        try:
            with torch.no_grad():
                labels = distribution.sample()
            with torch.enable_grad():
                log_prob = distribution.log_prob(labels)
        except (RuntimeError, ValueError):  # what sampling from NaNs raises; the step will be skipped
            self.poisoned = self._not_finite_source(distribution)
            if self.poisoned is None:
                raise
            return
        if not log_prob.requires_grad:
            raise ValueError(
                f"distribution must carry the model's graph, got a {type(distribution).__name__} of detached "
                "parameters: build it from the model's output, outside torch.no_grad()"
            )
        records = list(self.captures.records)
        # M times the gradient of the mean is the gradient of the sum
        edges = [record.edge for record in records]
        grads = torch.autograd.grad(-log_prob.sum(), edges, retain_graph=True, allow_unused=True) if edges else ()
        self.captures.records = records  # without what activation checkpointing ran, and captured, again
        reached = [(record, g) for record, g in zip(records, grads, strict=True) if g is not None]
        if not reached:
            raise ValueError(
                "distribution must come from a forward pass of the model in this iteration, with grad enabled; "
                "got one whose graph holds no output of a handled layer (if the model was compiled and run before "
                "the optimizer was built: build it first, or call torch._dynamo.reset())"
            )
        passed = self._one_pass(reached)
        if passed and log_prob.numel():
            self._add(passed, log_prob.numel(), scale=1.0)

    def take_backward(self) -> None:
        """With the empirical Fisher: add up the gradients that the ordinary backward passes of this iteration left."""
        rounds: dict[int, list[tuple[Capture, Tensor]]] = {}
        for record in self.captures.records:
            if record.g is not None:
                rounds.setdefault(record.round, []).append((record, record.g))
        passes = [self._one_pass(reached) for reached in rounds.values()]
        passes = [[rows for rows in passed if rows.layer in self._layers] for passed in passes]  # some dropped since
        cases = [self._options.cases or passed[0].x.shape[0] for passed in passes if passed]
        for passed, count in zip([passed for passed in passes if passed], cases, strict=True):
            # The losses of all passes add up to the mean over all their cases: that is what M multiplies.
            self._add(passed, count, scale=float(sum(cases)))

    def _one_pass(self, reached: Sequence[tuple[Capture, Tensor]]) -> list[Rows]:
        """Order captures as the layers are, and drop layers that were called twice."""
        by_layer: dict[Layer, list[Rows]] = {}
        for record, g in reached:
            if not (g.numel() and record.x.numel()):
                continue  # no rows, as of an expert without tokens: not used in this pass
            layer = record.layer
            by_layer.setdefault(layer, []).append(Rows(layer, layer.rows(record.x), layer.rows(g)))
        for layer, calls in by_layer.items():
            if len(calls) > 1:
                logger.warning("%s is left to SGD: it is called %d times in one forward pass", layer.name, len(calls))
                self._drop(layer)
        return [by_layer[layer][0] for layer in self._layers if layer in by_layer]

    @torch.no_grad()
    def _add(self, passed: Sequence[Rows], cases: int, scale: float) -> None:
        self.raw.add_pass(passed, self._layers, cases, scale, self._options.levels, self._options.downsample)

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

"""The self-check: Σ g āᵀ over the captured uses of a weight must be the gradient that autograd gives it.

The rows that K-FAC builds its factors of are then all there are, and each is right. Whatever reaches a weight by
another way shows as a difference: a function that is not captured, a derivative of the network in the loss, an input
that was overwritten.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from kfac2.capture import Capture
from kfac2.kinds import Layer
from kfac2.processes import Processes
from kfac2.statistics import Use

Reached = Sequence[tuple[Capture, Tensor]]
"""Captures, and the gradients of their outputs."""
_MOST_SETS = 64  # of uses that are told apart: with experts, each pass may have its own
_LOW = (torch.float16, torch.bfloat16)


class SelfCheck:
    """When the check is due, and what it finds.

    Args:
        every: passes from one check to the next, beside those of a set of uses that is new; 0: none.

    Attributes:
        every: as above.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._count = 0
        self._sets: set[frozenset[tuple[str, int]]] = set()

    def is_due(self, uses: Counter[Layer]) -> bool:
        """Tell whether a pass with so many uses of each layer is to be checked, and count it."""
        if not self.every:
            return False
        names = frozenset((layer.name, count) for layer, count in uses.items())
        is_new = names not in self._sets and len(self._sets) < _MOST_SETS
        if is_new:
            self._sets.add(names)
        self._count += 1
        return is_new or self._count % self.every == 0

    @staticmethod
    def parameters(layers: Sequence[Layer]) -> list[Tensor]:
        """Return what the gradients of `of_sample` belong to."""
        return [parameter for layer in layers for parameter in _parameters(layer)]

    @torch.no_grad()
    def of_sample(
        self, layers: Sequence[Layer], rows: RebuiltGradients, gradients: Sequence[Tensor | None]
    ) -> dict[Layer, str]:
        """Compare with autograd's gradients of the same scalar.

        Args:
            layers: all that are watched.
            rows: what the captures of the pass rebuild.
            gradients: of `parameters(layers)`.

        Returns:
            The layers that fail, and why.
        """
        rest, failed = iter(gradients), {}
        for layer in layers:
            true = [next(rest) for _ in _parameters(layer)]
            if true[0] is None:
                continue
            error = rows.error(layer, true)
            if error is not None:
                failed[layer] = _reason(error)
        return failed

    @torch.no_grad()
    def of_backward(
        self, watched: Sequence[Layer], reached: Reached, processes: Processes
    ) -> tuple[dict[Layer, str], float]:
        """Compare with `.grad`, into which the ordinary backward passes of this iteration have added up.

        A factor that all layers share does not make rows wrong: gradients were clipped after the backward pass, or an
        optimizer's loss scale was taken out of them, or they were divided by a number of micro-batches. The latter two
        are powers of two, or so it is taken: then the rows' g are multiplied by it.

        Args:
            watched: all layers that are watched.
            reached: the captures of all passes, and the gradients of their outputs.
            processes: over which `.grad` was averaged.

        Returns:
            The layers that fail, and why; and the factor.
        """
        rows = RebuiltGradients()
        for capture, g in reached:
            rows.add(capture, g)
        if not processes.is_alone:
            rows.average(watched, processes)
        layers = [layer for layer in watched if layer.weight.grad is not None]
        factors = sorted(filter(math.isfinite, (rows.factor(layer) for layer in layers if layer in rows)))
        shared = factors[len(factors) // 2] if factors else 1.0
        if abs(shared - 1) < 1e-2:
            shared = 1.0
        failed = {}
        for layer in layers:
            error = rows.error(layer, [parameter.grad for parameter in _parameters(layer)], shared)
            if error is not None:
                failed[layer] = _reason(error)
        exponent = math.log2(shared) if shared > 0 else 0.0
        is_scale = abs(exponent - round(exponent)) < 1e-2
        return failed, 2.0 ** round(exponent) if is_scale else 1.0


def check_are_means(passes: Sequence[tuple[Use, int]], scale: float, processes: Processes) -> None:
    """Check that cross-entropies are means over their cases, where their output gradients show that they are some.

    With a softmax each row g = (p - y)/M adds up to 0, and |p - y|₁ is at most 2: so is its mean over the cases,
    weighted or not. Of several processes, whose losses may be averaged with other weights than their cases have, it is
    all together that count.

    Args:
        passes: the last use of each forward pass, and its M.
        scale: what g is to be multiplied by.
        processes: that have passes.

    Raises:
        ValueError: if the rows are larger than those of a mean.
    """
    found = [(_size_of_softmax(last), cases) for last, cases in passes]
    if not processes.is_alone:
        sizes, cases = (sum(numbers) for numbers in zip(*found, strict=True)) if found else (0.0, 0)
        (told,) = processes.added("the sizes of losses", [torch.tensor([sizes, cases], dtype=torch.float64)])
        found = [(float(told[0]), int(told[1]))]
    for size, cases in found:
        if size * scale > 2.02 * cases:  # NaN where it is no softmax
            raise ValueError(
                "the loss must be the mean over its cases with fisher='empirical', got output gradients of a "
                f"cross-entropy whose size is {size * scale / cases:.3g} for each of {cases} cases, where a mean gives "
                "at most 2: take reduction='mean' and a weight of 1, or give cases= as a number to have it taken as it "
                "is"
            )


def _size_of_softmax(last: Use) -> float:
    """Return Σ |g|₁ of output gradients that are those of a softmax; NaN of others."""
    g = last.grads.tensor.detach().flatten(2).double() if last.grads.tensor.dim() > 2 else last.grads.tensor.double()
    total = float(g.abs().sum())
    is_softmax = g.shape[1] > 1 and total > 0 and float(g.sum(1).abs().sum()) < 1e-3 * total
    return total if is_softmax else math.nan


class RebuiltGradients:
    """Gradients of weights and biases, rebuilt from captured uses, one after the other."""

    def __init__(self) -> None:
        self._sums: dict[Layer, list[Tensor]] = {}
        self._bounds: dict[Layer, float] = {}  # |g| |ā|, which no rounding error exceeds times eps
        self._low: set[Layer] = set()

    @torch.no_grad()
    def add(self, capture: Capture, g: Tensor) -> None:
        """Add the rows of one use."""
        layer, parts = capture.layer, _rebuilt(capture, g)
        old = self._sums.get(layer)
        self._sums[layer] = parts if old is None else [a + b for a, b in zip(old, parts, strict=True)]
        size = float(capture.x.double().norm()) * float(g.double().norm())
        self._bounds[layer] = self._bounds.get(layer, 0.0) + size
        if {capture.x.dtype, g.dtype, layer.weight.dtype} & {*_LOW}:
            self._low.add(layer)

    def average(self, layers: Sequence[Layer], processes: Processes) -> None:
        """Average over the processes, as `.grad` was.

        Args:
            layers: of which some may have rows, the same ones in all processes.
            processes: all.
        """
        shapes = [(layer, _parameters(layer)) for layer in layers]
        parts = [part for layer, own in shapes for part in self._sums.get(layer, map(torch.zeros_like, own))]
        numbers = [
            [float(layer in self._sums), self._bounds.get(layer, 0.0), float(layer in self._low)] for layer in layers
        ]
        told = torch.tensor(numbers, dtype=torch.float64).to(layers[0].weight.device)
        told, *parts = processes.added("rebuilt gradients", [told, *(part.detach() for part in parts)])
        rest = iter(parts)
        rebuilt = {layer: [next(rest) / processes.size for _ in own] for layer, own in shapes}
        flags = told.tolist()
        self._sums = {layer: rebuilt[layer] for layer, (there, _, _) in zip(layers, flags, strict=True) if there}
        self._bounds = {layer: bound / processes.size for layer, (_, bound, _) in zip(layers, flags, strict=True)}
        self._low = {layer for layer, (_, _, low) in zip(layers, flags, strict=True) if low}

    def __contains__(self, layer: Layer) -> bool:
        return layer in self._sums

    def error(self, layer: Layer, true: Sequence[Tensor | None], factor: float = 1.0) -> float | None:
        """Return by how much the rebuilt gradient is off, |Σ g āᵀ - ∇| / |∇|; None where it is right."""
        wanted = _joined([t for t in true if t is not None])
        size = float(wanted.norm())
        if layer not in self._sums:
            return math.inf if size > 0 else None
        parts = [part for part, t in zip(self._sums[layer], true, strict=True) if t is not None]
        off = float((_joined(parts) * factor - wanted).norm())
        low = layer in self._low
        eps = torch.finfo(torch.bfloat16 if low else torch.float32).eps
        if not math.isfinite(off) or off <= (5e-2 if low else 1e-2) * size + 2 * eps * factor * self._bounds[layer]:
            return None
        return off / size if size > 0 else math.inf

    def factor(self, layer: Layer) -> float:
        """Return the factor that brings the rebuilt gradient closest to `.grad`."""
        rows = _joined(self._sums[layer][:1])
        square = float(rows.square().sum())
        assert layer.weight.grad is not None
        return float(rows @ _joined([layer.weight.grad])) / square if square > 0 else math.nan


def _parameters(layer: Layer) -> list[Tensor]:
    return [layer.weight] if layer.bias is None else [layer.weight, layer.bias]


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten().double() for tensor in tensors])


def _rebuilt(capture: Capture, g: Tensor) -> list[Tensor]:
    """Return Σ g āᵀ in the shapes of weight and bias: the backward of the same call, on its own."""
    layer = capture.layer
    weight = layer.weight.detach().requires_grad_()
    own = layer.bias is not None and capture.call.bias is layer.bias
    bias = None if capture.call.bias is None else capture.call.bias.detach().to(weight.dtype)
    wanted = [weight]
    if own and bias is not None:
        wanted.append(bias.requires_grad_())
    with torch.enable_grad(), torch.autocast(weight.device.type, enabled=False):
        output = capture.call.repeated(capture.x.to(weight.dtype), weight, bias)
        parts = list(torch.autograd.grad(output, wanted, g.to(output.dtype)))
    if layer.bias is not None and not own:
        parts.append(torch.zeros_like(layer.bias))
    return parts


def _reason(error: float) -> str:
    """Say why a layer fails; the error is infinity where no rows were captured."""
    if error == math.inf:
        return "its weight has a gradient, but was used in no call of F.linear, F.conv or F.conv_transpose"
    return (
        f"its rows do not rebuild its gradient, off by {100 * error:.3g} %: it is used in a way that is not captured, "
        "the loss has derivatives of the network in it, or an input was overwritten"
    )

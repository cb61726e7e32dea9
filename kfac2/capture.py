"""Forward hooks that keep what the statistics need: each layer's input and the edge of its output."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from kfac2.kinds import Layer


@dataclass(eq=False)
class Capture:
    """One call of one layer.

    Attributes:
        layer: the layer.
        x: its input, detached.
        edge: where the gradient of its output arrives. An edge stays right when an activation overwrites the
            output in place; the output tensor would by then stand for the activation's result.
        round: with the empirical Fisher, which forward-backward pass of the iteration it belongs to.
        g: with the empirical Fisher, the output's gradient, once backward has come by.
    """

    layer: Layer
    x: Tensor
    edge: GradientEdge
    round: int
    g: Tensor | None = None


class _Hook:
    """Belongs to one module object: a copy of the module gets a hook that does nothing."""

    def __init__(self, module: nn.Module | None = None, capture: Callable[..., None] | None = None) -> None:
        self._module = weakref.ref(module) if module is not None else lambda: None
        self._capture = weakref.WeakMethod(capture) if capture is not None else lambda: None
        self.layer: Layer | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        capture = self._capture()
        if capture is not None and self._module() is module:
            capture(self.layer, args[0] if args else kwargs["input"], output)

    def __deepcopy__(self, memo: object) -> _Hook:
        return _Hook()

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


class Captures:
    """The captures of the current iteration.

    Args:
        layers: the layers to watch.
        wanted: whether forwards are to be captured now.
        follow_backward: whether the ordinary backward pass brings the gradients (the empirical Fisher).
    """

    def __init__(self, layers: Sequence[Layer], wanted: Callable[[], bool], follow_backward: bool) -> None:
        self.records: list[Capture] = []
        self._wanted = wanted
        self._follow_backward = follow_backward
        self._round = 0
        self._handles = {}
        for layer in layers:
            hook = _Hook(layer.module, self._capture)
            hook.layer = layer
            # First of all hooks: what another hook makes of the output is no longer the layer's own.
            self._handles[layer] = layer.module.register_forward_hook(hook, with_kwargs=True, prepend=True)

    @property
    def layers(self) -> Collection[Layer]:
        """The layers that are watched, in the order of the model."""
        return self._handles.keys()

    def clear(self) -> None:
        """Free everything captured."""
        self.records = []
        self._round = 0

    def forget(self, layer: Layer) -> None:
        """Watch a layer no longer."""
        self._handles.pop(layer).remove()
        self.records = [record for record in self.records if record.layer is not layer]

    def _capture(self, layer: Layer, x: Tensor, output: Tensor) -> None:
        if not (torch.is_grad_enabled() and output.requires_grad and self._wanted()):
            return
        if self._follow_backward and any(
            record.g is not None and record.round == self._round for record in self.records
        ):
            self._round += 1  # a forward after a backward opens the next pass
        record = Capture(layer, x.detach(), get_gradient_edge(output), self._round)
        self.records.append(record)
        if self._follow_backward:
            known = weakref.ref(record)  # the graph must not keep it: it keeps the graph
            output.register_hook(lambda gradient: _receive(known(), gradient))


def _receive(record: Capture | None, gradient: Tensor) -> None:
    if record is None:
        return
    gradient = gradient.detach()
    record.g = gradient if record.g is None else record.g + gradient

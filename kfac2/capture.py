"""What the statistics need of a forward pass: the input of each use of a weight, kept as long as the graph that it is in.

A *use* is a call of `F.linear`, `F.conv*` or `F.conv_transpose*` with the weight of a handled layer, whoever makes it: the
module itself, another module, or a function. A mode of torch sees these calls while any module runs, in iterations of
statistics only: a global hook of `torch.nn` puts it up around the outermost call. The modules of the model carry nothing.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _get_current_function_mode_stack
from torch.utils.hooks import RemovableHandle

from kfac2.kinds import KINDS, Call, Layer


_NOTHING = torch.empty(0)


@dataclass(eq=False)
class Capture:
    """One use of a weight. It belongs to the graph: nothing else keeps it while it waits for its gradient.

    Attributes:
        layer: whose weight it is.
        x: its input, detached.
        call: how the weight was used.
        order: counts the uses, so that those of one weight stay in their order.
        round: with the empirical Fisher, which forward-backward pass of the iteration it belongs to.
        trace: outlives the capture.
        g: with the empirical Fisher, the gradient of the output, once backward has come by.
    """

    layer: Layer
    x: Tensor
    call: Call
    order: int
    round: int
    trace: Trace
    g: Tensor | None = None


@dataclass(eq=False)
class Trace:
    """What remains of a capture: whether a backward pass of the user's has come by."""

    went_backward: bool = False


class Captures:
    """The captures of one optimizer.

    Args:
        layers: the layers to watch.
        follow_backward: whether the ordinary backward pass brings the gradients (the empirical Fisher).

    Attributes:
        received: with the empirical Fisher, the captures whose gradients have come, in the order of their uses.
        is_paused: whether nothing is captured, since it is kfac2 that runs the model's graph.
    """

    def __init__(self, layers: Sequence[Layer], follow_backward: bool) -> None:
        self.received: list[Capture] = []
        self.is_paused = False
        self._follow_backward = follow_backward
        self._round = self._count = 0
        self._key = object()  # of the graph's nodes: several optimizers may watch one model
        self._layers: dict[int, Layer] = {}  # by id of the weight
        self._alive: weakref.WeakSet[Capture] = weakref.WeakSet()
        self._watch = _Watch(self)
        self.follow(layers)

    @property
    def count(self) -> int:
        """How many captures there are, of this iteration and of graphs that are still alive."""
        return len(self._alive)

    def in_order(self) -> list[Capture]:
        """Return those that are alive, in the order of their uses."""
        return sorted(self._alive, key=lambda capture: capture.order)

    def follow(self, layers: Sequence[Layer]) -> None:
        """Watch these layers from now on; what was captured of their weights is theirs."""
        self._layers = {id(layer.weight): layer for layer in layers}
        for capture in [*self._alive]:
            capture.layer = next((layer for layer in layers if layer.weight is capture.layer.weight), capture.layer)

    def uses(self, layer: Layer) -> bool:
        """Tell whether a use of this layer is captured."""
        return any(capture.layer is layer for capture in self._alive)

    # -- while modules run ----------------------------------------------------------------------------------

    def turn(self, on: bool) -> None:
        """Look at all forward passes from now on, or at none."""
        if on:
            self._watch.start()
        else:
            self._watch.stop()

    def saw(self, call: Call, x: Any, weight: Any, output: Any) -> None:
        """Capture a use, if its weight is watched and its output part of a graph."""
        layer = self._layers.get(id(weight))
        if layer is None or layer.weight is not weight or self.is_paused:
            return
        reason = _cannot_be_rows(x)
        if reason is not None:
            raise TypeError(
                f"the input of {layer.name} must be a plain tensor where statistics are taken, got {reason}; "
                f"leave the layer to plain gradients with skip=[{layer.name!r}]"
            )
        if not output.requires_grad or output.grad_fn is None:
            return
        self._count += 1
        capture = Capture(layer, x.detach(), call, self._count, self._round_of_now(), Trace())
        self._alive.add(capture)
        output.grad_fn.metadata.setdefault(self._key, []).append((capture, output.output_nr))
        output.register_hook(_Receiver(weakref.ref(capture), weakref.ref(self)))

    def _round_of_now(self) -> int:
        """A forward after a backward opens the next pass; one inside of a backward (checkpointing) does not."""
        inside = torch._C._current_graph_task_id() != -1
        if not inside and any(capture.round == self._round for capture in self.received):
            self._round += 1
        return self._round

    def receive(self, capture: Capture, gradient: Tensor) -> None:
        """Take the gradient of an output from a backward pass of the user's."""
        if self.is_paused:
            return
        capture.trace.went_backward = True
        if not self._follow_backward:
            return
        gradient = gradient.detach()
        if capture.g is None:
            capture.g = gradient
            self._forget_what_was_zeroed(capture)
            self.received.append(capture)
        else:
            capture.g = capture.g + gradient

    def _forget_what_was_zeroed(self, capture: Capture) -> None:
        """Drop earlier passes whose gradients were thrown away: there is none, though they have brought some."""
        before = [c.round for c in self.received if c.layer is capture.layer and c.round < capture.round]
        gradient = capture.layer.weight.grad
        if before and (gradient is None or not bool(gradient.any())):
            self.received = [c for c in self.received if c.round > max(before)]

    # -- afterwards -----------------------------------------------------------------------------------------

    def reached_from(self, root: Node | None) -> list[tuple[Capture, GradientEdge]]:
        """Find the captures in a graph, in the order of their uses, and where the gradients of their outputs arrive."""
        found = [
            (capture, GradientEdge(node, number))
            for node in _nodes(root)
            for capture, number in node.metadata.get(self._key, ())
            if self._layers.get(id(capture.layer.weight)) is capture.layer
        ]
        return sorted(found, key=lambda pair: pair[0].order)

    def clear(self) -> None:
        """Free everything captured, of graphs that live on, too."""
        for capture in list(self._alive):
            capture.x, capture.g = _NOTHING, None
        self._alive.clear()
        self.received = []
        self._round = 0
        self._key = object()


class _Receiver:
    """A hook of an output that keeps neither the capture, which its graph owns, nor the optimizer."""

    def __init__(self, capture: weakref.ref[Capture], captures: weakref.ref[Captures]) -> None:
        self._capture, self._captures = capture, captures

    def __call__(self, gradient: Tensor) -> None:
        capture, captures = self._capture(), self._captures()
        if capture is not None and captures is not None:
            captures.receive(capture, gradient)


def _nodes(root: Node | None) -> Iterator[Node]:
    """Walk a graph from its end to its leaves."""
    stack = [] if root is None else [root]
    seen = set(stack)
    while stack:
        node = stack.pop()
        yield node
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                stack.append(child)


def _cannot_be_rows(x: Any) -> str | None:
    """Name what kind of tensor gives no rows, or None."""
    if not isinstance(x, Tensor):
        return type(x).__name__
    if x.is_nested:
        return "a nested (jagged) tensor"
    if x.layout != torch.strided:
        return f"a tensor of layout {x.layout}"
    if torch._C._functorch.is_batchedtensor(x):
        return "a tensor inside of torch.vmap"
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        return "a tensor inside of a torch.func transform"
    return None


# -- hooks of torch ---------------------------------------------------------------------------------------------


class _Watch:
    """Global hooks that put the mode up around the outermost call of a module, in the thread that asked for it.

    What torch.compile has compiled runs as it was written meanwhile, since compiled code calls no hooks.
    """

    def __init__(self, captures: Captures) -> None:
        self._thread = 0
        self._inside: list[int] = []  # ids of the modules that are being called, outermost first
        self._mode = _Mode(weakref.ref(captures))
        self._handles: list[RemovableHandle] = []
        weakref.finalize(captures, self.stop)

    def start(self) -> None:
        if self._handles:
            return
        self._thread = threading.get_ident()
        self._handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]
        _hold_the_compiler_off(+1)

    def stop(self) -> None:
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._inside.clear()
        self._mode.take_down()
        _hold_the_compiler_off(-1)

    def _enter(self, module: nn.Module, args: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        if not self._inside:
            self._mode.put_up()
        self._inside.append(id(module))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() != self._thread or id(module) not in self._inside:
            return
        while self._inside.pop() != id(module):  # what an exception has left without a word
            pass
        if not self._inside:
            self._mode.take_down()


_held_off = 0
_stance: Any = None


def _hold_the_compiler_off(change: int) -> None:
    """Let compiled code run uncompiled while any optimizer looks at forward passes."""
    global _held_off, _stance
    _held_off += change
    if _held_off == 1 and change > 0:
        _stance = torch.compiler.set_stance("force_eager")
    elif _held_off == 0:
        _stance.__exit__(None, None, None)


class _Mode(TorchFunctionMode):
    """Sees every call of torch's functions, and tells the captures of those that use a weight."""

    def __init__(self, captures: weakref.ref[Captures]) -> None:
        super().__init__()
        self._captures = captures
        self._readers = {function: kind.read_call for kind in KINDS for function in kind.functions}
        self._is_up = False

    def put_up(self) -> None:
        self._is_up = True
        if not any(mode is self for mode in _get_current_function_mode_stack()):
            self.__enter__()

    def take_down(self) -> None:
        """Leave the stack; below modes that came later and stayed it does nothing from now on."""
        self._is_up = False
        if _get_current_function_mode() is self:
            self.__exit__(None, None, None)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        read = self._readers.get(func)
        if read is not None and self._is_up and torch.is_grad_enabled():
            captures = self._captures()
            if captures is not None:
                x, weight, call = read(func, args, kwargs)
                captures.saw(call, x, weight, output)
        return output

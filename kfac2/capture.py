"""What the statistics need of a forward pass: the input of each use of a weight, kept as long as its graph.

A *use* is a call of `F.linear`, `F.conv*` or `F.conv_transpose*` with the weight of a handled layer, whoever makes it:
the module itself, another module, or a function; `watch` sees them all. The modules of the model carry nothing.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.utils.checkpoint import CheckpointFunction
from torch.utils.hooks import RemovableHandle

from kfac2.kinds import Call, Layer
from kfac2.watch import WATCH as _WATCH

_Checkpointed: Any = CheckpointFunction._backward_cls
_NOTHING = torch.empty(0, device="cpu")


@dataclass(eq=False)
class Capture:
    """One use of a weight. It belongs to the graph: nothing else keeps it while it waits for its gradient.

    Attributes:
        layer: whose weight it is.
        x: its input, detached; under torch.autocast as it is multiplied, in bfloat16 or float16.
        shape: of its output.
        call: how the weight was used.
        order: counts the uses, so that those of one weight stay in their order.
        version: of x then, which moves on where x is overwritten.
        is_given: whether no operation of the graph has made x: once the backward pass is over it may be overwritten.
        round: with the empirical Fisher, which forward-backward pass of the iteration it belongs to.
        trace: outlives the capture.
        g: with the empirical Fisher, the gradient of the output, once backward has come by.
    """

    layer: Layer
    x: Tensor
    shape: torch.Size
    call: Call
    order: int
    version: int
    is_given: bool
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
        received: with the empirical Fisher, the captures whose gradients have come.
        is_paused: whether nothing is captured, since it is kfac2 that runs the model's graph.
        has_loss: whether the loss of the forward passes that are looked at goes backward through them.
        thread: whose forward passes are looked at: the one that has last asked for it.
        is_closed: whether none are any more, whoever asks.
    """

    def __init__(self, layers: Sequence[Layer], follow_backward: bool) -> None:
        self.received: list[Capture] = []
        self.is_paused = self.is_closed = False
        self.has_loss = True
        self.thread = 0
        self._follow_backward = follow_backward
        self._round = self._count = 0
        self._key = object()  # of the graph's nodes: several optimizers may watch one model
        self._layers: dict[int, Layer] = {}  # by id of the weight
        self._since: dict[Layer, int] = {}  # how many uses there had been when it was first watched
        self._alive: weakref.WeakSet[Capture] = weakref.WeakSet()
        # Of the backward pass that runs: its id, whether `.grad` held nothing before, a capture, and its gradient.
        self._arriving: list[tuple[int, bool, Capture, Tensor]] = []
        self._handles: list[RemovableHandle] = []
        self._is_on = False
        self._own = weakref.ref(self)
        weakref.finalize(self, _WATCH.tidy)
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
        known = {id(layer.weight): count for layer, count in self._since.items()}
        self._since = {layer: known.get(id(layer.weight), self._count) for layer in layers}
        for capture in [*self._alive]:
            capture.layer = self._layers.get(id(capture.layer.weight), capture.layer)
        if self._is_on:
            self._hook_weights()

    def uses(self, layer: Layer) -> bool:
        """Tell whether a use of this layer is captured."""
        return any(capture.layer is layer for capture in self._alive)

    def was_watched(self, layer: Layer, first: int) -> bool:
        """Tell whether a layer was watched already when the use of that order came."""
        return self._since[layer] < first

    # -- while modules run ----------------------------------------------------------------------------------

    def turn(self, on: bool) -> None:
        """Look at all forward passes of this thread from now on, or at none."""
        self.thread = threading.get_ident()
        if on == self._is_on or self.is_closed:
            return
        self._is_on = on
        if on:
            self._hook_weights()
            _WATCH.add(self)
        else:
            self._unhook_weights()
            _WATCH.remove(self)

    def close(self) -> None:
        """Look at none, from now on and for good."""
        self.turn(False)
        self.is_closed = True

    def saw(self, call: Call, x: Any, weight: Any, output: Any) -> None:
        """Capture a use, if its weight is watched and its output part of a graph."""
        layer = self._layers.get(id(weight))
        if layer is None or layer.weight is not weight or self.is_paused:
            return
        reason = _cannot_be_rows(x)
        if reason is not None:
            raise TypeError(
                f"the input of {layer.title} must be a plain tensor where statistics are taken, got {reason}; "
                f"leave the layer to plain gradients with skip=[{layer.name!r}]"
            )
        if not output.requires_grad or output.grad_fn is None:
            return
        self._count += 1
        given = x.detach(), output.shape, call
        history = self._count, x._version, x.grad_fn is None
        capture = Capture(layer, *given, *history, self._round_of_now(), Trace())
        self._alive.add(capture)
        result = _not_a_view(output)
        result.grad_fn.metadata.setdefault(self._key, []).append((capture, result.output_nr))
        if self.has_loss:  # a hook of the node takes less than half the time of one of the tensor
            result.grad_fn.register_prehook(_Receiver(weakref.ref(capture), self._own, result.output_nr))

    def _round_of_now(self) -> int:
        """A forward after a backward opens the next pass; one inside of a backward (checkpointing) does not."""
        inside = torch._C._current_graph_task_id() != -1
        if not inside and any(capture.round == self._round for capture in self.received):
            self._round += 1
        return self._round

    # -- while a backward pass runs -------------------------------------------------------------------------

    def receive(self, capture: Capture, gradient: Tensor) -> None:
        """Take the gradient of an output. With the empirical Fisher it waits until `.grad` has it, too."""
        if self.is_paused:
            return
        capture.trace.went_backward = True
        if self._follow_backward:
            task, before = torch._C._current_graph_task_id(), capture.layer.weight.grad
            self._arriving = [one for one in self._arriving if one[0] == task]
            gradient = gradient.detach().reshape(capture.shape)
            self._arriving.append((task, before is None or not bool(before.any()), capture, gradient))

    def _accumulated(self, weight: Tensor) -> None:
        """Count the gradients that a backward pass has brought, now that `.grad` has them; `autograd.grad` does not."""
        task = torch._C._current_graph_task_id()
        mine = [one for one in self._arriving if one[0] == task and one[2].layer.weight is weight]
        if mine and all(was_zero for _, was_zero, _, _ in mine):  # what came before was thrown away
            self.received = [c for c in self.received if c.round >= mine[0][2].round]
        for _, _, capture, gradient in mine:
            if capture.g is None:
                self.received.append(capture)
            capture.g = gradient if capture.g is None else capture.g + gradient
        self._arriving = [one for one in self._arriving if one[2].layer.weight is not weight]

    def _hook_weights(self) -> None:
        self._unhook_weights()
        if self._follow_backward:
            hook = _Accumulated(weakref.ref(self))
            self._handles = [
                layer.weight.register_post_accumulate_grad_hook(hook)
                for layer in self._layers.values()
                if layer.weight.requires_grad
            ]

    def _unhook_weights(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # -- afterwards -----------------------------------------------------------------------------------------

    def reached_from(self, root: Node | None) -> list[tuple[Capture, GradientEdge]]:
        """Find the captures in a graph, in the order of their uses, and where the gradients of their outputs arrive.

        Such a gradient has the numbers of `Capture.shape` in their order, maybe in another shape.

        Raises:
            RuntimeError: if a part of the graph was not recorded (reentrant checkpointing); or after `close`.
        """
        if self.is_closed:
            raise RuntimeError("statistics are taken from forward passes, and close() has ended the looking at them")
        found = []
        for node in _nodes(root):
            if isinstance(node, _Checkpointed):
                raise RuntimeError(
                    "statistics differentiate the model's graph, which torch.utils.checkpoint records only with "
                    "use_reentrant=False, got a graph with reentrant checkpointing: set use_reentrant=False, or take "
                    "fisher='empirical'"
                )
            for capture, number in node.metadata.get(self._key, ()):  # type: ignore[attr-defined]
                if self._layers.get(id(capture.layer.weight)) is capture.layer:
                    found.append((capture, GradientEdge(node, number)))
        return sorted(found, key=lambda pair: pair[0].order)

    def clear(self) -> None:
        """Free everything captured, of graphs that live on, too."""
        for capture in list(self._alive):
            capture.x, capture.g = _NOTHING, None
        self._alive.clear()
        self.received, self._arriving = [], []
        self._round = 0
        self._key = object()


class _Receiver:
    """A hook of an output's node that keeps neither the capture, which its graph owns, nor the optimizer."""

    def __init__(self, capture: weakref.ref[Capture], captures: weakref.ref[Captures], number: int) -> None:
        self._capture, self._captures, self._number = capture, captures, number

    def __call__(self, gradients: Sequence[Tensor | None]) -> None:
        capture, captures, gradient = self._capture(), self._captures(), gradients[self._number]
        if capture is not None and captures is not None and gradient is not None:
            captures.receive(capture, gradient)


class _Accumulated:
    """A hook of a weight that does not keep the optimizer."""

    def __init__(self, captures: weakref.ref[Captures]) -> None:
        self._captures = captures

    def __call__(self, weight: Tensor) -> None:
        captures = self._captures()
        if captures is not None:
            captures._accumulated(weight)


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


def lowest_of(found: Sequence[tuple[Capture, GradientEdge]]) -> list[tuple[Capture, GradientEdge]]:
    """Return those captures of a graph from which no path leads on to another.

    Args:
        found: what `Captures.reached_from` returns.
    """
    own = {edge.node for _, edge in found}
    leads: dict[Node, bool] = {}  # of nodes that were come by: whether a path leads on to one of these
    for start in own:
        path = [(start, iter(start.next_functions))]
        while path:
            for child, _ in path[-1][1]:
                if child is not None and (child in own or leads.get(child, False)):  # in most graphs soon
                    leads |= dict.fromkeys((node for node, _ in path), True)
                    path = []
                    break
                if child is not None and child not in leads:
                    leads[child] = False
                    path.append((child, iter(child.next_functions)))
                    break
            else:
                path.pop()
    return [pair for pair in found if not leads.get(pair[1].node, False)]


def _not_a_view(output: Tensor) -> Any:
    """Return what an output is a view of: `F.linear` flattens positions, and a map of one sample is a batch of one.

    An activation in place on a view takes the view's node out of the graph; that of what it is a view of stays.
    """
    base = output._base
    return output if base is None or base.grad_fn is None or base.numel() != output.numel() else base


def _cannot_be_rows(x: Any) -> str | None:
    """Name what kind of tensor gives no rows, or None."""
    if not isinstance(x, Tensor):
        return type(x).__name__
    if x.is_nested:
        return "a nested (jagged) tensor"
    if x.layout != torch.strided:
        return f"a tensor of layout {x.layout}"
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        batched = torch._C._functorch.is_batchedtensor(x)
        return "a tensor inside of torch.vmap" if batched else "a tensor inside of a torch.func transform"
    return None

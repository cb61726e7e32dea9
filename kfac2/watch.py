"""Sees every use of a weight while any module runs, whoever calls torch's function.

A mode of torch sees the calls of its functions. Global hooks of `torch.nn` put it up around the outermost call of a
module, as long as anybody asks for it: in iterations of statistics. There is one for the process, since modes are a
stack.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _get_current_function_mode_stack
from torch.utils.hooks import RemovableHandle

from kfac2.kinds import KINDS, Call

_AUTOCAST = ("cpu", "cuda")  # device types on which autocast casts the inputs of all these functions


class Watcher(Protocol):
    """Who asks."""

    thread: int

    def saw(self, call: Call, x: Any, weight: Any, output: Any) -> None:
        """Take note of a use of a weight."""


class Watch:
    """The hooks and the mode. What torch.compile has compiled runs as it was written meanwhile: it calls no hooks."""

    def __init__(self) -> None:
        self._watchers: list[weakref.ref[Watcher]] = []  # read at each use: a WeakSet is slow to go through
        self._of_threads = _OfThread(self)
        self._handles: list[RemovableHandle] = []
        self._stance: Any = None
        self._period = 0  # counts how often the hooks were put up

    def add(self, watcher: Watcher) -> None:
        """Tell a watcher of all uses from now on."""
        self._watchers.append(weakref.ref(watcher))
        if not self._handles:
            self._period += 1
            self._handles = [
                register_module_forward_pre_hook(self._enter),
                register_module_forward_hook(self._leave, always_call=True),
            ]
            self._stance = torch.compiler.set_stance("force_eager")

    def remove(self, watcher: Watcher) -> None:
        """Tell a watcher nothing any more."""
        self._watchers = [ref for ref in self._watchers if ref() is not watcher]
        self.tidy()

    def tidy(self) -> None:
        """Take the hooks away where nobody asks."""
        self._watchers = [ref for ref in self._watchers if ref() is not None]
        if self._watchers or not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._stance.__exit__(None, None, None)
        thread = self._this_thread()
        if thread.inside:
            thread.inside.clear()
            thread.mode.take_down()

    def _this_thread(self) -> _OfThread:
        thread = self._of_threads
        if thread.period != self._period:  # another thread took the hooks away in the middle of a call
            thread.inside, thread.period = [], self._period
            thread.mode.take_down()
        return thread

    def _enter(self, module: nn.Module, args: Any) -> None:
        thread = self._this_thread()
        if not thread.inside:
            thread.plain = None
            if self._here():
                thread.mode.put_up()
        elif thread.mode.is_up and _is_plain(module):
            thread.mode.take_down()
            thread.plain = module
        elif thread.plain is not None and not _is_plain(module):  # called by a hook of the plain one
            thread.plain = None
            thread.mode.put_up()
        thread.inside.append(id(module))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        thread = self._this_thread()
        inside, number = thread.inside, id(module)
        if number not in inside:
            return
        while inside.pop() != number:  # what an exception has left without a word
            pass
        if not inside:
            thread.mode.take_down()
        elif thread.plain is module:
            thread.plain = None
            thread.mode.put_up()

    def _here(self) -> list[Watcher]:
        thread = threading.get_ident()
        watchers = [ref() for ref in self._watchers]
        return [watcher for watcher in watchers if watcher is not None and watcher.thread == thread]

    def tell(self, call: Call, x: Any, weight: Any, output: Any) -> None:
        """Tell the watchers of this thread."""
        for watcher in self._here():
            watcher.saw(call, x, weight, output)


@functools.cache
def _is_plain_class(kind: type[nn.Module]) -> bool:
    handled = tuple(module for of_kind in KINDS for module in of_kind.modules)
    return kind.__module__.startswith("torch.nn.modules.") and not issubclass(kind, handled)


def _is_plain(module: nn.Module) -> bool:
    """Tell whether no layer's weight is used in a module: the mode makes each function that it sees slower."""
    own = type(module)
    return not module._modules and "forward" not in module.__dict__ and _is_plain_class(own)  # type: ignore[arg-type]


class _Mode(TorchFunctionMode):
    """Sees every call of torch's functions, and tells of those that use a weight."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch
        self._readers = {function: kind.read_call for kind in KINDS for function in kind.functions}
        self.is_up = False

    def put_up(self) -> None:
        """Look at calls from now on."""
        self.is_up = True
        if _get_current_function_mode() is None or not any(one is self for one in _get_current_function_mode_stack()):
            self.__enter__()

    def take_down(self) -> None:
        """Leave the stack; below a mode that came later and stayed it does nothing from now on."""
        self.is_up = False
        if _get_current_function_mode() is self:
            self.__exit__(None, None, None)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call the function, and look at it."""
        kwargs = kwargs or {}
        read = self._readers.get(func)
        if read is None or not self.is_up or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        args, kwargs = _with_input_cast(args, kwargs)
        output = func(*args, **kwargs)
        x, weight, call = read(func, args, kwargs)
        self._watch.tell(call, x, weight, output)
        return output


def _with_input_cast(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Cast the input of a function that uses a weight where torch.autocast is about to do it, inside of the function.

    What is captured is then what the weight is multiplied with, the tensor that autograd keeps for its own gradient:
    the same cast, no memory of its own, and no matter if the user overwrites the other one.
    """
    x = args[0] if args else kwargs.get("input")
    if not isinstance(x, Tensor) or not _casts(x):
        return args, kwargs
    x = x.to(torch.get_autocast_dtype(x.device.type))
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "input": x})


def _casts(x: Tensor) -> bool:
    """Tell whether autocast casts an input: any of floating point but float64.

    Of a leaf that is trained it keeps the cast, for all that use it: that one is left to it.
    """
    kind = x.device.type
    if kind not in _AUTOCAST or not torch.is_autocast_enabled(kind) or (x.is_leaf and x.requires_grad):
        return False
    return x.is_floating_point() and x.dtype not in (torch.float64, torch.get_autocast_dtype(kind))


class _OfThread(threading.local):
    """What is so in one thread.

    Attributes:
        inside: ids of the modules that are being called, outermost first.
        mode: that of the thread.
        plain: the module for which it was taken down, or None.
        period: of the watch, to which these belong.
    """

    def __init__(self, watch: Watch) -> None:
        self.inside: list[int] = []
        self.mode = _Mode(watch)
        self.plain: nn.Module | None = None
        self.period = 0


WATCH = Watch()

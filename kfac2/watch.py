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
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _get_current_function_mode_stack
from torch.utils.hooks import RemovableHandle

from kfac2.kinds import KINDS, Call


class Watcher(Protocol):
    """Who asks."""

    thread: int

    def saw(self, call: Call, x: Any, weight: Any, output: Any) -> None:
        """Take note of a use of a weight."""


class Watch:
    """The hooks and the mode. What torch.compile has compiled runs as it was written meanwhile: it calls no hooks."""

    def __init__(self) -> None:
        self._watchers: list[weakref.ref[Watcher]] = []  # read at each use: a WeakSet is slow to go through
        self._local = threading.local()
        self._handles: list[RemovableHandle] = []
        self._stance: Any = None

    def add(self, watcher: Watcher) -> None:
        """Tell a watcher of all uses from now on."""
        self._watchers.append(weakref.ref(watcher))
        if not self._handles:
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
        if self._inside:
            self._inside.clear()
            self._mode.take_down()

    @property
    def _inside(self) -> list[int]:
        """Ids of the modules that this thread is calling, outermost first."""
        if not hasattr(self._local, "inside"):
            self._local.inside, self._local.mode, self._local.plain = [], _Mode(self), None
        return self._local.inside  # type: ignore[no-any-return]

    @property
    def _mode(self) -> _Mode:
        return self._local.mode  # type: ignore[no-any-return]

    def _enter(self, module: nn.Module, args: Any) -> None:
        inside = self._inside
        if not inside:
            self._local.plain = None
            if self._here():
                self._mode.put_up()
        elif self._mode.is_up and _is_plain(module):
            self._mode.take_down()
            self._local.plain = module
        elif self._local.plain is not None and not _is_plain(module):  # called by a hook of the plain one
            self._local.plain = None
            self._mode.put_up()
        inside.append(id(module))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        inside = self._inside
        if id(module) not in inside:
            return
        while inside.pop() != id(module):  # what an exception has left without a word
            pass
        if not inside:
            self._mode.take_down()
        elif self._local.plain is module:
            self._local.plain = None
            self._mode.put_up()

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
        if not any(mode is self for mode in _get_current_function_mode_stack()):
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
        output = func(*args, **kwargs)
        read = self._readers.get(func)
        if read is not None and self.is_up and torch.is_grad_enabled():
            x, weight, call = read(func, args, kwargs)
            self._watch.tell(call, x, weight, output)
        return output


WATCH = Watch()

"""An unpickler for CIFAR-10's "python" batches that runs nothing that a file names.

A pickle is a program: it may import and call anything. This one gets plain containers, and placeholders of ours
where it asks for numpy's arrays; whatever else it names is refused before it is looked up.
"""

from __future__ import annotations

import io
import math
import pickle
from typing import Any

import numpy as np

_BYTES = ("u1", "|u1")


class RefusedError(ValueError):
    """The pickle is damaged, or asks for what it has no need of."""


class _Dtype:
    """Stands for a numpy dtype; only unsigned bytes are allowed."""

    def __init__(self, code: object, *_: object) -> None:
        name = code.decode("latin1") if isinstance(code, bytes) else code
        if name not in _BYTES:
            raise RefusedError(f"an array must hold unsigned bytes, got dtype {name!r}")

    def __setstate__(self, state: object) -> None:
        """Leave out byte order and the like: a byte has none."""


class _Array:
    """Stands for a numpy array until all of it is there.

    Attributes:
        value: the array; None before its state was read.
    """

    value: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        """Make the array from (version, shape, dtype, whether columns come first, bytes)."""
        _, shape, dtype, by_columns, data = state
        data = data.encode("latin1") if isinstance(data, str) else data
        sound = isinstance(dtype, _Dtype) and isinstance(data, bytes) and isinstance(shape, tuple)
        if not sound or not all(type(n) is int and n >= 0 for n in shape) or math.prod(shape) != len(data):
            raise RefusedError("an array's bytes do not fit its shape")
        self.value = np.frombuffer(data, np.uint8).reshape(shape, order="F" if by_columns else "C")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Return a new placeholder for the few names of numpy that an array's pickle holds, and nothing else."""
        if (module, name) in (("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")):
            return lambda *_: _Array()
        if (module, name) == ("numpy", "ndarray"):
            return object()
        if (module, name) == ("numpy", "dtype"):
            return lambda *arguments: _Dtype(*arguments)
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2
            return lambda *arguments: _latin1(*arguments)
        raise RefusedError(f"it asks for {module}.{name}, and only arrays, bytes, str, dict and list are allowed")

    def persistent_load(self, pid: Any) -> Any:
        """Refuse objects from outside."""
        raise RefusedError("it refers to objects outside of it")


def _latin1(text: object, encoding: object) -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
        raise RefusedError("it encodes text in another way than bytes are written")
    return text.encode("latin1")


def loads(data: bytes) -> Any:
    """Unpickle containers, numbers, strings and arrays of unsigned bytes.

    Args:
        data: a pickle, of Python 2 (its strings become bytes) or 3.

    Raises:
        RefusedError: if it is damaged or asks for anything else.
    """
    try:
        value = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except RefusedError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise RefusedError(f"it is damaged ({type(error).__name__}: {error})") from error
    return _finished(value)


def _finished(value: Any) -> Any:
    """Put arrays in place of their placeholders, in a dict's values too: CIFAR-10 has them nowhere else."""
    if isinstance(value, _Array):
        return value.value
    if type(value) is dict:
        return {key: item.value if isinstance(item, _Array) else item for key, item in value.items()}
    return value

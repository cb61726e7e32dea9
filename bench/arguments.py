"""What the commands of this folder read from the command line; a bad value ends them with a clear error."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Collection
from pathlib import Path

import torch


def positive(text: str) -> int:
    """Read a number of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return number


def above_zero(text: str) -> float:
    """Read a finite number above 0."""
    return _number(text, lambda value: 0 < value < math.inf, "above 0")


def below_one(text: str) -> float:
    """Read a number in [0, 1)."""
    return _number(text, lambda value: 0 <= value < 1, "from 0 to below 1")


def _number(text: str, is_allowed: Callable[[float], bool], what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not is_allowed(value):
        raise argparse.ArgumentTypeError(f"must be a number {what}, got {text!r}")
    return value


def device_name(text: str) -> str:
    """Read a device that this torch can use."""
    try:
        torch.zeros(1, device=text)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"must be a device that torch can use here, got {text!r}: {reason}") from error
    return text


def some_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """Return a reader of a list with commas, each entry one of `known`."""

    def read(text: str) -> list[str]:
        entries = [entry.strip() for entry in text.split(",")]
        for entry in entries:
            if entry not in known:
                raise argparse.ArgumentTypeError(f"must be some of {', '.join(known)}, with commas, got {entry!r}")
        return list(dict.fromkeys(entries))

    return read


def writable(text: str) -> Path:
    """Read the path of a file in a folder that exists: better refused now than after minutes of measuring."""
    path = Path(text)
    if not path.parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file in a folder that exists, got {text!r}")
    return path


def add_where(parser: argparse.ArgumentParser) -> None:
    """Add `--device` and `--threads`."""
    parser.add_argument("--device", type=device_name, default="cpu", help="where to measure (default: cpu)")
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads of torch (default: 1)")

"""What the commands of this folder read from the command line; a bad value ends them with a clear error."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence

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


def device_name(text: str) -> str:
    """Read a device that this torch can use."""
    try:
        torch.zeros(1, device=text)
    except (RuntimeError, AssertionError) as error:
        missing = text.startswith("cuda") and not torch.cuda.is_available()
        reason = "no CUDA device" if missing else str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"must be a device that torch can use here, got {text!r}: {reason}") from error
    return text


def add_some(parser: argparse.ArgumentParser, name: str, known: Collection[str], usual: Sequence[str]) -> None:
    """Add an option that takes some of `known`."""
    shown = "all" if list(usual) == list(known) else " ".join(usual)
    parser.add_argument(
        name, nargs="+", choices=known, default=list(usual), metavar="NAME",
        help=f"some of {', '.join(known)} (default: {shown})",
    )  # fmt: skip


def add_where(parser: argparse.ArgumentParser) -> None:
    """Add `--device` and `--threads`."""
    parser.add_argument("--device", type=device_name, default="cpu", help="where (default: cpu)")
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads of torch (default: 1)")

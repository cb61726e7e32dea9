"""Draws that change no other: torch's generators are seeded for a while, and then go on from where they were."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def drawn_apart(*what: object) -> Iterator[None]:
    """Seed torch's generators by some words and numbers; afterwards they are as they were.

    Args:
        *what: whatever tells these draws from others, the seed of the run among it.
    """
    text = " ".join(map(str, what))
    seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") % 2**63
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield

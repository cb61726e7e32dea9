"""A forward pass that leaves the running statistics of a model's norms as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def without_running_statistics(model: nn.Module) -> Iterator[None]:
    """Let norms that follow running statistics in training take those of the batch, and follow nothing.

    Args:
        model: the model, whose modes are put back in the end.
    """
    following = [m for m in model.modules() if m.training and getattr(m, "track_running_stats", False)]
    for module in following:
        module.track_running_stats = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in following:
            module.track_running_stats = True  # type: ignore[assignment]

"""One process."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from torch import Tensor, distributed

from kfac2.processes.base import Processes
from kfac2.statistics import Sums


class Alone(Processes):
    """All work is its own."""

    def add_up(self, sums: Sums) -> Sums:
        """Return the sums.

        Raises:
            RuntimeError: if there are other processes by now.
        """
        check_alone(())
        return sums

    def agree(self, flag: bool) -> bool:
        """Return the flag."""
        return flag


def check_alone(parameters: Iterable[Tensor]) -> None:
    """Check that this process trains the whole model by itself.

    Args:
        parameters: of the model.

    Raises:
        RuntimeError: if torch.distributed has more than one process.
        ValueError: if a parameter is a DTensor (FSDP2, tensor parallelism).
    """
    count = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    if count > 1:
        raise RuntimeError(
            f"kfac2 trains in one process so far, got torch.distributed with {count}: statistics are not shared "
            "between processes, so that their replicas of the model would drift apart; train in one process, or with "
            "another optimizer"
        )
    tensor = sys.modules.get("torch.distributed.tensor")  # without it there is no DTensor
    for number, parameter in enumerate(parameters):
        if tensor is not None and isinstance(parameter, tensor.DTensor):
            raise ValueError(
                f"parameters must be plain tensors, got a DTensor (FSDP2, tensor parallelism) of shape "
                f"{tuple(parameter.shape)} at number {number}: statistics of sharded weights are not there yet; build "
                "the optimizer for a model that is not sharded, or train it with another optimizer"
            )

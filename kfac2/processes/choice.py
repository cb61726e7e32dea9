"""Which processes an optimizer works with."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch
from torch import Tensor, distributed, nn

from kfac2.processes.alone import Alone, world_size
from kfac2.processes.base import Processes

WORLD = "world"
"""`process_group=` where nothing else is said: all processes of torch.distributed, where there are any."""


def processes_of(process_group: object, device: torch.device) -> Processes:
    """Return the processes that train together.

    Args:
        process_group: `"world"`; a `torch.distributed.ProcessGroup`; or None for this process alone.
        device: of the layers.

    Raises:
        TypeError: if it is none of these.
        ValueError: if the group cannot be used, see `Group`.
    """
    if process_group is None:
        return Alone(as_asked=True)
    if isinstance(process_group, str):
        if process_group != WORLD:
            raise ValueError(f"process_group must be 'world', a ProcessGroup or None, got {process_group!r}")
        if world_size() == 1:
            return Alone()
        process_group = distributed.distributed_c10d._get_default_group()
    elif distributed.is_available() and process_group is distributed.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("process_group must have this process in it, got the group of other processes")
    elif not distributed.is_available() or not isinstance(process_group, distributed.ProcessGroup):
        raise TypeError(
            "process_group must be 'world', a torch.distributed.ProcessGroup or None, got "
            f"{type(process_group).__name__}"
        )
    from kfac2.processes.group import Group  # what a process alone never needs

    if process_group.size() == 1:
        return Alone(as_asked=True)
    return Group(process_group, device)


def unwrapped(model: nn.Module, draws_labels: bool) -> nn.Module:
    """Return the model that DistributedDataParallel has wrapped, so that names are the same with it and without.

    Args:
        model: wrapped, or not.
        draws_labels: whether statistics differentiate the model's graph by themselves.

    Raises:
        ValueError: if it was wrapped with `static_graph=True` and statistics differentiate its graph.
    """
    if not isinstance(model, nn.parallel.DistributedDataParallel):
        return model
    if draws_labels and model.static_graph:
        raise ValueError(
            "model must be wrapped with static_graph=False where statistics differentiate its graph, got "
            "static_graph=True: DistributedDataParallel would take that for the backward pass, and average no "
            "gradients; or take fisher='empirical'"
        )
    return model.module


def check_plain(parameters: Iterable[Tensor]) -> None:
    """Check that every process has all of each parameter.

    Args:
        parameters: of the model.

    Raises:
        ValueError: if a parameter is a DTensor (FSDP2, tensor parallelism).
    """
    tensor = sys.modules.get("torch.distributed.tensor")  # without it there is no DTensor
    for number, parameter in enumerate(parameters):
        if tensor is not None and isinstance(parameter, tensor.DTensor):
            raise ValueError(
                f"parameters must be plain tensors, got a DTensor (FSDP2, tensor parallelism) of shape "
                f"{tuple(parameter.shape)} at number {number}: the statistics of a weight need its whole gradient, "
                "which no process has; wrap the model in DistributedDataParallel instead of fully_shard"
            )

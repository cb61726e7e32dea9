"""Checks that more than one op needs. Tensors' shapes are checked by the bindings, once."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def check_tensors(name: str, tensors: Sequence[Tensor]) -> None:
    """Check that a list is one of tensors, not empty, and on one device."""
    if isinstance(tensors, Tensor) or not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise TypeError(f"{name} must be a list of tensors, got {type(tensors).__name__}")
    if not tensors:
        raise ValueError(f"{name} must hold at least one tensor, got an empty list")
    device = tensors[0].device
    for i, tensor in enumerate(tensors):
        if tensor.device != device:
            check_one_device(**{f"{name}[0]": tensors[0], f"{name}[{i}]": tensor})


def check_one_device(**tensors: Tensor) -> None:
    """Check that all named tensors are on the device of the first."""
    (first, reference), *others = tensors.items()
    for name, tensor in others:
        if tensor.device != reference.device:
            raise ValueError(
                f"{name} must be on the device of {first}, {reference.device}, got {tensor.device}: "
                "move all tensors to one device"
            )


def check_same_length(name: str, sequence: Sequence[object], other_name: str, other: Sequence[object]) -> None:
    """Check that two lists have one entry for each layer."""
    if len(sequence) != len(other):
        raise ValueError(
            f"{name} must have one entry for each of the {len(other)} entries of {other_name}, got {len(sequence)}"
        )


def detached(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Cut tensors from their graphs: no op of kfac2 is differentiated."""
    return [tensor.detach() if tensor.requires_grad else tensor for tensor in tensors]

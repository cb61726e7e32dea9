"""Numbers that tell whether processes have the same: of options, of layers, of the bits of tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

BITS = 48  # a float64 holds such an integer
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(*values: object) -> int:
    """Return a number of 48 bits that depends on what values print as."""
    return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=BITS // 8).digest(), "little")


@torch.no_grad()
def checksum(tensors: Iterable[Tensor]) -> int:
    """Return a number of 48 bits that depends on the bits of tensors: each one's, as integers, added up."""
    sums = [_sum_of_bits(tensor) for tensor in tensors if not isinstance(tensor, UninitializedParameter)]
    by_device: dict[torch.device, list[Tensor]] = {}
    for one in sums:
        by_device.setdefault(one.device, []).append(one)
    read = {device: iter(torch.stack(own).tolist()) for device, own in by_device.items()}
    return fingerprint([next(read[one.device]) for one in sums])


def _sum_of_bits(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    if tensor.dtype is torch.bool:
        return tensor.sum(dtype=torch.int64)
    return tensor.view(_INTEGERS[tensor.dtype.itemsize]).sum(dtype=torch.int64)

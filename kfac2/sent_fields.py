"""Fields of inverses as one flat message: half of each symmetric matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kfac2.fine import Fields, FineSolver
from kfac2.layout import Batch, Layout
from kfac2.triangles import packed, packed_shape, unpacked


def room(layout: Layout, fine: FineSolver) -> Tensor:
    """Return memory for a message about the layers of a layout."""
    return torch.empty(sent_size(layout, fine), dtype=layout.dtype, device=layout.device)


def flat_fields(fields: Fields, layout: Layout, fine: FineSolver) -> Tensor:
    """Return the message about the layers of a layout: field after field, batch after batch."""
    flat = room(layout, fine)
    for part, name, number in _parts(flat, layout, fine):
        stack = fields[name][number]
        part.copy_(packed(stack) if name in fine.symmetric else stack)
    return flat


def read_fields(flat: Tensor, layout: Layout, fine: FineSolver) -> Fields:
    """Read what `flat_fields` wrote."""
    fields: Fields = {name: [] for name in fine.fields}
    for part, name, number in _parts(flat, layout, fine):
        d = fine.shape(name, layout.batches[number])[0]
        fields[name].append(unpacked(part, d) if name in fine.symmetric else part)
    return fields


def sent_size(layout: Layout, fine: FineSolver) -> int:
    """Return how many numbers are sent for the layers of a layout."""
    return sum(math.prod(_shape(batch, name, fine)) for name in fine.fields for batch in layout.batches)


def sent_bytes(layout: Layout, fine: FineSolver) -> int:
    """Return how many bytes are sent for the layers of a layout."""
    return sent_size(layout, fine) * layout.dtype.itemsize


def _parts(flat: Tensor, layout: Layout, fine: FineSolver) -> Iterator[tuple[Tensor, str, int]]:
    """View the parts of a message, each with its field and the number of its batch."""
    begin = 0
    for name in fine.fields:
        for number, batch in enumerate(layout.batches):
            shape = _shape(batch, name, fine)
            end = begin + math.prod(shape)
            yield flat[begin:end].view(shape), name, number
            begin = end


def _shape(batch: Batch, name: str, fine: FineSolver) -> tuple[int, ...]:
    """Return the shape in which the entries of a field of a batch are sent."""
    shape = fine.shape(name, batch)
    return batch.blocks, *(packed_shape(shape[0]) if name in fine.symmetric else shape)

"""Drawn shapes: convolutions of one to three axes with their inputs, for the statistics ops."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 1e-5}


@dataclass
class Case:
    x: torch.Tensor
    kernel_size: tuple
    stride: tuple
    padding: object
    dilation: tuple
    bias: bool

    @property
    def geometry(self):
        return (self.kernel_size, self.stride, self.padding, self.dilation, self.bias)


def _laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "strided":
        return torch.stack([x, -x], dim=-1)[..., 0]
    return x


@st.composite
def cases(draw, dtypes=tuple(TOLERANCE), ranks=(0, 1, 2, 3), batches=(0, 1, 2, 5)):
    rank = draw(st.sampled_from(ranks))
    kernel = tuple(draw(st.integers(1, 4)) for _ in range(rank))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(rank))
    padding = draw(st.sampled_from(["same", "valid", "numbers"]))
    stride = (1,) * rank if padding == "same" else tuple(draw(st.integers(1, 3)) for _ in range(rank))
    if padding == "numbers":
        padding = tuple(draw(st.integers(0, 3)) for _ in range(rank))
    spatial = tuple(d * (k - 1) + draw(st.integers(1, 6)) for d, k in zip(dilation, kernel, strict=True))
    channels = draw(st.sampled_from([1, 2, 3, 5, 8, 17, 33]))
    dtype = draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    x = torch.randn(draw(st.sampled_from(batches)), channels, *spatial, dtype=torch.float64, generator=generator)
    layout = draw(st.sampled_from(["contiguous", "channels_last", "strided"]))
    return Case(_laid_out(x.to(dtype), layout), kernel, stride, padding, dilation, draw(st.booleans()))


@st.composite
def map_sets(draw, dtype=torch.float64):
    batch = draw(st.sampled_from([1, 2, 7]))
    rows, grids = [], []
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    for _ in range(draw(st.integers(1, 7))):
        grid = tuple(draw(st.lists(st.integers(1, 9), min_size=0, max_size=3)))
        places = int(torch.tensor(grid).prod()) if grid else 1
        width = draw(st.integers(1, 3))
        rows.append(torch.randn(batch, places, width, dtype=dtype, generator=generator))
        grids.append(grid)
    return rows, grids

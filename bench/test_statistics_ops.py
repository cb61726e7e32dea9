"""The statistics ops beside plain torch, each checked before it is timed: `pytest bench --benchmark-only`."""

import pytest
import torch
import torch.nn.functional as F

from kfac2 import ops

BATCH = 128
CONVOLUTIONS = {"16x32x32": (16, 32), "32x16x16": (32, 16), "64x8x8": (64, 8)}
RESNET_110 = [32] * 37 + [16] * 37 + [8] * 38  # maps of its 112 layers, square


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def unfold_and_multiply(x):
    rows = F.unfold(x, 3, padding=1).transpose(1, 2).reshape(-1, 9 * x.shape[1])
    return rows.T @ rows


def shifted_planes(x):
    padded = F.pad(x, (1, 1, 1, 1))
    height, width = x.shape[2:]
    planes = [padded[:, :, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    rows = torch.stack(planes, 2).permute(1, 2, 0, 3, 4).reshape(9 * x.shape[1], -1)
    return rows @ rows.T


COVARIANCES = {
    "unfold, one product": unfold_and_multiply,
    "nine planes, one product": shifted_planes,
    "kfac2": lambda x: ops.input_covariance(x, 3, padding=1),
}


@pytest.mark.parametrize("how", COVARIANCES)
@pytest.mark.parametrize("size", CONVOLUTIONS)
def test_input_covariance(benchmark, size, how):
    channels, extent = CONVOLUTIONS[size]
    x = torch.randn(BATCH, channels, extent, extent, generator=torch.Generator().manual_seed(0))
    function = COVARIANCES[how]
    torch.testing.assert_close(function(x), unfold_and_multiply(x), rtol=1e-3, atol=1e-1)
    benchmark.group = f"input_covariance, 3x3, {size}, batch {BATCH}"
    benchmark(function, x)


SUMS = {
    "x.sum(dim=1)": lambda x: x.sum(1),
    "x.sum(), one number": lambda x: x.sum(),
    "kfac2": ops.channel_sums,
}


@pytest.mark.parametrize("how", SUMS)
def test_channel_sums(benchmark, how):
    x = torch.randn(BATCH, 64, 64, 64, generator=torch.Generator().manual_seed(0))  # 134 MB: larger than the caches
    torch.testing.assert_close(SUMS["kfac2"](x), x.sum(1), rtol=1e-4, atol=1e-3)
    benchmark.group = "channel_sums, 128x64x64x64"
    benchmark(SUMS[how], x)


def sums_by_torch(maps):
    """Pool every map onto each coarser grid, and multiply class by class."""
    classes = {extent: torch.stack([m for m in maps if m.shape[1] == extent]) for extent in (32, 16, 8)}
    rows = []
    for a, x in classes.items():
        row = []
        for b, y in classes.items():
            u, v = (z[:, :, :: max(z.shape[2] // min(a, b), 1), :: max(z.shape[2] // min(a, b), 1)] for z in (x, y))
            row.append(u.flatten(1) @ v.flatten(1).T)
        rows.append(torch.cat(row, 1))
    return torch.cat(rows)


CROSS = {"torch, class by class": sums_by_torch, "kfac2": ops.cross_layer_sums}


@pytest.mark.parametrize("how", CROSS)
def test_cross_layer_sums(benchmark, how):
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(BATCH, extent, extent, generator=generator) for extent in RESNET_110]
    torch.testing.assert_close(ops.cross_layer_sums(maps), sums_by_torch(maps), rtol=1e-3, atol=1e-1)
    benchmark.group = "cross_layer_sums, 112 layers of ResNet-110, batch 128"
    benchmark(CROSS[how], maps)

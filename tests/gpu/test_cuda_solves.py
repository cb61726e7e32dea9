"""Inverses and the calls of every step on a CUDA device, against the CPU's."""

import pytest
import torch
from compare import assert_equal
from device import DEVICE, anywhere, needs_cuda

from kfac2 import ops
from kfac2.ops.gather_gradients import gather_gradients
from kfac2.ops.shift_and_scale import shift_and_scale
from kfac2.ops.write_gradients import write_gradients

pytestmark = anywhere
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}


def factors(sizes, dtype, blocks=1):
    generator = torch.Generator().manual_seed(sum(sizes))
    rows = [torch.randn(blocks, d + d // 4 + 1, d, dtype=torch.float64, generator=generator) for d in sizes]
    return [(r.mT @ r / r.shape[1]).to(dtype) for r in rows]


def there(tensors):
    return [tensor.to(DEVICE) for tensor in tensors]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sizes", [[1, 2, 3], [31, 32, 33], [63, 64, 65], [577, 64], [10] * 200, [300, 5, 129, 1024]])
def test_inverses(sizes, dtype):
    A, G = factors(sizes, dtype, 2), factors(sizes[::-1], dtype, 2)
    got = ops.factored_tikhonov_inverse(there(A), there(G), 0.01)
    expected = ops.factored_tikhonov_inverse([a.double() for a in A], [g.double() for g in G], 0.01)
    assert not torch.cat(got.status).any()
    for ours, theirs in zip(got.A_inv + got.G_inv, expected.A_inv + expected.G_inv, strict=True):
        assert torch.equal(ours, ours.mT)
        assert_equal(ours.cpu().double(), theirs, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_bad_factors_are_reported_and_their_neighbours_are_right(dtype):
    A, G = factors([70, 70, 5, 70, 9], dtype), factors([3, 70, 70, 2, 9], dtype)
    A[0][0, 69, 69] = -9
    G[1][0, 1, 1] = float("nan")
    A[2][0, 0, 0] = float("inf")
    got, expected = ops.factored_tikhonov_inverse(there(A), there(G), 0.01), ops.factored_tikhonov_inverse(A, G, 0.01)
    assert torch.cat(got.status).tolist() == torch.cat(expected.status).tolist() == [1, 1, 1, 0, 0]
    for i in (3, 4):
        assert_equal(got.A_inv[i].cpu(), expected.A_inv[i], TOLERANCE[dtype])


@pytest.mark.parametrize("condition", [1e4, 1e6])
def test_accuracy_in_float32(condition):
    """As on the CPU: within 1e-3 up to 1e4; beyond, no worse than 1.5 times torch's own inverse."""
    d, ours, theirs = 577, [], []
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        basis = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator))[0]
        values = torch.where(torch.arange(d) < d // 8, 1.0, 1 / condition).double()
        A = (basis @ torch.diag(values) @ basis.T).float().to(DEVICE)
        A = (A + A.T) / 2
        exact = torch.linalg.inv(A.double())
        got = ops.factored_tikhonov_inverse([A], [torch.eye(3, device=DEVICE) * A.trace() / d], 0.0)
        assert int(got.status[0]) == 0
        for inverse, errors in ((got.A_inv[0], ours), (torch.linalg.inv(A), theirs)):
            errors.append(((inverse.double() - exact).norm() / exact.norm()).item())
    bound = 1.5 * sum(theirs) / 3
    assert sum(ours) / 3 < (max(1e-3, bound) if condition <= 1e4 else bound), (ours, theirs)


@pytest.mark.parametrize("total", [torch.float32, torch.float64])
def test_the_calls_of_a_step(total):
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 6, 3, 2), (300, 70), (7,), (5, 3)] * 30
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    gradients = [torch.randn(shape, generator=generator).to(dtypes[i % 4]) for i, shape in enumerate(shapes)]
    gradients = [g.to(memory_format=torch.channels_last) if g.dim() == 4 else g for g in gradients]
    lengths = [gradient.numel() // gradient.shape[0] for gradient in gradients]
    sizes = torch.tensor([gradient.numel() for gradient in gradients])
    ends = sizes.cumsum(0)
    spans = torch.stack([ends - sizes, ends, sizes], 1)
    layers = len(gradients)
    layout = torch.stack([spans[:, 0], torch.tensor(lengths), torch.arange(layers), torch.arange(layers)], 1)
    rates, in_coarse = torch.full((layers,), 0.1, dtype=torch.float64), torch.ones(layers, dtype=torch.float64)
    usable = (torch.arange(layers) % 7 > 0).double()
    inverse = torch.randn(layers, layers, dtype=torch.float64, generator=generator)
    directions = torch.randn(int(ends[-1]), generator=generator).to(total)
    limits = torch.tensor([[0.01, 1.0, torch.inf][i % 3] for i in range(layers)], dtype=torch.float64)
    largest = torch.tensor([torch.finfo(g.dtype).max for g in gradients], dtype=torch.float64)
    results = []
    for device in (torch.device("cpu"), DEVICE):
        mine = [torch.empty_strided(g.shape, g.stride(), dtype=g.dtype, device=device).copy_(g) for g in gradients]
        matrices = torch.zeros(int(ends[-1]), dtype=total, device=device)
        first_bad = gather_gradients(mine, layout, layers, layers, matrices)
        skipped = torch.zeros(2, dtype=torch.int64, device=device)
        step = shift_and_scale(
            matrices, directions.to(device), spans, rates, None, in_coarse, usable.to(device), inverse.to(device),
            first_bad, layers, 0.5, 1e-3, skipped, limits.to(device), largest,
        )  # fmt: skip
        write_gradients(mine, layout, directions.to(device), step, usable.to(device))
        results.append([matrices.cpu(), first_bad.cpu(), *(part.cpu() for part in step), *(g.cpu() for g in mine)])
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert_equal(ours.double(), theirs.double(), 1e-2 if theirs.dtype.itemsize == 2 else 1e-4)


def test_what_is_not_finite_zeroes_all_gradients():
    gradients = [torch.randn(3, 4, device=DEVICE), torch.randn(9, device=DEVICE)]
    gradients[1][5] = float("nan")
    layout, one = torch.tensor([[0, 4, 0, 0], [-1, 0, -1, 1]]), torch.ones(1, dtype=torch.float64)
    matrices, skipped = torch.zeros(12, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    first_bad = gather_gradients(gradients, layout, 1, 2, matrices)
    usable = one.to(DEVICE)
    step = shift_and_scale(
        matrices, matrices, torch.tensor([[0, 12, 12]]), one, None, one, usable, None, first_bad, 2, 0.0, None, skipped
    )
    write_gradients(gradients, layout, matrices, step, usable)
    assert step.found.item() == 1 and skipped.tolist() == [1, 1]
    assert not any(gradient.any() for gradient in gradients)


@needs_cuda
def test_no_call_waits_for_the_device():
    """Torch reports its own waits; a launch that waits would be seen by the clock."""
    A, G = there(factors([70, 300, 10], torch.float32)), there(factors([5, 60, 10], torch.float32))
    ops.factored_tikhonov_inverse(A, G, 0.1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(2_000_000_000)  # about a second
        done = torch.cuda.Event()
        ops.factored_tikhonov_inverse(A, G, 0.1)
        done.record()
        assert not done.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()

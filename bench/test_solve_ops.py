"""The solves beside plain torch, each checked before it is timed: `pytest bench --benchmark-only`."""

import pytest
import torch

from kfac2.ops.eigendecompose import floored_eigh


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def native(stack):
    values, vectors, _ = torch.ops.kfac2.eigendecompose([stack])
    return values[0], vectors[0]


EIGENDECOMPOSITIONS = {
    "torch.linalg.eigh": torch.linalg.eigh,
    "native": native,
    "floored_eigh, which chooses": lambda stack: floored_eigh(stack)[:2],
}


@pytest.mark.parametrize("how", EIGENDECOMPOSITIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("size", [2, 4, 8, 16, 32, 64])
def test_eigendecompose(benchmark, size, dtype, how):
    rows = torch.randn(36, 2 * size, size, dtype=dtype, generator=torch.Generator().manual_seed(0))
    stack = rows.mT @ rows / (2 * size)
    function = EIGENDECOMPOSITIONS[how]
    values, vectors = function(stack)
    torch.testing.assert_close((vectors * values.unsqueeze(1)) @ vectors.mT, stack, rtol=1e-4, atol=1e-4)
    benchmark.group = f"eigendecompose, 36 matrices of size {size}, {str(dtype).removeprefix('torch.')}"
    benchmark(function, stack)

"""The native eigendecomposition on a CUDA device: what its results must satisfy, and no synchronisation."""

import pytest
import torch
from compare import assert_equal
from device import DEVICE, anywhere, needs_cuda, needs_kernels

from kfac2 import ops
from kfac2.ops.eigendecompose import floored_eigh

pytestmark = anywhere
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}


def symmetric(q, d, dtype=torch.float64):
    m = torch.randn(q, d, d, dtype=torch.float64)
    return (m + m.mT).to(dtype)


def assert_decomposed(stack, values, vectors, tolerance):
    if not len(stack):
        return
    scale = stack.double().abs().max().clamp(min=1e-300)  # the squares of huge and tiny ones are no numbers
    stack, values, vectors = stack.double() / scale, values.cpu().double() / scale, vectors.cpu().double()
    exact = torch.linalg.eigvalsh(stack)
    assert_equal(values, exact.clamp(min=0), tolerance)
    assert_equal(vectors @ torch.diag_embed(exact) @ vectors.mT, stack, tolerance)
    assert_equal(vectors.mT @ vectors, torch.eye(stack.shape[-1]).expand_as(stack), tolerance)


@needs_kernels
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("largest", [5, 16, 33, 64, 100, 128, 150, 256])  # in shared memory, in the workspace
def test_mixed_sizes(largest, dtype):
    stacks = [symmetric(1 + i % 3, d, dtype) for i, d in enumerate((1, 2, 3, largest - 1, largest))]
    stacks.insert(2, symmetric(0, 4, dtype))  # an empty one
    values, vectors, status = torch.ops.kfac2.eigendecompose([stack.to(DEVICE) for stack in stacks])
    assert not status.any() and len(status) == 9
    for stack, w, V in zip(stacks, values, vectors, strict=True):
        assert_decomposed(stack, w, V, TOLERANCE[dtype])


def test_special_matrices():
    d = 17
    rank_one = torch.randn(d, 1, dtype=torch.float64) @ torch.ones(1, d, dtype=torch.float64)
    stack = torch.stack(
        [
            torch.zeros(d, d, dtype=torch.float64),
            torch.eye(d, dtype=torch.float64) * 3,
            rank_one @ rank_one.mT,
            torch.diag(torch.arange(d, dtype=torch.float64) - 5),
            symmetric(1, d)[0] * 1e200,
            symmetric(1, d)[0] * 1e-200,
        ]
    )
    values, vectors, status = floored_eigh(stack.to(DEVICE))
    assert not status.any()
    for i in range(len(stack)):
        assert_decomposed(stack[i], values[i], vectors[i], 1e-13)


def test_a_matrix_that_is_not_finite_is_reported_and_its_neighbours_are_right():
    good = symmetric(4, 6)
    stack = good.clone()
    stack[1, 2, 5] = float("nan")
    stack[2, 5, 0] = float("-inf")
    values, vectors, status = floored_eigh(stack.to(DEVICE))
    assert status.tolist() == [0, 1, 1, 0]
    for i in (0, 3):
        assert_decomposed(good[i], values[i], vectors[i], 1e-13)
    assert not values[1:3].any() and torch.equal(vectors[1].cpu(), torch.eye(6, dtype=torch.float64))


def test_the_front_takes_large_sizes_too():
    A, G = [symmetric(1, d)[0] for d in (3, 200, 64)], [symmetric(1, d)[0] for d in (130, 2, 5)]
    parts = ops.eigendecompose([a.to(DEVICE) for a in A], [g.to(DEVICE) for g in G])
    for matrices, values, vectors in ((A, *parts[:2]), (G, *parts[2:4])):
        for matrix, w, V in zip(matrices, values, vectors, strict=True):
            assert_decomposed(matrix, w, V, 1e-12)
    assert not torch.cat(parts.status).any()


@needs_cuda
def test_no_synchronisation():
    A = [symmetric(1, d)[0].float().to(DEVICE) for d in (3, 16, 64, 128)]
    coarse = symmetric(1, 66).to(DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        parts = ops.eigendecompose(A, A[::-1])
        result = floored_eigh(coarse)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_decomposed(coarse.cpu(), *result[:2], 1e-13)
    assert_decomposed(A[0].cpu(), parts.A_values[0], parts.A_vectors[0], 1e-5)


@needs_kernels
def test_results_are_the_same_each_time():
    stacks = [symmetric(20, d, torch.float32).to(DEVICE) for d in (7, 31, 64, 120)]
    first = torch.ops.kfac2.eigendecompose(stacks)
    for _ in range(5):
        again = torch.ops.kfac2.eigendecompose(stacks)
        for i in range(2):
            assert all(torch.equal(a, b) for a, b in zip(first[i], again[i], strict=True))


@needs_kernels
def test_the_lower_triangle_is_read_whatever_the_strides():
    stack = symmetric(2, 3).to(DEVICE)
    noisy = (stack + torch.full_like(stack, 9.0).triu(1)).mT.contiguous().mT
    for ours, theirs in zip(
        torch.ops.kfac2.eigendecompose([noisy]), torch.ops.kfac2.eigendecompose([stack]), strict=True
    ):
        assert torch.equal(ours[0], theirs[0])


@needs_kernels
def test_opcheck():
    stacks = [symmetric(2, 5, torch.float32).to(DEVICE), symmetric(1, 3, torch.float32).to(DEVICE)]
    torch.library.opcheck(torch.ops.kfac2.eigendecompose.default, (stacks,))

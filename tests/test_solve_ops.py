"""Inverses and preconditioning against kfac2.reference, over drawn sizes, blocks and dtypes."""

import math
import sys

import pytest
import torch
from compare import assert_equal
from hypothesis import given
from hypothesis import strategies as st

from kfac2 import ops, reference
from kfac2.ops.eigendecompose import floored_eigh

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
precondition_module = sys.modules["kfac2.ops.precondition"]


def spd(d, dtype=torch.float64, generator=None):
    rows = torch.randn(2 * d + 1, d, dtype=torch.float64, generator=generator)
    return (rows.T @ rows / len(rows)).to(dtype)


@st.composite
def layer_sets(draw):
    """Factors and gradients of a few layers; some of several blocks."""
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    A, G, grads = [], [], []
    for _ in range(draw(st.integers(1, 5))):
        d_in, d_out = draw(st.sampled_from([1, 2, 3, 7])), draw(st.sampled_from([1, 2, 5]))
        q = draw(st.sampled_from([None, 1, 3]))
        count = 1 if q is None else q
        stacks = [
            torch.stack([spd(d_in, dtype, generator) for _ in range(count)]),
            torch.stack([spd(d_out, dtype, generator) for _ in range(count)]),
            torch.randn(count, d_out, d_in, dtype=torch.float64, generator=generator).to(dtype),
        ]
        for matrices, stack in zip((A, G, grads), stacks, strict=True):
            matrices.append(stack[0] if q is None else stack)
    return A, G, grads, draw(st.sampled_from([1e-2, 1.0]))


def flat(stacks):
    """All blocks as single float64 matrices."""
    return [m.double() for stack in stacks for m in (stack if stack.dim() == 3 else stack.unsqueeze(0))]


@given(layer_sets())
def test_factored_tikhonov_inverse_and_precondition(drawn):
    A, G, grads, damping = drawn
    tolerance = TOLERANCE[A[0].dtype]
    result = ops.factored_tikhonov_inverse(A, G, damping)
    expected = reference.factored_tikhonov_inverse(flat(A), flat(G), damping)
    for got, given_, wanted in ((result.A_inv, A, expected[0]), (result.G_inv, G, expected[1])):
        assert [m.shape for m in got] == [m.shape for m in given_]
        assert [m.dtype for m in got] == [m.dtype for m in given_]
        for ours, theirs in zip(flat(got), wanted, strict=True):
            assert_equal(ours, theirs, tolerance)
    assert not torch.cat(result.status).any()
    stepped = ops.precondition(grads, result.A_inv, result.G_inv)
    assert [m.shape for m in stepped] == [m.shape for m in grads]
    for ours, theirs in zip(flat(stepped), reference.precondition(flat(grads), *expected), strict=True):
        assert_equal(ours, theirs, tolerance)


@given(layer_sets())
def test_eigendecompose_and_precondition(drawn):
    A, G, grads, damping = drawn
    tolerance = TOLERANCE[A[0].dtype]
    parts = ops.eigendecompose(A, G)
    for values, vectors, factors in (
        (parts.A_values, parts.A_vectors, A),
        (parts.G_values, parts.G_vectors, G),
    ):
        for w, V, M in zip(values, vectors, factors, strict=True):
            assert_equal(V @ torch.diag_embed(w) @ V.mT, M, tolerance)
            assert (w >= 0).all()
    expected = reference.eigendecompose(flat(A), flat(G))
    for ours, theirs in zip([v for s in parts.A_values for v in s.reshape(-1, s.shape[-1])], expected, strict=True):
        assert_equal(ours, theirs[0], tolerance)
    stepped = ops.precondition_eigh(grads, *parts[:4], damping)
    for ours, theirs in zip(
        flat(stepped), reference.precondition_eigh(flat(grads), flat(A), flat(G), damping), strict=True
    ):
        assert_equal(ours, theirs, tolerance)


@pytest.mark.parametrize("size", [3, 30])
def test_floored_eigh(size):
    good, broken = spd(size), spd(size)
    broken[size - 1, 0] = float("inf")
    values, vectors, status = floored_eigh(torch.stack([good, broken, -good]))
    assert status.tolist() == [0, 1, 0]
    assert_equal((vectors[0] * values[0]) @ vectors[0].mT, good)
    assert torch.equal(vectors[1].abs(), torch.eye(size, dtype=torch.float64)) and not values[1:].any()


def conditioned(d, condition, spectrum, generator):
    """A symmetric matrix of that condition, eigenvalues spread evenly in the logarithm or nearly all at the bottom."""
    basis = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator))[0]
    values = torch.logspace(0, -math.log10(condition), d, dtype=torch.float64)
    if spectrum == "few large":
        values = torch.where(torch.arange(d) < max(d // 8, 1), 1.0, 1 / condition).double()
    matrix = basis @ torch.diag(values) @ basis.T
    return (matrix + matrix.T) / 2


def relative(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("d", [10, 64, 145, 300])
@pytest.mark.parametrize("spectrum", ["even", "few large"])
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e5, 1e6])
def test_accuracy_in_float32(condition, spectrum, d):
    """Within 1e-3 up to a condition of 1e4; beyond, no worse than 1.5 times torch's own float32 inverse by Cholesky.

    Rounding of few numbers differs widely from draw to draw, and from processor to processor.
    """
    generator = torch.Generator().manual_seed(d)
    ours, theirs, stepped, stepped_theirs = [], [], [], []
    for _ in range(40 if d < 100 else 5):
        A = conditioned(d, condition, spectrum, generator).float()
        G = torch.eye(3) * A.trace() / d
        exact = torch.linalg.inv(A.double())
        result = ops.factored_tikhonov_inverse([A], [G], 0.0)
        assert int(result.status[0]) == 0
        grad = torch.randn(3, d, dtype=torch.float64, generator=generator)
        wanted = torch.linalg.inv(G.double()) @ grad @ exact
        (step,) = ops.precondition([grad.float()], result.A_inv, result.G_inv)
        ours.append(relative(result.A_inv[0], exact))
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(A))
        theirs.append(relative(inverse, exact))
        stepped.append(relative(step, wanted))
        stepped_theirs.append(relative(torch.linalg.inv(G) @ grad.float() @ inverse, wanted))
        precise = ops.factored_tikhonov_inverse([A.double()], [G.double()], 0.0)  # the float64 route
        assert relative(precise.A_inv[0], exact) < 1e-8
    for mine, other in ((ours, theirs), (stepped, stepped_theirs)):
        mean, bound = sum(mine) / len(mine), 1.5 * sum(other) / len(other)
        assert mean < (max(1e-3, bound) if condition <= 1e4 else bound), (mean, bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_factors_go_through_torch_and_mix_with_small_ones(dtype, monkeypatch):
    from kfac2.ops import factored_tikhonov_inverse as module

    monkeypatch.setattr(sys.modules[module.__module__], "_LARGEST_ON_CPU", 6)
    A, G = [spd(9, dtype), spd(3, dtype), spd(4, dtype)], [spd(2, dtype), spd(8, dtype), spd(2, dtype)]
    result = ops.factored_tikhonov_inverse(A, G, 0.1)
    expected = reference.factored_tikhonov_inverse([a.double() for a in A], [g.double() for g in G], 0.1)
    for got, wanted in zip(result.A_inv + result.G_inv, expected[0] + expected[1], strict=True):
        assert_equal(got.double(), wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("largest", [6, 100])
def test_factors_that_may_be_written_over_give_the_same(largest, monkeypatch):
    """A large stack that is alone in its shape is inverted where it lies."""
    monkeypatch.setattr(sys.modules[ops.factored_tikhonov_inverse.__module__], "_LARGEST_ON_CPU", largest)
    A, G = ([torch.stack([spd(d), spd(d)]) for d in sizes] for sizes in ((9, 5, 5), (8, 7, 3)))
    expected = ops.factored_tikhonov_inverse(A, G, 0.1)
    result = ops.factored_tikhonov_inverse(A, G, 0.1, overwrites=True)
    for ours, theirs in zip(result, expected, strict=True):
        assert all(map(torch.equal, ours, theirs))
    assert (result.A_inv[0].data_ptr() == A[0].data_ptr()) == (largest == 6)


def test_layers_of_several_precisions():
    A, G = [spd(4), spd(3, torch.float32)], [spd(2), spd(5, torch.float32)]
    result = ops.factored_tikhonov_inverse(A, G, 0.1)
    assert [m.dtype for m in result.A_inv] == [torch.float64, torch.float32]
    expected = reference.factored_tikhonov_inverse([a.double() for a in A], [g.double() for g in G], 0.1)
    for got, wanted in zip(result.A_inv + result.G_inv, expected[0] + expected[1], strict=True):
        assert_equal(got.double(), wanted, 1e-4)


def test_zero_trace_gives_pi_one():
    zero, one = torch.zeros(2, 2, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    result = ops.factored_tikhonov_inverse([zero, zero], [one, torch.zeros(1, 1, dtype=torch.float64)], 0.04)
    assert_equal(result.A_inv[0], torch.eye(2).double() / 0.2)
    assert_equal(result.G_inv[0], one / 1.2)
    assert_equal(result.G_inv[1], torch.eye(1).double() / 0.2)


def test_a_bad_matrix_is_reported_and_its_neighbours_are_right():
    good, indefinite = spd(3), torch.diag(torch.tensor([1.0, -5.0, 2.0], dtype=torch.float64))
    broken = good.clone()
    broken[1, 2] = float("nan")
    G = [spd(2) for _ in range(4)]
    result = ops.factored_tikhonov_inverse([good, indefinite, broken, good], G, 1e-2)
    assert [int(s) for s in result.status] == [0, 1, 1, 0]
    expected = reference.factored_tikhonov_inverse([good], [G[3]], 1e-2)
    assert_equal(result.A_inv[3], expected[0][0])
    parts = ops.eigendecompose([good, indefinite, broken, good], G)
    assert [int(s) for s in parts.status] == [0, 0, 1, 0]
    assert_equal(parts.A_values[1], torch.tensor([0.0, 1.0, 2.0]))
    assert_equal(parts.A_values[3], torch.linalg.eigvalsh(good))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("place", range(4))
def test_a_root_that_breaks_off_anywhere_is_reported_and_never_raises(place, dtype):
    diagonal = torch.ones(4, dtype=dtype)
    for value in (-5.0, 0.0, float("inf"), float("nan"), 1e-45):
        diagonal[place] = value
        factors = [torch.diag(diagonal), torch.eye(4, dtype=dtype)]
        result = ops.factored_tikhonov_inverse(factors, [torch.eye(2, dtype=dtype)] * 2, 0.0)
        assert int(result.status[0]) == 1 or result.A_inv[0].isfinite().all()
        assert int(result.status[1]) == 0
        assert_equal(result.A_inv[1], torch.eye(4, dtype=dtype), 1e-6)


def test_number_of_torch_calls_does_not_grow_with_layers():
    """Batched by size: 3 layers and 112 layers of the same two sizes make the same calls."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.heavy = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.heavy += any(word in str(func) for word in ("cholesky", "bmm", "eigh", "matmul"))
            return func(*args, **(kwargs or {}))

    calls = []
    for count in (3, 112):
        A = [spd(3 + i % 2) for i in range(count)]
        G = [spd(2) for _ in range(count)]
        grads = [torch.randn(2, len(a), dtype=torch.float64) for a in A]
        with Count() as counter:
            inverse = ops.factored_tikhonov_inverse(A, G, 0.1)
            ops.precondition(grads, inverse.A_inv, inverse.G_inv)
            ops.precondition_eigh(grads, *ops.eigendecompose(A, G)[:4], 0.1)
        calls.append(counter.heavy)
    assert calls[0] == calls[1] > 0

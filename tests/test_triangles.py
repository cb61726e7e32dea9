"""Triangles of symmetric matrices against the whole ones."""

import torch
from compare import assert_equal
from hypothesis import given
from hypothesis import strategies as st

from kfac2.triangles import diagonals, frobenius_norms, packed, packed_shape, unpacked


def symmetric(blocks, d, seed=0):
    M = torch.randn(blocks, d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return M + M.mT


@given(st.integers(1, 9), st.integers(1, 3))
def test_half_as_many_numbers_say_the_same(d, blocks):
    M = symmetric(blocks, d)
    half = packed(M)
    assert half.shape == (blocks, *packed_shape(d)) and half[0].numel() == d * (d + 1) // 2
    assert torch.equal(unpacked(half, d), M)


@given(st.integers(2, 9), st.integers(1, 3))
def test_the_last_row_may_come_apart(d, blocks):
    M = symmetric(blocks, d)
    assert torch.equal(packed(M[:, :-1, :-1], M[:, -1]), packed(M))


@given(st.integers(1, 9), st.integers(1, 3))
def test_diagonals_and_norms(d, blocks):
    M = symmetric(blocks, d)
    assert torch.equal(diagonals(packed(M)), M.diagonal(dim1=1, dim2=2))
    assert_equal(frobenius_norms(packed(M)), torch.linalg.matrix_norm(M), 1e-14)
    assert frobenius_norms(packed(torch.zeros_like(M))).tolist() == [0.0] * blocks

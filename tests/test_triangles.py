"""Triangles of symmetric matrices against the whole ones."""

import torch
import torch.nn.functional as F
from compare import assert_equal
from hypothesis import given
from hypothesis import strategies as st

from kfac2.ops.fold_products import Product, fold_products
from kfac2.triangles import (
    all_diagonals,
    bytes_of_diagonals,
    diagonals,
    few_at_a_time,
    packed,
    packed_shape,
    unpacked,
    upper_triangle,
)


def symmetric(blocks, d, seed=0):
    M = torch.randn(blocks, d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return M + M.mT


@given(st.integers(1, 9), st.integers(1, 3))
def test_half_as_many_numbers_say_the_same(d, blocks):
    M = symmetric(blocks, d)
    half = packed(M)
    assert half.shape == (blocks, *packed_shape(d)) and half[0].numel() == d * (d + 1) // 2
    assert torch.equal(unpacked(half, d), M)
    assert torch.equal(unpacked(half, d, upper_triangle(d + blocks, half.device)), M)


def panels_of(M, rows):
    """The upper triangle of a matrix in panels of so many rows; below its diagonal nothing of use."""
    M = torch.where(torch.ones_like(M, dtype=torch.bool).triu(), M, torch.nan)
    return [M[first : first + rows, first:] for first in range(0, len(M), rows)]


@st.composite
def products(draw):
    """A product in panels, the matrix, and what was there before or None."""
    d, count = draw(st.sampled_from([*range(1, 9), 31, 32, 33, 64, 65, 70])), draw(st.integers(1, 8))
    has_last, dtype = draw(st.booleans()), draw(st.sampled_from([torch.float32, torch.float64]))
    M, before = (symmetric(1, d + has_last, draw(st.integers(0, 9)))[0].to(dtype) for _ in range(2))
    last = M[-1, :d].contiguous() if has_last else None
    product = Product(panels_of(M[:d, :d], -(-d // count)), last, float(M[-1, -1]) if has_last else 0.0)
    return product, M, before if draw(st.booleans()) else None


@given(st.lists(products(), min_size=1, max_size=5))
def test_products_in_panels_are_folded(drawn):
    alone, matrices, before = zip(*drawn, strict=True)
    for got, M in zip(fold_products(alone), matrices, strict=True):
        assert torch.equal(got, packed(M[None]))
    previous = [None if p is None else packed(p[None]) for p in before]
    scales = [0.3 + i for i in range(len(drawn))]
    got = fold_products(alone, previous=previous, kept=0.9, scales=scales)
    for ours, M, there, scale in zip(got, matrices, before, scales, strict=True):
        expected = scale * M + (0 if there is None else 0.9 * there)
        assert ours.dtype == M.dtype
        assert_equal(ours, packed(expected[None]), 1e-15 if M.dtype == torch.float64 else 1e-6)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 3)), min_size=1, max_size=4))
def test_diagonals(shapes):
    matrices = [symmetric(blocks, d, seed) for seed, (d, blocks) in enumerate(shapes)]
    expected = [M.diagonal(dim1=1, dim2=2) for M in matrices]
    assert all(torch.equal(diagonals(packed(M)), wanted) for M, wanted in zip(matrices, expected, strict=True))
    longest = max(d for d, _ in shapes)
    filled_up = torch.cat([F.pad(wanted, (0, longest - wanted.shape[1])) for wanted in expected])
    assert torch.equal(all_diagonals([packed(M) for M in matrices], torch.float64), filled_up)


@given(st.lists(st.integers(0, 20), max_size=9))
def test_few_at_a_time_need_no_more_than_the_largest(sizes):
    stacks = [torch.empty(size, dtype=torch.uint8) for size in sizes]
    parts = [stacks[part] for part in few_at_a_time(stacks)]
    assert [id(stack) for part in parts for stack in part] == [id(stack) for stack in stacks]
    totals = [sum(map(len, part)) for part in parts]
    assert all(part for part in parts) and max(totals, default=0) == max(sizes, default=0)
    # none could have been one with the next
    assert all(total + len(after[0]) > max(sizes) for total, after in zip(totals, parts[1:], strict=False))


def test_diagonals_of_many_small_matrices_are_not_filled_up_to_a_long_one():
    """Of a depthwise convolution each channel has a matrix of its own."""
    stacks = [torch.zeros(blocks, *packed_shape(d)) for blocks, d in ((3, 20), (5000, 9), (2, 21), (4, 30), (1, 200))]
    parts = [stacks[part] for part in few_at_a_time(stacks, bytes_of_diagonals)]
    assert [len(part) for part in parts] == [4, 1]
    for part in parts:
        diagonals = all_diagonals(part, torch.float32)
        assert diagonals.nbytes == bytes_of_diagonals(part) <= max(stack.nbytes for stack in stacks)

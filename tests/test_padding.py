"""Rows padded to 16 or 128 bytes: what pads them is zero, whatever has been done to what they hold."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inside import curvature_of
from torch import nn

from kfac2 import KFAC
from kfac2.layout import Layout
from kfac2.padding import ALIGNED, ALIGNED_WIDE, WIDE, padded_length, padded_zeros, with_padding

CPU = torch.device("cpu")


LENGTHS = st.one_of(st.integers(1, 9), st.integers(WIDE - 9, WIDE + 33))


@given(LENGTHS)
def test_lengths_are_aligned_at_little_cost(length):
    padded = padded_length(length)
    aligned = ALIGNED_WIDE if length >= WIDE else ALIGNED
    assert padded % aligned == 0 and length <= padded < length + aligned
    assert padded == padded_length(padded) and (length < WIDE or padded <= 1.041 * length)


@given(st.integers(1, 4), LENGTHS, LENGTHS, st.sets(st.integers(1, 2)))
def test_views_of_padded_memory(blocks, rows, columns, axes):
    if padded_length(columns) > columns:
        axes = axes | {2}
    view = padded_zeros((blocks, rows, columns), axes, torch.float32, CPU)
    assert view.shape == (blocks, rows, columns)
    for part in (view, view[blocks - 1 :]):
        memory = with_padding(part)
        assert memory.shape == (len(part), padded_length(rows) if 1 in axes else rows, padded_length(columns))
        assert memory.is_contiguous() and memory.data_ptr() == part.data_ptr()
    view.fill_(1)
    assert with_padding(view).sum() == view.numel()


def test_memory_that_is_not_padded_is_refused():
    with pytest.raises(AssertionError, match="padded memory"):
        with_padding(torch.zeros(2, 3, 5))


def odd_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5), nn.Linear(5, 3))


def trained(opt, net, steps):
    for seed in range(steps):
        generator = torch.Generator().manual_seed(seed)
        x, y = torch.randn(16, 1, 4, 4, generator=generator), torch.randint(3, (16,), generator=generator)
        out = net(x)
        opt.accumulate_fisher(torch.distributions.Categorical(logits=out))
        opt.zero_grad()
        nn.functional.cross_entropy(out, y).backward()
        opt.step()


@pytest.mark.parametrize("inverse", ["cholesky", "eigh", "ekfac"])
def test_what_pads_inverses_is_zero(inverse):
    """After updates, in a copy that has loaded the state, and where a layer has been given up."""
    net, other = odd_net(), odd_net()
    opt, again = (KFAC(n, lr=0.01, inverse=inverse, cov_every=1, inv_every=2) for n in (net, other))
    trained(opt, net, 3)
    other.load_state_dict(net.state_dict())
    again.load_state_dict(opt.state_dict())
    other[4].bias.requires_grad_(False)
    for one, model in ((opt, net), (again, other)):
        trained(one, model, 3)
        curvature = curvature_of(one)
        fields = {**curvature.inverses.fields, **curvature.inverses.derived}
        padded = 0
        for stack in (stack for stacks in fields.values() for stack in stacks if stack.dim() == 3):
            whole = with_padding(stack) if stack.shape[2] % ALIGNED and stack.stride(1) != stack.shape[2] else stack
            padded += whole is not stack
            rest = whole.clone()
            rest[:, : stack.shape[1], : stack.shape[2]] = 0
            assert not rest.any() and stack.any()
        assert padded


def test_matrices_are_padded_by_zeros_only(monkeypatch):
    layers = curvature_of(KFAC(odd_net(), lr=0.1)).layout.layers
    layout = Layout(layers, CPU)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(torch.nan))
    for zeros in (False, True):
        matrices = layout.matrices(zeros)
        for i, layer in enumerate(layers):
            whole, own = layout.padded_matrix(matrices, i), layout.matrix(matrices, i)
            assert own.shape == layer.matrix_shape and whole.shape[2] % ALIGNED == 0
            assert not whole[..., own.shape[2] :].any()
            begin, end, numbers = layout.spans[i].tolist()
            assert (end - begin, numbers) == (whole.numel(), own.numel())
            row, column = own.shape[1] - 1, own.shape[2] - 1
            place, length = layout.place(i, row, column)
            matrices[place] = 7
            assert own[0, row, column] == 7 and length == whole.shape[2]

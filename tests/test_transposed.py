"""Transposed convolutions against the dense Fisher, over drawn geometries, where K-FAC is exact: behind them only noise."""

import logging

import pytest
import torch
import torch.nn as nn
from compare import assert_equal
from hypothesis import given, settings
from hypothesis import strategies as st
from paper import KFAC, Curvature
from torch.distributions import Independent, Normal

CLASSES = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


class Crossed(Independent):
    """Labels whose residuals are √d·e_k in place of normal draws; the batch holds each input once for each k."""

    def __init__(self, mean):
        super().__init__(Normal(mean, 1.0), mean.dim() - 1)

    def sample(self, *args):
        mean = self.base_dist.mean.detach()
        d = mean[0].numel()
        residuals = d**0.5 * torch.eye(d, dtype=mean.dtype).repeat(len(mean) // d, 1)
        return mean + residuals.reshape(mean.shape)


@st.composite
def transposed(draw):
    rank = draw(st.integers(1, 3))

    def numbers(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(rank))

    kernel, stride, dilation = numbers(1, 3), numbers(1, 3), numbers(1, 2)
    extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    size = numbers(1, 3)
    shortest = [
        (n - 1) * s + d * (k - 1) + 1 + e for n, s, d, k, e in zip(size, stride, dilation, kernel, extra, strict=True)
    ]
    padding = tuple(draw(st.integers(0, (short - 1) // 2)) for short in shortest)
    groups = draw(st.integers(1, 2))
    module = CLASSES[rank](
        groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2)), kernel, stride, padding, extra, groups,
        draw(st.booleans()), dilation,
    )  # fmt: skip
    return module.double(), size


def dense_fisher(module, x):
    """E[JᵀJ] of unit normal outputs; W in the order of its own elements, then the bias."""
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def outputs(parameters, sample):
        return torch.func.functional_call(module, parameters, (sample[None],)).flatten()

    J = torch.func.vmap(torch.func.jacrev(outputs), (None, 0))(parameters, x)
    J = torch.cat([J[name].flatten(2) for name in ("weight", "bias") if name in J], 2)
    return torch.einsum("ndp,ndq->pq", J, J) / len(x)


def element_order(module):
    """Where each entry of kron(A, G) of each block lies among the parameters."""
    weights = torch.arange(module.weight.numel()).reshape(module.weight.shape)
    biases = torch.arange(module.out_channels) + weights.numel()
    orders = []
    for part, own in zip(weights.chunk(module.groups), biases.chunk(module.groups), strict=True):
        columns = part.movedim(1, -1).reshape(-1, part.shape[1])  # one row for each column of the matrix
        orders.append((torch.cat([columns, own[None]]) if module.bias is not None else columns).flatten())
    return orders


@settings(deadline=None, max_examples=60)
@given(transposed())
def test_blocks_equal_the_dense_fisher(drawn):
    module, size = drawn
    x = torch.randn(2, module.in_channels, *size, dtype=torch.float64)
    curvature = Curvature(module)
    d = module(x)[0].numel()
    curvature.accumulate(Crossed(module(x.repeat_interleave(d, 0))))
    fisher = dense_fisher(module, x)
    A, G = (factor.reshape(-1, *factor.shape[-2:]) for factor in curvature.factors(""))
    for q, order in enumerate(element_order(module)):
        assert_equal(torch.kron(A[q], G[q]), fisher[order][:, order])
    if module.groups == 1:
        assert_equal(curvature.coarse_fisher().reshape(()), fisher.sum())


def test_an_output_size_of_one_call_is_seen():
    results = []
    for extra, size in ((1, None), (0, [7])):
        torch.manual_seed(0)
        module = nn.ConvTranspose1d(2, 3, 2, stride=2, output_padding=extra).double()
        x = torch.randn(5, 2, 3, dtype=torch.float64)
        curvature = Curvature(module)
        curvature.accumulate(Normal(module(x, output_size=size), 1.0))
        results.append([*curvature.factors(""), curvature.coarse_fisher()])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    assert_equal(
        results[0][0][-1, -1], torch.tensor(1 / 3, dtype=torch.float64)
    )  # the bias: places of the output by cases


def test_unbatched_channels_last_and_half_precision():
    torch.manual_seed(0)
    module = nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, groups=2)
    x = torch.randn(4, 5, 3)
    results = []
    for change in (lambda x: x[None], lambda x: x, lambda x: x[None].contiguous(memory_format=torch.channels_last)):
        curvature = Curvature(module)
        torch.manual_seed(1)
        out = module(change(x))
        curvature.accumulate(Normal(out, 1.0))
        results.append([*curvature.factors(""), curvature.coarse_fisher()])
    for other in results[1:]:
        for ours, theirs in zip(other, results[0], strict=True):
            assert_equal(ours, theirs, 1e-5)
    low = nn.Sequential(module).to(torch.bfloat16)
    opt = KFAC(low)
    out = low(x[None].to(torch.bfloat16)).float()
    opt.accumulate_fisher(Normal(out, 1.0))
    out.square().mean().backward()
    opt.step()
    assert opt.factors("0")[0].dtype == torch.float32 and low[0].weight.isfinite().all()


@pytest.mark.parametrize("groups", [1, 3])
def test_an_autoencoder_trains(groups, caplog):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(6, 6, 3, stride=2, padding=1), nn.Tanh(),
        nn.ConvTranspose2d(6, 6, 4, stride=2, padding=1, groups=groups), nn.Tanh(),
        nn.ConvTranspose2d(6, 1, 4, stride=2, padding=1),
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, logger="kfac2"):
        opt = KFAC(model, lr=0.1, levels=1, damping=1e-2, inv_every=5, cov_every=5)
    assert not caplog.records and opt.layers == ["0", "2", "4", "6"]
    x = torch.randn(16, 1, 1, 1) * torch.linspace(-1, 1, 8)[:, None] + torch.zeros(16, 1, 8, 8)
    losses = []
    for _ in range(60):
        opt.zero_grad()
        out = model(x)
        opt.accumulate_fisher(Normal(out, 1.0))
        loss = 0.5 * (out - x).square().mean()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]

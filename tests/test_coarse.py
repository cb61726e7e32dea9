"""Properties of the coarse Fisher over training."""

import models
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from compare import assert_equal, error
from hypothesis import given
from hypothesis import strategies as st
from inside import curvature_of
from paper import KFAC
from torch.distributions import Categorical

import kfac2
from kfac2 import reference


def dividing_grids():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Tanh(),
        nn.Conv2d(4, 4, 3, stride=(1, 2), padding=1, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(32, 5), nn.Tanh(),
        nn.Linear(5, 3),
    ).double()  # fmt: skip


def other_grids():
    return nn.Sequential(
        nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(100, 3)
    ).double()


def train(model, steps, **options):
    opt = KFAC(model, lr=0.02, cov_every=1, inv_every=5, damping=1e-2, **options)
    for _ in range(steps):
        x = torch.randn(8, 2, 8, 8, dtype=torch.float64)
        y = x.mean((1, 2, 3)).gt(0).long() + x[:, 0, 0, 0].gt(0).long()
        opt.zero_grad()
        out = model(x)
        opt.accumulate_fisher(Categorical(logits=out))
        F.cross_entropy(out, y).backward()
        opt.step()
    return opt


@pytest.mark.parametrize("downsample", ["nearest", "area"])
def test_symmetric_and_semi_definite_after_hundreds_of_updates(downsample):
    opt = train(dividing_grids(), 300, downsample=downsample)
    fisher = opt.coarse_fisher()
    assert torch.equal(fisher, fisher.T)
    for sums in opt.coarse_sums():
        assert torch.equal(sums, sums.T)
    values = torch.linalg.eigvalsh(fisher)
    assert values[-1] > 0
    if downsample == "nearest":
        assert values[0] >= -1e-12 * values[-1]


def test_classifier_row_vanishes_under_softmax():
    opt = train(dividing_grids(), 3)
    fisher = opt.coarse_fisher()
    assert fisher[-1].abs().max() <= 1e-12 * fisher.abs().max()


def test_an_indefinite_coarse_fisher_never_turns_uphill():
    opt = train(other_grids(), 20)
    assert torch.equal(opt.coarse_fisher(), opt.coarse_fisher().T)
    indefinite = torch.diag(torch.tensor([1.0, -3.0, 2.0], dtype=torch.float64))
    from kfac2.coarse.ones import coarse_inverse

    inverse, failed = coarse_inverse(indefinite, 0.5)
    assert not failed
    assert_equal(inverse, reference.coarse_inverse(indefinite, 0.5))
    assert torch.linalg.eigvalsh(inverse)[0] > 0
    assert coarse_inverse(indefinite * float("nan"), 0.5)[1]


@pytest.mark.parametrize("groups, limit, blocks", [(4, 4, 4), (4, 3, 1)])
def test_a_convolution_with_many_groups_gives_one_summed_map(groups, limit, blocks):
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=groups), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3)).double()
    opt = KFAC(model, coarse_max_groups=limit)
    x = torch.randn(5, 4, 4, 4, dtype=torch.float64)
    out = model(x)
    opt.accumulate_fisher(Categorical(logits=out))
    out.sum().backward()
    opt.step()
    assert opt.coarse_sums()[0].shape == (blocks + 1, blocks + 1)
    assert opt.coarse_fisher().shape == (2, 2)
    assert opt.factors("0")[0].shape == (4, 10, 10)
    rows = [reference.patches(part, 3, bias=True)[0].sum(2) for part in x.chunk(4, 1)]  # s of each group
    if blocks == 1:
        expected = torch.stack(rows).sum(0).square().sum() / 5
        assert_equal(opt.coarse_sums()[0][0, 0], expected)
    else:
        assert_equal(opt.coarse_sums()[0][1, 2], (rows[1] * rows[2]).sum() / 5)


def test_coarse_step_matters():
    """A guard for the tests above: with one level the same training ends elsewhere."""
    ends = []
    for levels in (1, 2):
        torch.manual_seed(3)
        model = dividing_grids()
        train(model, 5, levels=levels)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert error(ends[0], ends[1]) > 1e-4


@pytest.mark.parametrize("name", ["conv2d", "tokens", "grouped"])
def test_few_samples_at_a_time_give_the_same_sums(name, monkeypatch):
    import kfac2.coarse.ones

    sums = []
    for numbers in (2**22, 1, 60):  # all samples at once, one by one, a few
        monkeypatch.setitem(kfac2.coarse.ones.MAP_NUMBERS, "cpu", numbers)
        torch.manual_seed(0)
        task = models.task(name, batch=7)
        opt = KFAC(task.model, fisher="empirical")
        task.loss(task.model(task.x)).backward()
        opt.step()
        sums.append(opt.coarse_sums())
    for other in sums[1:]:
        for ours, theirs in zip(other, sums[0], strict=True):
            assert_equal(ours, theirs)


@given(seed=st.integers(0, 2**31), size=st.integers(1, 12), rank=st.integers(1, 12))
def test_the_coarse_inverse_with_a_damping_for_each_layer_against_dense_algebra(seed, size, rank):
    from kfac2.coarse.ones import coarse_inverse

    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(size, rank, generator=generator, dtype=torch.float64)
    damping = 10 ** (4 * torch.rand(size, generator=generator, dtype=torch.float64) - 2)
    fisher = rows @ rows.T
    inverse, failed = coarse_inverse(fisher, damping)
    assert not failed
    assert_equal(inverse @ (fisher + damping.diag()), torch.eye(size, dtype=torch.float64))
    assert_equal(inverse, reference.coarse_inverse(fisher, damping))


def test_relative_damping_of_the_coarse_space_is_a_share_of_the_traces_of_the_blocks():
    model = dividing_grids()
    opt = train(model, 5, levels=2, relative_damping=True, inverse="cholesky")
    factors = [opt.factors(name) for name in opt.layers]
    assert [len(A) for A, _ in factors if A.dim() == 3] == [2]  # one has two groups
    traces = [(A.diagonal(dim1=-2, dim2=-1).sum(-1) * G.diagonal(dim1=-2, dim2=-1).sum(-1)).sum() for A, G in factors]
    opt.options.damping = 0.3
    x = torch.randn(8, 2, 8, 8, dtype=torch.float64)
    F.cross_entropy(model(x), torch.arange(8) % 3).backward()
    opt.options.cov_every = 100
    opt.step()  # no statistics, new inverses
    expected = reference.coarse_inverse(opt.coarse_fisher(), 0.3 * torch.stack(traces))
    assert_equal(curvature_of(opt).inverses.coarse, expected)


def test_where_the_coarse_fisher_is_only_rounding_two_levels_step_as_one():
    """A LayerNorm, or the softmax, behind every layer cancels what is added to all its outputs: 1ᵀg = 0."""
    directions = []
    for levels in (1, 2):
        torch.manual_seed(0)
        norms = [nn.Linear(12, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 16), nn.LayerNorm(16), nn.GELU()]
        model = nn.Sequential(*norms, nn.Linear(16, 4))
        opt = kfac2.KFAC(model, levels=levels, kl_clip=None, kl_bound=None, max_change=None, momentum=0.0)
        x, y = torch.randn(64, 12), torch.arange(64) % 4
        torch.manual_seed(1)
        out = model(x)
        opt.accumulate_fisher(Categorical(logits=out))
        F.cross_entropy(out, y).backward()
        opt.step()
        directions.append(torch.cat([layer.weight.grad.flatten() for layer in model if isinstance(layer, nn.Linear)]))
    assert_equal(directions[1], directions[0], 1e-4)

"""Properties of the coarse Fisher over training."""

import models
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from compare import assert_equal, error
from paper import KFAC
from torch.distributions import Categorical

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
        monkeypatch.setattr(kfac2.coarse.ones, "MAP_NUMBERS", numbers)
        torch.manual_seed(0)
        task = models.task(name, batch=7)
        opt = KFAC(task.model, fisher="empirical")
        task.loss(task.model(task.x)).backward()
        opt.step()
        sums.append(opt.coarse_sums())
    for other in sums[1:]:
        for ours, theirs in zip(other, sums[0], strict=True):
            assert_equal(ours, theirs)

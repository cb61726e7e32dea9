"""Models that do what models do: empty batches of rows, recomputation, layers that come and go."""

import copy
import logging
import pickle

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from compare import assert_equal
from paper import KFAC
from torch.distributions import Categorical
from torch.utils.checkpoint import checkpoint

X, Y = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).double(), torch.arange(8) % 3


def step(opt, model, x=X, y=Y):
    opt.zero_grad()
    out = model(x)
    opt.accumulate_fisher(Categorical(logits=out))
    F.cross_entropy(out, y).backward()
    opt.step()


class Experts(nn.Module):
    """The first `split` samples go to one expert, the others to the other."""

    def __init__(self):
        super().__init__()
        self.experts, self.head, self.split = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]), nn.Linear(4, 3), 4

    def forward(self, x):
        parts = [self.experts[0](x[: self.split]), self.experts[1](x[self.split :])]
        return self.head(torch.cat(parts).relu())


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("split", [0, 8])
def test_an_expert_without_tokens_keeps_its_factors(split, levels):
    model = Experts().double()
    opt = KFAC(model, cov_every=1, levels=levels)
    step(opt, model)
    empty = f"experts.{int(split == 8)}"
    before = opt.factors(empty)
    model.split = split
    step(opt, model)
    assert all(torch.equal(a, b) for a, b in zip(opt.factors(empty), before, strict=True))
    assert all(p.isfinite().all() for p in model.parameters())


def test_activation_checkpointing_changes_nothing():
    class Checkpointed(nn.Module):
        def __init__(self, on):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c, self.on = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3), on

        def middle(self, h):
            return self.b(h).relu()

        def forward(self, x):
            h = self.a(x).relu()
            return self.c(checkpoint(self.middle, h, use_reentrant=False) if self.on else self.middle(h))

    ends = []
    for on in (False, True):
        model = Checkpointed(on).double()
        opt = KFAC(model, cov_every=2)
        for seed in range(4):
            torch.manual_seed(seed)
            step(opt, model)
        ends.append([*model.parameters(), opt.coarse_fisher()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


class Otherwise(nn.Module):
    """From some time on the layer's weight is used by another function, which is not seen."""

    def __init__(self):
        super().__init__()
        self.a, self.otherwise = nn.Linear(4, 4), False

    def forward(self, x):
        h = self.a(x)
        return h.relu() @ self.a.weight.T if self.otherwise else h


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@pytest.mark.parametrize("late", [False, True])
def test_when_the_last_layer_leaves_sgd_goes_on(late, fisher, levels):
    model = Otherwise().double()
    opt = KFAC(model, cov_every=1, inv_every=1, levels=levels, fisher=fisher, momentum=0, check_every=1)
    if late:
        step(opt, model)
    model.otherwise = True
    with pytest.warns(RuntimeWarning) as caught:
        for _ in range(3):
            before = model.a.weight.clone()
            step(opt, model)
            assert_equal(before - model.a.weight, 1e-2 * model.a.weight.grad)
    assert len(caught) == 1 and "a leaves K-FAC" in str(caught[0].message) and "off by" in str(caught[0].message)
    assert opt.layers == [] and not opt.needs_fisher
    fresh = KFAC(Otherwise().double(), levels=levels, fisher=fisher)
    fresh.load_state_dict(opt.state_dict())
    assert fresh.layers == []


def test_a_pass_of_layers_that_left_the_coarse_space():
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.only_b = nn.Linear(4, 3), nn.Linear(4, 3), False

        def forward(self, x):
            return self.b(x) if self.only_b else self.a(x) + self.b(x[:5]).sum(0)

    model = Parts().double()
    opt = KFAC(model, cov_every=1)
    with pytest.warns(RuntimeWarning, match="b has rows that do not belong to the 8 samples"):
        step(opt, model)
    sums = opt.coarse_sums()
    model.only_b = True
    step(opt, model)
    for now, before in zip(opt.coarse_sums(), sums, strict=True):
        assert_equal(now[0], 0.5 * before[0])  # a took no part, and b fits now
        assert now[1, 1] > 0


def test_outputs_that_overflow_skip_the_step():
    model = nn.Linear(4, 3).double()
    opt = KFAC(model, cov_every=1)
    step(opt, model)
    before = copy.deepcopy(model.state_dict())
    out = model(X) * float("inf")
    opt.accumulate_fisher(Categorical(logits=out, validate_args=False))
    with pytest.warns(RuntimeWarning, match="logits of the distribution"):
        opt.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_coarse_sums_that_overflow_are_not_averaged_in():
    model = nn.Sequential(nn.Linear(4000, 8), nn.ReLU(), nn.Linear(8, 3))
    opt = KFAC(model, cov_every=1, inv_every=1)
    step(opt, model, torch.randn(8, 4000))
    before = opt.coarse_sums()
    opt.zero_grad()
    out = model(torch.full((8, 4000), 5e16)) * 1e-30 + model[2].bias
    opt.accumulate_fisher(Categorical(logits=out))
    with pytest.warns(RuntimeWarning, match="coarse sums of inputs|statistics of"):
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(opt.coarse_sums(), before, strict=True))


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_empirical_fisher_under_gradient_accumulation(parts):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    whole, opt = KFAC(twin := copy.deepcopy(model), fisher="empirical"), KFAC(model, fisher="empirical")
    F.cross_entropy(twin(X), Y).backward()
    for x, y in zip(X.chunk(parts), Y.chunk(parts), strict=True):
        (F.cross_entropy(model(x), y) / parts).backward()
    whole.step()
    opt.step()
    assert_equal(opt.coarse_fisher(), whole.coarse_fisher())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_equal(p, q)


def test_another_hook_may_change_the_output():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3)).double()
    twin = copy.deepcopy(model)
    model[0].register_forward_hook(lambda module, args, output: output * 10)
    results = []
    for m, scale in ((model, 1), (twin, 10)):
        opt = KFAC(m)
        torch.manual_seed(1)
        opt.accumulate_fisher(Categorical(logits=m(X) * scale))
        m(X).sum().backward()
        opt.step()
        results.append(opt.factors("0")[1])
    assert_equal(*results)


def test_the_optimizer_is_not_copied_whole():
    opt = KFAC(nn.Linear(2, 2))
    for copying in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="state_dict"):
            copying(opt)


def test_a_complex_layer_is_left_to_sgd(caplog):
    with caplog.at_level(logging.WARNING, logger="kfac2"):
        opt = KFAC(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.complex64)]))
    assert opt.layers == ["0"] and "its weight is torch.complex64" in caplog.text

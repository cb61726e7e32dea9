"""The bounds on a step: a measured divergence, exact against the dense Fisher, and a share of each layer's weights."""

import copy

import models
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from compare import assert_equal
from inside import curvature_of
from torch.distributions import Categorical

import kfac2
from kfac2.bound import Bound
from kfac2.collector import Collector
from kfac2.divergence import divergence, kept_of
from kfac2.layers import find_layers


def sampled_pass(task, seed=0):
    layers = find_layers(task.model, list(task.model.parameters()), (), 32)
    collector = Collector(layers, lambda: True, False, lambda layer: pytest.fail("no layer is to be dropped"))
    torch.manual_seed(seed)
    passed = collector.sample(task.distribution(task.model(task.x)))
    return layers, passed


def scores(task, parameters, samples, seed=0):
    """The gradient of each sample's log-probability of the labels that are drawn with this seed."""
    torch.manual_seed(seed)
    distribution = task.distribution(task.model(task.x))
    log_prob = distribution.log_prob(distribution.sample())
    rows = []
    for n in range(samples):
        grads = torch.autograd.grad(-log_prob[n].sum(), parameters, retain_graph=True)
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    return torch.stack(rows), log_prob.numel()


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("name", models.NAMES)
def test_the_divergence_is_that_of_the_dense_fisher(name, share):
    task = models.task(name)
    layers, passed = sampled_pass(task)
    parameters = [p for layer in layers for p in (layer.weight, layer.bias) if p is not None]
    step = {id(p): torch.randn_like(p) for p in parameters}
    kept = kept_of(passed, share, least=1)
    measured = divergence([kept], lambda p: step[id(p)])
    samples = int(len(task.x) * share)
    J, cases = scores(task, parameters, samples)
    fisher = J.T @ J / (cases * samples / len(task.x))
    d = torch.cat([step[id(p)].flatten() for p in parameters])
    assert_equal(measured, d @ fisher @ d, 1e-12)


def test_a_layer_that_does_not_move_and_scaled_gradients():
    task = models.task("linear")
    layers, passed = sampled_pass(task)
    moving = {id(layers[1].weight): torch.randn_like(layers[1].weight)}
    measured = divergence([kept_of(passed, 1.0)], lambda p: moving.get(id(p)))
    J, cases = scores(task, [layers[1].weight], len(task.x))
    assert_equal(measured, (J @ moving[id(layers[1].weight)].flatten()).square().sum() / cases)
    for use in passed.uses:
        use.g.div_(7.0)
    scaled = kept_of(passed.__class__(passed.uses, passed.cases, 7.0), 1.0)
    assert_equal(divergence([scaled], lambda p: moving.get(id(p))), measured)


@pytest.mark.parametrize("at_once", [True, False])
def test_the_factor_falls_at_once_and_rises_slowly(at_once):
    bound = Bound()
    seen = []
    for squared in (0.4, 40.0, 0.1, 0.1, 0.1, float("nan")):
        bound.measured(torch.tensor(squared, dtype=torch.float64), 0.4, at_once)
        seen.append(float(bound.factor))
    assert seen == pytest.approx([1.0, 0.1, 0.15, 0.225, 0.3375, 0.50625], rel=1e-6)


def train(model, x, y, steps, **options):
    opt = kfac2.KFAC(model, **options)
    losses = []
    for _ in range(steps):
        opt.zero_grad()
        out = model(x)
        opt.accumulate_fisher(Categorical(logits=out))
        loss = F.cross_entropy(out, y)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return opt, losses


def mlp(depth=6):
    torch.manual_seed(0)
    return nn.Sequential(*(m for _ in range(depth) for m in (nn.Linear(8, 8), nn.Tanh())), nn.Linear(8, 3))


def test_the_whole_step_momentum_included_is_held_to_the_bound():
    """The step that was taken, measured afterwards on the same rows by the dense way."""
    model, x, y = mlp(3).double(), torch.randn(16, 8).double(), torch.arange(16) % 3
    settings = {"kl_clip": None, "max_change": None, "momentum": 0.9, "cov_every": 1, "inv_every": 1}
    opt, _ = train(model, x, y, 3, kl_bound=None, **settings)
    opt.options.kl_bound = 1e-3
    opt.curvature.keeps_rows = True
    before = [p.detach().clone() for p in model.parameters()]
    torch.manual_seed(5)
    opt.zero_grad()
    out = model(x)
    opt.accumulate_fisher(Categorical(logits=out))
    torch.manual_seed(5)
    labels = Categorical(logits=out).sample()
    log_prob = F.log_softmax(out, 1).gather(1, labels[:, None])
    J = torch.stack([
        torch.cat([g.flatten() for g in torch.autograd.grad(log_prob[n].sum(), list(model.parameters()), retain_graph=True)])
        for n in range(16)
    ])  # fmt: skip
    F.cross_entropy(out, y).backward()
    opt.step()
    d = torch.cat([(p - q).flatten() for p, q in zip(model.parameters(), before, strict=True)]).detach()
    assert_equal((J @ d).square().sum() / 16, torch.tensor(1e-3, dtype=torch.float64))
    assert not opt.curvature.kept  # nothing is kept beyond the step


def test_a_careless_setting_does_not_blow_up_under_the_bound():
    x, y = torch.randn(64, 8), torch.arange(64) % 3
    careless = {"momentum": 0.9, "kl_clip": 1.0, "damping": 1e-3, "relative_damping": False, "max_change": None}
    _, loose = train(mlp(12), x, y, 40, kl_bound=None, **careless)
    _, held = train(mlp(12), x, y, 40, kl_bound=0.1, **careless)
    assert max(loose) > 2 * loose[0] and max(held) < max(loose)


def test_no_layer_changes_by_more_than_its_share():
    model, x, y = mlp(), torch.randn(64, 8), torch.arange(64) % 3
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()
    before = copy.deepcopy(model)
    train(model, x, y, 1, max_change=0.01, momentum=0.0, kl_clip=None, kl_bound=None, damping=1e-4)
    for layer, old in zip(model, before, strict=True):
        if isinstance(layer, nn.Linear):
            own = torch.cat([p.detach().flatten() for p in old.parameters()])
            change = torch.cat(
                [(p - q).detach().flatten() for p, q in zip(layer.parameters(), old.parameters(), strict=True)]
            )
            limit = max(0.01 * own.norm().item(), 1e-3 * change.numel() ** 0.5)
            assert 0 < change.norm().item() <= limit * 1.001
            assert layer is not model[0] or change.norm().item() == pytest.approx(limit, rel=1e-3)  # it may leave 0


def test_limits_where_a_gradient_is_missing():
    model, x, y = mlp(2), torch.randn(16, 8), torch.arange(16) % 3
    opt, _ = train(model, x, y, 2)
    before = [p.detach().clone() for p in model.parameters()]
    opt.zero_grad()
    F.cross_entropy(model(x), y).backward()
    model[0].bias.grad = None
    model[2].weight.grad = model[2].bias.grad = None
    opt.step()
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert moved == [True, False, False, False, True, True]


@pytest.mark.parametrize("at_once", [True, False])
def test_bounded_training_reads_nothing_back_where_it_may_not_and_is_the_same(at_once):
    ends = []
    for way in (True, at_once):
        model = mlp().double()
        torch.manual_seed(1)
        x, y = torch.randn(32, 8).double(), torch.arange(32) % 3
        opt = kfac2.KFAC(model, kl_bound=1e-3)
        curvature_of(opt).health.at_once = way
        torch.manual_seed(2)
        for _ in range(12):
            opt.zero_grad()
            out = model(x)
            opt.accumulate_fisher(Categorical(logits=out))
            F.cross_entropy(out, y).backward()
            opt.step()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert_equal(ends[0], ends[1], 1e-6)  # the factor on a device is float32

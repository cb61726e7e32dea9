"""Labels of a Categorical built from logits: those of torch, with the gradient that torch finds op by op."""

import math

import pytest
import torch
import torch.nn as nn
from compare import assert_equal
from hypothesis import given
from hypothesis import strategies as st
from inside import curvature_of
from paper import KFAC
from test_memory import peak
from torch.distributions import Categorical, Independent
from torch.utils._python_dispatch import TorchDispatchMode

from kfac2.likelihood import NotFiniteError, scores_of
from kfac2.softmax import Softmax, won_race


class Plain(Categorical):
    """A distribution of the user's own: its `sample` and `log_prob` are called, and torch differentiates."""


def logits_of(*shape, dtype=torch.float64, seed=0):
    z = 3 * torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    return z.requires_grad_()


def gradient(scalar, z, by=-1.0):
    return torch.autograd.grad(scalar, z, torch.full_like(scalar, by), retain_graph=True)[0]


@given(st.lists(st.integers(1, 4), max_size=3), st.integers(1, 9), st.booleans(), st.integers(0, 99))
def test_labels_and_gradients_are_those_of_torch(leading, classes, is_masked, seed):
    leaf = logits_of(*leading, classes, seed=seed)
    z = leaf * 1.0
    if is_masked and classes > 1:
        z = torch.cat([z[..., :-1], torch.full_like(z[..., -1:], -math.inf)], -1)
    distribution, weights = Categorical(logits=z), torch.randn(leading, dtype=torch.float64)
    softmax = Softmax.of(distribution)
    assert softmax.z is z
    torch.manual_seed(seed)
    ours = softmax.draw()
    torch.manual_seed(seed)
    theirs = distribution.log_prob(distribution.sample())
    assert ours.shape == theirs.shape and torch.equal(ours, theirs)
    grads = [torch.autograd.grad(one, leaf, weights, retain_graph=True)[0] for one in (ours, theirs)]
    assert grads[0].isfinite().all()
    assert_equal(*grads, 1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_may_be_differentiated_again_and_drawn_from_again(dtype):
    z = logits_of(5, 3, 7, dtype=dtype)
    softmax = Softmax.of(Categorical(logits=z))
    first = softmax.draw()
    before = gradient(first, z)
    other = softmax.draw()
    assert not torch.equal(first, other) and not torch.equal(gradient(other, z), before)
    assert torch.equal(gradient(first, z), before)
    assert_equal(gradient(first, z, 2.0), -2 * before, 1e-6)


def heads(kind, z):
    whole = kind(logits=z[0])
    return [whole, Independent(kind(logits=z[1]), 1), Independent(Independent(kind(logits=z[2]), 0), 2)]


@pytest.mark.parametrize("looks", [True, False])
@pytest.mark.parametrize("samples", [1, 3])
def test_heads_are_weighted_as_those_of_any_distribution(looks, samples):
    ends = []
    for kind in (Categorical, Plain):
        z = [logits_of(6, 5), logits_of(3, 2, 4), logits_of(2, 3, 4, 5)]
        torch.manual_seed(1)
        scores = scores_of(heads(kind, z), samples=samples, looks=looks)
        scalars = [scores.drawn, *(direction() for direction in scores.directions)]
        assert len(scalars) == samples
        ends.append([*scalars, *(g for one in scalars for g in torch.autograd.grad(one, z, retain_graph=True))])
    for ours, theirs in zip(*ends, strict=True):
        assert_equal(ours, theirs, 1e-12)


def statistics(kind, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    opt = KFAC(model, cov_every=1, inv_every=1, **options)
    for seed in range(3):
        opt.zero_grad()
        out = model(torch.randn(12, 5, generator=torch.Generator().manual_seed(seed)).double())
        torch.manual_seed(seed)
        opt.accumulate_fisher(kind(logits=out))
        out.square().sum().backward()
        opt.step()
    averages = curvature_of(opt).averages
    return [*averages.A, *averages.G, *averages.coarse, *(p.detach() for p in model.parameters())]


@pytest.mark.parametrize("options", [{}, {"samples": 3}, {"inverse": "ekfac"}, {"fisher": "exact"}])
def test_whole_steps_are_those_of_any_distribution(options):
    for ours, theirs in zip(statistics(Categorical, **options), statistics(Plain, **options), strict=True):
        assert_equal(ours, theirs, 1e-11)


# -- what it costs ----------------------------------------------------------------------------------------------


class Large(TorchDispatchMode):
    """Ops that write as many numbers as there are logits."""

    def __init__(self, size):
        super().__init__()
        self.size, self.names = size, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if isinstance(result, torch.Tensor) and result.numel() == self.size and not func.is_view:
            self.names += [] if "empty" in name else [name]
        return result


@pytest.mark.parametrize("samples", [1, 3])
def test_each_gradient_is_one_pass_and_probabilities_are_made_once(samples):
    z = logits_of(8, 4, 16)
    distribution = Independent(Categorical(logits=z), 1)
    with Large(z.numel()) as large:
        scores = scores_of(distribution, samples=samples, looks=False)
        gradient(scores.drawn, z)
        for one in [direction() for direction in scores.directions]:
            gradient(one, z)
    draws, gradients = ["exponential_", "div"], ["mul", "scatter_add_"]
    assert large.names == ["exp", *draws, *gradients, *draws * (samples - 1), *gradients * (samples - 1)]


def test_two_more_tensors_of_the_size_of_the_logits_are_there_at_once():
    leaf = torch.randn(64, 4000, requires_grad=True)
    z = leaf * 1.0

    def most(kind):
        distribution = kind(logits=z, validate_args=False)
        return peak(lambda: gradient(scores_of(distribution, looks=False).drawn, z)) / z.nbytes

    assert most(Categorical) < 2.1 < 3.9 < most(Plain)


# -- what is left to torch --------------------------------------------------------------------------------------


def with_logits(z, logits):
    distribution = Categorical(logits=z.detach())
    distribution.logits = logits
    return distribution


def overwritten(z):
    y = z * 1.0
    distribution = Categorical(logits=y)
    with torch.no_grad():
        y.add_(1.0)
    return distribution


def freed(z):
    distribution = Categorical(logits=z * 1.0)
    distribution.logits.sum().backward()
    return distribution


def hooked(z):
    distribution = Categorical(logits=z)
    distribution.logits.register_hook(lambda g: 2 * g)
    return distribution


def packed_away(z):
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        return Categorical(logits=z)


def changed(z, change):
    distribution = Categorical(logits=z)
    with torch.no_grad():
        change(distribution.logits)
    return distribution


LEFT = {
    "probs": lambda z: Categorical(probs=z.exp()),
    "probs whose logits were asked for": lambda z: (d := Categorical(probs=z.exp()), d.logits)[0],
    "float16": lambda z: Categorical(logits=z.half()),
    "bfloat16": lambda z: Categorical(logits=z.bfloat16()),
    "expanded": lambda z: Categorical(logits=z).expand((2, 4, 3)),
    "indexed": lambda z: with_logits(z, Categorical(logits=z).logits[1:]),
    "detached": lambda z: Categorical(logits=z.detach()),
    "twice": lambda z: with_logits(z, torch.sub(z, z.logsumexp(-1, keepdim=True), alpha=2)),
    "another axis": lambda z: with_logits(z, z - z.logsumexp(0, keepdim=True)),
    "several axes": lambda z: with_logits(z, z - z.logsumexp((0, -1), keepdim=True)),
    "across": lambda z: with_logits(z, (p := z[0, :, :3]) - p.logsumexp(-1)),
    "of others": lambda z: with_logits(z, z - (z * 1.0).logsumexp(-1, keepdim=True)),
    "of another part": lambda z: with_logits(z, (p := z.unbind(0))[0] - p[1].logsumexp(-1, keepdim=True)),
    "a number": lambda z: with_logits(z, z - 1.0),
    "a softmax": lambda z: with_logits(z, z.log_softmax(-1)),
    "clamped in place": lambda z: with_logits(z, Categorical(logits=z).logits.clamp_(min=-9.0)),
    "changed behind its back": lambda z: changed(z, lambda logits: logits.clamp_(min=-1.0)),
    "overwritten": overwritten,
    "freed": freed,
    "hooked": hooked,
    "packed away": packed_away,
}


@pytest.mark.parametrize("name", LEFT)
def test_any_other_graph_is_left_to_torch(name):
    assert Softmax.of(LEFT[name](logits_of(4, 3, 5))) is None


def test_a_hook_of_the_user_is_heard():
    z = logits_of(4, 5)
    found = []
    for distribution in (hooked(z), Categorical(logits=z)):
        torch.manual_seed(0)
        found.append(gradient(scores_of(distribution).drawn, z))
    assert_equal(found[0], 2 * found[1], 1e-12)


def test_logits_that_were_overwritten_or_freed_are_an_error_of_torch():
    for make, message in ((overwritten, "modified by an inplace operation"), (freed, "second time")):
        z = logits_of(4, 5)
        scores = scores_of(make(z))
        with pytest.raises(RuntimeError, match=message):
            gradient(scores.drawn, z)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nans_are_found_before_or_after_labels_are_drawn(value):
    z = logits_of(4, 5).detach()
    z[1, 2] = value
    distribution = Categorical(logits=z.requires_grad_(), validate_args=False)
    with pytest.raises(NotFiniteError, match="logits of the distribution"):
        scores_of(distribution)
    assert scores_of(distribution, looks=False).total.isnan()
    rows = Softmax.of(distribution).draw()
    assert rows.isnan().tolist() == [False, True, False, False]


def test_labels_follow_their_probabilities():
    z = torch.tensor([0.5, -1.0, 2.0, -110.0, -3.0, 0.0])  # float32 does not hold the fourth
    torch.manual_seed(0)
    labels = won_race(z.softmax(0).expand(200_000, 6))
    shares = labels.bincount(minlength=6) / len(labels)
    assert shares[3] == 0 and (shares - z.softmax(0)).abs().max() < 4e-3

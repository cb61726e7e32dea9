"""A step of statistics waits for the device once while the rows come, and once at its end: forced on CPU tensors."""

import copy
import traceback

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from compare import assert_equal
from inside import curvature_of, set_factor
from paper import KFAC
from test_not_finite import iterate, net, same, snapshot
from test_unread import INDEFINITE, unread
from torch.distributions import Bernoulli, Categorical, Independent, Normal
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from kfac2.likelihood import scores_of

READS = ("_local_scalar_dense", "nonzero", "aten.equal", "masked_select")


def caller():
    """The innermost function of kfac2 that is running."""
    frames = [frame for frame in traceback.extract_stack() if "/kfac2/" in frame.filename]
    return f"{frames[-1].filename.rsplit('/', 1)[-1]}: {frames[-1].name}"


class Reads(TorchDispatchMode):
    """Ops whose result the host reads: each waits for a CUDA device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in str(func) for name in READS):
            self.found.append(caller())
        return func(*args, **(kwargs or {}))


class Copies(TorchFunctionMode):
    """Copies to the host and, but for those of `brought`, to the device: they wait as well, and dispatch nothing."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        to_device = name in ("tensor", "as_tensor", "new_tensor") and kwargs.get("device") != "cpu"
        if (to_device and "brought" not in caller()) or name in ("tolist", "cpu", "numpy"):
            self.found.append(caller())
        return func(*args, **kwargs)


def waits_of(run):
    reads, copies = Reads(), Copies()
    with copies, reads:
        run()
    return sorted(reads.found + copies.found)


def convolutions():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 5)]
    return nn.Sequential(*layers)


SETTINGS = [
    {},
    {"inverse": "eigh"},
    {"levels": 1, "kl_bound": 1e-3, "max_change": 0.02, "relative_damping": True, "burn_in": 2},
    {"damping": "auto", "relative_damping": True},
    {"fisher": "exact"},
    {"samples": 3},
]


@pytest.mark.parametrize("make", [lambda out: Categorical(logits=out), lambda out: Independent(Normal(out, 1.0), 1)])
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_step_of_statistics_waits_twice(settings, make):
    """Whether a row has no gradient is looked at as the first rows come: other sums are taken then."""
    model = convolutions()
    opt = unread(KFAC(model, cov_every=2, inv_every=4, check_every=100, **settings))
    x, y = torch.randn(6, 3, 6, 6), torch.arange(6) % 5
    found = []
    for _ in range(9):
        opt.zero_grad()
        out = model(x)
        distribution = make(out)
        before = waits_of(lambda distribution=distribution: opt.accumulate_fisher(distribution))
        F.cross_entropy(out, y).backward()
        found.append(before + waits_of(opt.step))
    once = ["health.py: read_together"]
    assert found[5] == found[7] == []
    assert found[6] == found[8] == ["reached.py: _any", *once]  # with new inverses, too


LABELS = [
    lambda z: Categorical(logits=z),
    lambda z: Categorical(probs=z.exp()),
    lambda z: Categorical(logits=z.transpose(0, 1)),
    lambda z: Normal(z, z.exp()),
    lambda z: Normal(z, 0.5),
    lambda z: Independent(Normal(z, 0.5), 1),
    lambda z: Independent(Independent(Categorical(logits=z), 1), 1),
    lambda z: Bernoulli(logits=z),
    lambda z: [Categorical(logits=z), Normal(z, 1.0)],
]


@pytest.mark.parametrize("make", LABELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_labels_drawn_unseen_are_those_of_sample(make, dtype):
    z = torch.randn(5, 4, 7, dtype=dtype, requires_grad=True)
    drawn = []
    for looks in (True, False):
        torch.manual_seed(1)
        scores = scores_of(make(z), samples=2, looks=looks)
        drawn.append([scores.drawn, scores.directions[0]()])
        assert (scores.total is None) == looks
    for ours, theirs in zip(*drawn, strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(*(torch.autograd.grad(one, z, retain_graph=True)[0] for one in (ours, theirs)))


UNCHECKED = [
    lambda z: Categorical(logits=z, validate_args=False),
    lambda z: Categorical(probs=z.exp(), validate_args=False),
    lambda z: Normal(z, 1.0, validate_args=False),
    lambda z: Independent(Normal(z, z.exp(), validate_args=False), 1, validate_args=False),
    lambda z: [Categorical(logits=torch.zeros_like(z).requires_grad_()), Normal(z, 1.0, validate_args=False)],
]


@pytest.mark.parametrize("make", UNCHECKED)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_drawn_unseen_of_nans_shows(make, value):
    z = torch.randn(5, 4, 7)
    assert scores_of(make(z.requires_grad_()), looks=False).total.isfinite()
    z = z.detach().clone()
    z[2, 1, 3] = value
    assert not scores_of(make(z.requires_grad_()), looks=False).total.isfinite()


def poisoned(where, value, model, x):
    """An input, and what is done to gradients."""
    bad = x.clone()
    if where == "input":
        bad[1, 2] = value
    return bad, (lambda: model[3].bias.grad.fill_(value)) if where == "gradient" else lambda: None


NAMED = {"input": "the statistics of 0", "gradient": "the gradient of 3.bias"}


def all_numbers(opt):
    curvature = curvature_of(opt)
    return [*curvature.inverses.tensors(), *curvature.averages.A, *curvature.averages.G]


@pytest.mark.parametrize("inverse", ["cholesky", "eigh", "ekfac"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["input", "gradient"])
def test_what_is_not_finite_leaves_all_as_it_was(where, value, inverse):
    """New inverses are to be written over the last ones in that step, with another damping."""
    model, x = net(), torch.randn(6, 3)
    opt = unread(KFAC(model, cov_every=2, inv_every=2, inverse=inverse))
    for _ in range(4):
        iterate(model, opt, x)
    before, numbers = snapshot(model, opt), [tensor.clone() for tensor in all_numbers(opt)]
    model.eval()
    opt.options.damping = 0.3
    bad, poison = poisoned(where, value, model, x)
    with pytest.warns(RuntimeWarning, match=NAMED[where] + " at iteration 4; the step is skipped"):
        iterate(model, opt, bad, poison=poison)
    opt.options.damping = opt.state_dict()["kfac"]["inverses"]["damping"][0]
    assert same(before, snapshot(model, opt))
    assert all(torch.equal(a, b) for a, b in zip(numbers, all_numbers(opt), strict=True))
    model.train()
    iterate(model, opt, x)
    assert opt.preconditioner.iteration == 6 and not same(before, snapshot(model, opt))


def test_logits_that_are_not_finite_are_named():
    model, x = net(), torch.randn(6, 3)
    opt = unread(KFAC(model, cov_every=1))
    iterate(model, opt, x)
    before = [p.clone() for p in model.parameters()]
    opt.zero_grad()
    out = model(x)
    opt.accumulate_fisher(Categorical(logits=out * torch.tensor([1.0, float("nan")]), validate_args=False))
    out.sum().backward()
    with pytest.warns(RuntimeWarning, match="the log-probabilities of the distribution at iteration 1"):
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert curvature_of(opt).averages.updates == 1


def test_a_bad_first_step_leaves_a_sound_optimizer():
    model = net()
    opt = unread(KFAC(model))
    with pytest.warns(RuntimeWarning, match="the step is skipped"):
        iterate(model, opt, torch.full((4, 3), float("nan")))
    model[1].reset_running_stats()
    assert opt.needs_fisher and curvature_of(opt).inverses is None
    iterate(model, opt, torch.randn(6, 3))
    assert opt.factors("0")[0].isfinite().all()


def test_steps_that_were_skipped_before_and_this_one_are_told_apart():
    model, x = net(), torch.randn(6, 3)
    opt = unread(KFAC(model, cov_every=4))
    for _ in range(2):
        iterate(model, opt, x)
    for _ in range(2):
        iterate(model, opt, x, poison=lambda: model[0].weight.grad.fill_(float("nan")))
    with pytest.warns(RuntimeWarning) as caught:
        iterate(model, opt, x, poison=lambda: model[3].weight.grad.fill_(float("nan")))
        opt.check()
    messages = [str(warning.message) for warning in caught]
    assert (
        "2 steps before iteration 4 were skipped; the first for a NaN or an infinity in the gradient of 0.weight"
        in (messages[0])
    )
    assert (
        "3 steps up to iteration 4 were skipped, lately for a NaN or an infinity in the gradient of 3.weight"
        in (messages[1])
    )
    assert curvature_of(opt).health.skipped[0] == 0


def scale_gradients(model, by):
    for parameter in model.parameters():
        parameter.grad *= by


@pytest.mark.parametrize("inverse", ["cholesky", "eigh"])
def test_large_gradients_have_their_inverses_made_beside_the_last_ones(inverse):
    """They are finite, but nobody knows of the step: both ways make the same one, of the new inverses."""
    ends = []
    for make in (lambda opt: opt, unread):
        model, x = net().double(), torch.randn(6, 3, generator=torch.Generator().manual_seed(1)).double()
        opt = make(KFAC(model, cov_every=2, inv_every=2, inverse=inverse, kl_clip=None, lr=1e-12))
        torch.manual_seed(0)
        for large in (False, False, True, False):
            iterate(model, opt, x, poison=lambda by=1e14 if large else 1.0, model=model: scale_gradients(model, by))
        ends.append([*all_numbers(opt), *(p.detach() for p in model.parameters())])
    for ours, theirs in zip(*ends, strict=True):
        assert_equal(ours, theirs, 1e-12)


def test_an_inverse_that_fails_in_a_step_of_statistics_is_mended_at_its_end():
    model, x = net(), torch.randn(6, 3)
    opt = unread(KFAC(model, cov_every=2, inv_every=2, stat_decay=0.999))
    for _ in range(2):
        iterate(model, opt, x)
    set_factor(opt, "0", INDEFINITE * 1e6)
    with pytest.warns(RuntimeWarning, match="a factor of 0 is not positive definite"):
        iterate(model, opt, x)
    inverses = curvature_of(opt).inverses
    assert inverses.failed is None and all(tensor.isfinite().all() for tensor in inverses.tensors())


def test_statistics_that_overflow_are_not_averaged_in():
    model = net()
    opt = unread(KFAC(model, cov_every=1, inv_every=1))
    iterate(model, opt, torch.randn(6, 3))
    before = [tensor.clone() for tensor in all_numbers(opt)]
    opt.zero_grad()
    out = model[3](model[2](torch.randn(6, 4)) * 1e30)  # finite, but its square is not
    opt.accumulate_fisher(Categorical(logits=out * 1e-30))
    out.mul(1e-30).sum().backward()
    with pytest.warns(RuntimeWarning, match="the statistics of 3"):
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(before, all_numbers(opt), strict=True))


def test_a_batch_that_is_thrown_away_takes_its_nan_with_it():
    model, x = net(), torch.randn(6, 3)
    model.eval()
    opt = unread(KFAC(model, cov_every=1))
    other = copy.deepcopy(model)
    expected = unread(KFAC(other, cov_every=1))
    opt.accumulate_fisher(Categorical(logits=model(x * float("nan")), validate_args=False))
    for trained, own in ((model, opt), (other, expected)):
        out = trained(x)
        torch.manual_seed(0)
        own.accumulate_fisher(Categorical(logits=out))
        F.cross_entropy(out, torch.arange(6) % 2).backward()
        own.step()
    for ours, theirs in zip(all_numbers(opt), all_numbers(expected), strict=True):
        assert torch.equal(ours, theirs)

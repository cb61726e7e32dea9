"""Under torch.autocast an input is captured as it is multiplied, and nothing else changes."""

import contextlib

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from compare import assert_equal, error
from inside import curvature_of
from paper import KFAC
from torch.distributions import Categorical
from torch.utils.checkpoint import checkpoint

HALVES = [torch.bfloat16, torch.float16]


class Cast(nn.Module):
    """What autocast does to an input, as a module."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        return x.to(self.dtype)


def tokens():
    return [(nn.LayerNorm(6), nn.Linear(6, 8)), (nn.LayerNorm(8), nn.Linear(8, 3))], (5, 4, 6)


def maps():
    layers = [(nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3)), (nn.BatchNorm2d(3), nn.ConvTranspose2d(3, 3, 2, stride=2))]
    return [*layers, (nn.Flatten(), nn.Linear(108, 3))], (5, 2, 5, 5)


def built(make, cast=None):
    """Each layer after one whose output is float32; with `cast`, its input is cast before it."""
    torch.manual_seed(0)
    pairs, shape = make()
    between = [[] if cast is None else [Cast(cast)] for _ in pairs]
    model = nn.Sequential(*(nn.Sequential(a, *some, b) for (a, b), some in zip(pairs, between, strict=True)))
    return model, torch.randn(shape, generator=torch.Generator().manual_seed(1))


def trained(model, x, autocast, **options):
    """What three steps leave: factors, the coarse space and parameters."""
    opt = KFAC(model, cov_every=1, inv_every=1, check_every=1, **options)
    for seed in range(3):
        opt.zero_grad()
        with autocast():
            out = model(x).float()
        torch.manual_seed(seed)
        opt.accumulate_fisher(Categorical(logits=out))
        F.cross_entropy(out.flatten(0, -2), torch.arange(out.shape[:-1].numel()) % 3).backward()
        opt.step()
    averages = curvature_of(opt).averages
    assert len(opt.layers) == len(model) and all(averages.in_coarse)
    return [*averages.A, *averages.G, *averages.coarse, *(p.detach() for p in model.parameters())]


def region(dtype=torch.bfloat16, enabled=True):
    return lambda: torch.autocast("cpu", dtype, enabled=enabled)


@contextlib.contextmanager
def off_inside():
    """A region without autocast in one with it."""
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        yield


@pytest.mark.parametrize("options", [{}, {"inverse": "ekfac"}, {"levels": 2}, {"kl_bound": 0.5}])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("make", [tokens, maps])
def test_steps_are_those_of_inputs_that_were_cast_before(make, dtype, options):
    ours = trained(*built(make), region(dtype), **options)
    theirs = trained(*built(make, dtype), region(dtype), **options)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def first_factor(autocast):
    """A of the first layer, and the float32 rows that it is given."""
    model, x = built(tokens)
    opt, rows = KFAC(model), model[0][0](x).detach().flatten(0, 1)
    with autocast():
        out = model(x).float()
    opt.accumulate_fisher(Categorical(logits=out))
    out.sum().backward()
    opt.step()
    return opt.factors("0.1")[0], rows


def second_moment(rows):
    rows = F.pad(rows.double(), (0, 1), value=1.0)
    return rows.T @ rows / len(rows)


@pytest.mark.parametrize("dtype", HALVES)
def test_factors_are_those_of_rounded_rows(dtype):
    A, rows = first_factor(region(dtype))
    assert A.dtype == torch.float32
    assert_equal(A, second_moment(rows.to(dtype)), 1e-6)
    assert error(A, second_moment(rows)) > 1e-5


@pytest.mark.parametrize("autocast", [region(enabled=False), off_inside])
def test_without_autocast_nothing_is_cast(autocast):
    A, rows = first_factor(autocast)
    assert_equal(A, second_moment(rows), 1e-6)
    ours, theirs = (trained(*built(tokens), some) for some in (autocast, region(enabled=False)))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def captured(layer, x, **options):
    """The input that is captured of one use, and the output."""
    opt = KFAC(layer, **options)
    with region()():
        out = layer(x)
    (capture,) = curvature_of(opt).collector.captures.in_order()
    return capture.x, out, opt


def test_the_input_is_the_one_that_autograd_keeps():
    x = torch.randn(5, 6, requires_grad=True) * 1.0
    seen, out, _opt = captured(nn.Linear(6, 3), x)
    assert seen.dtype == torch.bfloat16 and seen.data_ptr() == out.grad_fn._saved_mat1.data_ptr()
    assert torch.equal(seen, x.bfloat16())


class Named(nn.Linear):
    def forward(self, x):
        return F.linear(weight=self.weight, bias=self.bias, input=x)


def test_an_input_given_by_name_is_cast_too():
    assert captured(Named(6, 3), torch.randn(5, 6))[0].dtype == torch.bfloat16


def test_what_autocast_does_not_cast_is_left():
    assert captured(nn.Linear(6, 3), torch.randn(5, 6).bfloat16())[0].dtype == torch.bfloat16
    assert captured(nn.Linear(6, 3), torch.randn(5, 6).half())[0].dtype == torch.bfloat16
    assert captured(nn.Linear(6, 3).double(), torch.randn(5, 6).double())[0].dtype == torch.float64
    leaf = torch.randn(5, 6, requires_grad=True)  # autocast keeps one cast of it for all that use it
    assert captured(nn.Linear(6, 3), leaf)[0].data_ptr() == leaf.data_ptr()


def test_an_input_that_is_overwritten_later_has_been_captured():
    """Of one that is not cast autograd itself would complain, or the layer leaves."""
    ends = []
    for overwrites in (False, True):
        torch.manual_seed(0)
        layer, x = nn.Linear(6, 3), torch.randn(5, 6)
        opt = KFAC(layer)
        with region()():
            out = layer(x).float()
        if overwrites:
            x.zero_()
        torch.manual_seed(1)
        opt.accumulate_fisher(Categorical(logits=out))
        out.square().sum().backward()
        opt.step()
        ends.append([*opt.factors(""), layer.weight.detach()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


class Checkpointed(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def __len__(self):
        return len(self.model)

    def forward(self, x):
        for part in self.model:
            x = checkpoint(part, x, use_reentrant=False)
        return x


@pytest.mark.parametrize("options", [{}, {"inverse": "ekfac"}])
def test_checkpointing_changes_nothing(options):
    model, x = built(tokens)
    ours = trained(Checkpointed(model), x, region(), **options)
    theirs = trained(*built(tokens), region(), **options)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

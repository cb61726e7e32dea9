"""The SGD step after preconditioning: torch's fused kernel where it is right, foreach elsewhere."""

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from compare import assert_equal
from paper import KFAC, Preconditioner
from torch.optim import SGD

STEPS = 4


def net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 3, 1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(48, 3))


def follow(change=lambda model, step: None, dtype=torch.float32, **options):
    """Train by KFAC, and by Preconditioner and torch.optim.SGD; return both models."""
    models = [net().to(dtype) for _ in range(2)]
    x, y = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(1)).to(dtype), torch.arange(5) % 3
    kfac = {"damping": 0.1, "fisher": "empirical", "kl_clip": None, "cov_every": 2}
    sgd = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2, **options}
    opt = KFAC(models[0], **sgd, **kfac)
    preconditioner, plain = Preconditioner(models[1], **kfac), SGD(models[1].parameters(), foreach=True, **sgd)
    for step in range(STEPS):
        for model in models:
            change(model, step)
            model.zero_grad()
            F.cross_entropy(model(x.to(next(model.parameters()).dtype)), y).backward()
        opt.step()
        preconditioner.step()
        plain.step()
    return models


def expect_same(models, tolerance=1e-5):
    start = net()
    for p, q, before in zip(models[0].parameters(), models[1].parameters(), start.parameters(), strict=True):
        assert_equal(p.double(), q.double(), tolerance)
        if p.dim() > 1:  # bfloat16 rounds small steps of a 1 away
            assert (p.double() != before.double()).float().mean() > 0.5


@pytest.mark.parametrize("options", [{}, {"momentum": 0.0}, {"nesterov": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_precision_moves_as_with_torch_sgd(dtype, options):
    expect_same(follow(dtype=dtype, **options), 0.05 if dtype == torch.bfloat16 else 1e-5)


def test_a_model_that_becomes_channels_last_keeps_its_momentum():
    expect_same(follow(lambda model, step: model.to(memory_format=torch.channels_last) if step == 2 else None))


def test_gradients_in_other_strides():
    def scramble(model, step):
        for p in model.parameters():
            if p.dim() == 4 and step % 2 == 0:
                p.register_hook(lambda g: g.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0))

    expect_same(follow(scramble))


def test_a_model_that_changes_its_dtype_goes_on():
    model = net()
    opt = KFAC(model, fisher="empirical", cov_every=100, inv_every=100)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        model.to(dtype)
        before = copy.deepcopy(model)
        opt.zero_grad()
        F.cross_entropy(model(torch.randn(5, 2, 4, 4).to(dtype)), torch.arange(5) % 3).backward()
        opt.step()
        for p, q in zip(model.parameters(), before.parameters(), strict=True):
            assert p.dim() == 1 or (p != q).float().mean() > 0.5  # bfloat16 rounds small steps of a 1 away


def test_a_parameter_with_gaps_between_its_rows():
    model = net()
    model[5].weight = nn.Parameter(torch.randn(3, 96)[:, ::2])
    assert not model[5].weight.is_contiguous()
    opt = KFAC(model, fisher="empirical", momentum=0, kl_clip=None)
    before = model[5].weight.detach().clone()
    F.cross_entropy(model(torch.randn(5, 2, 4, 4)), torch.arange(5) % 3).backward()
    opt.step()
    assert_equal(before - model[5].weight, 1e-2 * model[5].weight.grad, 1e-3)

"""Whole training steps on a CUDA device: the same numbers as on the CPU, and no growing memory."""

import copy
import gc

import models
import pytest
import torch
import torch.nn.functional as F
from compare import assert_equal
from device import DEVICE, needs_device
from torch.distributions import Categorical

from kfac2 import KFAC

pytestmark = needs_device


def train(model, x, target, steps, **options):
    opt = KFAC(model, lr=0.05, damping=1e-2, cov_every=2, inv_every=3, fisher="empirical", **options)
    for _ in range(steps):
        opt.zero_grad()
        out = model(x)
        F.cross_entropy(out.flatten(0, -2), target.flatten()).backward()
        opt.step()
    return opt


@pytest.mark.parametrize("options", [{}, {"inverse": "eigh"}, {"levels": 1}, {"downsample": "area", "kl_clip": 1e-4}])
@pytest.mark.parametrize("name", ["linear", "conv1d", "conv2d", "conv3d", "grouped", "same_even", "tokens", "sequence"])
def test_training_follows_the_cpu(name, options):
    task = models.task(name)
    there = copy.deepcopy(task.model).to(DEVICE)
    opt = train(task.model, task.x, task.target, 7, **options)
    other = train(there, task.x.to(DEVICE), task.target.to(DEVICE), 7, **options)
    for p, q in zip(task.model.parameters(), there.parameters(), strict=True):
        assert_equal(q.cpu(), p, 1e-8)
    for layer in opt.layers:
        for ours, theirs in zip(other.factors(layer), opt.factors(layer), strict=True):
            assert_equal(ours.cpu(), theirs, 1e-8)
    if options.get("levels") != 1:
        assert_equal(other.coarse_fisher().cpu(), opt.coarse_fisher(), 1e-8)


def test_sampled_labels_and_state():
    task = models.task("conv2d")
    model, x, target = task.model.to(DEVICE), task.x.to(DEVICE), task.target.to(DEVICE)
    opt = KFAC(model, cov_every=1)
    for _ in range(3):
        opt.zero_grad()
        out = model(x)
        opt.accumulate_fisher(Categorical(logits=out))
        F.cross_entropy(out, target).backward()
        opt.step()
    assert opt.coarse_fisher().device.type == DEVICE.type and opt.coarse_fisher().isfinite().all()
    fresh = KFAC(copy.deepcopy(model), cov_every=1)
    fresh.load_state_dict(torch.load(_saved(opt.state_dict()), weights_only=True, map_location="cpu"))
    assert torch.equal(fresh.coarse_fisher(), opt.coarse_fisher())


def _saved(state):
    import io

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def test_memory_does_not_grow_over_200_steps():
    task = models.task("conv2d")
    model, x, target = task.model.to(DEVICE), task.x.to(DEVICE), task.target.to(DEVICE)
    opt = KFAC(model, cov_every=2, inv_every=10)
    seen = []
    for step in range(200):
        opt.zero_grad()
        out = model(x)
        opt.accumulate_fisher(Categorical(logits=out))
        F.cross_entropy(out, target).backward()
        opt.step()
        if step % 20 == 19:
            gc.collect()
            seen.append(torch.cuda.memory_allocated())
    assert seen[-1] <= seen[1], seen

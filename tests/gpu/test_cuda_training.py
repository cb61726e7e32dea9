"""Whole training steps on a CUDA device: the same numbers as on the CPU, and no growing memory."""

import copy
import gc
import importlib
import warnings

import models
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from compare import assert_equal
from device import DEVICE, anywhere, needs_cuda
from inside import fields, set_factor
from paper import KFAC
from torch.distributions import Categorical

pytestmark = anywhere


def train(model, x, target, steps, **options):
    settings = {"lr": 0.05, "damping": 1e-2, "cov_every": 2, "inv_every": 3, "fisher": "empirical", **options}
    opt = KFAC(model, **settings)
    for _ in range(steps):
        opt.zero_grad()
        out = model(x)
        F.cross_entropy(out.flatten(0, -2), target.flatten()).backward()
        opt.step()
    return opt


# What `KFAC(model)` adds to the paper's plain method.
DEFAULTS = {
    "damping": 0.1,
    "relative_damping": True,
    "kl_bound": 1e-3,
    "max_change": 0.02,
    "burn_in": 3,
    "rest": "adamw",
}


eigendecompose = importlib.import_module("kfac2.ops.eigendecompose")


def decomposed_on_the_cpu(stacks, limit):
    """Give both devices the same bases: where eigenvalues are equal (0, of few rows) EKFAC depends on the choice.

    There the last bits of a factor choose, which are rounding: they are cut off.
    """
    found = eigendecompose._by_torch([stack.cpu().round(decimals=6) for stack in stacks])
    return tuple([tensor.to(stack.device) for tensor, stack in zip(part, stacks, strict=True)] for part in found)


@pytest.mark.parametrize(
    "options",
    [{}, {"inverse": "eigh"}, {"levels": 1}, {"downsample": "area", "kl_clip": 1e-4}, DEFAULTS, {"inverse": "ekfac"}],
)
@pytest.mark.parametrize(
    "name", ["linear", "conv1d", "conv2d", "conv3d", "grouped", "same_even", "transposed2d", "tokens", "sequence"]
)
def test_training_follows_the_cpu(name, options, monkeypatch):
    if options.get("inverse") == "ekfac":
        monkeypatch.setattr(eigendecompose, "_decompose", decomposed_on_the_cpu)
    task = models.task(name)
    options = {"cases": "rows", **options} if name == "sequence" else options  # its loss is a mean over tokens
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


@needs_cuda
def test_products_of_a_step_in_tf32():
    """Rounded to 11 bits where that is asked for, whatever torch's own setting is, which stays as it was."""
    setting, steps = torch.backends.cuda.matmul, {}
    before = setting.fp32_precision
    for precision in ("ieee", "tf32", None):
        torch.manual_seed(0)
        model, x = nn.Linear(256, 64).to(DEVICE), torch.randn(512, 256, device=DEVICE)
        opt = KFAC(model, fisher="empirical", kl_clip=None, momentum=0.0, step_precision=precision)
        start = model.weight.detach().clone()
        model(x).square().sum(1).mean().backward()
        opt.step()
        steps[precision] = model.weight.detach() - start
        assert setting.fp32_precision == before
    assert not torch.equal(steps["ieee"], steps["tf32"])
    assert torch.equal(steps[None], steps["tf32" if before == "tf32" else "ieee"])
    assert_equal(steps["tf32"], steps["ieee"], 1e-2)


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


@needs_cuda
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


def net():
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 3)]
    return nn.Sequential(*layers).to(DEVICE)


def iterate(model, opt, x, target, poison=lambda: None):
    opt.zero_grad()
    out = model(x)
    opt.accumulate_fisher(Categorical(logits=out, validate_args=False))
    F.cross_entropy(out, target).backward()
    poison()
    opt.step()


@needs_cuda
@pytest.mark.parametrize("options", [{}, {"inverse": "eigh"}, {"levels": 1, "kl_clip": None}, DEFAULTS])
def test_an_ordinary_step_never_waits_for_the_device(options):
    model, x, target = net(), torch.randn(32, 6, device=DEVICE), torch.randint(0, 3, (32,), device=DEVICE)
    opt = KFAC(model, cov_every=100, inv_every=100, weight_decay=1e-3, **options)
    for _ in range(3):
        iterate(model, opt, x, target)
    opt.zero_grad()
    F.cross_entropy(model(x), target).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(2_000_000_000)
        done = torch.cuda.Event()
        opt.step()
        done.record()
        assert not done.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


@needs_cuda
@pytest.mark.parametrize("options", [{}, {"inverse": "eigh"}, {"levels": 1, "kl_clip": None}, DEFAULTS])
def test_a_step_of_statistics_waits_twice(options):
    """For the first rows, and at its end; with new inverses, too. Eigendecompositions that are torch's wait as well."""
    model, x, target = net(), torch.randn(32, 6, device=DEVICE), torch.randint(0, 3, (32,), device=DEVICE)
    opt = KFAC(model, cov_every=2, inv_every=4, weight_decay=1e-3, **options)
    for _ in range(6):
        iterate(model, opt, x, target)
    waits = []
    for _ in range(3):  # statistics; nothing; statistics and inverses
        opt.zero_grad()
        out = model(x)
        loss = F.cross_entropy(out, target)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                opt.accumulate_fisher(Categorical(logits=out, validate_args=False))
                loss.backward()
                opt.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchronizing CUDA operation" in str(warning.message) for warning in caught))
    assert waits[:2] == [2, 0]
    if options.get("levels") == 1:
        assert waits[2] == 2


def test_statistics_that_are_not_finite_are_found_at_the_end_of_the_step():
    model, x, target = net(), torch.randn(32, 6, device=DEVICE), torch.randint(0, 3, (32,), device=DEVICE)
    opt = KFAC(model, cov_every=2, inv_every=2, weight_decay=0.1)
    for _ in range(2):
        iterate(model, opt, x, target)
    model.eval()
    before = [t.detach().clone() for t in (*model.parameters(), *opt.curvature.inverses.tensors())]
    bad = x.clone()
    bad[3, 2] = float("nan")
    with pytest.warns(RuntimeWarning, match="the statistics of 0 at iteration 2; the step is skipped"):
        iterate(model, opt, bad, target)
    now = (*model.parameters(), *opt.curvature.inverses.tensors())
    assert all(torch.equal(t, old) for t, old in zip(now, before, strict=True))
    iterate(model, opt, x, target)
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=False))


def capture(model, opt, x, target):
    """A CUDA graph of one whole ordinary step."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            iterate(model, opt, x, target)
    torch.cuda.current_stream().wait_stream(stream)
    opt.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        iterate(model, opt, x, target)
    return graph


@needs_cuda
@pytest.mark.parametrize("options", [{}, {"inverse": "eigh"}, DEFAULTS])
def test_a_cuda_graph_replayed_1000_times_follows_eager_steps(options):
    torch.manual_seed(0)
    x, target = torch.randn(32, 6, device=DEVICE), torch.randint(0, 3, (32,), device=DEVICE)
    options = {"lr": 1e-3, "weight_decay": 1e-3, "cov_every": 600, "inv_every": 600, **options}
    models_, graph = [net(), net()], None
    opts = [KFAC(model, **options) for model in models_]
    for index, (model, opt) in enumerate(zip(models_, opts, strict=True)):
        torch.manual_seed(1)
        graph = capture(model, opt, x, target) if index else [iterate(model, opt, x, target) for _ in range(3)]
        assert opt.preconditioner.iteration == 3  # what is captured has not run
        for _ in range(1003 - 3):
            if index and opt.ordinary:
                graph.replay()
                opt.replayed()
            else:
                iterate(model, opt, x, target)  # iteration 600: statistics and inverses, while the graph is there
        assert opt.check() == 0
    for p, q in zip(models_[0].parameters(), models_[1].parameters(), strict=True):
        assert_equal(q, p, 1e-4)


@needs_cuda
def test_only_ordinary_steps_are_captured():
    model, x, target = net(), torch.randn(32, 6, device=DEVICE), torch.randint(0, 3, (32,), device=DEVICE)
    opt = KFAC(model, cov_every=100, inv_every=6)
    with pytest.raises(RuntimeError, match="only an ordinary step can be captured in a CUDA graph, got iteration 6"):
        for _ in range(2):
            capture(model, opt, x, target)


def test_a_bad_gradient_moves_nothing_and_is_reported_by_check():
    model, x, target = net(), torch.randn(32, 6, device=DEVICE), torch.randint(0, 3, (32,), device=DEVICE)
    opt = KFAC(model, cov_every=100, inv_every=100, weight_decay=0.1)
    for _ in range(3):
        iterate(model, opt, x, target)
    before = [p.detach().clone() for p in model.parameters()]
    momenta = [state["momentum_buffer"].clone() for state in opt.state.values()]
    iterate(model, opt, x, target, poison=lambda: model[1].weight.grad[0].fill_(float("nan")))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(torch.equal(state["momentum_buffer"], m) for state, m in zip(opt.state.values(), momenta, strict=True))
    with pytest.warns(RuntimeWarning, match="1 steps before iteration 4 were skipped; .*the gradient of 1.weight"):
        assert opt.check() == 1
    iterate(model, opt, x, target)
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_failed_inverse_keeps_the_last_one_until_statistics_come():
    model, x, target = net(), torch.randn(32, 6, device=DEVICE), torch.randint(0, 3, (32,), device=DEVICE)
    opt = KFAC(model, cov_every=4, inv_every=2)
    for _ in range(2):
        iterate(model, opt, x, target)
    last = fields(opt, "0")["A_inv"].clone()
    set_factor(opt, "0", -opt.factors("0")[0])
    iterate(model, opt, x, target)  # inverses, without statistics
    assert torch.equal(fields(opt, "0")["A_inv"], last)
    iterate(model, opt, x, target)
    with pytest.warns(RuntimeWarning, match="a factor of 0 is not positive definite"):
        iterate(model, opt, x, target)
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_rate_on_the_device():
    results = []
    for lr in (0.25, torch.tensor(0.25, device=DEVICE)):
        model, target = net().double(), torch.zeros(8, dtype=torch.long, device=DEVICE)
        x = torch.ones(8, 6, device=DEVICE, dtype=torch.float64)
        opt = KFAC(model, lr=lr, kl_clip=1e-4, fisher="empirical")
        for _ in range(4):
            iterate(model, opt, x + torch.arange(8, device=DEVICE)[:, None], target)
        results.append([p.detach() for p in model.parameters()])
    for p, q in zip(*results, strict=True):
        assert_equal(p, q)

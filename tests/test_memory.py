"""No gradient is held longer than its sums take, and a refresh of inverses needs little memory of its own."""

import gc
import weakref

import models
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from compare import assert_equal
from inside import curvature_of, fields
from paper import KFAC
from torch.distributions import Categorical

import kfac2
from kfac2 import arrivals, ops, outer_products
from kfac2.inverses import LEAST_BYTES, SHARE, chunks

WIDTH = 6


class Chain(nn.Sequential):
    """Linear layers of one width; as many classes."""

    def __init__(self, layers, width=WIDTH):
        torch.manual_seed(0)
        super().__init__(*(m for _ in range(layers) for m in (nn.Linear(width, width), nn.Tanh())))


class Shared(nn.Module):
    """One layer, used three times between two others."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.first, self.shared, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        x = torch.tanh(self.first(x))
        for _ in range(3):
            x = torch.tanh(self.shared(x))
        return self.last(x)


def batch(size=8):
    return torch.randn(size, WIDTH, generator=torch.Generator().manual_seed(1)), torch.arange(size) % WIDTH


def iterate(model, opt, x, y, seed=0):
    torch.manual_seed(seed)
    opt.zero_grad()
    out = model(x)
    opt.accumulate_fisher(Categorical(logits=out))
    F.cross_entropy(out, y).backward()
    opt.step()


def peak(function):
    """What a function needs on top of what was there, in bytes that torch's allocator hands out."""
    gc.collect()
    with torch.profiler.profile(profile_memory=True) as profile:
        result = function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    del result
    return most


@pytest.fixture
def none_waits(monkeypatch):
    """Take the sums of each gradient as it comes, however small it is."""
    monkeypatch.setattr(arrivals, "WAITING_BYTES", 0)


@pytest.fixture
def gradients(monkeypatch):
    """Weak references to the gradients of all uses that have come, and how many were alive as each one came."""
    seen, alive = [], []
    add = arrivals.Taking.add

    def watched(self, use, *rest):
        alive.append(sum(g() is not None for g in seen))
        seen.append(weakref.ref(use.g))
        return add(self, use, *rest)

    monkeypatch.setattr(arrivals.Taking, "add", watched)
    return alive


@pytest.mark.parametrize("settings", [{}, {"levels": 2}, {"inverse": "ekfac"}, {"kl_bound": 0.5}, {"check_every": 1}])
def test_each_gradient_is_let_go_before_the_next_one_comes(settings, none_waits, gradients):
    model = Chain(5)
    opt = KFAC(model, cov_every=1, **settings)
    for seed in range(2):
        iterate(model, opt, *batch(128), seed=seed)
    assert gradients == [0] * 10


@pytest.mark.parametrize("at_once", [True, False])
def test_a_step_holds_no_buffer_when_it_is_over(at_once):
    model = Chain(3)
    opt = KFAC(model, cov_every=2, inv_every=2)
    curvature_of(opt).health.at_once = at_once
    for seed in range(3):
        iterate(model, opt, *batch(), seed=seed)
        held = [v for v in vars(curvature_of(opt).prepared()).values() if isinstance(v, torch.Tensor)]
        assert all(tensor.numel() < WIDTH * WIDTH for tensor in held)


def test_small_gradients_share_a_native_call(monkeypatch):
    calls = []
    covariances = ops.folded_covariances

    def counting(tensors, *rest, **options):
        calls.append(len(tensors))
        return covariances(tensors, *rest, **options)

    monkeypatch.setattr(ops, "folded_covariances", counting)
    model = Chain(5)
    iterate(model, KFAC(model), *batch())
    assert calls == [5, 5]  # the gradients of all layers, then their inputs
    calls.clear()
    monkeypatch.setattr(outer_products, "CALL_BYTES", 4 * (WIDTH + 1) * (WIDTH + 2))  # of two inputs, with a bias each
    iterate(model, KFAC(model), *batch())
    assert calls == [2, 2, 1, 2, 2, 1]


def test_gradients_wait_until_they_are_as_large_as_said(monkeypatch, gradients):
    monkeypatch.setattr(arrivals, "WAITING_BYTES", 2 * 8 * WIDTH * 4)
    model = Chain(5)
    iterate(model, KFAC(model), *batch())
    assert gradients == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("inverse", ["cholesky", "ekfac"])
def test_uses_of_one_layer_wait_for_each_other_only_where_somebody_wants_all(inverse, none_waits, gradients):
    model = Shared()
    opt = KFAC(model, cov_every=1, inverse=inverse)
    iterate(model, opt, *batch())
    gradients.clear()
    iterate(model, opt, *batch())
    assert gradients == ([0] * 5 if inverse == "cholesky" else [0, 0, 1, 2, 0])


@pytest.mark.parametrize("inverse", ["cholesky", "ekfac"])
@pytest.mark.parametrize("name", models.NAMES)
def test_it_does_not_count_how_many_gradients_wait(name, inverse, monkeypatch):
    ends = []
    for waiting in (0, 2**40):
        monkeypatch.setattr(arrivals, "WAITING_BYTES", waiting)
        torch.manual_seed(0)
        task = models.task(name)
        opt = KFAC(task.model, levels=2, inverse=inverse, cov_every=1, inv_every=1)
        for step in range(2):
            torch.manual_seed(step)
            opt.zero_grad()
            prediction = task.model(task.x)
            opt.accumulate_fisher(task.distribution(prediction))
            task.loss(prediction).backward()
            opt.step()
        ends.append(torch.cat([p.detach().flatten() for p in task.model.parameters()]))
    assert_equal(*ends, 1e-12)


def test_a_statistics_step_needs_little_more_than_sgd():
    """24 layers of 8 channels on maps of 16 × 16: the gradients of all would be 12.6 MB."""

    def step(opt):
        opt.zero_grad()
        out = model(x)
        if isinstance(opt, kfac2.KFAC):
            opt.accumulate_fisher(Categorical(logits=out))
        F.cross_entropy(out, y).backward()
        opt.step()

    def maps(layers):
        convolutions = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(layers)]
        return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(8 * 16 * 16, 3))

    torch.manual_seed(0)
    model, x, y = maps(24), torch.randn(64, 8, 16, 16), torch.arange(64) % 3
    model[-1].requires_grad_(False)
    sgd = torch.optim.SGD(model.parameters(), lr=1e-3)
    step(sgd)
    least = peak(lambda: step(sgd))
    opt = kfac2.KFAC(model, lr=1e-3, rest="sgd", kl_bound=None, cov_every=1, inv_every=1)
    step(opt)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrivals, "WAITING_BYTES", 0)
        assert peak(lambda: step(opt)) < 1.15 * least


def test_sums_are_let_go_as_averages_take_their_place(monkeypatch, none_waits):
    """Eight layers of other shapes: sums, averages so far and new ones were there at once."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(60 + i, 61 + i) for i in range(8)))
    opt = KFAC(model, cov_every=1)
    x, y = torch.randn(16, 60), torch.arange(16)
    iterate(model, opt, x, y)
    curvature = curvature_of(opt)
    held = sum(stack.nbytes for stack in (*curvature.averages.A, *curvature.averages.G))

    def averages():
        curvature.accumulate(Categorical(logits=model(x)))

    assert peak(averages) < 1.6 * held  # sums as large as these, rows of 16 samples, and the average of one layer


# -- inverses -------------------------------------------------------------------------------------------------


def wide(count=12, width=256):
    """Layers whose factors need 3.1 MB, and their inverses as much again: chunks are smaller than all of them."""
    model = Chain(count, width)
    generator = torch.Generator().manual_seed(1)
    return model, torch.randn(32, width, generator=generator), torch.arange(32)


@pytest.mark.parametrize("inverse", ["cholesky", "eigh", "ekfac"])
def test_a_refresh_needs_a_quarter_of_factors_and_inverses(inverse, monkeypatch):
    monkeypatch.setattr("kfac2.inverses.LEAST_BYTES", 0)
    measured = []
    inverted = kfac2.estimates.inverted

    def metered(*given):
        result = []
        measured.append(peak(lambda: result.append(inverted(*given))))
        return result[0]

    model, x, y = wide(40)
    opt = KFAC(model, inverse=inverse, cov_every=1, inv_every=1)
    iterate(model, opt, x, y)
    monkeypatch.setattr("kfac2.estimates.inverted", metered)
    iterate(model, opt, x, y)
    curvature = curvature_of(opt)
    stacks = [*curvature.averages.A, *curvature.averages.G, *curvature.inverses.tensors()]
    held = sum(stack.numel() * stack.element_size() for stack in stacks)
    assert measured and measured[0] <= held / SHARE


def test_chunks_hold_each_block_once_and_are_as_small_as_said(monkeypatch):
    monkeypatch.setattr("kfac2.inverses.LEAST_BYTES", 0)
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in ((5, 5), (5, 70), (70, 70), (70, 5), (5, 5), (5, 70))))
    curvature = kfac2.Curvature(model)
    layout, fine = curvature.layout, curvature.solvers.fine
    found = list(chunks(layout, fine, None))
    firsts, counted = [], 0
    for chunk in found:
        for part in chunk:
            firsts += [(part.batch, q) for q in range(part.begin, part.end)]
            assert part.first == counted
            counted += part.end - part.begin
    assert firsts == [(number, q) for number, b in enumerate(layout.batches) for q in range(b.blocks)]
    sizes = [b.d_in**2 + b.d_out**2 for b in layout.batches]
    held = 2 * 4 * sum(size * b.blocks for size, b in zip(sizes, layout.batches, strict=True))
    for chunk in found:
        blocks = sum(part.end - part.begin for part in chunk)
        used = 4 * fine.copies * sum(sizes[part.batch] * (part.end - part.begin) for part in chunk)
        assert blocks == 1 or used <= held / SHARE
    monkeypatch.undo()
    assert held < LEAST_BYTES and len(list(chunks(layout, fine, None))) == 1


@pytest.mark.parametrize("inverse", ["cholesky", "eigh", "ekfac"])
def test_it_does_not_count_how_large_chunks_are(inverse, monkeypatch):
    ends = []
    for least in (0, 2**40):
        monkeypatch.setattr("kfac2.inverses.LEAST_BYTES", least)
        model, x = Chain(4, 12).double(), torch.randn(64, 12, generator=torch.Generator().manual_seed(1))
        y = torch.arange(64) % 12
        opt = KFAC(model, inverse=inverse, cov_every=1, inv_every=1)
        for seed in range(3):
            iterate(model, opt, x.double(), y, seed)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert_equal(*ends, 1e-10)


def held_by(opt):
    curvature = curvature_of(opt)
    return {n: {k: v.clone() for k, v in fields(opt, n).items()} for n in curvature.layers}


def test_new_inverses_take_the_place_of_the_last_ones():
    model = Chain(3)
    opt = KFAC(model, cov_every=1, inv_every=1)
    iterate(model, opt, *batch())
    places = [stack.data_ptr() for stacks in curvature_of(opt).inverses.fields.values() for stack in stacks]
    before = held_by(opt)
    iterate(model, opt, *batch(), seed=1)
    inverses = curvature_of(opt).inverses
    assert places == [stack.data_ptr() for stacks in inverses.fields.values() for stack in stacks]
    assert not torch.equal(before["0"]["A_inv"], fields(opt, "0")["A_inv"])


@pytest.mark.filterwarnings("ignore:kfac2.*is skipped")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38, 1e20])
def test_a_step_that_is_skipped_leaves_the_last_inverses(value):
    """A gradient of 3e38 is finite; what the inverses make of it is not. That of 1e20 may be, and is looked at, too."""
    model = Chain(3)
    opt = KFAC(model, cov_every=1, inv_every=1, damping=1e-3)
    iterate(model, opt, *batch())
    before, weight = held_by(opt), model[0].weight.detach().clone()
    x, y = batch()
    opt.zero_grad()
    out = model(x)
    opt.accumulate_fisher(Categorical(logits=out))
    F.cross_entropy(out, y).backward()
    model[2].weight.grad[0, 0] = value
    opt.step()
    if torch.equal(weight, model[0].weight):
        assert all(torch.equal(v, fields(opt, n)[k]) for n, own in before.items() for k, v in own.items())
    else:
        assert value == 1e20


@pytest.mark.filterwarnings("ignore:kfac2")
def test_an_inverse_that_would_make_a_step_overflow_has_failed(monkeypatch):
    monkeypatch.setattr("kfac2.inverses.LARGEST_STEP", 0.0)
    mended = []
    monkeypatch.setattr(
        "kfac2.estimates.mended", lambda layout, averages, inverses, *rest: mended.append(inverses) or inverses
    )
    model = Chain(2)
    opt = KFAC(model, cov_every=1, inv_every=1)
    iterate(model, opt, *batch())
    before = held_by(opt)
    assert mended[-1].failed.sum() == 0  # the first ones take no place
    iterate(model, opt, *batch(), seed=1)
    assert mended[-1].failed[:-1].tolist() == [1, 1]
    assert all(torch.equal(v, fields(opt, n)[k]) for n, own in before.items() for k, v in own.items())

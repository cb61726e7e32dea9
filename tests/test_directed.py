"""Steps in the space of directions over a run: what is not finite, states, when it pays, layers that come and go."""

import copy
import math

import models
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from compare import assert_equal
from inside import curvature_of, directed
from test_bounds import sampled_pass, scores
from test_directions import as_columns, flat, iterate, mlp, parts_of, task_of
from test_state import flatten, through_a_file
from test_unread import Calls
from torch.distributions import Categorical, Normal

import kfac2
from kfac2.coarse.directions import RIDGE, _solved
from kfac2.divergence import Matrices, derivatives, kept_of
from kfac2.signal_share import SignalShare

# -- what is not finite -------------------------------------------------------------------------------------


def assert_next_step_is_that_of_one_level(model, opt, step):
    """W ← W - η(v + μd), with v as it stands in `.grad` then."""
    before = [(p.detach().clone(), opt.state[p]["momentum_buffer"].clone()) for p in model.parameters()]
    step()
    for (old, d), p in zip(before, model.parameters(), strict=True):
        assert_equal(opt.state[p]["momentum_buffer"], p.grad + 0.6 * d, 1e-12)
        assert_equal(p, old - 0.8 * (p.grad + 0.6 * d), 1e-12)
        assert p.grad.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_are_not_finite_leave_a_step_of_one_level(bad):
    model, x, y = mlp()
    opt = directed(model, lr=0.8, momentum=0.6)
    for _ in range(3):
        iterate(model, opt, x, y)
    assert opt.needs_fisher and opt.preconditioner.iteration % 5  # rows and no statistics
    assert_next_step_is_that_of_one_level(model, opt, lambda: iterate(model, opt, x, y, at_rows=lambda g: g * bad))
    assert all(p.isfinite().all() for p in model.parameters())
    assert_differs_from_one_level(model, opt, lambda: iterate(model, opt, x, y))


def test_logits_of_nan_in_an_iteration_of_rows_leave_a_step_of_one_level():
    model, x, y = mlp()
    opt = directed(model, lr=0.8, momentum=0.6)
    for _ in range(3):
        iterate(model, opt, x, y)

    def step():
        opt.zero_grad()
        out = model(x)
        opt.accumulate_fisher(Categorical(logits=out * math.nan, validate_args=False))
        F.cross_entropy(out, y).backward()
        opt.step()

    assert_next_step_is_that_of_one_level(model, opt, step)
    assert not opt.curvature.iteration.kept
    assert_differs_from_one_level(model, opt, lambda: iterate(model, opt, x, y))


def assert_differs_from_one_level(model, opt, step):
    with pytest.raises(AssertionError, match="relative error"):
        assert_next_step_is_that_of_one_level(model, opt, step)


def test_a_factorisation_that_fails_leaves_a_step_of_one_level(monkeypatch):
    indefinite = torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))
    assert _solved(indefinite, torch.ones(2, dtype=torch.float64), RIDGE).isnan().all()
    model, x, y = mlp()
    opt = directed(model, lr=0.8, momentum=0.6)
    for _ in range(3):
        iterate(model, opt, x, y)
    correlations = opt._whole_step.directed.state()["correlations"]
    cholesky = torch.linalg.cholesky_ex
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "cholesky_ex", lambda Q: (cholesky(Q)[0], torch.ones((), dtype=torch.int32)))
        assert_next_step_is_that_of_one_level(model, opt, lambda: iterate(model, opt, x, y))
    assert torch.equal(opt._whole_step.directed.state()["correlations"], correlations)
    assert_differs_from_one_level(model, opt, lambda: iterate(model, opt, x, y))


def is_same(value, other):
    if isinstance(value, torch.Tensor):
        return torch.equal(value.isnan(), other.isnan()) and torch.equal(value.nan_to_num(), other.nan_to_num())
    return value == other


def spoil(model):
    model[2].weight.grad[1, 1] = math.nan


@pytest.mark.parametrize("at", [3, 5])  # rows only, and statistics
def test_a_gradient_of_nan_skips_the_step_and_changes_nothing(at):
    model, x, y = mlp()
    opt = directed(model)
    for _ in range(at):
        iterate(model, opt, x, y)
    before, weights = copy.deepcopy(opt.state_dict()), flat(model.parameters())
    with pytest.warns(RuntimeWarning, match="a NaN or an infinity in the gradient of 2.weight"):
        iterate(model, opt, x, y, at_gradients=spoil)
    assert torch.equal(flat(model.parameters()), weights)
    assert opt.preconditioner.iteration == at + 1
    after = flatten(opt.state_dict())
    for key, value in flatten(before).items():
        if key[-1] != "iteration":
            assert is_same(value, after[key]), key
    assert before["kfac"]["directed"]["signal"]["last"] is not None and not opt.curvature.iteration.kept
    iterate(model, opt, x, y)
    assert not torch.equal(flat(model.parameters()), weights)


@pytest.mark.filterwarnings("ignore:kfac2")
@pytest.mark.parametrize("at", [1, 3])
def test_a_gradient_of_nan_that_the_host_does_not_see_changes_nothing(at):
    """As on a device: the step is skipped there, and its slopes say nothing of the signal."""
    (model, x, y), (twin, _, _) = mlp(), mlp()
    opt, other = (directed(one) for one in (model, twin))
    curvature_of(opt).health.at_once = curvature_of(other).health.at_once = False
    for one, its in ((twin, other), (model, opt)):
        torch.manual_seed(1)
        for _ in range(at):
            iterate(one, its, x, y)
    signal, weights = opt._whole_step.directed.signal, flat(model.parameters())
    buffers = flat([opt.state[p]["momentum_buffer"] for p in model.parameters()])
    before, correlations = signal.state(), opt._whole_step.directed.state()["correlations"]
    iterate(model, opt, x, y, at_gradients=spoil)
    assert torch.equal(flat(model.parameters()), weights)
    assert torch.equal(flat([opt.state[p]["momentum_buffer"] for p in model.parameters()]), buffers)
    assert torch.equal(opt._whole_step.directed.state()["correlations"], correlations)
    after = signal.state()
    assert after["last"] == before["last"] and all(map(math.isnan, after["measured"][-1]))
    assert after["measured"][:-1] == before["measured"]
    share = signal.share
    signal._measured = signal._measured[-1:]
    signal.decide()  # of skipped steps alone nothing follows
    assert (signal.share, signal.is_on, signal._measured) == (share, True, [])
    iterate(model, opt, x, y)
    iterate(twin, other, x, y)  # which has skipped nothing
    assert signal.state()["measured"][-1] == pytest.approx(
        other._whole_step.directed.signal.state()["measured"][-1], rel=1e-6
    )


# -- as on a device, by other ways, and after the end --------------------------------------------------------


def test_it_reads_nothing_back_where_it_may_not_and_is_the_same():
    ends, solved = [], []
    for depth, at_once in ((2, True), (2, False), (12, False)):
        model, x, y = mlp(depth)
        opt = directed(model, kl_clip=0.01, weight_decay=1e-3, cov_every=7)
        curvature_of(opt).health.at_once = at_once
        torch.manual_seed(1)
        for _ in range(9):
            iterate(model, opt, x, y)
        ends.append(flat(model.parameters()))
        if not at_once:
            assert opt.needs_fisher
            opt.zero_grad()
            out = model(x)
            opt.accumulate_fisher(Categorical(logits=out))
            F.cross_entropy(out, y).backward()
            with Calls() as calls:
                opt.step()
            assert calls.names and not [n for n in calls.names if "_local_scalar_dense" in n or "nonzero" in n]
            solved.append(opt._whole_step.directed.latest.fine.isfinite().all())
    assert_equal(ends[1], ends[0], 1e-9)
    assert all(solved)


@pytest.mark.parametrize("options", [{"lr": torch.tensor(0.7, dtype=torch.float64)}, {"rest": "sgd"}])
def test_a_rate_that_is_a_tensor_and_what_trains_the_rest_change_nothing(options):
    ends = []
    for other in ({}, options):
        model, x, y = mlp()
        opt = directed(model, **{"lr": 0.7, **other})
        for _ in range(6):
            iterate(model, opt, x, y)
        ends.append(flat(model.parameters()))
    assert_equal(ends[1], ends[0], 1e-12)


@pytest.mark.parametrize("options", [{"inverse": "eigh"}, {"inverse": "ekfac"}, {"samples": 2}, {"fisher": "exact"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_options_and_dtypes_train(dtype, options):
    model, x, y = mlp(dtype=dtype)
    opt = directed(model, **options)
    losses = []
    for _ in range(12):
        opt.zero_grad()
        out = model(x).float()
        opt.accumulate_fisher(Categorical(logits=out))
        losses.append(F.cross_entropy(out, y))
        losses[-1].backward()
        opt.step()
    assert losses[-1] < 0.9 * losses[0] and opt._whole_step.directed.latest.last.abs().sum() > 0


def test_steps_after_close_are_those_of_one_level():
    model, x, y = mlp()
    opt = directed(model, lr=0.8, momentum=0.6, kl_bound=None)
    for _ in range(3):
        iterate(model, opt, x, y)
    opt.close()
    assert not opt.needs_fisher
    for _ in range(3):
        assert_next_step_is_that_of_one_level(model, opt, lambda: iterate(model, opt, x, y))


# -- states -------------------------------------------------------------------------------------------------


def with_looks(model, **options):
    return kfac2.KFAC(model, coarse="directions", **options)


def build(make=directed, **options):
    torch.manual_seed(3)
    layers = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)]
    model = nn.Sequential(*layers).double()
    return model, make(model, **{"cov_every": 3, "weight_decay": 1e-3, **options})


def noisy(model, opt, own_passes, samples=8):
    """An iteration of few samples with labels of pure noise."""
    x, y = torch.randn(samples, 6, dtype=torch.float64), torch.randint(0, 4, (samples,))
    opt.zero_grad()
    out = model(x)
    if own_passes:
        opt.accumulate_fisher(lambda part: Categorical(logits=model(x[part])), samples=8)
    else:
        opt.accumulate_fisher(Categorical(logits=out))
    F.cross_entropy(out, y).backward()
    opt.step()


@pytest.mark.parametrize("own_passes, make", [(False, directed), (True, directed), (False, with_looks)])
def test_resumed_training_equals_uninterrupted_training(own_passes, make, monkeypatch):
    monkeypatch.setattr("kfac2.signal_share.SOON", 7)
    model, opt = build(make)
    assert opt._whole_step.directed.signal.interval == 7
    saved, is_on, looks = [], [], []
    for k in range(40):
        saved.append(through_a_file([model.state_dict(), opt.state_dict(), torch.get_rng_state()]))
        is_on.append(opt._whole_step.directed.signal.is_on)
        looks += [k] * (opt._whole_step.directed.signal.wants_step(k) and not is_on[k])
        noisy(model, opt, own_passes)
    off = is_on.index(False)
    assert off == 0 if make is with_looks else off > 2  # the first that is off
    look = next(k for k in looks if k > off + 1)
    after = saved[look + 1][1]["kfac"]["directed"]
    assert after["signal"]["last"] is not None and len(after["looked"]) == 3
    for at in (1, off // 2, off, look, look + 1):
        resumed, other = build(make)
        resumed.load_state_dict(saved[at][0])
        other.load_state_dict(saved[at][1])
        torch.set_rng_state(saved[at][2])
        for k in range(at, 40):
            assert other._whole_step.directed.signal.is_on == is_on[k]
            noisy(resumed, other, own_passes)
        assert torch.equal(flat(model.state_dict().values()), flat(resumed.state_dict().values()))
        ours, theirs = flatten(opt.state_dict()), flatten(other.state_dict())
        assert ours.keys() == theirs.keys() and len(ours) > 30
        for key, value in ours.items():
            assert is_same(value, theirs[key]), key


def test_states_of_before_there_was_a_signal_load():
    model, opt = build(kfac2.KFAC)
    noisy(model, opt, False)
    state = copy.deepcopy(opt.state_dict())
    del state["kfac"]["directed"], state["kfac"]["options"]["coarse"], state["kfac"]["options"]["coarse_samples"]
    _, other = build(kfac2.KFAC)
    other.load_state_dict(state)
    assert other.preconditioner.iteration == 1
    model, opt = build()
    for _ in range(3):
        noisy(model, opt, False)
    state = copy.deepcopy(opt.state_dict())
    del state["kfac"]["directed"]
    opt._whole_step.directed.signal.is_on = False
    opt.load_state_dict(state)
    assert opt._whole_step.directed.state() == with_looks(model)._whole_step.directed.state()
    noisy(model, opt, False)


@pytest.mark.parametrize("mine, theirs", [("directions", None), (None, "directions"), ("ones", "directions")])
def test_a_state_of_another_space_is_refused_by_name(mine, theirs):
    model, opt = build(kfac2.KFAC, coarse=theirs)
    noisy(model, opt, False)
    _, other = build(kfac2.KFAC, coarse=mine)
    before = flatten(other.state_dict())
    with pytest.raises(ValueError, match=f"saved with coarse={mine!r}, got {theirs!r}"):
        other.load_state_dict(opt.state_dict())
    assert flatten(other.state_dict()) == before


# -- when it pays -------------------------------------------------------------------------------------------


def shares(opt):
    """Collect φ of each step, as they are measured."""
    seen, signal = [], opt._whole_step.directed.signal
    measured = signal.measured

    def keeping(*arguments):
        count = len(signal._measured)
        measured(*arguments)
        seen.extend(float(numbers[0]) for numbers in signal._measured[count:])

    signal.measured = keeping
    return seen


def quadratic_loss():
    torch.manual_seed(0)
    model = nn.Linear(6, 3).double()
    x = torch.randn(30, 6, dtype=torch.float64)
    y = x @ torch.randn(6, 3, dtype=torch.float64) + torch.randn(30, 3, dtype=torch.float64)
    return model, x, y


def fit(model, opt, x, y):
    opt.zero_grad()
    out = Normal(model(x), 1.0)
    opt.accumulate_fisher(out)
    (-out.log_prob(y)).mean().backward()
    opt.step()


@pytest.mark.parametrize("is_averaged", [False, True])
def test_without_noise_all_of_a_slope_is_there_on_the_next_batch(is_averaged, monkeypatch):
    """A quadratic loss with its exact Fisher; with correlations of steps before the model is not quite exact."""
    if not is_averaged:
        monkeypatch.setattr("kfac2.coarse.directions.KEPT", 0.0)
    model, x, y = quadratic_loss()
    opt = directed(model, fisher="exact", lr=0.2, damping=1.0, coarse_samples=30)
    seen = shares(opt)
    for _ in range(12):
        fit(model, opt, x, y)
        assert opt._whole_step.directed.signal.is_on
    assert len(seen) == 11
    assert seen == pytest.approx([1.0] * 11, abs=0.3 if is_averaged else 1e-6)
    assert 0.7 < opt._whole_step.directed.signal.share < 1.0 + 0.2 * is_averaged


@pytest.mark.parametrize("bound", [None, 1e-3])
def test_without_noise_all_of_the_slope_along_a_look_is_there_after_the_step_of_one_level(bound, monkeypatch):
    """A quadratic loss with its exact Fisher: s₁ = s₀ - DᵀFD₁, where D₁ may be shortened by the measured bound."""
    monkeypatch.setattr("kfac2.coarse.directions.KEPT", 0.0)
    model, x, y = quadratic_loss()
    options = {"fisher": "exact", "lr": 0.2, "damping": 1.0, "coarse_samples": 30, "kl_bound": bound}
    opt = with_looks(model, max_change=None, kl_clip=None, **options)
    opt._whole_step.directed.signal.decide = lambda: None  # so that each other step is a look
    seen = shares(opt)
    for _ in range(8):
        fit(model, opt, x, y)
        assert opt._whole_step.directed.latest is None
        assert bound is None or opt.last_step.bound_factor < 0.9
    assert seen == pytest.approx([1.0] * 4, abs=1e-6)


def test_noise_switches_the_space_off_and_looks_become_rare():
    model, opt = build(weight_decay=0.0)
    signal, wanted, intervals = opt._whole_step.directed.signal, [], []
    for k in range(130):
        is_on, is_due, interval = signal.is_on, k % 3 == 0, signal.interval
        assert opt.needs_fisher == (is_on or is_due or k % interval == 0)
        waits = signal.waits
        if opt.ordinary:
            assert not is_on and not is_due and k % interval and not waits
        wanted.append(signal.wants_step(k))
        intervals.append(interval)
        latest = opt._whole_step.directed.latest
        noisy(model, opt, False)
        took = opt._whole_step.directed.latest is not latest
        # what statistics have shown counts at once, but for an iteration that has looked at too few rows
        assert took == signal.is_on or (took, is_due) == (False, True)
        assert opt.curvature.iteration.kept == []
    off = wanted.index(False)
    assert off < 80
    assert not signal.is_on and set(intervals) >= {20, 40, 80}
    assert sum(wanted[off:]) < 6
    assert opt.preconditioner.schedule.most_damping == math.inf


@pytest.mark.parametrize("cov_every", [4, 1000])  # looks at statistics, and between
@pytest.mark.parametrize("coarse_samples", [40, 130])  # fewer and more than the bound is measured with
def test_where_the_space_is_only_looked_at_training_is_that_of_one_level_to_the_last_bit(cov_every, coarse_samples):
    """The first of all steps is a look, too; labels drawn for looks alone change no other, nor do rows the bound K."""
    options = {"cov_every": cov_every, "inv_every": 8, "burn_in": 2, "kl_bound": 1e-5}
    model, opt = build(with_looks, coarse_samples=coarse_samples, **options)
    twin, other = build(kfac2.KFAC, **options)
    signal = opt._whole_step.directed.signal
    generators, factors = [torch.get_rng_state()] * 2, []
    for k in range(44):
        for i, (one, its) in enumerate(((twin, other), (model, opt))):
            torch.set_rng_state(generators[i])
            noisy(one, its, False, samples=300)
            generators[i] = torch.get_rng_state()
        assert signal.waits == (k in (0, 20, 40)) and not signal.is_on and signal.is_new == (k == 0)
        if signal.waits:
            signal._last[0] = 100.0  # so little of such a slope will be there that the space is left
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(p, q)
        factors.append(other.last_step.bound_factor)
        assert opt.last_step.bound_factor == factors[-1]
    assert opt._whole_step.directed.latest is None and min(factors) < 1


def test_an_iteration_that_measures_a_look_is_not_ordinary():
    model, opt = build(weight_decay=0.0, cov_every=1000, inv_every=1000, burn_in=1)
    noisy(model, opt, False)
    opt._whole_step.directed.signal.is_on = False
    opt._whole_step.directed.signal.share = 0.1
    noisy(model, opt, False)  # measures the last of the steps in the space
    kinds = []
    for _ in range(2, 24):
        kinds.append((opt.preconditioner.iteration, opt.needs_fisher, opt.ordinary))
        if opt.preconditioner.iteration == 21:
            with pytest.raises(RuntimeError, match="counts an ordinary iteration, got iteration 21"):
                opt.replayed()
        noisy(model, opt, False)
    assert kinds == [(k, k == 20, k not in (20, 21)) for k in range(2, 24)]
    assert len(opt._whole_step.directed.signal._measured) == 2
    opt.replayed()
    assert opt.preconditioner.iteration == 25


def taking():
    """A signal of steps that are taken."""
    signal = SignalShare()
    signal.is_new, signal.is_on = False, True
    return signal


def decided(signal, *shares, divergence=0.05):
    """Let steps, or looks, have these shares of their slopes, and decide."""
    for share in shares:
        numbers = (torch.tensor(number, dtype=torch.float64) for number in (2.0, divergence))
        (signal.took if signal.is_on else signal.looked)(*numbers)
        assert signal.waits
        signal.measured(torch.tensor(2.0 * share - divergence, dtype=torch.float64))
        assert not signal.waits
    signal.decide()
    return signal.share, signal.is_on


@pytest.mark.parametrize("rows, least", [(0.0, 0.45), (0.25, 0.55), (0.5, 0.65), (1.0, 0.65)])
def test_the_space_is_left_below_one_bound_and_taken_again_above_another(rows, least):
    signal, mean = taking(), 0.7
    signal.rows = rows
    for shares in [(1.0, 0.8), (0.1, 0.3), *[(0.1,) * 5] * 4]:
        kept = 0.93 ** len(shares)
        mean = kept * mean + (1 - kept) * sum(shares) / len(shares)
        assert decided(signal, *shares) == (pytest.approx(mean), mean > least)
        if not signal.is_on:
            break
    assert not signal.is_on and signal.interval == 20
    for share, interval in ((0.3, 40), (float("nan"), 40), (least + 0.04, 80), (0.2, 80)):
        known = signal.share if share != share else share
        assert decided(signal, share) == (pytest.approx(known), False) and signal.interval == interval
    assert [k for k in range(250) if signal.wants_step(k)] == [0, 80, 160, 240]
    assert decided(signal, least + 0.06) == (pytest.approx(least + 0.05), True) and signal.interval == 80
    decided(signal, 2.0, 2.0)
    assert signal.is_on and signal.interval == 40  # it lasts
    decided(signal, *[0.1] * 30)
    assert not signal.is_on and signal.interval == 40


@pytest.mark.parametrize("share", [0.45, 0.55])
def test_the_first_look_decides_at_once(share):
    signal = SignalShare()
    assert [signal.wants_step(k) for k in range(3)] == [True] * 3
    assert decided(signal, share) == (0.7 if share > 0.5 else share, share > 0.5) and signal.interval == 20
    assert [signal.wants_step(k) for k in (1, 20)] == [share > 0.5, True]


def test_what_was_looked_at_is_measured_beside_the_step_that_was_taken():
    signal = SignalShare()
    signal.looked(torch.tensor(2.0).double(), torch.tensor(0.8).double())
    signal.shortened(0.5)
    signal.measured(torch.tensor(1.0).double())
    assert float(signal._measured[0][0]) == pytest.approx((1.0 + 0.5 * 0.8) / 2.0)
    signal.decide()
    assert signal.is_on and signal.length == 1.0


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_a_look_whose_step_is_skipped_on_the_device_says_nothing(found):
    signal, one = SignalShare(), torch.ones((), dtype=torch.float64)
    signal.looked(one, one, torch.tensor([found]))
    signal.measured(one, torch.tensor([0.0]))
    signal.decide()
    assert signal.is_new == (found == 1.0)


def test_steps_that_come_to_nothing_become_shorter_and_then_it_is_the_space_that_is_left():
    signal = taking()
    for k in range(1, 8):
        assert decided(signal, 0.0, divergence=1.0) == (0.7, True)
        assert signal.length == pytest.approx(0.7**k)
    while signal.is_on:
        assert signal.length < 0.1
        decided(signal, 0.0, divergence=1.0)
    assert signal.length == 1.0
    signal = taking()
    signal.length = 0.5
    decided(signal, 0.8, divergence=1.0)
    assert signal.length == pytest.approx(0.575) and signal.share > 0.7
    for _ in range(9):
        decided(signal, 0.8, divergence=1.0)
    assert signal.length == 1.0


def test_steps_that_are_confirmed_may_become_longer_and_at_once_as_long_as_the_model_says():
    signal = taking()
    decided(signal, 0.95, 0.95, divergence=1.0)
    assert signal.length == pytest.approx(1.2**2)
    for _ in range(8):
        decided(signal, 0.95, 0.95, divergence=1.0)
    assert signal.length == 10.0
    decided(signal, 0.85, divergence=1.0)
    assert signal.length == 10.0
    decided(signal, 0.0, divergence=1.0)
    assert signal.length == pytest.approx(0.7)


def test_the_bound_of_a_step_follows_the_length_which_shortens_steps_below_one():
    lengths, divergences, free = (0.1, 1.0, 3.0), [], []
    for length in (*lengths, 1.0):
        model, x, y = mlp()
        opt = directed(model, kl_bound=None if len(free) == 3 else 1e-6)
        for _ in range(2):
            iterate(model, opt, x, y)
        signal = opt._whole_step.directed.signal
        signal.length = length
        iterate(model, opt, x, y)
        divergences.append(float(signal._last[1]))
        free.append(opt._whole_step.directed.latest.fine)
    for length, divergence in zip(lengths, divergences, strict=False):
        assert divergence == pytest.approx(length**2 * 1e-6 / 5)
    assert divergences[-1] > 1e-5  # so that it is the bound that acts above


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_look_is_along_the_last_update_only_where_that_is_one(momentum):
    """Without momentum one level's steps are not kept, and the buffer is that of a step long ago."""
    model, x, y = mlp()
    opt = directed(model, momentum=momentum, damping=0.008)
    for _ in range(3):
        iterate(model, opt, x, y)
    latest = opt._whole_step.directed.latest
    assert latest.last.all()
    opt._whole_step.directed.signal.is_on, opt._whole_step.directed.signal.share = False, 0.1
    seen = []
    solved = opt._whole_step.directed._solved

    def keeping(*arguments):
        seen.append(solved(*arguments))
        return seen[-1]

    opt._whole_step.directed._solved = keeping
    opt._whole_step.directed.decide = lambda: None
    for k in range(3, 21):
        assert (opt.preconditioner.iteration, opt._whole_step.directed.wants_step(k)) == (k, k == 20)
        iterate(model, opt, x, y)
    assert opt._whole_step.directed.latest is latest and len(seen) == 1
    fine, last = seen[0][1].chunk(2)
    assert fine.all() and bool(last.any()) == (momentum > 0)


def test_the_signal_knows_which_part_of_a_batch_is_measured():
    for samples, own_passes, rows in ((2, False, 2 / 24), (None, False, 1.0), (6, True, 6 / 24)):
        model, x, y = mlp()
        opt = directed(model, coarse_samples=samples)
        for _ in range(3):
            if own_passes:
                opt.zero_grad()
                opt.accumulate_fisher(lambda part, m=model, i=x: Categorical(logits=m(i[part])), samples=len(x))
                F.cross_entropy(model(x), y).backward()
                opt.step()
            else:
                iterate(model, opt, x, y)
            assert opt._whole_step.directed.signal.rows == pytest.approx(rows)
        assert opt._whole_step.directed.state()["signal"]["rows"] == opt._whole_step.directed.signal.rows


def test_the_space_at_its_bounds():
    signal = taking()
    signal.share, signal.rows = 0.47, 0.0
    assert decided(signal, 0.47) == (pytest.approx(0.47), True)
    signal.is_on = False
    assert decided(signal, 0.47) == (pytest.approx(0.47), False)  # in between it stays as it is
    assert decided(signal) == (pytest.approx(0.47), False)  # nothing was measured
    signal.measured(torch.ones(()))  # along nothing
    signal.looked(torch.ones(()), torch.ones(()))
    signal.measured(None)  # other layers
    assert decided(signal) == (pytest.approx(0.47), False)
    assert [signal.wants_step(k) for k in (0, 1, 20, 39, 40, 80)] == [True, False, False, False, True, True]


# -- layers that come and go --------------------------------------------------------------------------------


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(4, 3)
        self.double()

    def forward(self, x, both=True):
        h = torch.tanh(self.a(x))
        return self.head(h + torch.tanh(self.b(x)) if both else h)


def branched(opt, model, x, y, both):
    opt.zero_grad()
    out = model(x, both)
    opt.accumulate_fisher(Categorical(logits=out))
    F.cross_entropy(out, y).backward()
    opt.step()


def test_a_layer_that_is_not_used_stays_as_it_is():
    torch.manual_seed(0)
    model, x, y = Branches(), torch.randn(16, 5).double(), torch.arange(16) % 3
    opt = directed(model)
    for _ in range(3):
        branched(opt, model, x, y, True)
    own = [*model.b.parameters()]
    before = [(p.detach().clone(), opt.state[p]["momentum_buffer"].clone()) for p in own]
    head = model.head.weight.detach().clone()
    for _ in range(4):
        branched(opt, model, x, y, False)
        assert opt._whole_step.directed.latest.names == ("a", "head")
    for (old, d), p in zip(before, own, strict=True):
        assert torch.equal(p, old) and torch.equal(opt.state[p]["momentum_buffer"], d)
    assert not torch.equal(model.head.weight, head)
    branched(opt, model, x, y, True)
    assert opt._whole_step.directed.latest.names == ("a", "b", "head")
    assert all(not torch.equal(p, old) for (old, _), p in zip(before, own, strict=True))


def test_a_layer_that_leaves_and_one_that_is_frozen():
    torch.manual_seed(0)
    model, x, y = Branches(), torch.randn(16, 5).double(), torch.arange(16) % 3
    opt = directed(model)
    for _ in range(3):
        branched(opt, model, x, y, True)
    curvature = opt.curvature
    with pytest.warns(RuntimeWarning, match="b leaves K-FAC"):
        curvature.drop(curvature.layout.layers[1], "it is dropped by a test")
    for _ in range(3):
        before = model.b.weight.detach().clone()
        branched(opt, model, x, y, True)
        assert opt._whole_step.directed.latest.names == ("a", "head") and opt._whole_step.directed.part(1000) == 64
        assert not torch.equal(model.b.weight, before)  # by AdamW
    with pytest.warns(RuntimeWarning, match="a leaves K-FAC"):
        for p in model.a.parameters():
            p.requires_grad_(False)
        before = model.a.weight.detach().clone()
        for _ in range(3):
            branched(opt, model, x, y, True)
    assert opt._whole_step.directed.latest.names == ("head",) and torch.equal(model.a.weight, before)


def test_a_bias_that_is_frozen_is_left_alone():
    model, x, y = mlp()
    model[0].bias.requires_grad_(False)
    opt = directed(model)
    before = model[0].bias.detach().clone()
    losses = [iterate(model, opt, x, y) for _ in range(8)]
    assert torch.equal(model[0].bias, before) and losses[-1] < losses[0]


def test_a_shared_layer_trains():
    task = task_of("shared")
    opt = directed(task.model)
    losses = []
    for _ in range(12):
        opt.zero_grad()
        out = task.model(task.x)
        opt.accumulate_fisher(Categorical(logits=out))
        loss = F.cross_entropy(out, task.target)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert opt._whole_step.directed.latest.names == ("inner", "head", "conv") and min(losses) < 0.9 * losses[0]


class Experts(nn.Module):
    """The second layer sees some of the samples only, in another order."""

    def __init__(self):
        super().__init__()
        self.inner, self.expert, self.head = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.double()

    def forward(self, x):
        h = torch.tanh(self.inner(x))
        chosen = torch.arange(len(x) - 1, 4, -1)
        return self.head(h.index_add(0, chosen, torch.tanh(self.expert(h[chosen]))))


@pytest.mark.filterwarnings("ignore:kfac2.*do not belong")
def test_rows_that_fit_no_samples_count_for_themselves():
    torch.manual_seed(0)
    task = models.Task(Experts(), torch.randn(12, 5, dtype=torch.float64), torch.arange(12) % 3)
    layers, passed = sampled_pass(task)
    v = {id(p): torch.randn_like(p) for p in task.model.parameters()}
    s, cases = derivatives([kept_of(passed, 12)], layers, Matrices(layers, 1).of((v,)))
    assert s.shape == (12 + 7, 1, 3) and cases == 12
    J, _ = scores(task, [p for layer in layers for p in parts_of(layer)], 12)
    dense = J @ as_columns(layers, v)
    wanted = dense.T @ dense / 12
    wanted[1, [0, 2]] = wanted[[0, 2], 1] = 0.0  # nobody knows
    assert_equal((s[:, 0].T @ s[:, 0]) / cases, wanted, 1e-12)
    opt = directed(task.model)
    losses = [iterate(task.model, opt, task.x, task.target) for _ in range(12)]
    assert losses[-1] < 0.9 * losses[0] and opt._whole_step.directed.latest.names == ("inner", "expert", "head")


def test_statistics_taken_by_hand_are_summed_up_after_an_iteration_of_rows():
    model, x, y = mlp()
    opt = directed(model)
    for _ in range(3):
        iterate(model, opt, x, y)
    before = opt.curvature.averages.updates
    opt.curvature.accumulate(Categorical(logits=model(x)))
    assert opt.curvature.averages.updates == before + 1

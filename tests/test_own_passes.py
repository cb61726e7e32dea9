"""Statistics from a forward pass of their own: a function in place of the distribution."""

import warnings

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from compare import assert_equal
from inside import directed
from torch.distributions import Categorical, Normal
from torch.utils.checkpoint import checkpoint

import kfac2
from kfac2.capture import _nodes


class Net(nn.Module):
    """Batch norm with a momentum and without one, and a count of the samples of each forward pass."""

    def __init__(self, momentum=0.1, is_checkpointed=False):
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=momentum), nn.Linear(6, 3)
        self.is_checkpointed, self.seen = is_checkpointed, []
        self.double()

    def forward(self, x):
        self.seen.append(len(x))
        h = self.first(x)
        h = checkpoint(self.norm, h, use_reentrant=False) if self.is_checkpointed else self.norm(h)
        return self.head(torch.tanh(h))


def data(samples=40):
    return torch.randn(samples, 4, dtype=torch.float64), torch.arange(samples) % 3


def plain(momentum=0.1):
    torch.manual_seed(0)
    return Net(momentum)


def iterate(model, opt, x, y, predict=None):
    """One iteration whose statistics have a forward pass of their own; return the slices that it was asked for."""
    parts = []

    def asked(part):
        parts.append(part)
        return Categorical(logits=model(x[part]))

    opt.zero_grad()
    out = model(x)
    opt.accumulate_fisher(predict or asked, samples=len(x))
    F.cross_entropy(out, y).backward()
    opt.step()
    return parts


def iterate_in_halves(model, opt, x, y):
    """The same with two micro-batches of 16 and 24 samples."""
    opt.zero_grad()
    for half in (slice(0, 16), slice(16, 40)):
        x_half = x[half]
        opt.accumulate_fisher(lambda part, x=x_half: Categorical(logits=model(x[part])), samples=len(x_half))
        F.cross_entropy(model(x_half), y[half]).mul(len(x_half) / 40).backward()
    opt.step()


def running(model):
    return {key: value.clone() for key, value in model.norm.named_buffers()}


# -- which samples, and when --------------------------------------------------------------------------------


@pytest.mark.parametrize("samples, coarse_samples, part", [
    (80, None, slice(0, 64, 1)), (41, 8, slice(0, 40, 5)), (40, 7, slice(0, 35, 5)), (40, 1, slice(0, 40, 40)),
    (40, 100, slice(0, 40, 1)), (5, None, slice(0, 5, 1)),
])  # fmt: skip
def test_it_is_asked_for_evenly_spaced_samples(samples, coarse_samples, part):
    model, (x, y) = plain(), data(samples)
    model.norm = nn.Identity()
    opt = directed(model, coarse_samples=coarse_samples)
    assert iterate(model, opt, x, y) == [part]
    assert model.seen == [samples, len(range(*part.indices(samples)))]
    assert iterate(model, opt, x, y) == [part]  # rows only


def test_one_level_takes_all_samples_and_asks_only_where_statistics_are_due():
    model, (x, y) = plain(), data()
    opt = kfac2.KFAC(model, cov_every=3)
    for k in range(8):
        assert opt.needs_fisher == (k % 3 == 0)
        assert iterate(model, opt, x, y) == [slice(0, 40, 1)] * (k % 3 == 0)
    preconditioner = kfac2.Preconditioner(plain(), kl_clip=None, cov_every=2)
    parts = []
    for _ in range(4):
        preconditioner.accumulate_fisher(
            lambda part: parts.append(part) or Categorical(logits=preconditioner.curvature.model(x[part])), samples=40
        )
        F.cross_entropy(preconditioner.curvature.model(x), y).backward()
        preconditioner.step()
    assert parts == [slice(0, 40, 1)] * 2


def test_it_has_grad_enabled_whatever_is_so_outside():
    model, (x, y) = plain(), data()
    opt = kfac2.KFAC(model)
    seen = []

    def predict(part):
        seen.append(torch.is_grad_enabled())
        return Categorical(logits=model(x[part]))

    with torch.no_grad():
        opt.accumulate_fisher(predict, samples=40)
        assert not torch.is_grad_enabled()
    F.cross_entropy(model(x), y).backward()
    opt.step()
    assert seen == [True] and opt.factors("first")[0].shape == (5, 5)


# -- what it leaves as it was -------------------------------------------------------------------------------


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_follow_the_training_pass_alone(momentum, is_checkpointed):
    torch.manual_seed(0)
    model, (x, y) = Net(momentum, is_checkpointed), data()
    torch.manual_seed(0)
    twin = Net(momentum, is_checkpointed)
    opt = directed(model, coarse_samples=10)
    before = running(model)
    opt.accumulate_fisher(lambda part: Categorical(logits=model(x[part])), samples=40)
    assert model.seen == [10]
    for key, value in running(model).items():
        assert torch.equal(value, before[key])
    assert model.norm.track_running_stats and model.training
    F.cross_entropy(model(x), y).backward()
    opt.step()
    F.cross_entropy(twin(x), y).backward()
    for key, value in running(model).items():
        assert torch.equal(value, running(twin)[key]) and not torch.equal(value, before[key])


def test_in_eval_mode_norms_are_as_in_eval_mode():
    model, (x, y) = plain(), data()
    opt = kfac2.KFAC(model)
    model(3 * x + 1)
    model.eval()
    outputs = []

    def predict(part):
        outputs.append(model(x[part]))
        return Categorical(logits=outputs[0])

    opt.accumulate_fisher(predict, samples=40)
    out = model(x)
    assert torch.equal(outputs[0], out) and not model.training and model.norm.track_running_stats
    F.cross_entropy(out, y).backward()
    opt.step()


def test_the_training_pass_is_not_looked_at():
    model, (x, y) = plain(), data()
    opt = directed(model, coarse_samples=16 * 2)
    captures = opt.curvature.collector.captures
    for k in range(8):
        out = model(x)
        assert (captures.count > 0) == (k == 0)  # nobody has said yet that there would be a function
        if k:
            nodes = [*_nodes(out.grad_fn)]
            assert len(nodes) > 6 and not any(node.metadata for node in nodes)
            assert out._backward_hooks is None
        opt.zero_grad()
        opt.accumulate_fisher(lambda part: Categorical(logits=model(x[part])), samples=40)
        model(x[:3])
        F.cross_entropy(out, y).backward()
        opt.step()
        assert captures.count == 0 and not opt.curvature.iteration.pending


# -- the statistics -----------------------------------------------------------------------------------------


def statistics(opt):
    return [factor for name in opt.layers for factor in opt.factors(name)]


@pytest.mark.parametrize("options", [
    {}, {"levels": 2}, {"inverse": "ekfac"}, {"samples": 3}, {"fisher": "exact"},
    {"coarse": "directions", "coarse_samples": 20},
])  # fmt: skip
def test_they_are_those_of_a_distribution_of_the_same_samples(options):
    (model, twin), (x, y) = (plain(), plain()), data()
    opt, other = kfac2.KFAC(model, **options), kfac2.KFAC(twin, **options)
    part = slice(0, 40, 2) if "coarse" in options else slice(None)
    for k in range(6):
        torch.manual_seed(k)
        iterate(model, opt, x, y)
        other.zero_grad()
        torch.manual_seed(k)
        other.accumulate_fisher(Categorical(logits=twin(x[part])))
        F.cross_entropy(twin(x), y).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that its loss has another forward pass
            other.step()
        for ours, theirs in zip(statistics(opt), statistics(other), strict=True):
            assert_equal(ours, theirs, 1e-12)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert_equal(p, q, 1e-9)


def test_several_calls_add_up():
    (model, twin), (x, y) = (plain(), plain()), data()
    model.norm = twin.norm = nn.Identity()
    opt, other = (kfac2.KFAC(net, fisher="exact") for net in (model, twin))
    iterate_in_halves(model, opt, x, y)
    iterate(twin, other, x, y)
    for ours, theirs in zip(statistics(opt), statistics(other), strict=True):
        assert_equal(ours, theirs, 1e-12)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_equal(p, q, 1e-9)


def test_micro_batches_have_their_rows_together_in_the_space_of_directions():
    (model, twin), (x, y) = (plain(), plain()), data()
    model.norm = twin.norm = nn.Identity()
    opt, other = (directed(net, fisher="exact", coarse_samples=40) for net in (model, twin))
    for _ in range(7):
        iterate_in_halves(model, opt, x, y)
        iterate(twin, other, x, y)
        assert_equal(opt._whole_step.directed.latest.fine, other._whole_step.directed.latest.fine, 1e-8)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert_equal(p, q, 1e-8)


def test_they_count_although_a_batch_was_thrown_away():
    """What a function has brought counts, of a distribution only what has gone backward."""
    (model, twin, net), (x, y) = (plain(), plain(), plain()), data()
    for one in (model, twin, net):
        one.norm = nn.Identity()  # which the exact Fisher draws signs for
    opt, other = (kfac2.KFAC(one, fisher="exact") for one in (model, twin))
    F.cross_entropy(model(10 * x), y).backward()  # thrown away
    opt.accumulate_fisher(Categorical(logits=model(10 * x)))
    opt.zero_grad()
    iterate(model, opt, x, y)
    iterate(twin, other, x, y)
    for ours, theirs in zip(statistics(opt), statistics(other), strict=True):
        assert_equal(ours, theirs, 1e-12)
    both = kfac2.KFAC(net, fisher="exact")
    both.accumulate_fisher(lambda part: Categorical(logits=net(10 * x[part])), samples=40)
    iterate(net, both, x, y)
    A, _ = both.factors("first")
    rows = torch.cat([torch.cat([scale * x, torch.ones(40, 1).double()], 1) for scale in (1, 10)])
    assert_equal(A, rows.T @ rows / 80, 1e-12)


def test_a_mask_is_of_all_samples():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, mask = torch.randn(12, 5, 4, dtype=torch.float64), torch.rand(12, 5) > 0.4
    opt = directed(model, coarse_samples=4)
    opt.accumulate_fisher(lambda part: Categorical(logits=model(x[part])), mask=mask, samples=12)
    model(x).logsumexp(2).mean().backward()
    opt.step()
    rows = x[::3][mask[::3]]
    rows = torch.cat([rows, torch.ones(len(rows), 1).double()], 1)
    assert_equal(opt.factors("0")[0], rows.T @ rows / 20, 1e-12)
    with pytest.raises(ValueError, match=r"mask must have the shape .N, S. of the tokens"):
        opt.accumulate_fisher(lambda part: Categorical(logits=model(x[part])), mask=mask[:, :3], samples=12)


# -- what goes wrong ----------------------------------------------------------------------------------------


def test_a_function_that_raises_leaves_everything_usable():
    (model, twin), (x, y) = (plain(), plain()), data()
    opt, other = (directed(net, coarse_samples=8) for net in (model, twin))
    for net, its in ((model, opt), (twin, other)):
        torch.manual_seed(1)
        iterate(net, its, x, y)
    before = running(model)

    def fails(part):
        model(x[part])
        raise KeyError("the function's own")

    with pytest.raises(KeyError, match="the function's own"):
        opt.accumulate_fisher(fails, samples=40)
    for key, value in running(model).items():
        assert torch.equal(value, before[key])
    assert model.norm.track_running_stats
    for net, its in ((model, opt), (twin, other)):
        torch.manual_seed(2)
        for _ in range(6):
            iterate(net, its, x, y)
    for p, q in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.filterwarnings("ignore:kfac2")
@pytest.mark.parametrize("k", [0, 2, 5])
def test_a_step_without_the_function_goes_on(k):
    """Where it has raised and the step is taken all the same: older statistics, and a step of one level."""
    model, (x, y) = plain(), data()
    opt = directed(model, coarse_samples=32)
    for _ in range(k):
        iterate(model, opt, x, y)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(ZeroDivisionError):
        opt.accumulate_fisher(lambda part: 1 / 0, samples=40)
    if k == 0:
        with pytest.raises(RuntimeError, match="there are no statistics at all: call accumulate_fisher"):
            opt.step()
    else:
        opt.step()
    before = model.head.weight.detach().clone()
    assert iterate(model, opt, x, y) == [slice(0, 32, 1)]
    assert not torch.equal(model.head.weight, before)


@pytest.mark.parametrize("in_the_same_iteration", [False, True])
def test_a_distribution_after_a_function_works_from_the_next_forward_pass_on(in_the_same_iteration):
    model, (x, y) = plain(), data()
    opt = directed(model, coarse_samples=32)
    iterate(model, opt, x, y)
    out = model(x)
    with pytest.raises(
        ValueError, match=r"got one whose graph holds no use of .* The last call was given a function"
    ) as e:
        opt.accumulate_fisher(Categorical(logits=out))
    assert "those from now on are" in str(e.value)
    if not in_the_same_iteration:
        F.cross_entropy(out, y).backward()
        opt.step()
    for _ in range(6):
        opt.zero_grad()
        out = model(x)
        opt.accumulate_fisher(Categorical(logits=out))
        F.cross_entropy(out, y).backward()
        opt.step()
    assert opt._whole_step.directed.latest.names == ("first", "head")
    assert iterate(model, opt, x, y) == [slice(0, 32, 1)]  # and back again


def test_refusals():
    model, (x, y) = plain(), data()
    opt = kfac2.KFAC(model)
    out = model(x)
    with pytest.raises(TypeError, match="samples must be left out with a distribution, got 40"):
        opt.accumulate_fisher(Categorical(logits=out), samples=40)
    calls = []
    for samples, error in ((None, TypeError), (2.0, TypeError), (True, TypeError), (0, ValueError), (-3, ValueError)):
        with pytest.raises(error, match=f"samples must be an int of at least 1 with a function, got {samples}"):
            opt.accumulate_fisher(calls.append, samples=samples)
    with pytest.raises(TypeError, match=r"distribution must be a torch.distributions.Distribution.* got NoneType"):
        opt.accumulate_fisher(calls.append, samples=40)
    assert calls == [slice(0, 40, 1)] and not opt.curvature.iteration.pending
    with pytest.raises(ValueError, match="distribution must carry the model's graph"):
        opt.accumulate_fisher(lambda part: Categorical(logits=model(x[part]).detach()), samples=40)
    assert not opt.curvature.iteration.pending
    iterate(model, opt, x, y)
    with pytest.raises(TypeError, match="samples must be left out"):  # in an iteration that needs none, too
        opt.accumulate_fisher(Categorical(logits=out), samples=40)


def test_what_is_not_finite_skips_the_step_or_leaves_one_of_one_level():
    model, (x, y) = plain(), data()
    opt = directed(model, coarse_samples=32)

    def bad(part):
        return Normal(model(x[part]) * float("nan"), 1.0, validate_args=False)

    iterate(model, opt, x, y)
    for _ in range(4):
        before = model.head.weight.detach().clone()
        iterate(model, opt, x, y, bad)
        assert not torch.equal(model.head.weight, before) and model.head.weight.isfinite().all()
    before = model.head.weight.detach().clone()
    with pytest.warns(
        RuntimeWarning, match="a NaN or an infinity in loc of the distribution at iteration 5; the step is"
    ):
        iterate(model, opt, x, y, bad)
    assert torch.equal(model.head.weight, before)
    iterate(model, opt, x, y)
    assert not torch.equal(model.head.weight, before)

"""Processes that are driven apart on purpose: they decide alike, or all of them raise the same error."""

import copy
import warnings

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from compare import assert_equal
from test_elsewhere import net
from together import assert_replicas_are_equal, average_gradients, rank, size, spawn
from torch import distributed
from torch.distributions import Categorical

import kfac2
from kfac2.processes.group import Group

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(8, 6, generator=G), torch.arange(8) % 3
SHARES = "all", 0.5  # of two processes the second is "gradients"


def part():
    return slice(rank() * 8 // size(), (rank() + 1) * 8 // size())


def step(m, opt, distribution=lambda out: Categorical(logits=out), x=None, calls=True, **how):
    opt.zero_grad()
    out = m(X[part()] if x is None else x)
    if calls and opt.needs_fisher:
        opt.accumulate_fisher(distribution(out))
    F.cross_entropy(out, Y[part()]).backward()
    average_gradients(m)
    return opt.step(**how)


def built(m=None, **settings):
    m = net() if m is None else m
    return m, kfac2.KFAC(m, **settings)


def weights(m):
    return [p.detach().clone() for p in m.parameters()]


def raises(error, match, call):
    """Every rank has to raise it."""
    with pytest.raises(error, match=match):
        call()


class Routed(nn.Module):
    """What one rank does differently: which layers it uses, and how."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 3)
        self.uses_b = self.is_seen = True

    def forward(self, x):
        h = self.a(x)
        if self.uses_b:
            h = h + self.b(x)
        if not self.is_seen:  # a use of a's weight that is not captured
            h = h + torch.einsum("ni,oi->no", x, self.a.weight)
        return self.head(torch.tanh(h))


# -- what is decided alike --------------------------------------------------------------------------------------


def statistics_that_are_not_finite_on_one_rank():
    m, opt = built()
    step(m, opt)
    before, bad = weights(m), float("nan") if rank() == 1 else 1.0
    for _ in range(4):
        step(m, opt)
    before = weights(m)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(m, opt, lambda out: Categorical(logits=out * bad, validate_args=False))
    told = [str(one.message) for one in caught if "is skipped" in str(one.message)]
    assert len(told) == 1 and ("another process" in told[0]) == (rank() == 0), told
    assert all(torch.equal(p, old) for p, old in zip(m.parameters(), before, strict=True))
    for _ in range(6):
        step(m, opt)
    assert opt.curvature.averages.updates == 2
    assert_replicas_are_equal(m)


def gradients_that_are_not_finite_on_one_rank():
    m, opt = built()
    step(m, opt)
    before = weights(m)
    with warnings.catch_warnings(record=True):
        step(m, opt, x=X[part()] * (float("inf") if rank() == 1 else 1.0))
    assert all(torch.equal(p, old) for p, old in zip(m.parameters(), before, strict=True))
    step(m, opt)
    assert_replicas_are_equal(m)


def a_layer_that_is_used_on_one_rank():
    for settings in ({}, {"levels": 2}, {"coarse": "directions"}, {"inverse": "ekfac"}, {"fisher": "empirical"}):
        m, opt = built(Routed(), **settings)
        m.uses_b = rank() == 1
        for _ in range(7):
            step(m, opt)
        assert opt.layers == ["a", "b", "head"] and all(opt.curvature.averages.seen)
        assert_replicas_are_equal(m)
    m, opt = built(Routed(), coarse="directions")  # none has rows of it
    m.uses_b = False
    for _ in range(7):
        step(m, opt)
    m.uses_b = rank() == 0
    for _ in range(7):
        step(m, opt)
    assert all(opt.curvature.averages.seen)
    assert_replicas_are_equal(m)


def a_layer_that_leaves_on_one_rank():
    for settings in ({}, {"levels": 2}, {"coarse": "directions"}, {"inverse": "ekfac"}, {"fisher": "empirical"}):
        for begins in (0, 5):
            m, opt = built(Routed(), check_every=1, **settings)
            for number in range(12):
                m.is_seen = rank() == 1 or number < begins
                step(m, opt)
            assert opt.layers == ["b", "head"] and set(opt.curvature.handled.dropped) == {"a"}
            assert opt.curvature.averages.updates == 3
            assert_replicas_are_equal(m)


def rows_that_fit_no_samples_on_one_rank():
    class Odd(Routed):
        def forward(self, x):
            flipped = rank() == 1
            h = self.a(x) + (self.b(x.repeat(3, 1))[: len(x)] if flipped else self.b(x))
            return self.head(torch.tanh(h))

    m, opt = built(Odd(), levels=2)
    for _ in range(6):
        step(m, opt)
    assert opt.curvature.averages.in_coarse == (True, False, True)
    assert_replicas_are_equal(m)


def a_call_that_one_rank_leaves_out():
    m, opt = built()
    for number in range(11):
        step(m, opt, calls=rank() == 0 or number != 5)
    assert opt.curvature.averages.updates == 3
    assert_replicas_are_equal(m)
    m, opt = built()
    raises(RuntimeError, "there are no statistics at all", lambda: step(m, opt, calls=False))
    step(m, opt)
    assert_replicas_are_equal(m)


def losses_of_a_closure():
    def follow(bad):
        m, opt = built()
        for number in range(8):
            is_bad = rank() == 1 and number == 6

            def closure(factor=bad if is_bad else 1):
                opt.zero_grad()
                out = m(X[part()])
                opt.accumulate_fisher(Categorical(logits=out))
                loss = F.cross_entropy(out, Y[part()])
                loss.backward()
                average_gradients(m)
                return loss.item() * factor

            opt.step(closure)
        assert_replicas_are_equal(m)
        return opt.last_step.rise_factor

    assert follow(1.0) == 1 > follow(1e6)


# -- what is refused by all -------------------------------------------------------------------------------------


def a_setting_that_differs():
    m, opt = built()
    step(m, opt)
    if rank() == 1:
        opt.options.cov_every = 2
    for _ in range(4):
        step(m, opt)  # no rank waits for another
    raises(RuntimeError, "cov_every is 5 on rank 0 and 2 on rank 1", lambda: step(m, opt))
    m, opt = built(damping=lambda k: 0.1 if rank() == 0 or k < 5 else 0.2)
    for _ in range(5):
        step(m, opt)
    raises(RuntimeError, "damping is 0.1 on rank 0 and 0.2 on rank 1", lambda: step(m, opt))


def rates_and_parameters_that_differ():
    m, opt = built()
    step(m, opt)
    opt.param_groups[0]["lr"] = 0.5 + rank() / 4
    for _ in range(4):
        step(m, opt)
    raises(RuntimeError, "lr of group 0 is 0.5 on rank 0 and 0.75 on rank 1", lambda: step(m, opt))


def gradients_that_nobody_averages():
    m, opt = built()

    def alone():
        opt.zero_grad()
        out = m(X[part()])
        opt.accumulate_fisher(Categorical(logits=out))
        F.cross_entropy(out, Y[part()]).backward()
        opt.step()

    for _ in range(5):
        alone()
    raises(RuntimeError, "checksum of the parameters is .* averaged over them, as Dis", alone)


def what_only_one_rank_does():
    m, opt = built()
    for _ in range(3):
        step(m, opt)
    if rank() == 1:
        opt.close()
    for _ in range(2):
        step(m, opt)
    raises(RuntimeError, "what they meet for is 'statistics' on rank 0 and 'nothing' on rank 1", lambda: step(m, opt))

    m, opt = built()
    step(m, opt)
    opt.zero_grad()
    F.cross_entropy(m(X[part()]), Y[part()]).backward()
    average_gradients(m)
    if rank() == 0:
        raises(RuntimeError, "'closure' on rank 0 and 'statistics' on rank 1", lambda: opt.step(lambda: 1.0))
    else:
        for _ in range(4):
            opt.step()
        opt.zero_grad()
        out = m(X[part()])
        opt.accumulate_fisher(Categorical(logits=out))
        F.cross_entropy(out, Y[part()]).backward()
        raises(RuntimeError, "'closure' on rank 0 and 'statistics' on rank 1", opt.step)


def what_is_built_differently():
    other = net()
    if rank() == 1:
        with torch.no_grad():
            other[0].weight[0, 0] += 1e-7
    raises(ValueError, "checksum of the parameters is .* made alike by DistributedData", lambda: kfac2.KFAC(other))
    raises(ValueError, "cov_every is 5 on rank 0 and 6 on rank 1", lambda: kfac2.KFAC(net(), cov_every=5 + rank()))
    raises(ValueError, "lr of group 0 is 1.0 on rank 0 and 2.0 on rank 1", lambda: kfac2.KFAC(net(), lr=1.0 + rank()))
    raises(ValueError, "the list of layers is", lambda: kfac2.KFAC(net(), skip=["0"] if rank() else []))
    m = net()
    own = [*m.parameters()][rank() :]
    raises(ValueError, "the list of parameters' shapes is", lambda: kfac2.KFAC(m, params=own))
    raises(ValueError, "share must be one of 'auto', 'all'", lambda: kfac2.KFAC(m, share="some"))
    for part in (0, 1.5, float("nan")):
        raises(ValueError, "or a number above 0 and at most 1: the part", lambda part=part: kfac2.KFAC(m, share=part))
    raises(TypeError, "share must be one of .* got True of type bool", lambda: kfac2.KFAC(m, share=True))
    raises(ValueError, "groups of one size, one of 0.5, 1, got 0.3", lambda: kfac2.KFAC(m, share=0.3))
    raises(
        ValueError, "share is 'all' on rank 0 and 'gradients' on rank 1", lambda: kfac2.KFAC(m, share=SHARES[rank()])
    )
    ekfac = {"share": "gradients", "inverse": "ekfac"}
    raises(ValueError, "share must be 'all', 'inverses' or 1 with inverse='ekfac'", lambda: kfac2.KFAC(m, **ekfac))
    raises(ValueError, "process_group must be 'world', a Proc.* got 'all'", lambda: kfac2.KFAC(m, process_group="all"))
    raises(TypeError, "process_group must be .* got int", lambda: kfac2.KFAC(m, process_group=1))
    static = nn.parallel.DistributedDataParallel(net(), static_graph=True)
    raises(ValueError, "static_graph=False where", lambda: kfac2.KFAC(static))


def groups():
    kfac2.KFAC(net() if rank() else Routed(), process_group=None)  # each by itself: nothing is compared
    one = [distributed.new_group([r]) for r in range(size())][rank()]
    m, opt = built(process_group=one)
    assert opt.curvature.solvers.processes.is_alone
    raises(ValueError, "must have this process in it", lambda: _of_another())
    raises(
        ValueError, "process_group must have a backend for cuda, where the layers are, got .*gloo.*'cuda:nccl'",
        lambda: Group(distributed.group.WORLD, torch.device("cuda")),
    )  # fmt: skip
    both = distributed.new_group([0, 1])
    m, opt = built(process_group=both)
    step(m, opt)
    distributed.destroy_process_group(both)
    for _ in range(4):
        step(m, opt)
    before = weights(m)
    raises(RuntimeError, "process_group must stay .* destroyed", lambda: step(m, opt))
    assert all(torch.equal(p, old) for p, old in zip(m.parameters(), before, strict=True))


def _of_another():
    groups = [distributed.new_group([0]), distributed.new_group([1])]
    kfac2.KFAC(net(), process_group=groups[1 - rank()])


# -- labels, states ---------------------------------------------------------------------------------------------


def labels_of_the_ranks():
    torch.manual_seed(7 + 10 * rank())
    drawn = []

    class Seen(Categorical):
        def sample(self, shape=()):
            drawn.append(super().sample(shape))
            return drawn[-1]

    m, opt = built(samples=2, cov_every=1)
    before = torch.get_rng_state()
    out = m(X.repeat(20, 1))
    opt.accumulate_fisher(Seen(logits=out))
    assert torch.equal(torch.get_rng_state(), before)  # dropout, say, draws what it would have
    F.cross_entropy(out, Y.repeat(20)).backward()
    average_gradients(m)
    opt.step()
    opt.accumulate_fisher(Seen(logits=m(X.repeat(20, 1))))
    opt.curvature.iteration.discard()
    mine = torch.stack(drawn)
    assert len({tuple(labels.tolist()) for labels in drawn}) == 4  # each draw is another
    both = [torch.empty_like(mine) for _ in range(size())]
    distributed.all_gather(both, mine)
    assert not any(torch.equal(a, b) for a, b in zip(*both, strict=True))
    again = opt.state_dict()
    m2, opt2 = built(copy.deepcopy(m), samples=2, cov_every=1)
    opt2.load_state_dict(again)
    opt2.accumulate_fisher(Seen(logits=m2(X.repeat(20, 1))))
    assert torch.equal(drawn[-1], drawn[-3]) and torch.equal(drawn[-2], drawn[-4])


def curvatures_without_a_schedule():
    torch.manual_seed(0)
    m = net().double()
    whole, shared = kfac2.Curvature(m, process_group=None, levels=2), kfac2.Curvature(copy.deepcopy(m), levels=2)
    for _ in range(3):
        x = torch.randn(8, 6, dtype=torch.float64)
        whole.accumulate(Categorical(logits=m(x)).log_prob(Y))
        shared.accumulate(Categorical(logits=shared.model(x[part()])).log_prob(Y[part()]))
    for name in whole.layers:
        for a, b in zip(whole.factors(name), shared.factors(name), strict=True):
            assert_equal(b, a, 1e-12)
    assert_equal(shared.coarse_fisher(), whole.coarse_fisher(), 1e-12)
    gradients = {name: torch.randn_like(p) for name, p in m.named_parameters()}
    one, other = whole.solve(gradients, 0.1), shared.solve(gradients, 0.1)
    assert all(torch.allclose(one[name], other[name], rtol=1e-9) for name in one)
    bad = X.double()[part()] * (float("nan") if rank() == 1 else 1.0)
    raises(
        ValueError, "statistics must be finite",
        lambda: shared.accumulate(Categorical(logits=shared.model(bad), validate_args=False)),
    )  # fmt: skip
    assert shared.averages.updates == 3


CASES = (
    statistics_that_are_not_finite_on_one_rank,
    gradients_that_are_not_finite_on_one_rank,
    a_layer_that_is_used_on_one_rank,
    a_layer_that_leaves_on_one_rank,
    rows_that_fit_no_samples_on_one_rank,
    a_call_that_one_rank_leaves_out,
    losses_of_a_closure,
    a_setting_that_differs,
    rates_and_parameters_that_differ,
    gradients_that_nobody_averages,
    what_only_one_rank_does,
    what_is_built_differently,
    groups,
    labels_of_the_ranks,
    curvatures_without_a_schedule,
)


def _all():
    for case in CASES:
        if rank() == 0:
            print(case.__name__, flush=True)  # shown where one fails
        case()


@pytest.mark.slow
def test_processes_that_are_driven_apart():
    spawn(2, _all)

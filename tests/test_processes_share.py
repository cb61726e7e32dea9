"""Who inverts, of several processes: groups of holders, the default, and inverses that take the place of the last."""

import contextlib
import copy
import itertools
import warnings
from datetime import timedelta

import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from test_memory import Chain, peak
from test_processes_apart import built, step, weights
from test_processes_fail import _equal
from together import Batches, assert_alike, assert_replicas_are_equal, assert_trains_as_one, rank, size, spawn, train
from torch import distributed

import kfac2
from kfac2 import inverses, measured_share, shared_inverses
from kfac2.coarse import NoSpace
from kfac2.division import Division, work_of
from kfac2.fine import SOLVERS
from kfac2.inverses import Solvers
from kfac2.measured_share import Measured, costs_of
from kfac2.processes import Alone
from kfac2.processes.group import Group
from kfac2.sent_fields import sent_bytes


class Some(Alone):
    """So many processes, of which this is one; it says nothing."""

    def __init__(self, rank, size):
        super().__init__(as_asked=True)
        self.rank, self.size, self.made = rank, size, []

    def parts(self, ranks):
        self.made.append(ranks)
        return next(own for own in ranks if self.rank in own)


def layout_of(widths):
    curvature = kfac2.Curvature(nn.Sequential(*(nn.Linear(a, b) for a, b in widths)))
    return curvature.layout


WIDTHS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=9)


@settings(max_examples=15)
@given(WIDTHS, st.sampled_from([(4, 2), (6, 2), (6, 3), (8, 4), (3, 1), (3, 3)]))
def test_each_layer_is_held_by_one_column_and_sent_along_each_row(widths, shape):
    processes, holders = shape
    layout = layout_of(widths)
    held, owned = [], []
    for number in range(processes):
        some = Some(number, processes)
        division = Division(some, holders / processes)
        division.settle(division.share, "")
        assert (division.holders, division.columns) == (holders, processes // holders)
        if some.made:
            columns, rows = some.made
            assert all(set(column) & set(row) for column in columns for row in rows)  # one process in both
            for groups in (columns, rows):
                assert sorted(r for group in groups for r in group) == list(range(processes))
        held.append({layer.name for layer in division.held(layout).layers})
        owned.append({r: {layer.name for layer in own.layers} for r, own in division.owned_by(layout).items()})
        assert set().union(*owned[-1].values()) == held[-1]
    names = sorted(layer.name for layer in layout.layers)
    columns = processes // holders
    for begin in range(0, processes, columns):
        assert sorted(name for own in held[begin : begin + columns] for name in own) == names
    assert sorted(name for r, own in enumerate(owned) for name in own.get(r, ())) == names


@given(st.integers(2, 40), st.integers(1, 40))
def test_a_number_is_a_part_that_splits_the_processes(processes, holders):
    share = holders / processes
    if holders > processes or processes % holders:
        with pytest.raises(ValueError, match=f"share must be a part of the {processes} processes"):
            Division(Some(0, processes), share)
    else:
        word = {1: "gradients", processes: "inverses"}.get(holders, share)
        assert Division(Some(0, processes), share).share == word
    assert Division(Some(0, 1), 1 / 3).share == "all"


@given(WIDTHS, st.integers(2, 5), *[st.floats(1e-12, 1e-3)] * 3)
def test_the_default_is_what_takes_least(widths, processes, cube, byte, message):
    layout, fine = layout_of(widths), SOLVERS["cholesky"]()
    costs = costs_of(layout, fine, processes, Measured(cube, byte, message))
    owned = Division(Some(0, processes), "inverses").owned_by(layout)
    loads = [sum(map(work_of, own.layers)) for own in owned.values()]
    halves = sum(d * (d + 1) // 2 for sizes in widths for d in (sizes[0] + 1, sizes[1]))
    assert sent_bytes(layout, fine) == 4 * halves
    assert costs == pytest.approx(
        (sum(loads) * cube, max(loads) * cube, 4 * halves * byte + (len(loads) + 1) * message)
    )
    least = min(costs.alone, costs.share + costs.sending)
    assert least == (costs.alone if costs.best == "all" else costs.share + costs.sending)
    division = Division(Some(0, processes), "auto")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measured_share, "measure", lambda *_: Measured(cube, byte, message))
        measured_share.settle_share(Solvers(fine, NoSpace(), Some(0, processes), division), layout, None)
        assert division.share == "all" and "too little to be shared out" in division.why
        division = Division(Some(0, processes), "auto")
        patch.setattr(measured_share, "LITTLE", 0)
        measured_share.settle_share(Solvers(fine, NoSpace(), Some(0, processes), division), layout, None)
    assert division.share == costs.best and "MB a second, measured" in division.why


# -- in processes -----------------------------------------------------------------------------------------------

GROUPS = (
    ({"share": 0.5, "levels": 2}, {}),
    ({"share": 0.5, "inverse": "eigh", "cov_every": 4, "inv_every": 6, "burn_in": 1}, {"wrap": True}),
    ({"share": 0.5, "coarse": "directions"}, {}),
)


def groups_train_as_one(steps):
    for options, how in GROUPS:
        division = assert_trains_as_one(options, how, steps).curvature.solvers.division
        assert (division.holders, division.columns) == (2, 2)
    assert_trains_as_one({"share": 0.5, "levels": 2}, {}, 5, name="grouped")


def what_groups_send():
    m, opt = built(Chain(5), share=0.5, cov_every=3, inv_every=6, burn_in=0)
    step(m, opt)
    layout, processes = opt.curvature.layout, opt.curvature.solvers.processes
    division, numbers = opt.curvature.solvers.division, layout.size  # of directions, with what pads their rows
    own = sent_bytes(division.held(layout), opt.curvature.solvers.fine)
    for number in range(1, 7):
        before = processes.traffic.copy()
        step(m, opt)
        sent = processes.traffic["broadcast", "bytes"] - before["broadcast", "bytes"]
        messages = processes.traffic["broadcast", "messages"] - before["broadcast", "messages"]
        assert sent == 4 * numbers + (own if number == 6 else 0)  # directions along the row, inverses along the column
        assert messages == (2 if number != 6 else 2 + len(division.owned_by(layout)))
    assert own < sent_bytes(layout, opt.curvature.solvers.fine)


def states_of_groups(steps):
    batches = Batches()
    m, opt = train(batches, {"share": 0.5, "inverse": "eigh"}, steps, alone=False)
    state = opt.state_dict()
    states = [None] * size()
    distributed.all_gather_object(states, state)
    assert all(_equal(state, other) for other in states)
    ends = {}
    for share in (0.5, "gradients", "all", None):
        own, group = copy.deepcopy(m), {"process_group": None} if share is None else {"share": share}
        other = kfac2.KFAC(own, inverse="eigh", **group)
        other.load_state_dict(copy.deepcopy(state))
        if share is not None:
            assert _equal(other.state_dict()["kfac"], state["kfac"])
        ends[share] = going_on(own, other, steps)
    for share in (0.5, "gradients", "all"):
        assert_replicas_are_equal(ends[share])
        assert_alike(ends[share], ends[None])


def going_on(m, opt, steps):
    """Train on the same batch, without statistics of it that would be drawn."""
    batches = Batches()
    x, target, _ = batches.next()
    for _ in range(steps):
        opt.zero_grad()
        out = m(x)  # of all in each: their mean is the same
        if opt.needs_fisher:
            log_prob = torch.distributions.Categorical(logits=out).log_prob(target)
            opt.accumulate_fisher(log_prob)
        nn.functional.cross_entropy(out, target).backward()
        opt.step()
    return m


def smaller_groups():
    pair = [distributed.new_group([0, 1]), distributed.new_group([2, 3])][rank() // 2]
    assert division_of(process_group=pair, share=0.5).share == "gradients"  # one of two
    three = distributed.new_group([0, 1, 2])
    if rank() < 3:
        with pytest.raises(ValueError, match=r"groups of one size, one of 0\.3333, 1, got 0\.5"):
            built(process_group=three, share=0.5)
        with pytest.raises(ValueError, match=r"process_group must have all 4 processes .* got a group of 3"):
            Group(three, torch.device("cpu")).parts([[0], [1, 2]])
    for group in (distributed.group.WORLD, distributed.new_group([0, 1, 2, 3], timedelta(seconds=77))):
        one, other = (division_of(process_group=group, share=0.5) for _ in range(2))
        assert one._row is other._row and one._column is other._column  # made once for all optimizers
        assert distributed.get_process_group_ranks(one._row) == [rank() // 2 * 2, rank() // 2 * 2 + 1]
        timeouts = [own._get_backend(torch.device("cpu")).options._timeout for own in (group, one._row, one._column)]
        assert timeouts == [timeouts[0]] * 3


def division_of(**settings):
    return built(**settings)[1].curvature.solvers.division


def new_inverses_take_the_place_of_the_last(share, inverse):
    m, opt = built(Chain(5), share=share, inverse=inverse, cov_every=1, inv_every=1)
    step(m, opt)
    curvature = opt.curvature
    places, before = pointers(curvature), [t.clone() for t in curvature.inverses.tensors()]
    step(m, opt)
    assert pointers(curvature) == places
    own = curvature.solvers.division.held(curvature.layout).layers
    assert not own or any(not torch.equal(a, b) for a, b in zip(before, curvature.inverses.tensors(), strict=True))
    for value in (float("nan"), float("inf"), 3e38):
        before, old = [t.clone() for t in curvature.inverses.tensors()], weights(m)
        step_with(m, opt, value)
        assert all(torch.equal(a, b) for a, b in zip(old, weights(m), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(before, curvature.inverses.tensors(), strict=True))
    step(m, opt)
    assert_replicas_are_equal(m)


def pointers(curvature):
    own = {**curvature.inverses.fields, **curvature.inverses.derived}
    return [stack.data_ptr() for stacks in own.values() for stack in stacks]


def step_with(m, opt, value):
    """A step in which a gradient that all have holds a value."""
    original = opt.step

    def poisoned():
        m[2].weight.grad[0, 0] = value
        return original()

    opt.step = poisoned
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step(m, opt)
    opt.step = original


def an_inverse_that_would_make_a_step_overflow_has_failed():
    failed = []
    with (
        patched(inverses, "LARGEST_STEP", 0.0),
        patched(shared_inverses, "mended", lambda layout, averages, own, *rest: failed.append(own.failed.sum()) or own),
    ):
        m, opt = built(Chain(4), share="inverses", cov_every=1, inv_every=1)
        step(m, opt)
        assert not any(failed)  # the first ones take no place
        before = [t.clone() for t in opt.curvature.inverses.tensors()]
        failed.clear()
        step(m, opt)
        assert sum(failed) == len(opt.curvature.solvers.division.owned_by(opt.curvature.layout)[rank()].layers)
        assert all(torch.equal(a, b) for a, b in zip(before, opt.curvature.inverses.tensors(), strict=True))


@contextlib.contextmanager
def patched(where, name, value):
    before = getattr(where, name)
    setattr(where, name, value)
    try:
        yield
    finally:
        setattr(where, name, before)


def a_refresh_needs_a_quarter_of_factors_and_inverses(share, inverse):
    measured = []
    original = kfac2.estimates.inverted_together

    def metered(*given):
        result = []
        measured.append(peak(lambda: result.append(original(*given))))
        return result[0]

    with patched(shared_inverses, "LEAST_BYTES", 0):
        m, opt = built(Chain(24, 64), share=share, inverse=inverse, cov_every=1, inv_every=1)
        x = torch.randn(8 // size(), 64)
        step(m, opt, x=x)
        with patched(kfac2.estimates, "inverted_together", metered):
            step(m, opt, x=x)
    curvature = opt.curvature
    stacks = [*curvature.averages.A, *curvature.averages.G, *curvature.inverses.tensors()]
    assert 0 < measured[0] <= sum(stack.nbytes for stack in stacks) / inverses.SHARE
    assert_replicas_are_equal(m)


def it_does_not_count_how_large_pieces_are_nor_who_inverts():
    """To the last bit, of Cholesky inverses: so it does not count either what the default has measured."""
    ends = []
    for share, least in (("all", 0), ("inverses", 0), ("inverses", 2**40)):
        with patched(shared_inverses, "LEAST_BYTES", least):
            m, opt = built(Mixed(), share=share, cov_every=1, inv_every=2)
            for number in range(4):
                torch.manual_seed(10 * rank() + number)
                step(m, opt)
            ends.append((opt.curvature.layers, opt.state_dict()["kfac"]["inverses"]["fine"]))
    (layers, first), *others = ends
    for name in layers:
        for _, other in others:
            assert all(torch.equal(value, other[name][key]) for key, value in first[name].items()), name


class Mixed(nn.Sequential):
    """Layers of several shapes, two of them alike."""

    def __init__(self):
        torch.manual_seed(0)
        sizes = (6, 40, 40, 40, 7, 33, 3)
        super().__init__(*(m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())))


def the_default_is_the_same_in_all():
    for cubes, seconds, share in (([1e-12, 1e-6], 1e-9, "inverses"), ([1e-12, 1e-12], 1.0, "all")):
        with (
            patched(measured_share, "LITTLE", 0),
            patched(measured_share, "_seconds_of_cube", lambda *_, own=cubes: own[rank() % 2]),  # of the slowest
            patched(measured_share, "_seconds_of_sending", lambda *_, own=seconds: (own, own)),
        ):
            m, opt = built()
        division = opt.curvature.solvers.division
        assert division.share == share and str(division) in str(opt.summary()) and opt.summary().sharing
        told = [None] * size()
        distributed.all_gather_object(told, str(division))
        assert len(set(told)) == 1
    with patched(measured_share, "LITTLE", 0):
        m, opt = built()
    step(m, opt)
    assert " ms, at Σ n³ of " in opt.summary().sharing
    m, opt = built()
    assert "share='all': Σ n³ of" in str(opt.summary())


def _in_four():
    groups_train_as_one(8)
    what_groups_send()
    states_of_groups(6)
    smaller_groups()
    new_inverses_take_the_place_of_the_last(0.5, "cholesky")
    a_refresh_needs_a_quarter_of_factors_and_inverses(0.5, "cholesky")


def _in_two():
    for share in ("inverses", "gradients"):
        new_inverses_take_the_place_of_the_last(share, "eigh")
        a_refresh_needs_a_quarter_of_factors_and_inverses(share, "cholesky")
    a_refresh_needs_a_quarter_of_factors_and_inverses("inverses", "ekfac")
    an_inverse_that_would_make_a_step_overflow_has_failed()
    it_does_not_count_how_large_pieces_are_nor_who_inverts()
    the_default_is_the_same_in_all()


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "work"), [(2, _in_two), (4, _in_four)])
def test_who_inverts(processes, work):
    spawn(processes, work)

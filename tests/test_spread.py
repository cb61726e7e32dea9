"""`damping="auto"`: the rule against its equations; it is taken with new inverses, waits for nothing, and goes on."""

import copy
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from compare import assert_equal
from hypothesis import given, settings
from hypothesis import strategies as st
from inside import curvature_of, fields, set_factor
from test_defaults import Mixed, data, iterate, updates_of
from test_state import flatten, through_a_file
from test_unread import Calls, unread
from torch.distributions import Categorical

import kfac2
from kfac2 import reference, spread
from kfac2.layers import find_layers
from kfac2.layout import Layout
from kfac2.triangles import packed


def expected_damping(errors):
    """√c, squared: the lower median of what is known, within its bounds."""
    known = sorted(errors)
    return min(max(known[(len(known) - 1) // 2], spread.LEAST), 3.0) ** 2 if known else 0.1


def error(s, kept):
    return math.sqrt((1 - kept) / (1 + kept) * s)


class Followed:
    """s of one factor by the equations, block by block, from the running averages that a user can read."""

    def __init__(self):
        self.s = self.before = None

    def update(self, average, kept):
        if self.before is not None:
            d = len(average)
            distance = ((average - self.before) / (1 - kept)).square().sum() / d / (average.trace() / d) ** 2
            self.s = distance.item() if self.s is None else 0.8 * self.s + 0.2 * distance.item()
        self.before = average


@st.composite
def sequences(draw):
    sizes = [(draw(st.integers(1, 5)), draw(st.integers(1, 5))) for _ in range(draw(st.integers(1, 4)))]
    updates = [
        [draw(st.sampled_from([True, True, True, False])) for _ in sizes] for _ in range(draw(st.integers(1, 6)))
    ]
    return sizes, draw(st.integers(1, 2)), updates, draw(st.sampled_from([0.0, 0.5, 0.95])), draw(st.integers(0, 1000))


def drawn_factors(stacks, generator):
    rows = [torch.randn(*stack.shape[:2], 2, dtype=stack.dtype, generator=generator) for stack in stacks]
    return [r @ r.mT for r in rows]


def triangles(A, G):
    """Both factors as the averages keep them."""
    return [packed(a) for a in A], [packed(g) for g in G]


@settings(deadline=None, max_examples=40)
@given(sequences())
def test_the_rule_against_its_equations(drawn):
    """Blocks of several shapes; layers that come late, or have no rows in an update, have another number of draws."""
    sizes, groups, updates, decay, seed = drawn
    layers = [nn.Conv1d(groups * i, groups * o, 1, groups=groups).double() for i, o in sizes]
    model = nn.Sequential(*layers)
    found = find_layers(model, list(model.parameters()), [], 32).layers
    layout, generator = Layout(found, torch.device("cpu")), torch.Generator().manual_seed(seed)
    A, G = layout.stacks(lambda b: (b.d_in, b.d_in)), layout.stacks(lambda b: (b.d_out, b.d_out))
    plain = {(i, side, q): Followed() for i in range(len(sizes)) for side in range(2) for q in range(groups)}
    s, seen, kept = None, [False] * len(sizes), 0.0
    for t, has_rows in enumerate(updates, start=1):
        kept = min(1 - 1 / t, decay)
        new = [[stack.clone() for stack in stacks] for stacks in (A, G)]
        for stacks in new:
            batch = drawn_factors(stacks, generator)
            for i, rows in enumerate(has_rows):
                if rows:
                    average = layout.view(stacks, i)
                    average.copy_(layout.view(batch, i) if not seen[i] else
                                  kept * average + (1 - kept) * layout.view(batch, i))  # fmt: skip
        again = [was and rows for was, rows in zip(seen, has_rows, strict=True)]
        s = spread.followed(layout, s, triangles(A, G), triangles(*new), again, kept)
        seen = [was or rows for was, rows in zip(seen, has_rows, strict=True)]
        A, G = new
        for (i, side, q), one in plain.items():
            if has_rows[i]:
                one.update(layout.view((A, G)[side], i)[q], kept)
    for (i, side, q), one in plain.items():
        ours = layout.view(spread.by_batch(layout, s[side]), i)[q].item()
        assert math.isnan(ours) if one.s is None else ours == pytest.approx(one.s, rel=1e-9)
    errors = [error(one.s, kept) for one in plain.values() if one.s is not None]
    assert spread.damping(layout, s, kept).item() == pytest.approx(expected_damping(errors), rel=1e-9)


def test_the_standard_error_is_that_of_an_average_of_independent_draws(monkeypatch):
    """√c is about the error that a running average of drawn factors has, against what they are drawn around."""
    monkeypatch.setattr(spread, "LEAST", 0.02)  # so that the spread decides
    model = nn.Linear(19, 20)
    layout = Layout(find_layers(model, list(model.parameters()), [], 32).layers, torch.device("cpu"))
    generator, kept = torch.Generator().manual_seed(0), 0.95
    averages, s = torch.eye(20)[None], None
    for _ in range(400):
        rows = torch.randn(64, 20, generator=generator)
        new = kept * averages + (1 - kept) * (rows.T @ rows / 64)[None]
        before, after = triangles([averages], [averages]), triangles([new], [new])
        s = spread.followed(layout, s, before, after, [True], kept)
        averages = new
    actual = ((averages[0] - torch.eye(20)).square().sum() / 20).sqrt().item()
    assert spread.damping(layout, s, kept).sqrt().item() == pytest.approx(actual, rel=0.25)


def test_a_factor_of_zeros_or_out_of_range_says_nothing():
    model = nn.Linear(2, 3)
    layout = Layout(find_layers(model, list(model.parameters()), [], 32).layers, torch.device("cpu"))
    zeros, ones = torch.zeros(1, 3, 3), torch.eye(3)[None]
    s = spread.followed(layout, None, triangles([ones], [zeros]), triangles([1.5 * ones], [zeros]), [True], 0.5)
    assert s[0].item() == pytest.approx(4 / 9) and s[1].isnan().all()
    far = torch.full((1, 3, 3), 1e30)  # the square of its norm is no float32
    again = spread.followed(layout, s, triangles([ones], [zeros]), triangles([far], [zeros]), [True], 0.5)
    assert torch.equal(again[0], s[0])
    assert spread.damping(layout, s, 0.5).item() == pytest.approx(4 / 27)
    assert spread.damping(layout, None, 0.0) == 0.1 and spread.damping(layout, 0 * s, 0.0).item() == spread.LEAST**2
    assert spread.damping(layout, 1e9 * s, 0.0).item() == 9


def iterate_on(words, model, opt):
    model.zero_grad()
    out = model(words)
    opt.accumulate_fisher(Categorical(logits=out))
    F.cross_entropy(out, words.sum(1) % 3).backward()
    opt.step()


def scales_of(curvature, name, c):
    """What a step multiplies with in the eigenbasis of a layer, and what it is by the equations."""
    layout, inverses = curvature.layout, curvature.inverses
    stacks = {**inverses.fields, **inverses.derived}
    own = {key: layout.view(stack, layout.named(name))[0] for key, stack in stacks.items()}
    values = own["diagonal"] if "diagonal" in own else torch.outer(own["G_values"], own["A_values"])
    return own["scales"], 1 / (values + c * values.mean())


@pytest.mark.parametrize("inverse", ["cholesky", "eigh", "ekfac"])
def test_blocks_are_inverted_with_what_their_spread_says(inverse):
    torch.manual_seed(0)
    model = Mixed().double()
    opt = kfac2.KFAC(model, damping="auto", inverse=inverse, cov_every=1, stat_decay=0.7)
    plain = {(name, side): Followed() for name in ("body", "head") for side in range(2)}
    for t in range(1, 8):
        kept = min(1 - 1 / t, 0.7)
        iterate_on(torch.randint(0, 7, (24, 4)), model, opt)
        for (name, side), one in plain.items():
            one.update(opt.factors(name)[side], kept)
        c = expected_damping([error(one.s, kept) for one in plain.values() if one.s is not None])
        assert opt.last_step.damping == pytest.approx(c, rel=1e-9) and (t > 1 or c == 0.1)
        for name in opt.layers:
            if inverse == "cholesky":
                A, G = opt.factors(name)
                damping = c * (A.trace() / len(A) * G.trace() / len(G)).item()
                (A_inv,), (G_inv,) = reference.factored_tikhonov_inverse([A], [G], damping)
                assert_equal(fields(opt, name)["A_inv"][0], A_inv)
                assert_equal(fields(opt, name)["G_inv"][0], G_inv)
            else:
                assert_equal(*scales_of(curvature_of(opt), name, c))
    assert spread.LEAST <= c**0.5 < 3


def test_it_is_taken_with_inverses_that_are_due_and_moves_none_by_itself(monkeypatch):
    monkeypatch.setattr(spread, "LEAST", 0.02)  # so that the spread decides
    torch.manual_seed(0)
    model = Mixed()
    opt = kfac2.KFAC(model, damping="auto", cov_every=2, inv_every=10, burn_in=3)
    assert updates_of(opt, model, 9) == ([0, 2, 4, 6, 8], [0, 2, 4])
    assert opt.ordinary and opt.last_step.damping != 0.1
    at_its_update, opt.options.inv_every = opt.last_step.damping, 9
    iterate(model, opt)
    assert opt.last_step.damping != at_its_update
    opt.options.damping = 0.3  # a number takes effect at once, and so does what takes its place
    assert not opt.ordinary
    iterate(model, opt)
    assert opt.last_step.damping == 0.3 and curvature_of(opt).averages.spread is None
    opt.options.damping = "auto"
    iterate(model, opt)
    assert opt.last_step.damping == 0.1
    assert updates_of(opt, model, 4) == ([0, 2], [])  # of iterations 12 to 15


def test_two_levels_are_damped_alike():
    torch.manual_seed(0)
    model = Mixed().double()
    opt = kfac2.KFAC(model, damping="auto", levels=2, cov_every=1)
    for _ in range(3):
        iterate(model, opt)
    traces = [A.trace() * G.trace() for A, G in map(opt.factors, opt.layers)]
    expected = reference.coarse_inverse(opt.coarse_fisher(), opt.last_step.damping * torch.stack(traces))
    assert_equal(curvature_of(opt).inverses.coarse, expected)


@pytest.mark.parametrize("inverse", ["cholesky", "eigh", "ekfac"])
def test_nothing_is_read_for_it(inverse):
    """Every read of a statistics step is one that it has with a number, and an ordinary step is the same throughout."""
    reads, ordinary = [], []
    for damping in (0.1, "auto"):
        torch.manual_seed(0)
        model = Mixed()
        opt = unread(kfac2.KFAC(model, damping=damping, inverse=inverse, cov_every=2, kl_bound=None))
        for names in (reads, ordinary, reads, ordinary, reads, ordinary):
            with Calls() as calls:
                iterate(model, opt)
            has_read = [name for name in calls.names if "_local_scalar_dense" in name or "nonzero" in name]
            names.append(len(has_read) if names is reads else len(calls.names))
    assert reads[:3] == reads[3:] and ordinary[:3] == ordinary[3:]


def test_a_graph_finds_the_inverses_of_the_new_damping_where_it_looks(monkeypatch):
    monkeypatch.setattr(spread, "LEAST", 0.02)  # so that the spread decides
    torch.manual_seed(0)
    model = Mixed()
    opt = unread(kfac2.KFAC(model, damping="auto", cov_every=2))
    for _ in range(4):
        iterate(model, opt)
    health = curvature_of(opt).health
    health.capture((curvature_of(opt).prepared(), curvature_of(opt).averages.in_coarse))
    before, places = opt.last_step.damping, [t.data_ptr() for t in curvature_of(opt).inverses.tensors()]
    values = [t.clone() for t in curvature_of(opt).inverses.tensors()]
    iterate(model, opt)
    after = curvature_of(opt).inverses.tensors()
    assert opt.last_step.damping != before and [t.data_ptr() for t in after] == places
    assert not all(torch.equal(a, b) for a, b in zip(after, values, strict=True))


@pytest.mark.parametrize("at", [1, 3, 6])
@pytest.mark.parametrize("inverse", ["cholesky", "eigh", "ekfac"])
def test_a_saved_state_goes_on_bit_for_bit(inverse, at):
    torch.manual_seed(0)
    model = Mixed()
    twin = copy.deepcopy(model)
    opt, other = (
        kfac2.KFAC(m, damping="auto", inverse=inverse, cov_every=2, burn_in=2, inv_every=3) for m in (model, twin)
    )
    for seed in range(at):
        iterate(model, opt, seed)
    saved = through_a_file([model.state_dict(), opt.state_dict()])
    twin.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    for seed in range(at, at + 9):
        iterate(model, opt, seed)
        iterate(twin, other, seed)
        assert other.last_step.damping == opt.last_step.damping
    ours, theirs = (flatten([m.state_dict(), o.state_dict()]) for m, o in ((model, opt), (twin, other)))
    assert ours.keys() == theirs.keys() and any("spread" in key for key in ours)
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]) if isinstance(value, torch.Tensor) else value == theirs[key], key


def test_a_state_without_a_spread_is_loaded():
    torch.manual_seed(0)
    model = Mixed()
    old = kfac2.KFAC(model, damping=0.05, cov_every=2)
    for _ in range(3):
        iterate(model, old)
    state = old.state_dict()
    assert "spread" not in state["kfac"]["statistics"] and state["kfac"]["inverses"]["damping"] == [0.05, True]
    opt = kfac2.KFAC(model, damping="auto", cov_every=2)
    opt.load_state_dict(state)
    assert opt.options.damping == 0.05  # options that may change are restored
    opt.options.damping = "auto"
    iterate(model, opt)
    assert opt.last_step.damping == 0.1
    iterate(model, opt)
    assert opt.last_step.damping != 0.1


def test_values_of_a_state_that_go_together_are_restored_together():
    one, other = {"damping": "auto"}, {"damping": 1e-3, "relative_damping": False}
    for saved, mine in ((one, other), (other, one)):
        opt = kfac2.KFAC(Mixed(), **mine)
        opt.load_state_dict(kfac2.KFAC(Mixed(), **saved).state_dict())
        assert opt.options.damping == saved["damping"]
        assert opt.options.relative_damping == saved.get("relative_damping", True)
    scheduled = kfac2.KFAC(Mixed(), damping=lambda k: 1e-3, relative_damping=False).state_dict()
    auto = kfac2.KFAC(Mixed(), damping="auto", inv_every=7)
    with pytest.raises(
        ValueError, match="damping must be a number above 0, or a callable, with relative_damping=False"
    ):
        auto.load_state_dict(scheduled)
    assert auto.options.relative_damping and auto.options.inv_every == 7


def test_a_layer_keeps_its_spread_where_others_leave_or_all_move():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Conv1d(4, 4, 1, groups=2), nn.Flatten(), nn.Linear(4, 3))

    def go():
        x = torch.randn(8, 5, dtype=model[0].weight.dtype)
        opt.zero_grad()
        out = model[3:](model[2](model[1](model[0](x))[:, :, None]))
        opt.accumulate_fisher(Categorical(logits=out))
        F.cross_entropy(out, torch.arange(8) % 3).backward()
        opt.step()

    opt = kfac2.KFAC(model, damping="auto", cov_every=1)
    for _ in range(3):
        go()
    curvature = curvature_of(opt)

    def own(name):
        layout, number = curvature.layout, curvature.layout.named(name)
        return [layout.view(spread.by_batch(layout, side), number).clone() for side in curvature.averages.spread]

    before = {name: own(name) for name in opt.layers}
    assert [len(A) for A, _ in before.values()] == [1, 2, 1]
    with pytest.warns(RuntimeWarning, match="leaves K-FAC"):
        curvature.drop(curvature.layout.layers[0], "it was asked to")
    assert opt.layers == ["2", "4"]
    model.double()
    curvature.prepared()
    assert curvature.averages.A[0].dtype == torch.float64
    for name in ("2", "4"):
        for ours, theirs in zip(own(name), before[name], strict=True):
            assert torch.equal(ours, theirs) and ours.isfinite().all()
    go()
    assert all(not torch.equal(a, b) for name in opt.layers for a, b in zip(own(name), before[name], strict=True))


def test_an_inverse_is_mended_with_it():
    """√c is added to the eigenvalues, floored at 0, in units of the mean of the factor as it is."""
    torch.manual_seed(0)
    model = Mixed().double()
    opt = kfac2.KFAC(model, damping="auto", cov_every=2, inv_every=5, burn_in=2)
    for _ in range(5):
        iterate(model, opt)
    eigenvalues = torch.tensor([*[2.0] * 8, -1.0], dtype=torch.float64)
    set_factor(opt, "head", eigenvalues.diag())
    with pytest.warns(RuntimeWarning, match="not positive definite"):
        iterate(model, opt)
    shift = opt.last_step.damping**0.5 * eigenvalues.mean()
    assert_equal(fields(opt, "head")["A_inv"][0], (1 / (eigenvalues.clamp(min=0) + shift)).diag())


def test_a_preconditioner_has_it_and_a_curvature_has_no_damping():
    torch.manual_seed(0)
    model = Mixed()
    preconditioner = kfac2.Preconditioner(model, damping="auto", kl_clip=None, cov_every=1)
    for _ in range(3):
        iterate_on(data()[0], model, preconditioner)
    assert curvature_of(preconditioner).inverses.damping.value.item() != 0.1
    curvature = kfac2.Curvature(model)
    for _ in range(2):
        curvature.accumulate(Categorical(logits=model(torch.zeros(3, 4, dtype=torch.long))))
    assert curvature.averages.spread is None
    with pytest.raises((TypeError, ValueError), match="damping must be a number above 0, got 'auto'"):
        curvature.solve({"head.bias": torch.ones(3)}, damping="auto")


def test_it_is_the_default():
    assert kfac2.KFAC(Mixed()).options.damping == kfac2.Preconditioner(Mixed()).options.damping == "auto"


def test_refusals():
    message = "damping must be a number above 0, or a callable, with relative_damping=False, got 'auto'"
    with pytest.raises(ValueError, match=message):
        kfac2.KFAC(Mixed(), damping="auto", relative_damping=False)
    with pytest.raises(ValueError, match="damping must be a number above 0, or 'auto', got 'adaptive'"):
        kfac2.Preconditioner(Mixed(), damping="adaptive")
    opt = kfac2.KFAC(Mixed(), damping="auto")
    with pytest.raises(ValueError, match=message):
        opt.options.relative_damping = False
    assert opt.options.relative_damping
    opt.options.damping = lambda k: "auto"
    with pytest.raises(TypeError, match=r"damping\(0\) must be a number above 0, got 'auto'"):
        opt.preconditioner.schedule.damping(curvature_of(opt).averages)

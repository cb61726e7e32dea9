"""`KFAC(model)`: what one line does, and the schedule behind it."""

import copy
import io

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from compare import assert_equal
from inside import curvature_of, fields
from test_state import flatten
from test_unread import Calls
from torch.distributions import Categorical

import kfac2
from kfac2 import reference


class Mixed(nn.Module):
    """A layer of each treatment: K-FAC's, and norms and an embedding for the rest."""

    def __init__(self):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(7, 6), nn.LayerNorm(6)
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, words):
        return self.head(torch.tanh(self.body(self.norm(self.embedding(words).mean(1)))))


def data(n=24):
    generator = torch.Generator().manual_seed(3)
    words = torch.randint(0, 7, (n, 4), generator=generator)
    return words, words.sum(1) % 3


def iterate(model, opt, seed=None):
    words, y = data()
    if seed is not None:
        torch.manual_seed(seed)
    opt.zero_grad()
    out = model(words)
    opt.accumulate_fisher(Categorical(logits=out))
    loss = F.cross_entropy(out, y)
    loss.backward()
    opt.step()
    return loss.item()


def test_one_line_trains():
    torch.manual_seed(0)
    model = Mixed()
    opt = kfac2.KFAC(model)
    losses = [iterate(model, opt) for _ in range(120)]
    assert losses[-1] < 0.05 and max(losses) < 1.5 * losses[0]


def test_the_rest_is_trained_by_adamw():
    """K-FAC's own layers do not move: what the rest does is what torch's AdamW does."""
    torch.manual_seed(0)
    model = Mixed().double()
    twin = copy.deepcopy(model)
    opt = kfac2.KFAC(model, lr=0.0, rest_lr=0.01, weight_decay=0.1, betas=(0.8, 0.99), eps=1e-7)
    rest = [*twin.embedding.parameters(), *twin.norm.parameters()]
    adamw = torch.optim.AdamW(rest, lr=0.01, weight_decay=0.1, betas=(0.8, 0.99), eps=1e-7)
    words, y = data()
    for _ in range(5):
        iterate(model, opt)
        twin.zero_grad()
        F.cross_entropy(twin(words), y).backward()
        adamw.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_equal(p, q, 1e-12)


def test_groups_are_split_and_schedulers_scale_both_kinds():
    model = Mixed()
    body = {"params": [*model.body.parameters(), *model.norm.parameters()], "lr": 0.5, "rest_lr": 0.02}
    others = {"params": [*model.embedding.parameters(), *model.head.parameters()]}
    opt = kfac2.KFAC(model, params=[body, others], rest_lr=0.003)
    found = [(group["method"], group["lr"], len(group["params"])) for group in opt.param_groups]
    assert found == [("kfac", 0.5, 2), ("adamw", 0.02, 2), ("kfac", 1.0, 2), ("adamw", 0.003, 1)]
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    iterate(model, opt)
    scheduler.step()
    assert [group["lr"] for group in opt.param_groups] == [0.25, 0.01, 0.5, 0.0015]
    new = nn.Parameter(torch.zeros(2))
    opt.add_param_group({"params": [new]})
    assert opt.param_groups[-1]["method"] == "adamw" and opt.param_groups[-1]["lr"] == 0.003
    new.grad = torch.full((2,), float("nan"))  # it is looked at, too
    with pytest.warns(RuntimeWarning, match="a NaN or an infinity in the gradient of a parameter outside the model"):
        iterate_keeping(model, opt, new)


def iterate_keeping(model, opt, new):
    words, y = data()
    model.zero_grad()
    F.cross_entropy(model(words), y).backward()
    opt.step()
    assert torch.equal(new, torch.zeros(2))


class Transposed(nn.Module):
    """The second use of its first layer's weight is not seen, so that the layer leaves."""

    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.a(x)) @ self.a.weight.T)


def step_of_the_layer_that_leaves(model, opt, reason):
    """Take a step in which its first layer leaves; return by how much that moves."""
    x, y = torch.randn(12, 4), torch.arange(12) % 3
    before = model.a.weight.detach().clone()
    out = model(x)
    with pytest.warns(RuntimeWarning, match=reason):
        opt.accumulate_fisher(Categorical(logits=out))
    F.cross_entropy(out, y).backward()
    opt.step()
    assert opt.layers == ["head"]
    return (model.a.weight - before).abs()


@pytest.mark.parametrize("old_state", [False, True])
def test_a_schedule_scales_adamw_of_a_dropped_layer_by_the_rate_of_its_own_group(old_state):
    torch.manual_seed(0)
    model = Transposed()

    def groups():
        return [{"params": model.a.parameters(), "lr": 0.2}, {"params": model.head.parameters()}]

    opt = kfac2.KFAC(model, params=groups(), rest_lr=0.01, kl_bound=None)
    state = copy.deepcopy(opt.state_dict())
    if old_state:
        state["param_groups"] = [
            {name: value for name, value in group.items() if name != "first_lr"} for group in state["param_groups"]
        ]
    opt = kfac2.KFAC(model, params=groups(), rest_lr=0.01, kl_bound=None)
    opt.load_state_dict(state)
    torch.optim.lr_scheduler.LambdaLR(opt, lambda k: 0.5)
    assert [group["lr"] for group in opt.param_groups] == [0.1, 0.5]
    change = step_of_the_layer_that_leaves(model, opt, "a leaves K-FAC")
    assert_equal(change, torch.full_like(change, 0.5 * 0.01), 1e-3)  # the first step of Adam, half of rest_lr


def test_rest_sgd_is_one_group_at_the_rate_of_kfac():
    opt = kfac2.KFAC(Mixed(), lr=0.1, rest="sgd")
    assert [group["method"] for group in opt.param_groups] == ["kfac"] and len(opt.param_groups[0]["params"]) == 7
    with pytest.raises(ValueError, match="rest must be 'adamw' or 'sgd', got 'adam'"):
        kfac2.KFAC(Mixed(), rest="adam")


def test_a_layer_that_leaves_goes_to_adamw():
    torch.manual_seed(0)
    model = Transposed()
    opt = kfac2.KFAC(model, rest_lr=0.01)
    reason = "a leaves K-FAC, and takes its plain gradient: its rows do not rebuild"
    change = step_of_the_layer_that_leaves(model, opt, reason)
    assert_equal(change, torch.full_like(change, 0.01), 1e-3)  # the first step of Adam


@pytest.mark.parametrize("options", [{}, {"inverse": "ekfac", "levels": 2}, {"kl_bound": 1e-4}])
def test_resumed_training_equals_uninterrupted_training(options):
    torch.manual_seed(0)
    model = Mixed().double()
    opt = kfac2.KFAC(model, **options)
    for seed in range(7):
        iterate(model, opt, seed)
    file = io.BytesIO()
    torch.save([model.state_dict(), opt.state_dict()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    twin = Mixed().double()
    twin.load_state_dict(saved[0])
    other = kfac2.KFAC(twin, **options)
    other.load_state_dict(saved[1])
    for seed in range(7, 20):
        iterate(model, opt, seed)
        iterate(twin, other, seed)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def updates_of(opt, model, steps):
    """In which iterations statistics and inverses were renewed."""
    statistics, inverses, curvature = [], [], curvature_of(opt)
    for k in range(steps):
        before = curvature.averages.updates, curvature.inverses
        iterate(model, opt)
        if curvature.averages.updates != before[0]:
            statistics.append(k)
        if curvature.inverses is not before[1]:
            inverses.append(k)
    return statistics, inverses


def test_inverses_are_fresh_at_the_start():
    torch.manual_seed(0)
    model = Mixed()
    opt = kfac2.KFAC(model, cov_every=2, inv_every=10, burn_in=3)
    assert updates_of(opt, model, 12) == ([0, 2, 4, 6, 8, 10], [0, 2, 4, 10])


def test_intervals_damping_and_clip_as_callables():
    torch.manual_seed(0)
    model = Mixed()
    opt = kfac2.KFAC(
        model,
        cov_every=lambda k: 1 if k < 3 else 4,
        inv_every=lambda k: 100,
        damping=lambda k: 0.1 if k < 6 else 0.2,
        kl_clip=lambda k: None if k else 1e-3,
        burn_in=0,
    )
    statistics, inverses = updates_of(opt, model, 10)
    assert statistics == [0, 1, 2, 4, 8] and inverses == [0, 6]  # a new damping takes effect at once
    assert "damping" not in opt.state_dict()["kfac"]["options"]
    with pytest.raises(ValueError, match=r"damping\(0\) must be a number above 0, got -1"):
        iterate(model, kfac2.KFAC(model, damping=lambda k: -1))


@pytest.mark.parametrize("inverse", ["cholesky", "eigh", "ekfac"])
def test_relative_damping_is_a_share_of_each_blocks_mean_eigenvalue(inverse):
    torch.manual_seed(0)
    model = Mixed().double()
    opt = kfac2.KFAC(model, damping=0.3, inverse=inverse, lr=0.0)
    iterate(model, opt)
    for name in opt.layers:
        A, G = opt.factors(name)
        damping = 0.3 * (A.trace() / len(A) * G.trace() / len(G)).item()
        kept = fields(opt, name)
        if inverse == "cholesky":
            (A_inv,), (G_inv,) = reference.factored_tikhonov_inverse([A], [G], damping)
            assert_equal(kept["A_inv"][0], A_inv)
            assert_equal(kept["G_inv"][0], G_inv)
        else:
            curvature = curvature_of(opt)
            scales = curvature.layout.view(curvature.inverses.derived["scales"], curvature.layout.named(name))[0]
            values = [torch.linalg.eigvalsh(M).clamp(min=0) for M in (G, A)]
            assert_equal(scales, 1 / (torch.outer(*values) + damping))


def test_relative_damping_follows_the_scale_of_the_loss():
    """Scaled gradients scale the Fisher by the square; the direction stays but for its length."""
    directions = []
    for scale in (1e-2, 1e-4):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        with torch.no_grad():
            model[2].weight.mul_(scale)  # the first layer hardly matters
        opt = kfac2.KFAC(model, kl_clip=None, kl_bound=None, max_change=None, momentum=0.0)
        x, y = torch.randn(32, 4).double(), torch.arange(32) % 3
        torch.manual_seed(1)
        out = model(x)
        opt.accumulate_fisher(Categorical(logits=torch.zeros_like(out) + out))
        F.cross_entropy(out, y).backward()
        opt.step()
        directions.append(model[0].weight.grad / model[0].weight.grad.norm())
    assert (directions[0] * directions[1]).sum() > 0.999


def test_an_ordinary_step_reads_nothing_and_calls_nothing_for_each_layer():
    counts = []
    for depth in (3, 40):
        torch.manual_seed(0)
        layers = (m for _ in range(depth) for m in (nn.Linear(4, 4), nn.LayerNorm(4)))
        model, x, y = nn.Sequential(*layers), torch.randn(6, 4), torch.arange(6) % 4
        opt = kfac2.KFAC(model, cov_every=100, inv_every=100, burn_in=0)
        curvature_of(opt).health.at_once = False  # as on a CUDA device
        for _ in range(3):
            opt.zero_grad()
            out = model(x)
            opt.accumulate_fisher(Categorical(logits=out))
            F.cross_entropy(out, y).backward()
            with Calls() as calls:
                opt.step()
        assert not [name for name in calls.names if "_local_scalar_dense" in name or "nonzero" in name]
        counts.append(len(calls.names))
    assert counts[0] == counts[1]


def test_the_last_step_tells_what_bounded_it():
    torch.manual_seed(0)
    model = Mixed()
    opt = kfac2.KFAC(model, kl_clip=1e-6, kl_bound=None, max_change=None)
    iterate(model, opt)
    step = opt.last_step
    assert step.damping == 0.1 and step.divergence is None and step.bound_factor == 1 and step.changes == {}
    assert step.nu == pytest.approx((1e-6 / step.block_divergence) ** 0.5, rel=1e-6)
    opt = kfac2.KFAC(model, kl_clip=None, kl_bound=1e-7, max_change=1e-3)
    iterate(model, opt)
    step = opt.last_step
    assert step.nu == 1 and step.bound_factor == pytest.approx((1e-7 / step.divergence) ** 0.5)
    assert list(step.changes) == ["body", "head"] and max(step.changes.values()) > 1e-3
    assert "largest change=(" in repr(step) and "nu=1," in repr(step)


def test_a_step_that_is_skipped_unread_moves_neither_kind_of_parameter():
    torch.manual_seed(0)
    model = Mixed()
    opt = kfac2.KFAC(model, cov_every=100, inv_every=100, burn_in=0)
    curvature_of(opt).health.at_once = False
    for _ in range(2):
        iterate(model, opt)
    before = copy.deepcopy([model.state_dict(), opt.state_dict()["state"]])
    words, y = data()
    opt.zero_grad()
    F.cross_entropy(model(words), y).backward()
    model.norm.weight.grad[0] = float("inf")
    opt.step()
    with pytest.warns(RuntimeWarning, match="1 steps before iteration 3 were skipped; .*norm.weight"):
        after = [model.state_dict(), opt.state_dict()["state"]]
    ours, theirs = flatten(before), flatten(after)
    assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())


def places_of(opt):
    return [
        opt._whole_step.bound.factor.data_ptr(),
        *(part.data_ptr() for part in opt.preconditioner.change_limit.current[:2]),
    ]


def test_a_graph_finds_bounds_where_it_looks_for_them():
    torch.manual_seed(0)
    model = Mixed()
    opt = kfac2.KFAC(model, cov_every=2)
    curvature_of(opt).health.at_once = False
    iterate(model, opt)
    places = places_of(opt)
    for _ in range(3):
        iterate(model, opt)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    iterate(model, opt)
    assert places_of(opt) == places

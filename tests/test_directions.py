"""The space of directions: exact against dense algebra, never uphill, and nothing but one level where it cannot be."""

import copy
import math
import os

import models
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from compare import assert_equal
from hypothesis import given, settings
from hypothesis import strategies as st
from inside import curvature_of
from test_bounds import sampled_pass, scores
from test_state import flatten, through_a_file
from test_unread import Calls
from torch.distributions import Categorical, Normal

import kfac2
from kfac2.coarse.directions import RIDGE, Quadratic, _solved, coefficients, quadratic, with_correlations
from kfac2.directed import _inner_products, _squares
from kfac2.divergence import as_matrices, derivatives, kept_of

EXAMPLES = int(os.environ.get("KFAC2_EXAMPLES", "200"))
DERANDOMIZED = "KFAC2_EXAMPLES" not in os.environ


class Shared(nn.Module):
    """One weight that is used twice, and a convolution over positions that is used three times."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.conv = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x):
        for _ in range(2):
            x = torch.tanh(self.inner(x))
        for _ in range(3):
            x = torch.tanh(self.conv(x[:, None])[:, 0])
        return self.head(x)


def task_of(name):
    if name != "shared":
        return models.task(name)
    return models.Task(Shared().double(), torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3)


NAMES = (*models.NAMES, "shared")


def parts_of(layer):
    return [p for p in (layer.weight, layer.bias) if p is not None]


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def as_columns(layers, *moved):
    """Z, (p, KL): a column for each direction of each layer, all others' numbers being 0."""
    columns = []
    for directions in moved:
        for layer in layers:
            parts = [
                [directions[id(p)] if own is layer else torch.zeros_like(p) for p in parts_of(own)] for own in layers
            ]
            columns.append(flat([part for own in parts for part in own]))
    return torch.stack(columns, 1)


# -- the quadratic model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_quadratic_model_is_that_of_the_dense_fisher(name):
    task = task_of(name)
    layers, passed = sampled_pass(task)
    parameters = [p for layer in layers for p in parts_of(layer)]
    v, d, gradient = ({id(p): torch.randn_like(p) for p in parameters} for _ in range(3))
    matrices = as_matrices(layers, (v, d))
    s, cases = derivatives([kept_of(passed, passed.samples)], layers, matrices)
    gradients = [m.flatten() for m in as_matrices(layers, (gradient,))]
    model = quadratic(s, cases, *_inner_products(matrices, gradients), _squares(layers))

    J, count = scores(task, parameters, len(task.x))
    Z, L = as_columns(layers, v, d), len(layers)
    assert_equal(model.fisher, Z.T @ (J.T @ J / count) @ Z, 1e-12)
    ridge = torch.zeros(2 * L, 2 * L, dtype=torch.float64)
    for i, layer in enumerate(layers):
        own = Z[:, [i, L + i]]
        share = 0.1 / sum(p.detach().square().sum() for p in parts_of(layer))
        ridge[[[i], [L + i]], [i, L + i]] = share * (own.T @ own)
    assert_equal(model.ridge, ridge, 1e-12)
    assert_equal(model.slopes, Z.T @ flat([gradient[id(p)] for p in parameters]), 1e-12)


def test_weights_of_zero_have_a_ridge_of_their_floor():
    task = models.task("linear")
    layers, _ = sampled_pass(task)
    with torch.no_grad():
        for p in parts_of(layers[0]):
            p.zero_()
    assert_equal(_squares(layers)[0], torch.tensor(1e-6 * 25, dtype=torch.float64), 1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_correlations_are_averaged_and_variances_are_not(seed):
    torch.manual_seed(seed)
    S, T = torch.randn(2, 20, 6, dtype=torch.float64)
    S[:, 4:] = 0.0  # no last update yet
    first = Quadratic(S.T @ S, torch.zeros(6, 6), torch.zeros(6))
    same, correlations = with_correlations(first, None)
    assert_equal(same.fisher, first.fisher, 1e-12)
    second = Quadratic(T.T @ T, torch.zeros(6, 6), torch.zeros(6))
    model, latest = with_correlations(second, correlations)

    def correlated(Q):
        spread = Q.diagonal().sqrt()
        return Q / spread[:, None] / spread

    wanted = correlated(second.fisher)
    wanted[:4, :4] = (wanted[:4, :4] + correlated(first.fisher[:4, :4])) / 2
    spread = second.fisher.diagonal().sqrt()
    assert_equal(latest, wanted, 1e-12)
    assert_equal(model.fisher, spread[:, None] * wanted * spread, 1e-12)


# -- the coefficients ---------------------------------------------------------------------------------------


def dense_coefficients(Q, b, tau, ridge):
    """Solve the equations as they stand, without units; the ridge is a share of diag Q, in W's space of its sums."""
    half, spread = len(b) // 2, Q.diagonal().diag()
    W = torch.zeros(2, len(b), dtype=b.dtype)
    W[0, :half] = W[1, half:] = 1.0
    is_there = [k for k in range(2) if (W @ spread @ W.T)[k, k] > 0]
    W = W[is_there]
    shared = W.T @ torch.linalg.solve(W @ (Q @ W.T) + ridge * W @ spread @ W.T, W @ b)
    if tau == math.inf:
        return shared
    there = Q.diagonal() > 0
    c = torch.zeros_like(b)
    left, right = Q + (tau + ridge) * spread, b + (tau + ridge) * spread @ shared
    c[there] = torch.linalg.solve(left[there][:, there], right[there])
    return c


@pytest.mark.parametrize("tau", [0.0, 0.3, 3.0, 1e6, math.inf])
@pytest.mark.parametrize("seed", range(4))
def test_coefficients_solve_their_equations(tau, seed):
    torch.manual_seed(seed)
    count = seed + 1
    S = torch.randn(40, 2 * count, dtype=torch.float64) * 10 ** torch.linspace(-1, 1, 2 * count, dtype=torch.float64)
    own = torch.randn(count, 2, 3, dtype=torch.float64)
    grams, weights = own @ own.mT, torch.rand(count, dtype=torch.float64) + 0.5
    slopes = torch.randn(count, 2, dtype=torch.float64)
    model = quadratic(S.view(40, 2, count), 40, grams, slopes, weights)
    c, Q, b = coefficients(model, tau), model.fisher + model.ridge, slopes.T.flatten()
    assert_equal(c, dense_coefficients(Q, b, tau, RIDGE))
    assert_equal(c, dense_coefficients(Q, b, tau, 0.0), 1e-4)
    if tau == math.inf:  # the pair that all layers share
        assert_equal(c, torch.cat([c[:1].expand(count), c[count : count + 1].expand(count)]), 1e-12)
    if tau == 0:
        assert_equal(c, torch.linalg.solve(Q, b), 1e-4)


@st.composite
def drawn_models(draw):
    """Positive semi-definite models of any scale, with directions that are not there, and some that are there twice."""
    count, rows = draw(st.integers(1, 6)), draw(st.integers(0, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    orders = st.lists(st.integers(-12, 12), min_size=2 * count, max_size=2 * count)
    scales = 10.0 ** torch.tensor(draw(orders), dtype=torch.float64)
    S, slopes = randn(rows, 2 * count), randn(2 * count)
    own = randn(count, 2, draw(st.integers(0, 3)))
    R = (own @ own.mT * 10.0 ** draw(st.integers(-12, 6))).permute(1, 2, 0)
    R = torch.diag_embed(R).permute(0, 2, 1, 3).reshape(2 * count, 2 * count)
    Q = S.T @ S / max(rows, 1)
    columns = list(range(2 * count))
    for i in draw(st.lists(st.integers(0, 2 * count - 1), max_size=2)):  # two directions are one
        columns[i] = draw(st.integers(0, 2 * count - 1))
    Q, slopes, R = Q[columns][:, columns], slopes[columns], R[columns][:, columns]
    scales[draw(st.lists(st.integers(0, 2 * count - 1), max_size=3))] *= 0.0
    slopes = slopes * scales * 10.0 ** draw(st.integers(-12, 12))
    tau = draw(st.one_of(st.just(0.0), st.just(math.inf), st.floats(1e-6, 1e6)))
    return Quadratic(scales[:, None] * Q * scales, scales[:, None] * R * scales, slopes), tau


def terms(model, c):
    """bᵀc, and m(c), and what both are rounded by."""
    products = c[:, None] * (model.fisher + model.ridge) * c
    size = (model.slopes * c).abs().sum() + products.abs().sum()
    return model.slopes @ c, products.sum() / 2 - model.slopes @ c, size


@settings(max_examples=EXAMPLES, derandomize=DERANDOMIZED)
@given(drawn_models())
def test_a_step_never_goes_uphill(drawn):
    model, tau = drawn
    c, shared = coefficients(model, tau), coefficients(model, math.inf)
    assert c.isfinite().all() and shared.isfinite().all()
    slope, value, size = terms(model, c)
    _, of_shared, size_of_shared = terms(model, shared)
    tiny = 1e-9 * (size + size_of_shared)
    assert slope >= -tiny
    assert value <= of_shared + tiny
    assert of_shared <= tiny


@settings(max_examples=EXAMPLES, derandomize=DERANDOMIZED)
@given(drawn_models(), st.integers(0, 2**20), st.integers(1, 4))
def test_with_correlations_so_far_it_goes_down_or_is_not_solved(drawn, seed, rows):
    """Averaged correlations of some directions beside new ones of others may be indefinite; else they are not."""
    model, tau = drawn
    size = len(model.slopes)
    S = torch.randn(rows, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    is_first = seed % 2
    if is_first:
        S[:, size // 2 :] = 0.0
    last = with_correlations(Quadratic(S.T @ S, S.T @ S, S.sum(0)), None)[1]
    model, latest = with_correlations(model, last)
    c, shared = coefficients(model, tau), coefficients(model, math.inf)
    if not is_first:
        assert torch.linalg.eigvalsh(latest)[0] > -1e-9 and c.isfinite().all()
    if c.isfinite().all():
        slope, value, size = terms(model, c)
        _, of_shared, size_of_shared = terms(model, shared)
        tiny = 1e-9 * (size + size_of_shared)
        assert (is_first or slope >= -tiny) and value <= of_shared + tiny and of_shared <= tiny
    else:
        assert c.isnan().all()


# -- whole steps --------------------------------------------------------------------------------------------


def is_definite(Q, tau):
    """Whether both systems are definite, in units of the diagonal."""
    spread, half = Q.diagonal().sqrt(), len(Q) // 2
    W = torch.zeros(2, len(Q), dtype=Q.dtype)
    W[0, :half], W[1, half:] = spread[:half], spread[half:]
    W = F.normalize(W)
    Q = torch.where(spread[:, None] * spread > 0, Q / (spread[:, None] * spread), 0.0)
    least = min(torch.linalg.eigvalsh(W @ Q @ W.T)[0], torch.linalg.eigvalsh(Q)[0] + (0 if tau == math.inf else tau))
    return least > -RIDGE


class Dense:
    """Steps in the space of directions on dense matrices, from the gradients that one level's `Preconditioner` leaves.

    Everything else is written out: one row of scores for each sample, Z column by column, Q, c and D.
    """

    def __init__(self, task, tau, kl_clip, rates, decays, **options):
        self.task, self.tau, self.kl_clip, self.rates, self.decays = task, tau, kl_clip, rates, decays
        self.one_level = kfac2.Preconditioner(task.model, kl_clip=kl_clip, **options)
        self.layers = curvature_of(self.one_level).layout.layers
        self.D = {id(p): torch.zeros_like(p) for layer in self.layers for p in parts_of(layer)}
        self.last, self.fell_back = None, 0

    def step(self, seed):
        task, layers, L = self.task, self.layers, len(self.layers)
        parameters = [p for layer in layers for p in parts_of(layer)]
        J, cases = scores(task, parameters, len(task.x), seed)
        task.model.zero_grad()
        out = task.model(task.x)
        torch.manual_seed(seed)
        self.one_level.accumulate_fisher(task.distribution(out))
        task.loss(out).backward()
        gradient = flat([p.grad for p in parameters])
        self.one_level.step(lr=dict(zip(self.one_level.layers, self.rates, strict=True)))
        Z = as_columns(layers, {id(p): p.grad for p in parameters}, self.D)
        F_ = Z.T @ (J.T @ J) @ Z / cases
        spread = F_.diagonal().sqrt()
        new = torch.where(spread[:, None] * spread > 0, F_ / (spread[:, None] * spread), 0.0)
        if self.last is not None:
            known = self.last.diagonal() > 0
            new = torch.where(known[:, None] & known, (new + self.last) / 2, new)
        before, self.last, F_ = self.last, new, spread[:, None] * new * spread
        Q = F_.clone()
        for i, layer in enumerate(layers):
            both = [i, L + i]
            weights = sum(p.detach().square().sum() for p in parts_of(layer))
            Q[[[i], [L + i]], both] += 0.1 / weights * (Z[:, both].T @ Z[:, both])
        c = dense_coefficients(Q, Z.T @ gradient, self.tau, RIDGE)
        moved = c * torch.tensor(self.rates * 2, dtype=torch.float64)
        self.divergence = (moved @ F_ @ moved).item()
        if not is_definite(Q, self.tau):  # correlations of d, which are new, beside averaged ones of v
            c, self.last = torch.cat([torch.ones(L), torch.full((L,), 0.5)]).double(), before
            self.fell_back += 1
        elif self.kl_clip is not None and self.divergence > self.kl_clip:
            c = c * (self.kl_clip / self.divergence) ** 0.5
        with torch.no_grad():
            for i, layer in enumerate(layers):
                for p in parts_of(layer):
                    self.D[id(p)] = c[i] * p.grad + c[L + i] * self.D[id(p)]
                    p -= self.rates[i] * (self.D[id(p)] + self.decays[i] * p)


@pytest.mark.parametrize("tau, kl_clip, max_change", [(3.0, None, 0.02), (0.5, 3e-4, None), (math.inf, 10.0, None)])
@pytest.mark.parametrize("name", NAMES)
def test_whole_steps_are_those_of_dense_algebra(name, tau, kl_clip, max_change):
    task = task_of(name)
    twin = copy.deepcopy(task)
    options = {"damping": 0.1, "cov_every": 2, "inv_every": 2, "max_change": max_change}
    first, *others = [m for m in task.model.modules() if getattr(m, "weight", None) is not None]
    groups = [
        {"params": list(first.parameters()), "lr": 0.3, "weight_decay": 0.1},
        {"params": [p for module in others for p in module.parameters()]},
    ]
    settings = {"params": groups, "lr": 0.7, "kl_clip": kl_clip, "coarse_damping": tau, "coarse_samples": 1000}
    opt = kfac2.KFAC(task.model, coarse="directions", **settings, **options)
    rates = [0.3] + [0.7] * (len(opt.layers) - 1)
    dense = Dense(twin, tau, kl_clip, rates, [0.1] + [0.0] * (len(rates) - 1), **options)
    assert dense.one_level.layers == opt.layers and opt.layers[0] == next(
        n for n, m in task.model.named_modules() if m is first
    )
    opt.preconditioner.took_statistics = lambda: None  # so few samples may switch it off
    before = flat(task.model.parameters())
    for seed in range(3):
        opt.zero_grad()
        out = task.model(task.x)
        assert opt.needs_fisher
        torch.manual_seed(seed)
        opt.accumulate_fisher(task.distribution(out))
        task.loss(out).backward()
        opt.step()
        dense.step(seed)
        assert_equal(flat(task.model.parameters()), flat(twin.model.parameters()))
        assert kl_clip != 3e-4 or dense.divergence > kl_clip
        assert dense.fell_back <= (seed > 0)  # it can only be where d is new
        assert kl_clip != 10.0 or dense.divergence < kl_clip
    for p, q in zip(task.model.parameters(), twin.model.parameters(), strict=True):
        assert_equal(opt.state[p]["momentum_buffer"], dense.D[id(q)])
    assert (flat(task.model.parameters()) - before).norm() > 1e-3 * before.norm()


def test_the_space_matters():
    """A guard for the test above: one level ends elsewhere, and so do another τ, and fewer samples."""
    ends = []
    for options in ({}, {"coarse": "directions"}, {"coarse": "directions", "coarse_damping": 0.1},
                    {"coarse": "directions", "coarse_samples": 3}):  # fmt: skip
        model, x, y = mlp()
        opt = kfac2.KFAC(model, **options)
        for _ in range(3):
            iterate(model, opt, x, y)
        ends.append(flat(model.parameters()))
    for i in range(4):
        for j in range(i):
            assert (ends[i] - ends[j]).norm() > 1e-4 * ends[i].norm()


# -- what is not finite -------------------------------------------------------------------------------------


def mlp(depth=2, seed=0, samples=24, dtype=torch.float64):
    torch.manual_seed(seed)
    model = nn.Sequential(*(m for _ in range(depth) for m in (nn.Linear(5, 5), nn.Tanh())), nn.Linear(5, 3)).to(dtype)
    return model, torch.randn(samples, 5, dtype=dtype), torch.arange(samples) % 3


def iterate(model, opt, x, y, at_rows=None, at_gradients=None):
    """One iteration; what is done to the log-probabilities of drawn labels, and to the gradients, may be said."""
    opt.zero_grad()
    out = model(x)
    if at_rows is None:
        opt.accumulate_fisher(Categorical(logits=out))
    else:
        drawn = Categorical(logits=out)
        log_prob = drawn.log_prob(drawn.sample())
        log_prob.register_hook(at_rows)
        opt.accumulate_fisher(log_prob)
    loss = F.cross_entropy(out, y)
    loss.backward()
    if at_gradients is not None:
        at_gradients(model)
    opt.step()
    return loss.item()


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
    opt = kfac2.KFAC(model, lr=0.8, momentum=0.6, coarse="directions")
    for _ in range(3):
        iterate(model, opt, x, y)
    assert opt.needs_fisher and opt.preconditioner.iteration % 5  # rows and no statistics
    assert_next_step_is_that_of_one_level(model, opt, lambda: iterate(model, opt, x, y, at_rows=lambda g: g * bad))
    assert all(p.isfinite().all() for p in model.parameters())
    assert_differs_from_one_level(model, opt, lambda: iterate(model, opt, x, y))


def test_logits_of_nan_in_an_iteration_of_rows_leave_a_step_of_one_level():
    model, x, y = mlp()
    opt = kfac2.KFAC(model, lr=0.8, momentum=0.6, coarse="directions")
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
    opt = kfac2.KFAC(model, lr=0.8, momentum=0.6, coarse="directions")
    for _ in range(3):
        iterate(model, opt, x, y)
    correlations = opt._directed.state()["correlations"]
    cholesky = torch.linalg.cholesky_ex
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "cholesky_ex", lambda Q: (cholesky(Q)[0], torch.ones((), dtype=torch.int32)))
        assert_next_step_is_that_of_one_level(model, opt, lambda: iterate(model, opt, x, y))
    assert torch.equal(opt._directed.state()["correlations"], correlations)
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
    opt = kfac2.KFAC(model, coarse="directions")
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
    opt, other = (kfac2.KFAC(one, coarse="directions") for one in (model, twin))
    curvature_of(opt).health.at_once = curvature_of(other).health.at_once = False
    for one, its in ((twin, other), (model, opt)):
        torch.manual_seed(1)
        for _ in range(at):
            iterate(one, its, x, y)
    signal, weights = opt._directed.signal, flat(model.parameters())
    buffers = flat([opt.state[p]["momentum_buffer"] for p in model.parameters()])
    before, correlations = signal.state(), opt._directed.state()["correlations"]
    iterate(model, opt, x, y, at_gradients=spoil)
    assert torch.equal(flat(model.parameters()), weights)
    assert torch.equal(flat([opt.state[p]["momentum_buffer"] for p in model.parameters()]), buffers)
    assert torch.equal(opt._directed.state()["correlations"], correlations)
    after = signal.state()
    assert after["last"] == before["last"] and math.isnan(after["measured"][-1])
    assert after["measured"][:-1] == before["measured"]
    share = signal.share
    signal._measured = signal._measured[-1:]
    signal.decide()  # of skipped steps alone nothing follows
    assert (signal.share, signal.is_on, signal._measured) == (share, True, [])
    iterate(model, opt, x, y)
    iterate(twin, other, x, y)  # which has skipped nothing
    assert signal.state()["measured"][-1] == pytest.approx(other._directed.signal.state()["measured"][-1], rel=1e-6)


# -- as on a device, by other ways, and after the end --------------------------------------------------------


def test_it_reads_nothing_back_where_it_may_not_and_is_the_same():
    ends, solved = [], []
    for depth, at_once in ((2, True), (2, False), (12, False)):
        model, x, y = mlp(depth)
        opt = kfac2.KFAC(model, coarse="directions", kl_clip=0.01, weight_decay=1e-3, cov_every=7)
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
            solved.append(opt._directed.latest.fine.isfinite().all())
    assert_equal(ends[1], ends[0], 1e-9)
    assert all(solved)


@pytest.mark.parametrize("options", [{"lr": torch.tensor(0.7, dtype=torch.float64)}, {"rest": "sgd"}])
def test_a_rate_that_is_a_tensor_and_what_trains_the_rest_change_nothing(options):
    ends = []
    for other in ({}, options):
        model, x, y = mlp()
        opt = kfac2.KFAC(model, **{"lr": 0.7, "coarse": "directions", **other})
        for _ in range(6):
            iterate(model, opt, x, y)
        ends.append(flat(model.parameters()))
    assert_equal(ends[1], ends[0], 1e-12)


@pytest.mark.parametrize("options", [{"inverse": "eigh"}, {"inverse": "ekfac"}, {"samples": 2}, {"fisher": "exact"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_options_and_dtypes_train(dtype, options):
    model, x, y = mlp(dtype=dtype)
    opt = kfac2.KFAC(model, coarse="directions", **options)
    losses = []
    for _ in range(12):
        opt.zero_grad()
        out = model(x).float()
        opt.accumulate_fisher(Categorical(logits=out))
        losses.append(F.cross_entropy(out, y))
        losses[-1].backward()
        opt.step()
    assert losses[-1] < 0.9 * losses[0] and opt._directed.latest.last.abs().sum() > 0


def test_steps_after_close_are_those_of_one_level():
    model, x, y = mlp()
    opt = kfac2.KFAC(model, lr=0.8, momentum=0.6, coarse="directions", kl_bound=None)
    for _ in range(3):
        iterate(model, opt, x, y)
    opt.close()
    assert not opt.needs_fisher
    for _ in range(3):
        assert_next_step_is_that_of_one_level(model, opt, lambda: iterate(model, opt, x, y))


# -- states -------------------------------------------------------------------------------------------------


def build(**options):
    torch.manual_seed(3)
    layers = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)]
    model = nn.Sequential(*layers).double()
    opt = kfac2.KFAC(model, **{"coarse": "directions", "cov_every": 3, "weight_decay": 1e-3, **options})
    return model, opt


def noisy(model, opt, own_passes):
    """An iteration of few samples with labels of pure noise."""
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.randint(0, 4, (8,))
    opt.zero_grad()
    out = model(x)
    if own_passes:
        opt.accumulate_fisher(lambda part: Categorical(logits=model(x[part])), samples=8)
    else:
        opt.accumulate_fisher(Categorical(logits=out))
    F.cross_entropy(out, y).backward()
    opt.step()


@pytest.mark.parametrize("own_passes", [False, True])
def test_resumed_training_equals_uninterrupted_training(own_passes, monkeypatch):
    monkeypatch.setattr("kfac2.signal_share.PROBE", 7)
    model, opt = build()
    saved, is_on = [], []
    for _ in range(40):
        saved.append(through_a_file([model.state_dict(), opt.state_dict(), torch.get_rng_state()]))
        is_on.append(opt._directed.signal.is_on)
        noisy(model, opt, own_passes)
    off = is_on.index(False)
    assert off > 2  # the first that is off
    trial = next(k for k in range(off + 1, 40) if k % 7 == 0 and not is_on[k])
    assert saved[trial + 1][1]["kfac"]["directed"]["signal"]["last"] is not None
    for at in (off // 2, off, trial, trial + 1):
        resumed, other = build()
        resumed.load_state_dict(saved[at][0])
        other.load_state_dict(saved[at][1])
        torch.set_rng_state(saved[at][2])
        for k in range(at, 40):
            assert other._directed.signal.is_on == is_on[k]
            noisy(resumed, other, own_passes)
        assert torch.equal(flat(model.state_dict().values()), flat(resumed.state_dict().values()))
        ours, theirs = flatten(opt.state_dict()), flatten(other.state_dict())
        assert ours.keys() == theirs.keys() and len(ours) > 30
        for key, value in ours.items():
            assert is_same(value, theirs[key]), key


def test_states_of_before_there_was_a_signal_load():
    model, opt = build(coarse=None)
    noisy(model, opt, False)
    state = copy.deepcopy(opt.state_dict())
    del state["kfac"]["directed"], state["kfac"]["options"]["coarse"], state["kfac"]["options"]["coarse_samples"]
    _, other = build(coarse=None)
    other.load_state_dict(state)
    assert other.preconditioner.iteration == 1
    model, opt = build()
    for _ in range(3):
        noisy(model, opt, False)
    state = copy.deepcopy(opt.state_dict())
    del state["kfac"]["directed"]
    opt._directed.signal.is_on = False
    opt.load_state_dict(state)
    assert opt._directed.state() == kfac2.KFAC(model, coarse="directions")._directed.state()
    noisy(model, opt, False)


@pytest.mark.parametrize("mine, theirs", [("directions", None), (None, "directions"), ("ones", "directions")])
def test_a_state_of_another_space_is_refused_by_name(mine, theirs):
    model, opt = build(coarse=theirs)
    noisy(model, opt, False)
    _, other = build(coarse=mine)
    before = flatten(other.state_dict())
    with pytest.raises(ValueError, match=f"saved with coarse={mine!r}, got {theirs!r}"):
        other.load_state_dict(opt.state_dict())
    assert flatten(other.state_dict()) == before


# -- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make, options, error, message", [
    (kfac2.Preconditioner, {"coarse": "directions"}, ValueError, "coarse must be None or 'ones' without an optimizer, got 'directions'"),
    (kfac2.Curvature, {"coarse": "directions"}, ValueError, "coarse must be None or 'ones' without an optimizer, got 'directions'"),
    (kfac2.KFAC, {"coarse": "directions", "fisher": "empirical"}, ValueError, "fisher must be 'mc' or 'exact' with coarse='directions', got 'empirical'"),
    (kfac2.KFAC, {"coarse": "directions", "nesterov": True}, ValueError, "nesterov must be False with coarse='directions'.* got True"),
    (kfac2.KFAC, {"coarse_damping": math.inf}, ValueError, "coarse_damping must be finite, but with coarse='directions', got inf"),
    (kfac2.KFAC, {"coarse": "ones", "coarse_damping": math.inf}, ValueError, "coarse_damping must be finite"),
    (kfac2.KFAC, {"coarse": "directions", "coarse_damping": 0.0}, ValueError, "coarse_damping must be a number above 0, or None, got 0.0"),
    (kfac2.KFAC, {"coarse": "directions", "coarse_samples": 0}, ValueError, "coarse_samples must be an int of at least 1, or None, got 0"),
    (kfac2.KFAC, {"coarse_samples": 1.5}, TypeError, "coarse_samples must be an int of at least 1, or None, got 1.5"),
    (kfac2.KFAC, {"coarse": "foo"}, ValueError, "coarse must be 'ones', 'directions', or None, got 'foo'"),
    (kfac2.KFAC, {"coarse": 2}, TypeError, "coarse must be 'ones', 'directions', or None, got 2"),
])  # fmt: skip
def test_refusals_at_construction(make, options, error, message):
    with pytest.raises(error, match=message):
        make(mlp()[0], **options)


def test_refusals_during_training_change_nothing():
    model, _, _ = mlp()
    opt = kfac2.KFAC(model, coarse="directions", coarse_damping=2.0)
    for name, value, message in [
        ("coarse", None, "coarse is fixed at construction .'directions'., got None"),
        ("coarse_samples", 0, "coarse_samples must be an int of at least 1"),
        ("coarse_damping", -1.0, "coarse_damping must be a number above 0"),
    ]:
        before = opt.options.as_dict()
        with pytest.raises(ValueError, match=message):
            setattr(opt.options, name, value)
        assert opt.options.as_dict() == before
    opt.options.coarse_damping = math.inf
    with pytest.raises(ValueError, match="nesterov must be False with coarse='directions'"):
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "nesterov": True})
    assert len(opt.param_groups) == 1
    for read in (opt.coarse_fisher, opt.coarse_sums):
        with pytest.raises(RuntimeError, match="no coarse sums without the space of ones"):
            read()


# -- when it pays -------------------------------------------------------------------------------------------


def shares(opt):
    """Collect φ of each step, as they are measured."""
    seen, signal = [], opt._directed.signal
    measured = signal.measured

    def keeping(*arguments):
        count = len(signal._measured)
        measured(*arguments)
        seen.extend(float(share) for share in signal._measured[count:])

    signal.measured = keeping
    return seen


@pytest.mark.parametrize("is_averaged", [False, True])
def test_without_noise_all_of_a_slope_is_there_on_the_next_batch(is_averaged, monkeypatch):
    """A quadratic loss with its exact Fisher; with correlations of steps before the model is not quite exact."""
    if not is_averaged:
        monkeypatch.setattr("kfac2.coarse.directions.KEPT", 0.0)
    torch.manual_seed(0)
    model = nn.Linear(6, 3).double()
    x = torch.randn(30, 6, dtype=torch.float64)
    y = x @ torch.randn(6, 3, dtype=torch.float64) + torch.randn(30, 3, dtype=torch.float64)
    opt = kfac2.KFAC(model, coarse="directions", fisher="exact", lr=0.2, damping=1.0, coarse_samples=30)
    seen = shares(opt)
    for _ in range(12):
        opt.zero_grad()
        out = Normal(model(x), 1.0)
        opt.accumulate_fisher(out)
        (-out.log_prob(y)).mean().backward()
        opt.step()
        assert opt._directed.signal.is_on
    assert len(seen) == 11
    assert seen == pytest.approx([1.0] * 11, abs=0.3 if is_averaged else 1e-6)
    assert opt._directed.signal.share == pytest.approx(1.0, abs=0.2 if is_averaged else 1e-6)


def test_noise_switches_the_space_off_and_trials_go_on():
    model, opt = build(weight_decay=0.0)
    signal, wanted = opt._directed.signal, []
    for k in range(130):
        is_on, is_due = signal.is_on, k % 3 == 0
        assert opt.needs_fisher == (is_on or is_due or k % 20 == 0)
        waits = signal.waits
        if opt.ordinary:
            assert not is_on and not is_due and k % 20 and not waits
        wanted.append(signal.wants_step(k))
        latest = opt._directed.latest
        noisy(model, opt, False)
        took = opt._directed.latest is not latest
        # what statistics have shown counts at once, but for an iteration that has looked at too few rows
        assert took == signal.wants_step(k) or (took, is_due) == (False, True)
        assert opt.curvature.iteration.kept == []
    off = wanted.index(False)
    assert 5 < off < 80
    assert not all(wanted[off:]) and any(not w for w in wanted[-20:])
    assert all(wanted[k] for k in range(0, 130, 20))
    assert opt.preconditioner.schedule.most_damping == math.inf or signal.is_on


def test_an_iteration_that_measures_a_trial_is_not_ordinary():
    model, opt = build(weight_decay=0.0, cov_every=1000, inv_every=1000, burn_in=1)
    noisy(model, opt, False)
    opt._directed.signal.is_on = False
    opt._directed.signal.share = 0.1
    noisy(model, opt, False)  # measures the last of the steps in the space
    kinds = []
    for _ in range(2, 24):
        kinds.append((opt.preconditioner.iteration, opt.needs_fisher, opt.ordinary))
        if opt.preconditioner.iteration == 21:
            with pytest.raises(RuntimeError, match="counts an ordinary iteration, got iteration 21"):
                opt.replayed()
        noisy(model, opt, False)
    assert kinds == [(k, k == 20, k not in (20, 21)) for k in range(2, 24)]
    assert len(opt._directed.signal._measured) == 2
    opt.replayed()
    assert opt.preconditioner.iteration == 25


def test_a_share_that_recovers_takes_the_space_again():
    signal = kfac2.signal_share.SignalShare()
    one = torch.ones((), dtype=torch.float64)
    for slope, is_on, share in [(-9.0, True, 0.4), (-9.0, False, -0.02), (0.0, False, -0.014)]:
        if slope == 0.0:
            signal.share, slope = 0.5, -0.9
            share, is_on = 0.7 * 0.5 + 0.3 * 0.1, False
        elif share == 0.4:
            share, is_on = 0.7 - 0.3, False
        else:
            share = 0.7 * 0.4 - 0.3
        signal.took(one, one)
        assert signal.waits
        signal.measured(one * slope)
        assert not signal.waits
        signal.decide()
        assert (signal.share, signal.is_on) == (pytest.approx(share), is_on)
    signal.share = 0.47
    signal.took(one, one)
    signal.measured(one * -0.45)  # φ is 0.55
    signal.decide()
    assert not signal.is_on and signal.share == pytest.approx(0.494)  # in between it stays as it is
    signal.took(one, one)
    signal.measured(0.0 * one)
    signal.decide()
    assert signal.is_on and signal.share == pytest.approx(0.6458)
    signal.decide()
    signal.measured(one)  # along nothing
    signal.took(one, one)
    signal.measured(None)
    signal.decide()
    assert signal.share == pytest.approx(0.6458)


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
    opt = kfac2.KFAC(model, coarse="directions")
    for _ in range(3):
        branched(opt, model, x, y, True)
    own = [*model.b.parameters()]
    before = [(p.detach().clone(), opt.state[p]["momentum_buffer"].clone()) for p in own]
    head = model.head.weight.detach().clone()
    for _ in range(4):
        branched(opt, model, x, y, False)
        assert opt._directed.latest.names == ("a", "head")
    for (old, d), p in zip(before, own, strict=True):
        assert torch.equal(p, old) and torch.equal(opt.state[p]["momentum_buffer"], d)
    assert not torch.equal(model.head.weight, head)
    branched(opt, model, x, y, True)
    assert opt._directed.latest.names == ("a", "b", "head")
    assert all(not torch.equal(p, old) for (old, _), p in zip(before, own, strict=True))


def test_a_layer_that_leaves_and_one_that_is_frozen():
    torch.manual_seed(0)
    model, x, y = Branches(), torch.randn(16, 5).double(), torch.arange(16) % 3
    opt = kfac2.KFAC(model, coarse="directions")
    for _ in range(3):
        branched(opt, model, x, y, True)
    curvature = opt.curvature
    with pytest.warns(RuntimeWarning, match="b leaves K-FAC"):
        curvature.drop(curvature.layout.layers[1], "it is dropped by a test")
    for _ in range(3):
        before = model.b.weight.detach().clone()
        branched(opt, model, x, y, True)
        assert opt._directed.latest.names == ("a", "head") and opt._part(1000) == 32
        assert not torch.equal(model.b.weight, before)  # by AdamW
    with pytest.warns(RuntimeWarning, match="a leaves K-FAC"):
        for p in model.a.parameters():
            p.requires_grad_(False)
        before = model.a.weight.detach().clone()
        for _ in range(3):
            branched(opt, model, x, y, True)
    assert opt._directed.latest.names == ("head",) and torch.equal(model.a.weight, before)


def test_a_bias_that_is_frozen_is_left_alone():
    model, x, y = mlp()
    model[0].bias.requires_grad_(False)
    opt = kfac2.KFAC(model, coarse="directions")
    before = model[0].bias.detach().clone()
    losses = [iterate(model, opt, x, y) for _ in range(8)]
    assert torch.equal(model[0].bias, before) and losses[-1] < losses[0]


def test_a_shared_layer_trains():
    task = task_of("shared")
    opt = kfac2.KFAC(task.model, coarse="directions")
    losses = []
    for _ in range(12):
        opt.zero_grad()
        out = task.model(task.x)
        opt.accumulate_fisher(Categorical(logits=out))
        loss = F.cross_entropy(out, task.target)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert opt._directed.latest.names == ("inner", "head", "conv") and losses[-1] < 0.9 * losses[0]


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
    s, cases = derivatives([kept_of(passed, 12)], layers, as_matrices(layers, (v,)))
    assert s.shape == (12 + 7, 1, 3) and cases == 12
    J, _ = scores(task, [p for layer in layers for p in parts_of(layer)], 12)
    dense = J @ as_columns(layers, v)
    wanted = dense.T @ dense / 12
    wanted[1, [0, 2]] = wanted[[0, 2], 1] = 0.0  # nobody knows
    assert_equal((s[:, 0].T @ s[:, 0]) / cases, wanted, 1e-12)
    opt = kfac2.KFAC(task.model, coarse="directions")
    losses = [iterate(task.model, opt, task.x, task.target) for _ in range(12)]
    assert losses[-1] < 0.9 * losses[0] and opt._directed.latest.names == ("inner", "expert", "head")


# -- whether it helps ---------------------------------------------------------------------------------------


def test_a_deep_network_without_noise_ends_lower():
    wins = 0
    for seed in range(3):
        ends = []
        for coarse in (None, "directions"):
            model, x, _ = mlp(8, seed, 128, torch.float32)
            y = (x[:, 0] * x[:, 1] > 0).long() + (x[:, 2] > 0.5).long()
            torch.manual_seed(seed)
            opt = kfac2.KFAC(model, coarse=coarse)
            ends.append([iterate(model, opt, x, y) for _ in range(60)][-1])
        wins += ends[1] < ends[0]
    assert wins >= 2

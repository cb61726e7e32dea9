"""The space of directions: exact against dense algebra, never uphill, and what it refuses."""

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
from inside import curvature_of, directed
from test_bounds import sampled_pass, scores
from torch.distributions import Categorical

import kfac2
from kfac2.coarse.directions import RIDGE, Quadratic, coefficients, products, quadratic, with_correlations
from kfac2.directed import _inner_products, _Layers
from kfac2.divergence import Matrices, derivatives, kept_of

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


# -- the quadratic model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_quadratic_model_is_that_of_the_dense_fisher(name):
    task = task_of(name)
    layers, passed = sampled_pass(task)
    parameters = [p for layer in layers for p in parts_of(layer)]
    v, d, gradient = ({id(p): torch.randn_like(p) for p in parameters} for _ in range(3))
    matrices = Matrices(layers, 2).of((v, d))
    s, cases = derivatives([kept_of(passed, passed.samples)], layers, matrices)
    gradients = [m.flatten() for m in Matrices(layers, 1).of((gradient,))]
    model = quadratic(products(s) / cases, *_inner_products(matrices, gradients), _Layers(layers).squares())

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
    assert_equal(_Layers(layers).squares()[0], torch.tensor(1e-6 * 25, dtype=torch.float64), 1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("is_new", [False, True])
def test_correlations_are_averaged_and_variances_are_not(seed, is_new):
    """Where there was no last update before, a mean of some entries might be indefinite: those of the step are taken."""
    torch.manual_seed(seed)
    S, T = torch.randn(2, 20, 6, dtype=torch.float64)
    if is_new:
        S[:, 4:] = 0.0
    first = Quadratic(S.T @ S, torch.zeros(6, 6), torch.zeros(6))
    same, correlations = with_correlations(first, None)
    assert_equal(same.fisher, first.fisher, 1e-12)
    second = Quadratic(T.T @ T, torch.zeros(6, 6), torch.zeros(6))
    model, latest = with_correlations(second, correlations)

    def correlated(Q):
        spread = Q.diagonal().sqrt()
        return Q / spread[:, None] / spread

    wanted = correlated(second.fisher)
    if not is_new:
        wanted = (wanted + correlated(first.fisher)) / 2
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
    model = quadratic(S.T @ S / 40, grams, slopes, weights)
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
def test_with_correlations_so_far_it_goes_down(drawn, seed, rows):
    """Those so far are of other rows; where d is new, the second step, they do not count."""
    model, tau = drawn
    size = len(model.slopes)
    S = torch.randn(rows, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    if seed % 2:
        S[:, size // 2 :] = 0.0
    last = with_correlations(Quadratic(S.T @ S, S.T @ S, S.sum(0)), None)[1]
    model, latest = with_correlations(model, last)
    c, shared = coefficients(model, tau), coefficients(model, math.inf)
    assert torch.linalg.eigvalsh(latest)[0] > -1e-9 and c.isfinite().all()
    slope, value, size = terms(model, c)
    _, of_shared, size_of_shared = terms(model, shared)
    tiny = 1e-9 * (size + size_of_shared)
    assert slope >= -tiny and value <= of_shared + tiny and of_shared <= tiny


# -- whole steps --------------------------------------------------------------------------------------------


class Dense:
    """Steps in the space of directions on dense matrices, from the gradients that one level's `Preconditioner` leaves.

    Everything else is written out: one row of scores for each sample, Z column by column, Q, c and D.
    """

    def __init__(self, task, tau, most, rates, decays, **options):
        self.task, self.tau, self.most, self.rates, self.decays = task, tau, most, rates, decays
        self.one_level = kfac2.Preconditioner(task.model, kl_clip=None, **options)
        self.layers = curvature_of(self.one_level).layout.layers
        self.D = {id(p): torch.zeros_like(p) for layer in self.layers for p in parts_of(layer)}
        self.last = None

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
        if self.last is not None and torch.equal(self.last.diagonal() > 0, new.diagonal() > 0):
            new = (new + self.last) / 2
        self.last, F_ = new, spread[:, None] * new * spread
        Q = F_.clone()
        for i, layer in enumerate(layers):
            both = [i, L + i]
            weights = sum(p.detach().square().sum() for p in parts_of(layer))
            Q[[[i], [L + i]], both] += 0.1 / weights * (Z[:, both].T @ Z[:, both])
        c = dense_coefficients(Q, Z.T @ gradient, self.tau, RIDGE)
        lengths = [self.rates[i] * (Z[:, [i, L + i]] @ c[[i, L + i]]).norm() for i in range(L)]
        weights = [math.sqrt(sum(p.detach().square().sum() for p in parts_of(layer))) for layer in layers]
        c = c * min([1.0, *(0.3 * w / float(d) for w, d in zip(weights, lengths, strict=True))])
        moved = c * torch.tensor(self.rates * 2, dtype=torch.float64)
        self.divergence = (moved @ F_ @ moved).item()
        if self.most is not None and self.divergence > self.most:
            c = c * (self.most / self.divergence) ** 0.5
        with torch.no_grad():
            for i, layer in enumerate(layers):
                for p in parts_of(layer):
                    self.D[id(p)] = c[i] * p.grad + c[L + i] * self.D[id(p)]
                    p -= self.rates[i] * (self.D[id(p)] + self.decays[i] * p)


@pytest.mark.parametrize("tau, most, max_change", [(3.0, None, 0.02), (0.5, 3e-4, None), (math.inf, 10.0, None)])
@pytest.mark.parametrize("name", NAMES)
def test_whole_steps_are_those_of_dense_algebra(name, tau, most, max_change):
    task = task_of(name)
    twin = copy.deepcopy(task)
    options = {"damping": 0.008, "cov_every": 2, "inv_every": 2, "max_change": max_change}
    first, *others = [m for m in task.model.modules() if getattr(m, "weight", None) is not None]
    groups = [
        {"params": list(first.parameters()), "lr": 0.3, "weight_decay": 0.1},
        {"params": [p for module in others for p in module.parameters()]},
    ]
    settings = {"params": groups, "lr": 0.7, "kl_clip": None, "coarse_damping": tau, "coarse_samples": 1000}
    settings["kl_bound"] = None if most is None else 5 * most
    opt = directed(task.model, **settings, **options)
    rates = [0.3] + [0.7] * (len(opt.layers) - 1)
    dense = Dense(twin, tau, most, rates, [0.1] + [0.0] * (len(rates) - 1), **options)
    assert dense.one_level.layers == opt.layers and opt.layers[0] == next(
        n for n, m in task.model.named_modules() if m is first
    )
    opt._whole_step.directed.decide = lambda: None  # so few samples may switch it off
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
        assert most != 3e-4 or dense.divergence > most
        assert most != 10.0 or dense.divergence < most
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


# -- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make, options, error, message", [
    (kfac2.Preconditioner, {"coarse": "directions"}, ValueError, "coarse must be None or 'ones' without an optimizer, got 'directions'"),
    (kfac2.Curvature, {"coarse": "directions"}, ValueError, "coarse must be None or 'ones' without an optimizer, got 'directions'"),
    (kfac2.KFAC, {"coarse": "directions", "fisher": "empirical"}, ValueError, "fisher must be 'mc' or 'exact' with coarse='directions', got 'empirical'"),
    (kfac2.KFAC, {"coarse": "directions", "nesterov": True}, ValueError, "nesterov must be False with coarse='directions'.* got True"),
    (kfac2.KFAC, {"coarse": "directions", "levels": 2}, ValueError, "levels must be 1 with coarse='directions', got 2"),
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
    opt = directed(model, coarse_damping=2.0)
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

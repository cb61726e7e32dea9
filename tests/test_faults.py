"""Faults that a review of the rebuilt middle found, each with its right value."""

import copy
import gc
import weakref
from dataclasses import replace

import models
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from compare import assert_equal
from inside import curvature_of, fields
from paper import KFAC, Curvature
from test_ekfac import sampled_fishers
from torch.distributions import Categorical


def iterate(model, opt, x, y=None, seed=None):
    if seed is not None:
        torch.manual_seed(seed)
    opt.zero_grad()
    out = model(x)
    opt.accumulate_fisher(Categorical(logits=out))
    F.cross_entropy(out, torch.arange(len(x)) % out.shape[1] if y is None else y).backward()
    opt.step()


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))


def test_squares_that_overflow_skip_the_step_and_leave_no_trace():
    model = net()
    opt = KFAC(model, inverse="ekfac", cov_every=1)
    for _ in range(2):
        iterate(model, opt, X)
    before = {name: value.clone() for name, value in fields(opt, "0").items()}
    layer = curvature_of(opt).layout.layers[0]
    opt.zero_grad()
    out = model(X)
    opt.accumulate_fisher(Categorical(logits=out))
    curvature_of(opt).iteration.pending[0].sums.squares[layer].fill_(float("inf"))
    out.sum().backward()
    with pytest.warns(RuntimeWarning, match="the statistics of 0 at iteration 2; the step is skipped"):
        opt.step()
    assert all(torch.equal(value, before[name]) for name, value in fields(opt, "0").items())
    assert curvature_of(opt).inverses.observations == 1


def test_a_mended_basis_has_no_observation_and_takes_the_next_one_whole():
    model = net().double()
    x = X.double()
    opt = KFAC(model, inverse="ekfac", cov_every=1, inv_every=100, lr=0.0)
    for seed in range(3):
        iterate(model, opt, x, seed=seed)
    curvature = curvature_of(opt)
    failed = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    curvature.estimates.inverses = replace(curvature.inverses, failed=failed)
    with pytest.warns(RuntimeWarning, match="a factor of 0 is not positive definite"):
        curvature.estimates.mend()
    assert curvature.inverses.observed == (False, True)
    mended = fields(opt, "0")["diagonal"].clone()
    task = models.Task(model, x, torch.arange(12) % 3)
    (fisher,) = sampled_fishers(task, ["0"], 7)["0"]
    iterate(model, opt, x, seed=7)
    kept = fields(opt, "0")
    V = torch.kron(kept["A_vectors"][0].contiguous(), kept["G_vectors"][0].contiguous())
    assert_equal(kept["diagonal"][0].T.reshape(-1), (V.T @ fisher @ V).diagonal())  # nothing of K-FAC's is mixed in
    assert not torch.equal(kept["diagonal"], mended) and curvature.inverses.observed == (True, True)


@pytest.mark.parametrize("inverse", ["cholesky", "ekfac"])
def test_a_model_that_changes_its_dtype_keeps_its_inverses_and_a_state_loads_into_it(inverse):
    model = net()
    opt = KFAC(model, inverse=inverse, cov_every=3, inv_every=100, momentum=0.0)
    for seed in range(4):
        iterate(model, opt, X, seed=seed)
    before = {name: value.clone() for name, value in fields(opt, "0").items()}
    model.double()
    iterate(model, opt, X.double(), seed=4)
    assert all(torch.equal(value, before[name].double()) for name, value in fields(opt, "0").items())
    for seed in (5, 6):  # statistics in float64
        iterate(model, opt, X.double(), seed=seed)
    assert opt.factors("0")[0].dtype == torch.float64
    twin = net()
    other = KFAC(twin, inverse=inverse, cov_every=3, inv_every=100, momentum=0.0)
    twin.double().load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for seed in (7, 8):
        iterate(model, opt, X.double(), seed=seed)
        iterate(twin, other, X.double(), seed=seed)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_solve_of_a_training_curvature_changes_nothing_and_is_not_changed():
    ends, answers = [], []
    for looks in (False, True):
        model = net()
        opt = KFAC(model, cov_every=2, inv_every=100)
        gradients = {name: torch.ones_like(p) for name, p in model.named_parameters()}
        for seed in range(5):
            if looks and seed:
                answers.append(opt.curvature.solve(gradients, 10.0)["0.weight"])
            iterate(model, opt, X, seed=seed)
        ends.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))
    assert torch.equal(answers[0], answers[1])  # the same statistics, a step between


def test_a_graph_does_not_outlive_inverses_that_a_state_took_away(monkeypatch):
    import kfac2.preconditioner

    model = net()
    opt = KFAC(model, cov_every=100, inv_every=100)
    curvature_of(opt).health.at_once = False
    fresh = copy.deepcopy(opt.state_dict())
    iterate(model, opt, X)
    monkeypatch.setattr(kfac2.preconditioner, "is_capturing", lambda device: True)
    iterate(model, opt, X)
    monkeypatch.setattr(kfac2.preconditioner, "is_capturing", lambda device: False)
    assert opt.ordinary
    opt.load_state_dict(fresh)
    iterate(model, opt, X)
    assert not opt.ordinary


def test_captures_are_freed_without_the_garbage_collector():
    model = net()
    opt = KFAC(model, fisher="empirical", cov_every=1)
    gc.collect()
    gc.disable()
    try:
        F.cross_entropy(model(X), torch.arange(12) % 3).backward()
        records = [weakref.ref(record) for record in curvature_of(opt).collector.captures.received]
        opt.step()
        assert len(records) == 2 and not any(record() for record in records)
    finally:
        gc.enable()


def test_states_of_other_kinds_change_nothing():
    model = net()
    opt = KFAC(model)
    iterate(model, opt, X)
    bare = Curvature(model)
    bare.load_state_dict(opt.curvature.state_dict())  # options that it lacks are no fault
    assert torch.equal(bare.coarse_fisher(), opt.coarse_fisher())
    state, before = copy.deepcopy(opt.state_dict()), copy.deepcopy(opt.state_dict())
    del state["kfac"]["statistics"]["fisher"]
    state["kfac"]["options"]["damping"] = 7.0
    with pytest.raises(ValueError, match=r"got statistics without .'fisher'."):
        opt.load_state_dict(state)
    assert opt.options.damping == before["kfac"]["options"]["damping"]


def test_the_empirical_fisher_takes_no_distribution():
    task = models.task("linear")
    curvature = Curvature(task.model, fisher="empirical")
    with pytest.raises(ValueError, match="empirical"):
        curvature.accumulate(task.distribution(task.model(task.x)))


def test_a_late_warning_names_what_it_was_about_when_parameters_have_joined():
    model = net().double()
    opt = KFAC(model, kl_clip=None, cov_every=100)
    curvature_of(opt).health.at_once = False
    iterate(model, opt, X.double())
    opt.zero_grad()
    F.cross_entropy(model(X.double()), torch.arange(12) % 3).backward()
    model[2].weight.grad.fill_(1e200)
    opt.step()
    with pytest.warns(RuntimeWarning, match="in the preconditioned gradients"):
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(2).double())]})


def test_a_transposed_convolution_whose_padding_cuts_off_more_than_the_map():
    module = nn.ConvTranspose1d(1, 1, 1, stride=5, padding=2, output_padding=4).double()
    curvature = Curvature(module)
    out = module(torch.randn(3, 1, 1, dtype=torch.float64))
    curvature.accumulate(torch.distributions.Normal(out, 1.0))
    A, _ = curvature.factors("")
    assert_equal(A[1, 1], torch.tensor(1.0, dtype=torch.float64))  # the bias: every place is one case


def test_a_solve_where_no_layer_is_left():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3))
    curvature = Curvature(model)
    curvature.accumulate(Categorical(logits=model(X)))
    curvature.drop(curvature.layout.layers[0])
    gradient = torch.randn(3, 4)
    assert torch.equal(curvature.solve({"0.weight": gradient}, 0.1)["0.weight"], gradient)

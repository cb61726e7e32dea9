"""Steps that read nothing back, as on a CUDA device: forced on a CPU, where everything else is the same."""

import copy
from dataclasses import replace

import models
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from compare import assert_equal
from inside import curvature_of, fields, is_usable, set_factor
from paper import KFAC, Preconditioner
from test_not_finite import iterate, net, same, snapshot
from torch.utils._python_dispatch import TorchDispatchMode


def unread(opt):
    curvature_of(opt).health.at_once = False
    return opt


def train(opt, task, steps):
    for _ in range(steps):
        opt.zero_grad()
        out = task.model(task.x)
        opt.accumulate_fisher(task.distribution(out))
        task.loss(out).backward()
        opt.step()


@pytest.mark.parametrize("options", [{}, {"inverse": "eigh"}, {"levels": 1, "kl_clip": None, "nesterov": True}])
@pytest.mark.parametrize("name", ["linear", "conv2d", "grouped"])
def test_follows_the_ordinary_way(name, options):
    task = models.task(name)
    tasks = [task, copy.deepcopy(task)]
    options = {"cov_every": 2, "inv_every": 3, "weight_decay": 1e-3, **options}
    for task, make in zip(tasks, (lambda opt: opt, unread), strict=True):
        torch.manual_seed(1)
        train(make(KFAC(task.model, lr=0.05, **options)), task, 7)
    for p, q in zip(tasks[0].model.parameters(), tasks[1].model.parameters(), strict=True):
        assert_equal(q, p, 1e-10)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", ["3.bias", "1.weight"])
def test_a_bad_gradient_moves_nothing_and_is_reported_later(name, momentum):
    model = net()
    opt = unread(KFAC(model, cov_every=3, momentum=momentum, weight_decay=0.1))
    x = torch.randn(6, 3)
    for _ in range(4):
        iterate(model, opt, x)
    before = snapshot(model, opt)
    model.eval()
    parameter = dict(model.named_parameters())[name]
    iterate(model, opt, x, poison=lambda: parameter.grad[0].fill_(float("nan")))
    assert all((p.grad == 0).all() for p in model.parameters())
    assert opt.preconditioner.found.item() == 1
    with pytest.warns(RuntimeWarning, match=f"1 steps before iteration 5 were skipped; .*the gradient of {name}"):
        assert opt.check() == 1
    assert same(before, snapshot(model, opt))
    assert opt.check() == 0
    model.train()
    iterate(model, opt, x)
    assert opt.preconditioner.found.item() == 0 and not same(before, snapshot(model, opt))


def test_the_first_momentum_of_a_skipped_step_is_none():
    model = net()
    opt = unread(KFAC(model, cov_every=100))
    x = torch.randn(6, 3)
    iterate(model, opt, x)
    opt.state.clear()
    before = [p.clone() for p in model.parameters()]
    iterate(model, opt, x, poison=lambda: model[0].weight.grad.fill_(float("inf")))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all((state["momentum_buffer"] == 0).all() for state in opt.state.values())


def test_statistics_report_what_was_skipped_and_skip_what_is_bad_themselves():
    model = net()
    opt = unread(KFAC(model, cov_every=2))
    x = torch.randn(6, 3)
    iterate(model, opt, x)
    iterate(model, opt, x, poison=lambda: model[0].weight.grad.fill_(float("inf")))
    with pytest.warns(RuntimeWarning, match="1 steps before iteration 2 were skipped; .*the gradient of 0.weight"):
        iterate(model, opt, x)
    iterate(model, opt, x)
    before = snapshot(model, opt)
    model.eval()
    with pytest.warns(RuntimeWarning, match="the gradient of 3.weight at iteration 4; the step is skipped"):
        iterate(model, opt, x, poison=lambda: model[3].weight.grad.fill_(float("nan")))
    assert same(before, snapshot(model, opt))


INDEFINITE = torch.diag(torch.tensor([2.0, 1.0, 0.5, -4.0]))


@pytest.mark.parametrize("inverse", ["cholesky", "eigh"])
def test_a_failed_inverse_leaves_the_last_one_until_it_is_mended(inverse):
    model, x = net(), torch.randn(6, 3)
    opts = []
    for make in (unread, lambda opt: opt):
        mine = copy.deepcopy(model)
        opt = make(KFAC(mine, cov_every=100, inv_every=2, inverse=inverse))
        torch.manual_seed(0)
        iterate(mine, opt, x)
        iterate(mine, opt, x)
        bad = INDEFINITE if inverse == "cholesky" else INDEFINITE * float("nan")
        set_factor(opt, "0", bad)
        opts.append((mine, opt))
    (mine, opt), (other, expected) = opts
    last = {name: value.clone() for name, value in fields(opt, "0").items()}
    iterate(mine, opt, x)
    assert all(torch.equal(fields(opt, "0")[name], last[name]) for name in last)
    with pytest.warns(RuntimeWarning, match="a factor of 0 is not"):
        opt.check()
    with pytest.warns(RuntimeWarning, match="a factor of 0 is not"):
        iterate(other, expected, x)
    wanted = fields(expected, "0")
    for name in last:
        assert_equal(fields(opt, "0")[name], last[name] if inverse == "eigh" else wanted[name], 1e-4)
    iterate(mine, opt, x)
    assert all(p.isfinite().all() for p in mine.parameters())


def test_without_any_inverse_a_layer_keeps_its_gradient():
    model, x = net(), torch.randn(6, 3)
    opt = unread(KFAC(model, cov_every=100, inv_every=100, momentum=0, kl_clip=None))
    iterate(model, opt, x)
    set_factor(opt, "0", INDEFINITE * float("nan"))
    state = opt.state_dict()
    state["kfac"]["inverses"] = None
    opt = unread(KFAC(model, cov_every=100, inv_every=100, momentum=0, kl_clip=None))
    opt.load_state_dict(state)
    opt.zero_grad()
    F.cross_entropy(model(x), torch.arange(6) % 2).backward()
    gradients = [p.grad.clone() for p in model[0].parameters()]
    other = model[3].weight.grad.clone()
    opt.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model[0].parameters(), gradients, strict=True))
    assert not torch.equal(model[3].weight.grad, other)
    with pytest.warns(RuntimeWarning, match="a factor of 0 is not finite"):
        assert "0" not in opt.state_dict()["kfac"]["inverses"]["fine"]


class Calls(TorchDispatchMode):
    """Names of the ops that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"inverse": "eigh"}])
def test_an_ordinary_step_reads_nothing_and_calls_nothing_for_each_layer(options):
    counts = []
    for depth in (3, 40):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(depth)))
        opt = unread(KFAC(model, cov_every=100, inv_every=100, **options))
        x = torch.randn(6, 4)
        iterate(model, opt, x)
        iterate(model, opt, x)
        opt.zero_grad()
        F.cross_entropy(model(x), torch.arange(6) % 4).backward()
        with Calls() as calls:
            opt.step()
        assert not [name for name in calls.names if "_local_scalar_dense" in name or "nonzero" in name]
        counts.append(len(calls.names))
    assert counts[0] == counts[1]


def test_a_rate_on_the_device_is_not_read_and_counts_in_the_clip():
    model, x = net(), torch.randn(6, 3)
    results = []
    for lr in (0.3, torch.tensor(0.3)):
        mine = copy.deepcopy(model)
        torch.manual_seed(0)
        opt = unread(KFAC(mine, lr=lr, kl_clip=1e-4))
        for _ in range(3):
            iterate(mine, opt, x)
        results.append([p.detach() for p in mine.parameters()])
    for p, q in zip(*results, strict=True):
        assert_equal(p, q, 1e-5)


def test_counting_replayed_steps():
    model, x = net(), torch.randn(6, 3)
    opt = KFAC(model, cov_every=2, inv_every=3)
    assert not opt.ordinary
    iterate(model, opt, x)
    assert opt.ordinary
    opt.replayed()
    assert not opt.ordinary  # statistics
    with pytest.raises(RuntimeError, match="iteration 2, which wants"):
        opt.replayed()
    iterate(model, opt, x)
    assert not opt.ordinary and not opt.needs_fisher  # inverses


def test_preconditioner_alone_zeroes_the_gradients():
    model = net()
    preconditioner = unread(Preconditioner(model, kl_clip=None, cov_every=100))
    for bad in (False, True):
        model.zero_grad()
        out = model(torch.randn(4, 3))
        preconditioner.accumulate_fisher(torch.distributions.Categorical(logits=out))
        out.sum().backward()
        if bad:
            model[1].weight.grad[0] = float("nan")
        assert preconditioner.step()
    assert all((p.grad == 0).all() for p in model.parameters())
    with pytest.warns(RuntimeWarning, match="the gradient of 1.weight"):
        preconditioner.check()


def test_sparse_gradients_are_looked_at_by_the_host():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    opt = unread(KFAC(model, cov_every=100, momentum=0))
    words = torch.tensor([0, 2, 3, 3])
    for _ in range(2):
        iterate(model, opt, words)
    before = [p.detach().clone() for p in model.parameters()]

    def poison():
        model[0].weight.grad = model[0].weight.grad * float("inf")

    with pytest.warns(RuntimeWarning, match="the gradient of 0.weight"):
        iterate(model, opt, words, poison=poison)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_the_parameter_is_named_of_the_step_that_failed():
    model = net()
    opt = unread(KFAC(model, cov_every=100, inv_every=100))
    x = torch.randn(6, 3)
    for _ in range(2):
        iterate(model, opt, x)
    iterate(model, opt, x, poison=lambda: model[3].weight.grad.fill_(float("nan")))
    iterate(model, opt, x, poison=lambda: setattr(model[0].weight, "grad", None))
    with pytest.warns(RuntimeWarning, match="the gradient of 3.weight"):
        opt.check()


def test_reports_outlive_a_layer_that_leaves():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    opt = unread(KFAC(model, cov_every=3))
    x = torch.randn(6, 3)
    iterate(model, opt, x)
    iterate(model, opt, x, poison=lambda: model[1].weight.grad.fill_(float("nan")))
    iterate(model, opt, x)
    model[0].weight.requires_grad_(False)
    with pytest.warns(RuntimeWarning) as caught:
        iterate(model, opt, x)
    messages = [str(warning.message) for warning in caught]
    assert any("1 steps before iteration 3 were skipped" in m and "1.weight" in m for m in messages)
    assert any("0 leaves K-FAC" in m and "frozen" in m for m in messages)
    assert opt.layers == ["1"]


def test_a_failed_inverse_beside_a_layer_of_another_precision_is_saved_sound():
    torch.manual_seed(0)

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2).double()

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)).double())

    model, x = Mixed(), torch.randn(6, 3)
    opt = unread(KFAC(model, cov_every=100, inv_every=2))
    for _ in range(2):
        iterate(model, opt, x)
    set_factor(opt, "a", INDEFINITE)
    iterate(model, opt, x)
    with pytest.warns(RuntimeWarning, match="a factor of a is not positive definite"):
        saved = opt.state_dict()["kfac"]["inverses"]["fine"]["a"]
    assert saved["A_inv"].dtype == torch.float32 and (torch.linalg.eigvalsh(saved["A_inv"][0]) > 0).all()


def test_an_inverse_that_fails_right_after_loading_leaves_the_loaded_one():
    model, x = net(), torch.randn(6, 3)
    opt = unread(KFAC(model, cov_every=100, inv_every=2))
    for _ in range(2):
        iterate(model, opt, x)
    saved = copy.deepcopy(opt.state_dict())
    wanted = saved["kfac"]["inverses"]["fine"]["0"]["A_inv"].clone()
    fresh = unread(KFAC(model, cov_every=100, inv_every=2))
    fresh.load_state_dict(saved)
    set_factor(fresh, "0", INDEFINITE * float("nan"))
    iterate(model, fresh, x)
    assert torch.equal(fields(fresh, "0")["A_inv"], wanted)
    fresh.load_state_dict(saved)  # what is pending belongs to the run that was left
    assert fresh.check() == 0 and is_usable(fresh, "0")


@pytest.fixture
def capture(monkeypatch):
    """Run a step as if a CUDA graph of it were captured."""
    import kfac2.preconditioner

    def run(step):
        monkeypatch.setattr(kfac2.preconditioner, "is_capturing", lambda device: True)
        step()
        monkeypatch.setattr(kfac2.preconditioner, "is_capturing", lambda device: False)

    return run


def test_a_graph_finds_new_inverses_where_it_looks_for_them(capture):
    model, x = net(), torch.randn(6, 3)
    opt = unread(KFAC(model, cov_every=2, inv_every=2))
    iterate(model, opt, x)
    capture(lambda: iterate(model, opt, x))
    assert opt.preconditioner.iteration == 1  # what is captured has not run
    inverses = curvature_of(opt).inverses
    seen = [tensor.clone() for tensor in inverses.tensors()]
    iterate(model, opt, x)
    iterate(model, opt, x)  # statistics and inverses
    after = curvature_of(opt).inverses.tensors()
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(after, inverses.tensors(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(after, seen, strict=True))
    saved = copy.deepcopy(opt.state_dict())
    opt.load_state_dict(saved)
    after = curvature_of(opt).inverses.tensors()
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(after, inverses.tensors(), strict=True))


@pytest.mark.parametrize("how", ["dropped", "out of the coarse space"])
def test_a_graph_that_no_longer_holds_is_not_to_be_replayed(capture, how):
    model, x = net(), torch.randn(6, 3)
    opt = unread(KFAC(model, cov_every=100, inv_every=100))
    iterate(model, opt, x)
    capture(lambda: iterate(model, opt, x))
    iterate(model, opt, x)
    curvature = curvature_of(opt)
    assert opt.ordinary
    if how == "dropped":
        curvature.drop(curvature.layout.layers[0])
        opt.preconditioner.iteration = 100
    else:
        curvature.estimates.averages = replace(curvature.averages, in_coarse=(False, True))
    iterate(model, opt, x)
    assert not opt.ordinary
    with pytest.raises(RuntimeError, match="replayed"):
        opt.replayed()
    capture(lambda: iterate(model, opt, x))
    assert opt.ordinary


def test_layouts_are_not_kept():
    model, x = nn.Sequential(*(nn.Linear(3, 3) for _ in range(6))), torch.randn(6, 3)
    opt = KFAC(model, cov_every=1000, inv_every=1000)
    iterate(model, opt, x)
    sizes = set()
    for number in range(20):
        iterate(model, opt, x, poison=lambda number=number: setattr(model[number % 6].weight, "grad", None))
        sizes.add(len(curvature_of(opt).prepared()._table))
    assert sizes == {11}


@pytest.mark.parametrize("inverse", ["cholesky", "eigh"])
def test_an_inverse_is_mended_with_the_damping_of_its_update(inverse):
    """The state says that damping, and the other layers' inverses are of it."""
    results = []
    for damping_at_check in (0.01, 1.0):
        torch.manual_seed(0)
        model, x = net(), torch.randn(6, 3)
        opt = unread(KFAC(model, cov_every=100, inv_every=2, damping=0.01, inverse=inverse))
        for _ in range(2):
            iterate(model, opt, x)
        set_factor(opt, "0", INDEFINITE * (1 if inverse == "cholesky" else 1e-30))
        if inverse == "eigh":
            curvature_of(opt).solvers.fine.invert = failing(curvature_of(opt).solvers.fine.invert)
        iterate(model, opt, x)
        opt.options.damping = damping_at_check
        with pytest.warns(RuntimeWarning, match="a factor of 0 is not positive definite"):
            opt.check()
        inverses = curvature_of(opt).inverses
        results.append([*fields(opt, "0").values(), *(stack for part in inverses.derived.values() for stack in part)])
        assert inverses.damping.value == 0.01 and opt.state_dict()["kfac"]["inverses"]["damping"] == [0.01, False]
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def failing(invert):
    """Report that the first block of the first batch could not be decomposed."""

    def wrapped(A, G, damping):
        result, status = invert(A, G, damping)
        status[0] = torch.cat([torch.full((1,), 2, dtype=status[0].dtype), status[0][1:]])
        return result, status

    return wrapped

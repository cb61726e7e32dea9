"""Whole training steps against dense linear algebra on vec(∇) (tests/oracle.py), parameter by parameter."""

import copy

import models
import pytest
import torch
import torch.nn.functional as F
from compare import assert_equal
from inside import fields
from oracle import Oracle
from paper import KFAC, Preconditioner
from torch.distributions import Categorical

from kfac2 import reference
from kfac2.fine.tikhonov import Tikhonov

STEPS = 7
BASE = {"lr": 0.05, "cov_every": 2, "inv_every": 3, "damping": 1e-2, "kl_clip": None, "weight_decay": 1e-2}
VARIANTS = {
    "one level": {"levels": 1},
    "two levels": {},
    "eigh": {"inverse": "eigh"},
    "eigh, one level": {"inverse": "eigh", "levels": 1},
    "clip active": {"kl_clip": 1e-5},
    "clip not active": {"kl_clip": 1e6},
    "no momentum": {"momentum": 0.0},
    "nesterov": {"nesterov": True},
    "coarse weight": {"coarse_weight": 0.3},
    "negative coarse weight": {"coarse_weight": -2.0},
    "coarse damping": {"coarse_damping": 0.5, "kl_clip": 1e-4},
    "area": {"downsample": "area"},
    "empirical": {"fisher": "empirical"},
    "empirical with cases": {"fisher": "empirical", "cases": 3},
    "decay": {"stat_decay": 0.2, "cov_every": 1, "inv_every": 1},
    "all": {
        "inverse": "eigh",
        "kl_clip": 1e-4,
        "nesterov": True,
        "coarse_weight": 0.7,
        "coarse_damping": 0.1,
        "downsample": "area",
        "weight_decay": 0.1,
    },
}


def train_both(
    task, opt, oracle, steps=STEPS, sgd=None, before=lambda step: None, step_of=lambda opt, step: opt.step()
):
    """Train the task's model with `opt` and the oracle's copy side by side, from the same random numbers."""
    for step in range(steps):
        before(step)
        torch.manual_seed(step)
        task.model.zero_grad()
        out = task.model(task.x)
        opt.accumulate_fisher(task.distribution(out))
        task.loss(out).backward()
        step_of(opt, step)
        torch.manual_seed(step)
        oracle.train_step(task.x, task.distribution, task.loss, sgd)


def run_both(name, options, steps=STEPS):
    """Train a model and its copy side by side; returns the optimizer, the oracle, and both models."""
    task = models.task(name)
    twin = copy.deepcopy(task.model)
    opt = KFAC(task.model, **options)
    oracle = Oracle(twin, opt.layers, **options)
    train_both(task, opt, oracle, steps)
    return opt, oracle, task.model, twin


def assert_same_parameters(model, twin):
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.isfinite(q).all(), name
        assert_equal(p, q)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["linear", "conv2d", "grouped"])
def test_every_option(name, variant):
    options = {**BASE, **VARIANTS[variant]}
    opt, oracle, model, twin = run_both(name, options)
    assert_same_parameters(model, twin)
    if options["kl_clip"] is not None:
        assert (oracle.nu < 1) == (options["kl_clip"] < 1)
    if options.get("levels") != 1:
        assert_equal(opt.coarse_fisher(), oracle.coarse_fisher())


@pytest.mark.parametrize("inverse", ["cholesky", "eigh"])
@pytest.mark.parametrize("name", models.NAMES)
def test_every_kind_of_layer_and_prediction(name, inverse):
    opt, oracle, model, twin = run_both(name, {**BASE, "inverse": inverse, "kl_clip": 1e-4})
    assert_same_parameters(model, twin)
    assert_equal(opt.coarse_fisher(), oracle.coarse_fisher())
    for i, layer in enumerate(opt.layers):
        blocks = [q for q, owner in enumerate(oracle.layer_of_block) if owner == i]
        A, G = opt.factors(layer)
        assert_equal(A, torch.stack([oracle.A[q, q] for q in blocks]).reshape(A.shape))
        assert_equal(G, torch.stack([oracle.G[q, q] for q in blocks]).reshape(G.shape))


def test_the_step_moves_parameters_and_levels_differ():
    ends = []
    for levels in (1, 2):
        torch.manual_seed(0)
        _, _, model, _ = run_both("linear", {**BASE, "levels": levels})
        ends.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert (ends[0] - ends[1]).norm() > 1e-3 * ends[0].norm()


def test_parameter_groups_with_the_clip_active():
    task = models.task("conv2d")
    twin = copy.deepcopy(task.model)
    slow, fast = (
        {"lr": 0.01, "momentum": 0.5, "weight_decay": 0.1},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    )

    def grouped(model):
        params = list(model.parameters())
        return [
            {"params": params[::3], **slow},
            {"params": [p for i, p in enumerate(params) if i % 3], **fast},
        ]

    options = {"kl_clip": 1e-5, "damping": 1e-2, "cov_every": 2, "inv_every": 3}
    opt = KFAC(task.model, params=grouped(task.model), **options)
    settings = {
        id(p): {
            **{"nesterov": False, "weight_decay": 0.0},
            **{k: v for k, v in group.items() if k != "params"},
        }
        for group in grouped(twin)
        for p in group["params"]
    }
    rates = {key: value["lr"] for key, value in settings.items()}
    oracle = Oracle(twin, opt.layers, rates=rates, **options)

    train_both(task, opt, oracle, sgd=lambda: oracle.sgd(settings))
    assert oracle.nu < 1
    assert len(set(rates.values())) == 2
    assert_same_parameters(task.model, twin)


def test_preconditioner_with_adamw():
    task = models.task("conv2d")
    twin = copy.deepcopy(task.model)
    options = {"kl_clip": 1e-4, "damping": 1e-2, "cov_every": 2, "inv_every": 3}
    preconditioner = Preconditioner(task.model, **options)
    adam = torch.optim.AdamW(task.model.parameters(), lr=1e-2)
    oracle = Oracle(twin, preconditioner.layers, lr=0.05, **options)
    twin_adam = torch.optim.AdamW(twin.parameters(), lr=1e-2)

    def step_of(preconditioner, step):
        assert preconditioner.step(lr=0.05 if step % 2 else dict.fromkeys(preconditioner.layers, 0.05))
        adam.step()

    train_both(task, preconditioner, oracle, sgd=twin_adam.step, step_of=step_of)
    assert oracle.nu < 1
    assert_same_parameters(task.model, twin)


def test_learning_rate_scheduler_drives_step_and_clip():
    task = models.task("linear")
    twin = copy.deepcopy(task.model)
    options = {"kl_clip": 1e-5, "damping": 1e-2, "cov_every": 1, "inv_every": 1}
    opt = KFAC(task.model, lr=0.1, **options)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 2, gamma=0.5)
    oracle = Oracle(twin, opt.layers, lr=0.1, **options)

    def halve(step):
        oracle.lr = 0.1 * 0.5 ** (step // 2)

    def step_of(opt, step):
        opt.step()
        scheduler.step()

    train_both(task, opt, oracle, before=halve, step_of=step_of)
    assert_same_parameters(task.model, twin)


def test_coarse_weight_zero_is_one_level_bit_for_bit():
    ends = []
    for options in ({"levels": 1}, {"levels": 2, "coarse_weight": 0.0}):
        torch.manual_seed(1)
        _, _, model, _ = run_both("conv2d", {**BASE, "kl_clip": 1e-4, **options})
        ends.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_several_accumulate_calls_add_up():
    class Fixed(torch.distributions.Categorical):
        def sample(self, *args):
            return self.logits.argmin(-1)

    task = models.task("conv2d", batch=8)
    opt, whole = KFAC(task.model), KFAC(twin := copy.deepcopy(task.model))
    for part in task.x.chunk(4):
        opt.accumulate_fisher(Fixed(logits=task.model(part)))
    whole.accumulate_fisher(Fixed(logits=twin(task.x)))
    task.loss(task.model(task.x)).backward()
    task.loss(twin(task.x)).backward()
    opt.step()
    whole.step()
    assert_equal(opt.coarse_fisher(), whole.coarse_fisher())
    assert_same_parameters(task.model, twin)


def test_factors_inverted_in_float64_on_request():
    """A float32 factor of a condition that float32 cannot invert well."""
    results = {}
    for dtype in (None, torch.float64):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(20, 3, bias=False))
        opt = KFAC(model, damping=1e-10, inverse_dtype=dtype, kl_clip=None, levels=1, momentum=0)
        x = torch.randn(64, 1) + 1e-2 * torch.randn(64, 20)
        out = model(x)
        opt.accumulate_fisher(Categorical(logits=out))
        F.cross_entropy(out, torch.arange(64) % 3).backward()
        opt.step()
        results[dtype] = fields(opt, "0")["A_inv"][0]
        A, G = opt.factors("0")
    assert results[None].dtype == results[torch.float64].dtype == torch.float32
    exact = reference.factored_tikhonov_inverse([A.double()], [G.double()], 1e-10)[0][0]
    errors = [((inverse.double() - exact).norm() / exact.norm()).item() for inverse in results.values()]
    assert errors[1] < 1e-6 < errors[0], errors
    state = opt.state_dict()
    assert state["kfac"]["options"]["inverse_dtype"] == torch.float64


@pytest.mark.parametrize("precision, seen", [("tf32", "tf32"), ("ieee", "ieee"), (None, "as it was")])
def test_the_products_of_a_step_have_the_precision_that_is_asked_for(monkeypatch, precision, seen):
    """And nothing else has it: torch's setting is what it was, after an error as well."""
    setting, found, error = torch.backends.cuda.matmul, [], []
    before = setting.fp32_precision

    def apply(solver, fields, gradients, work, out):
        found.append(setting.fp32_precision)
        for raised in error:
            raise raised
        for stack, gradient in zip(out, gradients, strict=True):
            stack.copy_(gradient)

    monkeypatch.setattr(Tikhonov, "apply", apply)
    task = models.task("linear")
    opt = KFAC(task.model, fisher="empirical", step_precision=precision)
    task.loss(task.model(task.x)).backward()
    opt.step()
    opt.curvature.solve({name: p.grad for name, p in task.model.named_parameters()}, 0.1)
    error.append(ArithmeticError())
    with pytest.raises(ArithmeticError):
        opt.curvature.solve({name: p.grad for name, p in task.model.named_parameters()}, 0.1)
    assert found == [before if precision is None else seen] * 3
    assert setting.fp32_precision == before

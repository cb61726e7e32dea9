"""Saving and going on, bit for bit."""

import copy
import io

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from paper import KFAC, Preconditioner
from torch.distributions import Categorical


def build(**options):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.ReLU(),
        nn.Linear(8, 3),
    )  # fmt: skip
    opt = KFAC(model, lr=0.05, cov_every=3, inv_every=4, damping=1e-2, weight_decay=1e-3, **options)
    return model, opt, torch.optim.lr_scheduler.StepLR(opt, 5, gamma=0.5)


def train(model, opt, scheduler, steps):
    for _ in range(steps):
        x, y = torch.randn(8, 2, 4, 4), torch.randint(0, 3, (8,))
        opt.zero_grad()
        out = model(x)
        opt.accumulate_fisher(Categorical(logits=out))
        F.cross_entropy(out, y).backward()
        opt.step()
        scheduler.step()


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("at", [1, 6, 8])
@pytest.mark.parametrize(
    "options",
    [{}, {"inverse": "eigh", "nesterov": True}, {"levels": 1}, {"fisher": "empirical", "downsample": "area"}],
)
def test_resumed_training_equals_uninterrupted_training(options, at):
    model, opt, scheduler = build(**options)
    train(model, opt, scheduler, at)
    saved = through_a_file([model.state_dict(), opt.state_dict(), scheduler.state_dict(), torch.get_rng_state()])
    train(model, opt, scheduler, 9)
    resumed, resumed_opt, resumed_scheduler = build(**options)
    for part, state in zip((resumed, resumed_opt, resumed_scheduler), saved, strict=False):
        part.load_state_dict(state)
    torch.set_rng_state(saved[3])
    train(resumed, resumed_opt, resumed_scheduler, 9)
    for p, q in zip(model.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(p, q)
    ours, theirs = flatten(opt.state_dict()), flatten(resumed_opt.state_dict())
    assert ours.keys() == theirs.keys() and len(ours) > 30
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]) if isinstance(value, torch.Tensor) else value == theirs[key], key


def flatten(value, path=()):
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for name, part in items for key, leaf in flatten(part, (*path, name)).items()}
    return {path: value}


def test_preconditioner_state():
    model, _, _ = build()
    preconditioner = Preconditioner(model, kl_clip=None)
    out = model(torch.randn(8, 2, 4, 4))
    preconditioner.accumulate_fisher(Categorical(logits=out))
    out.square().mean().backward()
    preconditioner.step()
    other = Preconditioner(copy.deepcopy(model), kl_clip=None)
    other.load_state_dict(through_a_file(preconditioner.state_dict()))
    assert torch.equal(other.coarse_fisher(), preconditioner.coarse_fisher())
    assert other.iteration == 1


def test_loading_keeps_the_dtype_of_factors():
    model, opt, scheduler = build()
    train(model, opt, scheduler, 1)
    low = copy.deepcopy(model).to(torch.bfloat16)
    loaded = KFAC(low)
    loaded.load_state_dict(opt.state_dict())
    assert loaded.factors("0")[0].dtype == torch.float32
    assert torch.equal(loaded.factors("0")[0], opt.factors("0")[0])


def test_a_state_with_whole_factors_is_read():
    """As earlier versions saved them."""
    model, opt, scheduler = build()
    train(model, opt, scheduler, 1)
    state = copy.deepcopy(opt.state_dict())
    own = state["kfac"]["statistics"]["factors"]
    for name in own:
        halves = [factor.numel() for factor in own[name].values()]
        own[name] = dict(zip("AG", (f.reshape(-1, *f.shape[-2:]) for f in opt.factors(name)), strict=True))
        assert sum(halves) < sum(factor.numel() for factor in own[name].values())
    other, loaded, _ = build()
    other.load_state_dict(model.state_dict())
    loaded.load_state_dict(through_a_file(state))
    for name in own:
        assert all(torch.equal(*pair) for pair in zip(loaded.factors(name), opt.factors(name), strict=True))


def test_options_set_during_training_are_restored():
    model, opt, scheduler = build()
    train(model, opt, scheduler, 1)
    opt.options.damping = 0.5
    _, other, _ = build()
    other.load_state_dict(opt.state_dict())
    assert other.options.damping == 0.5


@pytest.mark.parametrize("change, message", [
    (lambda s: (s.pop("kfac"), s["param_groups"][0].pop("kfac")), "state_dict must be one of kfac2.KFAC"),
    (lambda s: s["kfac"].pop("statistics"), "without .'statistics'."),
    (lambda s: s["kfac"]["options"].update(levels=1), "saved with levels=2, got 1"),
    (lambda s: s["kfac"]["options"].update(inverse="eigh"), "saved with inverse='cholesky', got 'eigh'"),
    (lambda s: s["kfac"]["layers"].update(other={"in_coarse": True}), "must hold the layers"),
    (lambda s: s["kfac"]["statistics"]["factors"]["0"].update(A=torch.zeros(2, 3, 3)), r"A of 0 in shape \(2, 5, 11\), got \(2, 3, 3\)"),
    (lambda s: s.update(param_groups=[]), "parameter groups"),
])  # fmt: skip
def test_a_state_that_does_not_fit_changes_nothing(change, message):
    model, opt, scheduler = build()
    train(model, opt, scheduler, 2)
    state = copy.deepcopy(opt.state_dict())
    before = copy.deepcopy(opt.state_dict())
    change(state)
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(state)
    after = flatten(opt.state_dict())
    for key, value in flatten(before).items():
        assert torch.equal(value, after[key]) if isinstance(value, torch.Tensor) else value == after[key], key

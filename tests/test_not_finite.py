"""NaNs, infinities and factors that cannot be inverted: warned about, never a crash, never a NaN."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from compare import assert_equal
from inside import fields, is_usable, set_factor
from paper import KFAC, Curvature, Preconditioner
from test_state import flatten
from torch.distributions import Categorical, Independent

from kfac2 import reference
from kfac2.fine import Damping


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


def iterate(model, opt, x, poison=lambda: None):
    opt.zero_grad()
    out = model(x)
    if isinstance(opt, KFAC):
        opt.accumulate_fisher(Categorical(logits=out, validate_args=False))
    F.cross_entropy(out, torch.arange(len(x)) % 2).backward()
    poison()
    opt.step()


def snapshot(model, opt):
    state = copy.deepcopy(opt.state_dict())
    state["kfac"]["iteration"] = None
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    return flatten({"parameters": parameters, "state": state})


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(v, b[k]) if isinstance(v, torch.Tensor) else v == b[k] for k, v in a.items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["gradient of a layer", "gradient of batch norm", "input"])
def test_the_step_is_skipped_and_only_the_iteration_count_moves(where, value):
    model = net()
    opt = KFAC(model, cov_every=2, inv_every=2)
    x = torch.randn(6, 3)
    for _ in range(2):
        iterate(model, opt, x)
    before = snapshot(model, opt)
    model.eval()  # the running statistics of batch norm are the model's business
    bad = x.clone()
    if where == "input":
        bad[1, 2] = value
    poisoned = {"gradient of a layer": model[3].bias, "gradient of batch norm": model[1].weight}.get(where)
    named = {
        "gradient of a layer": "the gradient of 3.bias",
        "gradient of batch norm": "the gradient of 1.weight",
    }
    with pytest.warns(RuntimeWarning, match=named.get(where, "the input of 0") + ".* at iteration 2"):
        iterate(model, opt, bad, poison=lambda: poisoned.grad.fill_(value) if poisoned is not None else None)
    assert same(before, snapshot(model, opt))
    assert opt.preconditioner.iteration == 3
    model.train()
    iterate(model, opt, x)
    assert all(p.isfinite().all() for p in model.parameters())


class NeverDrawn(Categorical):
    def sample(self, sample_shape=()):
        pytest.fail("drawn from NaNs, which on a CUDA device ends the process")


@pytest.mark.parametrize("wrapped", [False, True])
def test_nothing_is_drawn_from_nans(wrapped):
    model = net()
    opt = KFAC(model)
    logits = model(torch.randn(4, 3)).unflatten(0, (2, 2)) * torch.tensor([1.0, float("nan")])
    distribution = NeverDrawn(logits=logits, validate_args=False)
    opt.accumulate_fisher(Independent(distribution, 1, validate_args=False) if wrapped else distribution)
    logits.sum().backward()
    with pytest.warns(RuntimeWarning, match="a NaN or an infinity in logits of the distribution at iteration 0"):
        opt.step()


def test_a_class_that_is_masked_is_no_fault():
    model = net()
    opt = KFAC(model)
    out = model(torch.randn(6, 3))
    opt.accumulate_fisher(Categorical(logits=torch.cat([out, torch.full((6, 1), -torch.inf)], 1)))
    out.square().mean().backward()
    opt.step()
    assert opt.factors("3")[1].isfinite().all()


def test_a_bad_first_step_leaves_a_sound_optimizer():
    model = net()
    opt = KFAC(model)
    with pytest.warns(RuntimeWarning, match="the step is skipped"):
        iterate(model, opt, torch.full((4, 3), float("nan")))
    model[1].reset_running_stats()
    assert opt.needs_fisher  # no statistics yet: asked for at once
    iterate(model, opt, torch.randn(6, 3))
    assert opt.factors("0")[0].isfinite().all()


def test_statistics_that_overflow_are_not_averaged_in():
    model = net()
    opt = KFAC(model, cov_every=1)
    iterate(model, opt, torch.randn(6, 3))
    before = opt.coarse_fisher()
    opt.zero_grad()
    out = model[3](model[2](torch.randn(6, 4)) * 1e30)  # finite, but its square is not
    opt.accumulate_fisher(Categorical(logits=out * 1e-30))
    with pytest.warns(RuntimeWarning, match="the statistics of 3"):
        opt.step()
    assert torch.equal(opt.coarse_fisher(), before)


def test_preconditioner_drops_the_gradients():
    model = net()
    preconditioner, adam = Preconditioner(model, kl_clip=None), torch.optim.AdamW(model.parameters())
    out = model(torch.randn(4, 3))
    preconditioner.accumulate_fisher(Categorical(logits=out))
    out.sum().backward()
    model[0].weight.grad[0, 0] = float("nan")
    before = [p.clone() for p in model.parameters()]
    with pytest.warns(RuntimeWarning, match="the gradient of 0.weight"):
        assert not preconditioner.step()
    adam.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def linear_layers(count, size, inverse, dtype):
    model = nn.Sequential(*(nn.Linear(size, size, bias=False, dtype=dtype) for _ in range(count)))
    return Curvature(model, inverse=inverse, levels=1)


def invert(curvature, A_list, G):
    """Let an inverse update meet these factors, and commit it."""
    layers = len(curvature.layers)
    curvature.estimates.averages = replace(curvature.averages, updates=1, seen=(True,) * layers)
    for i, A in enumerate(A_list):
        set_factor(curvature, str(i), A)
        set_factor(curvature, str(i), G, "G")
    estimates = curvature.estimates
    averages, last = estimates.averaged(curvature.iteration.sums)
    estimates.commit(averages, estimates.inverted(averages, last, Damping(0.1)))


@pytest.mark.parametrize("inverse", ["cholesky", "eigh", "ekfac"])
def test_an_indefinite_factor_is_floored_and_a_broken_one_keeps_its_last_inverse(inverse):
    curvature = linear_layers(3, 2, inverse, torch.float64)
    good = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    indefinite = torch.diag(torch.tensor([1.0, -3.0], dtype=torch.float64))
    broken = good * float("nan")
    invert(curvature, [good, good, good], good)
    first = {name: value.clone() for name, value in fields(curvature, "2").items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        invert(curvature, [good, indefinite, broken], good)
    messages = [str(warning.message) for warning in caught]
    assert all(torch.equal(value, first[name]) for name, value in fields(curvature, "2").items())
    assert any("a factor of 2 is not finite" in message for message in messages)
    floored = fields(curvature, "1")
    assert all(value.isfinite().all() for value in floored.values())
    if inverse == "cholesky":
        assert any("a factor of 1 is not positive definite" in message for message in messages)
        # the trace is negative: π = 1
        assert_equal(floored["A_inv"][0], torch.diag(torch.tensor([1 / (1 + 0.1**0.5), 1 / 0.1**0.5]).double()), 1e-7)
        assert_equal(fields(curvature, "0")["A_inv"][0], reference.factored_tikhonov_inverse([good], [good], 0.1)[0][0])
    elif inverse == "eigh":
        assert_equal(floored["A_values"][0], torch.tensor([0.0, 1.0]))
    without = linear_layers(3, 2, inverse, torch.float64)
    with pytest.warns(RuntimeWarning, match="a factor of 0 is not finite"):
        invert(without, [broken, good, good], good)
    assert not is_usable(without, "0") and is_usable(without, "1")


def stubborn_eigh(matrix, eigh=torch.linalg.eigh):
    if matrix.dtype == torch.float32:
        raise torch.linalg.LinAlgError("did not converge")
    return eigh(matrix)


def stubborn_native(stacks):
    status = torch.full((sum(map(len, stacks)),), 2, dtype=torch.int32)
    return [stack[..., 0] for stack in stacks], stacks, status


@pytest.mark.parametrize("size", [2, 9])
def test_eigendecomposition_that_does_not_converge_is_done_in_float64(size, monkeypatch):
    """Whether it is the native kernel that does not, which takes the small ones, or LAPACK."""
    monkeypatch.setattr(torch.linalg, "eigh", stubborn_eigh)
    monkeypatch.setattr(torch.ops.kfac2, "eigendecompose", stubborn_native)
    curvature = linear_layers(2, size, "eigh", torch.float32)
    good = torch.eye(size) + 0.5
    with pytest.warns(RuntimeWarning, match="its eigendecomposition did not converge"):
        invert(curvature, [good, good], good)
    for name in curvature.layers:
        values, vectors = fields(curvature, name)["A_values"][0], fields(curvature, name)["A_vectors"][0]
        assert_equal(vectors @ torch.diag(values) @ vectors.mT, good, 1e-5)


def test_training_goes_on_with_the_plain_gradient_where_there_is_no_inverse():
    model = net()
    opt = KFAC(model, kl_clip=None, momentum=0, inv_every=1)
    x = torch.randn(6, 3)
    iterate(model, opt, x)
    state = opt.state_dict()
    state["kfac"]["statistics"]["factors"]["0"]["A"].fill_(float("nan"))
    state["kfac"]["inverses"] = None
    opt.load_state_dict(state)
    before = model[0].weight.clone()
    opt.zero_grad()
    F.cross_entropy(model(x), torch.arange(6) % 2).backward()
    gradient = model[0].weight.grad.clone()
    with pytest.warns(RuntimeWarning, match="a factor of 0 is not finite"):
        opt.step()
    assert_equal(before - model[0].weight, 1e-2 * gradient, 1e-4)


def test_preconditioned_gradients_that_overflow_are_not_written():
    model = net().double()
    opt = KFAC(model, kl_clip=None, cov_every=100)
    x = torch.randn(6, 3).double()
    iterate(model, opt, x)
    before = snapshot(model, opt)
    with pytest.warns(RuntimeWarning, match="the preconditioned gradients"):
        iterate(model, opt, x, poison=lambda: model[3].weight.grad.fill_(1e200))
    assert same(before, snapshot(model, opt))


@pytest.mark.parametrize("at_once", [True, False])
def test_gradients_that_float16_does_not_hold_are_not_written(at_once):
    """They are finite in float32, where they are computed: the parameters would become infinite in silence."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).half(), torch.randn(6, 3).half()
    opt = KFAC(model, kl_clip=None, cov_every=100)
    opt.curvature.health.at_once = at_once
    iterate(model, opt, x)
    before = snapshot(model, opt)
    with pytest.warns(RuntimeWarning, match="a NaN or an infinity in the preconditioned gradients"):
        iterate(model, opt, x, poison=lambda: model[2].weight.grad.fill_(6e4))
        opt.check()
    assert not any(p.grad.any() for p in model.parameters())
    assert same(before, snapshot(model, opt))
    iterate(model, opt, x)
    assert all(p.isfinite().all() for p in model.parameters()) and not same(before, snapshot(model, opt))
    solved = opt.curvature.solve({"2.weight": torch.full((2, 4), 6e4)}, damping=1e-3)  # in float32 it is a number
    assert solved["2.weight"].isfinite().all() and solved["2.weight"].abs().max() > 65504


def warned(run):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(warning.message).removeprefix("kfac2: ") for warning in caught]


def test_of_steps_skipped_in_a_row_few_are_told_and_none_is_left_out():
    model, x = net(), torch.randn(6, 3)
    opt = KFAC(model, cov_every=3)
    iterate(model, opt, x)

    def broken(count):
        for _ in range(count):
            iterate(model, opt, x, poison=lambda: model[3].bias.grad.fill_(float("nan")))

    cause = "a NaN or an infinity in the gradient of 3.bias"
    several = "{} steps up to iteration {} were skipped, lately for " + cause
    assert warned(lambda: broken(11)) == [
        f"{cause} at iteration 1; the step is skipped",
        several.format(2, 2),
        several.format(4, 4),
        several.format(8, 8),
    ]
    assert warned(lambda: iterate(model, opt, x)) == [several.format(11, 11)]
    assert warned(lambda: iterate(model, opt, x)) == []
    assert warned(lambda: broken(1)) == [f"{cause} at iteration 14; the step is skipped"]  # another row begins
    assert warned(lambda: iterate(model, opt, x)) == []
    broken_and_asked = warned(lambda: (broken(3), opt.check(), opt.check()))
    assert broken_and_asked == [
        f"{cause} at iteration 16; the step is skipped",
        several.format(2, 17),
        several.format(3, 18),
    ]
    assert opt.preconditioner.iteration == 19


def test_skipped_steps_that_are_read_late_are_told_as_rarely():
    model, x = net(), torch.randn(6, 3)
    opt = KFAC(model, cov_every=3)
    opt.curvature.health.at_once = False
    iterate(model, opt, x)
    iterate(model, opt, x)

    def broken(count):
        for _ in range(count):
            iterate(model, opt, x, poison=lambda: model[3].bias.grad.fill_(float("nan")))

    messages = warned(lambda: broken(30))  # iterations 2 to 31, of which every third looks
    assert [message.split(" ")[0] for message in messages] == ["1", "2", "4", "8", "16"]
    assert messages[0].startswith("1 steps before iteration 3 were skipped; the first for a NaN")
    assert messages[-1].startswith("16 steps up to iteration 17 were skipped, lately for a NaN")
    after = warned(lambda: [iterate(model, opt, x) for _ in range(5)])  # read at iteration 33
    assert len(after) == 1 and after[0].startswith("30 steps up to iteration 32 were skipped")
    assert warned(lambda: opt.check()) == []


class OneMore(nn.Module):
    """Its middle layer sees N + 1 rows from the second batch on."""

    def __init__(self):
        super().__init__()
        self.first, self.odd, self.head, self.extra = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2), 0

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.head(h + self.odd(torch.cat([h, h[: self.extra]]))[: len(h)])


def test_a_skipped_step_leaves_every_layer_in_the_coarse_space():
    torch.manual_seed(0)
    model, x = OneMore(), torch.randn(6, 3)
    opt = KFAC(model, cov_every=1)
    iterate(model, opt, x)
    before = snapshot(model, opt)
    model.extra = 1
    with pytest.warns(RuntimeWarning, match="odd has rows that do not belong"):
        iterate(model, opt, x, poison=lambda: model.first.weight.grad.fill_(float("nan")))
    assert same(before, snapshot(model, opt))
    model.extra = 0
    iterate(model, opt, x)
    assert opt.state_dict()["kfac"]["layers"]["odd"]["in_coarse"] and opt.coarse_fisher()[1, 1] > 0
    model.extra = 1
    iterate(model, opt, x)
    assert not opt.state_dict()["kfac"]["layers"]["odd"]["in_coarse"]  # a step that counts does take it out


def test_parameters_that_join_later_are_watched():
    """A bias outside the model: a NaN in its gradient is seen once the preconditioner is told of it."""
    torch.manual_seed(0)
    model, extra = nn.Linear(3, 2), nn.Parameter(torch.zeros(2))
    preconditioner = Preconditioner(model, kl_clip=None)
    for joins, is_done in ((False, True), (True, False)):
        if joins:
            preconditioner.watch([extra])
        out = model(torch.randn(8, 3)) + extra
        preconditioner.accumulate_fisher(Categorical(logits=out))
        F.cross_entropy(out, torch.arange(8) % 2).backward()
        extra.grad.fill_(float("nan"))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            assert preconditioner.step() is is_done
        assert any("a parameter outside the model" in str(one.message) for one in told) is joins
        model.zero_grad()

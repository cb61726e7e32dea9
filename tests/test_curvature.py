"""Curvature without an optimizer: the same statistics, and solves against dense algebra."""

import copy

import models
import pytest
import torch
from compare import assert_equal
from paper import KFAC, Curvature
from torch.distributions import Categorical

from kfac2 import reference


def accumulated(name, **options):
    task = models.task(name)
    curvature = Curvature(task.model, **options)
    torch.manual_seed(0)
    curvature.accumulate(task.distribution(task.model(task.x)))
    return task, curvature


@pytest.mark.parametrize("name", ["linear", "conv2d", "grouped", "tokens", "transposed2d"])
def test_statistics_are_those_of_the_optimizer(name):
    task, curvature = accumulated(name)
    opt = KFAC(task.model, cov_every=1)
    for seed in range(2):
        torch.manual_seed(seed)
        opt.accumulate_fisher(task.distribution(task.model(task.x)))
        task.model.zero_grad()
        task.loss(task.model(task.x)).backward()
        assert opt.curvature.iteration.settle() is None
        estimates = opt.curvature.estimates
        estimates.commit(*estimates.averaged(opt.curvature.iteration.sums))
        opt.curvature.iteration.discard()
        if seed:
            torch.manual_seed(seed)
            curvature.accumulate(task.distribution(task.model(task.x)))
    for layer in opt.layers:
        for ours, theirs in zip(curvature.factors(layer), opt.factors(layer), strict=True):
            assert torch.equal(ours, theirs)
    assert torch.equal(curvature.coarse_fisher(), opt.coarse_fisher())


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("inverse", ["cholesky", "eigh"])
def test_solve_against_dense_algebra(inverse, levels):
    task, curvature = accumulated("linear", inverse=inverse, levels=levels)
    gradients = {name: torch.randn_like(p) for name, p in task.model.named_parameters()}
    before = {name: gradient.clone() for name, gradient in gradients.items()}
    damping, expected, sums = 0.1, {}, []
    for layer in curvature.layers:
        A, G = curvature.factors(layer)
        bias = gradients.get(f"{layer}.bias")
        matrix = gradients[f"{layer}.weight"]
        matrix = matrix if bias is None else torch.cat([matrix, bias[:, None]], 1)
        if inverse == "cholesky":
            inverses = reference.factored_tikhonov_inverse([A], [G], damping)
            (expected[layer],) = reference.precondition([matrix], *inverses)
        else:
            (expected[layer],) = reference.precondition_eigh([matrix], [A], [G], damping)
        sums.append(matrix.sum())
    shifts = torch.zeros(len(sums), dtype=torch.float64)
    if levels == 2:
        shifts = reference.coarse_inverse(curvature.coarse_fisher(), damping) @ torch.stack(sums)
    solved = curvature.solve(gradients, damping)
    assert list(solved) == list(gradients)
    for layer, shift in zip(curvature.layers, shifts, strict=True):
        bias = solved.get(f"{layer}.bias")
        matrix = solved[f"{layer}.weight"]
        assert_equal(matrix if bias is None else torch.cat([matrix, bias[:, None]], 1), expected[layer] + shift)
    assert all(torch.equal(gradients[name], before[name]) for name in before)  # they are the caller's
    other = curvature.solve(gradients, 10 * damping)["0.weight"]
    assert other.norm() < solved["0.weight"].norm()


def test_a_solve_follows_statistics_and_damping():
    task, curvature = accumulated("conv2d")
    gradients = {name: torch.ones_like(p) for name, p in task.model.named_parameters()}
    first = curvature.solve(gradients, 0.1)
    inverses = curvature.inverses
    again = curvature.solve(gradients, 0.1)
    assert curvature.inverses is inverses  # nothing is inverted twice
    assert all(torch.equal(first[name], again[name]) for name in first)
    curvature.accumulate(task.distribution(task.model(2 * task.x)))
    assert not torch.equal(curvature.solve(gradients, 0.1)["0.weight"], first["0.weight"])


def test_some_gradients_only():
    task, curvature = accumulated("linear", levels=1)
    gradients = {name: torch.randn_like(p) for name, p in task.model.named_parameters()}
    whole = curvature.solve(gradients, 0.1)
    part = curvature.solve({"2.weight": gradients["2.weight"]}, 0.1)
    assert list(part) == ["2.weight"] and torch.equal(part["2.weight"], whole["2.weight"])


def test_several_passes_are_micro_batches():
    class Fixed(Categorical):
        def sample(self, *args):
            return self.logits.argmin(-1)

    task = models.task("conv2d", batch=8)
    twin = copy.deepcopy(task.model)
    whole, parts = Curvature(task.model), Curvature(twin)
    whole.accumulate(Fixed(logits=task.model(task.x)))
    parts.accumulate(*(Fixed(logits=twin(x)) for x in task.x.chunk(4)))
    assert_equal(parts.coarse_fisher(), whole.coarse_fisher())


def test_empirical_fisher_takes_backward_passes():
    task = models.task("linear")
    twin = copy.deepcopy(task.model)
    curvature, opt = Curvature(task.model, fisher="empirical"), KFAC(twin, fisher="empirical")
    with pytest.raises(RuntimeError, match="nothing to accumulate"):
        curvature.accumulate()
    task.loss(task.model(task.x)).backward()
    curvature.accumulate()
    task.loss(twin(task.x)).backward()
    opt.step()
    for ours, theirs in zip(curvature.factors("0"), opt.factors("0"), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("inverse", ["cholesky", "eigh", "ekfac"])
def test_state_goes_on(inverse):
    task, curvature = accumulated("grouped", inverse=inverse)
    gradients = {name: torch.randn_like(p) for name, p in task.model.named_parameters()}
    curvature.solve(gradients, 0.1)
    other = Curvature(task.model, inverse=inverse)
    other.load_state_dict(copy.deepcopy(curvature.state_dict()))
    for one in (curvature, other):
        torch.manual_seed(5)
        one.accumulate(task.distribution(task.model(task.x)))
    ours, theirs = curvature.solve(gradients, 0.2), other.solve(gradients, 0.2)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(ValueError, match="saved with levels=1, got 2"):
        Curvature(task.model, inverse=inverse, levels=1).load_state_dict(curvature.state_dict())


def test_what_is_refused_changes_nothing():
    task, curvature = accumulated("linear")
    before = curvature.factors("0")
    gradient = {"0.weight": torch.ones(5, 4, dtype=torch.float64)}
    with pytest.raises(ValueError, match="damping must be a number above 0, got -1"):
        curvature.solve(gradient, -1)
    with pytest.raises(KeyError, match="names of the model's parameters, got 'weight'"):
        curvature.solve({"weight": gradient["0.weight"]}, 0.1)
    with pytest.raises(ValueError, match=r"the gradient of 0.weight must have shape \(5, 4\), got \(4,\)"):
        curvature.solve({"0.weight": torch.ones(4)}, 0.1)
    with pytest.raises(
        ValueError, match=r"gradients must be finite, got a NaN or an infinity in the gradient of 0.weight"
    ):
        curvature.solve({"0.weight": gradient["0.weight"] * float("nan")}, 0.1)
    with pytest.raises(RuntimeError, match="no statistics yet"):
        Curvature(task.model).solve(gradient, 0.1)
    with pytest.raises(TypeError, match="damping is no option of kfac2; the options are levels"):
        Curvature(task.model, damping=0.1)
    out = task.model(task.x * float("nan"))
    with pytest.raises(ValueError, match="statistics must be finite, got a NaN or an infinity in the input of 0"):
        curvature.accumulate(Categorical(logits=out, validate_args=False))
    with pytest.raises(TypeError, match=r"a list of them, or a tensor of log-probabilities, got str"):
        curvature.accumulate("logits")
    assert all(torch.equal(a, b) for a, b in zip(curvature.factors("0"), before, strict=True))
    assert not curvature.collector.captures.count

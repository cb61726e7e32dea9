"""EKFAC: the diagonal that the Fisher has in K-FAC's eigenbasis (George et al. 2018)."""

import copy

import models
import pytest
import torch
from compare import assert_equal
from inside import curvature_of, fields
from paper import KFAC, Curvature

from kfac2.fine import ekfac

NETS = ("linear", "conv1d", "conv2d", "conv3d", "grouped", "transposed2d", "tokens", "sequence", "normal")


def iterate(task, opt, seed):
    torch.manual_seed(seed)
    opt.zero_grad()
    out = task.model(task.x)
    opt.accumulate_fisher(task.distribution(out))
    task.loss(out).backward()
    opt.step()


def sampled_fishers(task, layers, seed):
    """Each layer's block of 1/M Σ_n ∇_n ∇_nᵀ, the labels those that the optimizer draws; by block, vec stacking columns."""
    torch.manual_seed(seed)
    out = task.model(task.x)
    distribution = task.distribution(out)
    log_prob = distribution.log_prob(distribution.sample())
    fishers = {}
    for name in layers:
        module = task.model.get_submodule(name)
        gradients = [matrices(module, -log_prob[n].sum()) for n in range(len(task.x))]
        blocks = zip(*gradients, strict=True)
        fishers[name] = [sum(torch.outer(v, v) for v in block) / log_prob.numel() for block in blocks]
    return fishers


def matrices(module, loss):
    """The gradient as vec(∇) of each block, bias last."""
    parameters = [module.weight] + ([] if module.bias is None else [module.bias])
    weight, *bias = torch.autograd.grad(loss, parameters, retain_graph=True)
    groups = getattr(module, "groups", 1)
    if isinstance(module, torch.nn.modules.conv._ConvTransposeNd):
        weight = torch.cat([part.transpose(0, 1) for part in weight.chunk(groups)])
    matrix = weight.reshape(weight.shape[0], -1)
    if bias:
        matrix = torch.cat([matrix, bias[0].unsqueeze(1)], 1)
    return [part.T.reshape(-1) for part in matrix.chunk(groups)]


@pytest.mark.parametrize("seed, numbers", [(0, 2**22), (1, 50)])  # all samples at once, and few at a time
@pytest.mark.parametrize("name", NETS)
def test_closer_to_the_fisher_than_kfac_in_frobenius_norm(name, seed, numbers, monkeypatch):
    monkeypatch.setattr(ekfac, "_GRADIENT_NUMBERS", numbers)
    torch.manual_seed(seed)
    task = models.task(name)
    opt = KFAC(task.model, lr=0, inverse="ekfac", cov_every=1, inv_every=100, stat_decay=0.0)
    iterate(task, opt, 7)  # the eigenbasis
    iterate(task, opt, 7)  # the diagonal, of the same rows
    fishers = sampled_fishers(task, opt.layers, 7)
    for layer in opt.layers:
        A, G = (factor.reshape(-1, *factor.shape[-2:]) for factor in opt.factors(layer))
        kept = fields(opt, layer)
        for q, fisher in enumerate(fishers[layer]):
            V = torch.kron(kept["A_vectors"][q].contiguous(), kept["G_vectors"][q].contiguous())
            diagonal = kept["diagonal"][q].T.reshape(-1)
            assert_equal(diagonal, (V.T @ fisher @ V).diagonal())
            ours, kfacs = V @ torch.diag(diagonal) @ V.T, torch.kron(A[q], G[q])
            assert (ours - fisher).norm() < (kfacs - fisher).norm()


@pytest.mark.parametrize("name", ["linear", "conv2d", "grouped", "transposed2d"])
def test_a_step_solves_the_damped_block(name):
    task = models.task(name)
    opt = KFAC(task.model, lr=0, inverse="ekfac", levels=1, damping=0.3, kl_clip=None, cov_every=1, inv_every=100)
    iterate(task, opt, 0)
    iterate(task, opt, 1)
    torch.manual_seed(2)
    opt.zero_grad()
    out = task.model(task.x)
    opt.accumulate_fisher(task.distribution(out))
    loss = task.loss(out)
    wanted = {layer: matrices(task.model.get_submodule(layer), loss) for layer in opt.layers}
    loss.backward()
    opt.step()
    for layer in opt.layers:
        kept, module = fields(opt, layer), task.model.get_submodule(layer)
        # what the step wrote, read as a gradient
        parameters = [module.weight] + ([] if module.bias is None else [module.bias])
        written = matrices(module, sum((p * p.grad.detach()).sum() for p in parameters))
        for q, (got, gradient) in enumerate(zip(written, wanted[layer], strict=True)):
            V = torch.kron(kept["A_vectors"][q].contiguous(), kept["G_vectors"][q].contiguous())
            block = V @ torch.diag(kept["diagonal"][q].T.reshape(-1) + 0.3) @ V.T
            assert_equal(got, torch.linalg.solve(block, gradient))


def test_the_first_diagonal_is_kfacs_and_a_new_basis_takes_the_old_one_along():
    task = models.task("linear")
    opt = KFAC(task.model, lr=0.1, inverse="ekfac", cov_every=1, inv_every=3)
    blocks = []
    for seed in range(4):
        before_last = copy.deepcopy(task.model.state_dict())
        iterate(task, opt, seed)
        kept = {name: value[0].clone() for name, value in fields(opt, "0").items()}
        V = torch.kron(kept["A_vectors"], kept["G_vectors"])
        blocks.append((V, kept["diagonal"].T.reshape(-1)))
        if seed == 0:
            A, G = opt.factors("0")
            assert_equal(V @ torch.diag(blocks[0][1]) @ V.T, torch.kron(A, G))
    # Iteration 3 observes in the old basis, then turns: what it observes is a share of 1/3 of the third average.
    assert not torch.allclose(blocks[3][0], blocks[2][0])
    V_old, V_new = blocks[2][0], blocks[3][0]
    task.model.load_state_dict(before_last)
    (fisher,) = sampled_fishers(task, ["0"], 3)["0"]
    observed = 2 / 3 * blocks[2][1] + 1 / 3 * (V_old.T @ fisher @ V_old).diagonal()
    assert_equal(blocks[3][1], (V_new.T @ V_old @ torch.diag(observed) @ V_old.T @ V_new).diagonal())
    assert curvature_of(opt).inverses.observations == 3 and all(curvature_of(opt).inverses.observed)


def test_turning_a_diagonal_is_exact():
    generator = torch.Generator().manual_seed(0)

    def basis(d):
        return torch.linalg.qr(torch.randn(2, d, d, dtype=torch.float64, generator=generator))[0]

    last = {"A_vectors": [basis(4)], "G_vectors": [basis(3)], "diagonal": [torch.rand(2, 3, 4, dtype=torch.float64)]}
    new = {"A_vectors": [basis(4)], "G_vectors": [basis(3)], "diagonal": [torch.zeros(2, 3, 4, dtype=torch.float64)]}
    turned = ekfac.EKFAC().carry_over(new, last, [torch.tensor([True, False])])["diagonal"][0]
    V, W = (torch.kron(f["A_vectors"][0][0].contiguous(), f["G_vectors"][0][0].contiguous()) for f in (last, new))
    dense = V @ torch.diag(last["diagonal"][0][0].T.reshape(-1)) @ V.T
    assert_equal(turned[0].T.reshape(-1), (W.T @ dense @ W).diagonal())
    assert not turned[1].any()  # had no inverse: begins with K-FAC's own


def test_one_place_layers_form_no_gradient_of_a_sample(monkeypatch):
    def forbidden(*args, **kwargs):
        pytest.fail("a gradient of each sample was formed")

    task = models.task("linear")
    curvature = Curvature(task.model, inverse="ekfac")
    curvature.accumulate(task.distribution(task.model(task.x)))
    curvature.solve({"0.weight": torch.ones(5, 4, dtype=torch.float64)}, damping=0.1)
    monkeypatch.setattr(torch, "bmm", forbidden)
    curvature.accumulate(task.distribution(task.model(task.x)))
    assert curvature.inverses.observations == 1


@pytest.mark.parametrize("name", ["linear", "conv2d", "grouped"])
def test_resumed_training_equals_uninterrupted_training(name):
    task = models.task(name)
    options = {"inverse": "ekfac", "cov_every": 2, "inv_every": 3, "lr": 0.05}
    opt = KFAC(task.model, **options)
    for seed in range(6):
        iterate(task, opt, seed)
    twin = copy.deepcopy(task)
    other = KFAC(twin.model, **options)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for seed in range(6, 12):
        iterate(task, opt, seed)
        iterate(twin, other, seed)
    for p, q in zip(task.model.parameters(), twin.model.parameters(), strict=True):
        assert p.isfinite().all() and torch.equal(p, q)

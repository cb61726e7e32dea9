"""The dense Fisher, the algebra of directions on it, and the records of `bench/quality.py`."""

import itertools
import math
import sys
from functools import partial
from pathlib import Path

import pytest
import quality
import quality_nets
import quality_report
import torch
from dense import Flat, Quadratic, coefficients, dense_fisher, halved
from experiments.data import image_set
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import CLASSES
from quality_nets import NETS, PIXELS
from torch import nn
from torch.distributions import Normal
from untuned_nets import Net, mlp


def drawn(prediction, outputs, size, generator):
    x = torch.randn(size, 5, generator=generator, dtype=torch.float64)
    if prediction is PIXELS:
        return x, (torch.rand(size, outputs, generator=generator) < 0.5).double()
    return x, torch.randint(outputs, (size,), generator=generator)


TINY = {
    "classes": Net(partial(mlp, (5, 6, 6, 4), nn.Tanh), partial(drawn, CLASSES, 4), CLASSES, 12),
    "pixels": Net(partial(mlp, (5, 4, 3), nn.Tanh), partial(drawn, PIXELS, 3), PIXELS, 12),
    "norm": Net(partial(mlp, (5, 6, 4), nn.ReLU, quality_nets._norm), partial(drawn, CLASSES, 4), CLASSES, 12),
}


@pytest.fixture
def point():
    return point_of(TINY["classes"], 0)


def point_of(net, seed):
    ((_, model, last),) = quality.trajectory(net, seed, [3])
    return quality.Point(net, model, last, *net.draw(24, torch.Generator().manual_seed(seed)), seed)


def labels(prediction, out):
    """All labels that a case can have."""
    if prediction is PIXELS:
        values = itertools.product((0.0, 1.0), repeat=out.shape[1])
        return [torch.tensor(value, dtype=out.dtype).expand_as(out) for value in values]
    return [torch.full(out.shape[:1], label) for label in range(out.shape[1])]


@pytest.mark.parametrize("name", TINY)
def test_the_dense_fisher_is_the_mean_product_of_scores(name, monkeypatch):
    """Over all labels, weighted by their probability: no Jacobian and no H is formed."""
    net = TINY[name]
    monkeypatch.setattr("dense.SAMPLES", 3)
    torch.manual_seed(0)
    model = net.make().double()
    x, _ = net.draw(7, torch.Generator().manual_seed(1))
    flat = Flat(model, [layer for layer, module in model.named_modules() if isinstance(module, nn.Linear)])
    parameters = [dict(model.named_parameters())[parameter] for parameter in flat.parameters]
    predicted = net.prediction.distribution(model(x))
    expected = torch.zeros(flat.size, flat.size, dtype=torch.float64)
    for y in labels(net.prediction, predicted.sample() if net.prediction is PIXELS else model(x)):
        log_prob = predicted.log_prob(y)
        for one in log_prob:
            gradients = torch.autograd.grad(one, parameters, retain_graph=True)
            score = flat.vector(dict(zip(flat.parameters, gradients, strict=True)))
            expected += one.exp().item() * torch.outer(score, score) / len(x)
    fisher = dense_fisher(model, flat, x, net.prediction.distribution)
    torch.testing.assert_close(fisher.matrix, expected, rtol=1e-9, atol=1e-12)
    assert fisher.cases == 7 and fisher.scores.shape == (7, flat.size)


def test_scores_are_gradients_of_the_drawn_labels(point):
    torch.manual_seed(5)
    fisher = dense_fisher(point.model, point.flat, point.x, CLASSES.distribution)
    torch.manual_seed(5)
    predicted = CLASSES.distribution(point.model(point.x))
    y = predicted.sample()
    parameters = [dict(point.model.named_parameters())[name] for name in point.flat.parameters]
    for n, score in enumerate(fisher.scores):
        gradients = torch.autograd.grad(-predicted.log_prob(y)[n], parameters, retain_graph=True)
        torch.testing.assert_close(score, point.flat.vector(dict(zip(point.flat.parameters, gradients, strict=True))))
    with pytest.raises(TypeError, match="must be a Categorical"):
        halved(Normal(torch.zeros(2), 1.0), torch.zeros(2, 1, 3))


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(sorted(TINY)), st.sampled_from([1e-1, 1e-2, 1e-3]))
def test_larger_spaces_reach_more(seed, name, damping):
    point = point_of(TINY[name], seed)
    model = Quadratic(point.fisher.matrix, point.gradient, damping)
    directions = point.directions(model)
    assert directions.keys() == quality_report.METHODS.keys()
    q = {method: model.share(v) for method, v in directions.items()}
    assert q["full inverse"] == pytest.approx(1, abs=1e-9) and max(q.values()) <= 1 + 1e-9 and min(q.values()) > 0
    chains = [
        ["one level, damped by λ", "one level", "layers", "directions", "rows + d"],
        ["one level", "pair", "directions"],
        ["one level", "ones, best weight"],
        ["layers", "rows", "rows + d"],
        ["directions, uncoupled", "directions"],
        ["directions, sampled", "directions"],
        ["directions, sampled on ¼", "directions"],
        ["ones", "ones, best weight"],
        ["ekfac", "directions on ekfac"],
        ["exact blocks", "directions on blocks"],
    ]
    for less, more in (pair for chain in chains for pair in itertools.pairwise(chain)):
        assert q[less] <= q[more] + 1e-7, (less, more, q)
    for method in ("layers", "pair", "directions", "rows", "rows + d", "directions on blocks"):
        v = directions[method]  # a minimum: m = −½ gᵀv, and its own best scale is 1
        assert model.value(v) == pytest.approx(-(point.gradient @ v).item() / 2, rel=1e-6)
        assert model.scale(v) == pytest.approx(1, rel=1e-6)


def test_coefficients_minimise_and_leave_out_what_is_dependent(point):
    model = Quadratic(point.fisher.matrix, point.gradient, 1e-2)
    Z = point.spaces(point.solve("kfac", 1e-2))["directions"]
    Q, b = Z.mT @ model.matrix @ Z, Z.mT @ point.gradient
    c = coefficients(Q, b)
    torch.testing.assert_close(Q @ c, b)
    assert model.value(Z @ c) == pytest.approx(-(b @ c).item() / 2)
    double = torch.cat([Z, Z, torch.zeros_like(Z[:, :1])], 1)
    torch.testing.assert_close(model.within(double), Z @ c)
    assert not coefficients(torch.zeros(3, 3), torch.zeros(3)).any()


def test_a_vector_is_the_tensors_of_its_layers(point):
    v = torch.randn(point.flat.size, dtype=torch.float64)
    named = point.flat.named(v)
    assert all(named[name].shape == p.shape for name, p in point.flat.parameters.items())
    torch.testing.assert_close(point.flat.vector(named), v)
    for most_rows, columns in ((0, 3), (4, 2 + 4), (6, 16)):
        parts = point.flat.split(v, most_rows)
        assert parts.shape == (len(v), columns) and torch.equal(parts.sum(1), v)
        assert ((parts != 0).sum(1) == 1).all()


def test_ekfac_with_second_moments_of_the_dense_fisher_is_kfac2s_with_exact_labels(point):
    point.curvatures["ekfac"] = point._curvature(inverse="ekfac", fisher="exact")
    point.solve("ekfac", 1.0)
    point._see(point.curvatures["ekfac"])
    basis = point.basis_of(point.curvatures["exact"])
    torch.testing.assert_close(point.solve("ekfac", 1e-2), point.solve_in(basis, 1e-2), rtol=1e-6, atol=1e-9)


def test_one_level_is_the_same_without_the_second(point):
    alone = point._curvature().solve(point.flat.named(point.gradient), 1e-2)
    torch.testing.assert_close(point.solve("kfac", 1e-2), point.flat.vector(alone))
    assert not torch.allclose(point.solve("kfac", 1e-2, 1.0), point.solve("kfac", 1e-2))


def test_a_step_along_a_direction_decreases_the_loss(point):
    model = Quadratic(point.fisher.matrix, point.gradient, 1e-2)
    assert point.decrease(model.best, point.x, point.y) > 0
    change = point.flat.named(1e-4 * point.gradient)
    before, after = (point.loss({name: s * v for name, v in change.items()}, point.x, point.y) for s in (0, 1))
    assert before - after == pytest.approx(1e-4 * point.gradient.square().sum().item(), rel=1e-2)
    assert point.decrease(-model.best, point.x, point.y) == 0


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    monkeypatch.setattr(quality, "NETS", TINY)
    monkeypatch.setattr(quality, "STEPS", (0, 3))
    return tmp_path / "quality.jsonl"


def called(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["quality.py", *arguments])
    threads = torch.get_num_threads()
    quality.main()
    torch.set_num_threads(threads)


def test_points_are_recorded_once_and_tabulated(tiny, monkeypatch, capsys):
    called(monkeypatch, "--out", str(tiny), "--nets", "classes", "norm")
    records = quality.load(tiny)
    assert len(records) == 2 * 2 * len(quality.DAMPINGS)
    for record in records:
        for numbers in (record["batch"], record["minibatch"]):
            assert all(math.isfinite(value) for by_method in numbers.values() for value in by_method.values())
            assert numbers["q"].keys() <= quality_report.METHODS.keys()
            assert ("directions" in numbers["q"]) == (record["step"] > 0)
    before, table = tiny.read_bytes(), tiny.with_suffix(".md").read_text()
    assert all(f"| {method} " in table for method in quality_report.METHODS)
    assert "Medians over 2 points: 2 networks" in table and tiny.with_suffix(".png").stat().st_size > 10_000
    capsys.readouterr()
    called(monkeypatch, "--out", str(tiny), "--nets", "classes", "norm")
    assert tiny.read_bytes() == before and "seed" not in capsys.readouterr().out
    tiny.write_text("".join(tiny.read_text().splitlines(keepends=True)[: len(quality.DAMPINGS)]))  # ended early
    called(monkeypatch, "--out", str(tiny), "--nets", "classes", "norm")
    assert tiny.read_bytes() == before


def test_missing_images_are_named_with_their_package(tmp_path, monkeypatch):
    monkeypatch.setattr(quality_nets, "FASHION_MNIST", tmp_path)
    monkeypatch.setattr(quality_nets, "_pixels", quality_nets._pixels.__wrapped__)
    image_set.cache_clear()
    with pytest.raises(SystemExit, match=r"lacks .*dataset-fashion-mnist"):
        called(monkeypatch, "--out", str(tmp_path / "quality.jsonl"), "--nets", "tanh-8")


def test_ratios():
    assert quality_report.ratio(3.0, 2.0) == 1.5
    assert quality_report.ratio(0.0, 0.0) == 1 and quality_report.ratio(1.0, 0.0) == math.inf


@pytest.mark.parametrize("name", NETS)
def test_networks_are_small_and_the_distribution_is_the_loss(name):
    net = NETS[name]
    try:
        x, y = net.draw(4, torch.Generator().manual_seed(0))
    except quality.DataError as error:
        pytest.skip(str(error))
    model = net.make().double()
    assert sum(p.numel() for p in model.parameters()) <= 5000
    out = model(x)
    prediction = net.prediction
    differences = [-prediction.distribution(o).log_prob(y).mean() - prediction.loss(o, y) for o in (out, 2 * out + 0.1)]
    torch.testing.assert_close(*differences, rtol=1e-9, atol=1e-9)


def test_the_published_table_is_that_of_the_records():
    folder = Path(quality.__file__).parent / "results"
    records = quality.load(folder / "quality.jsonl")
    assert (folder / "quality.md").read_text() == quality_report.tables(records)
    assert {(r["net"], r["step"]) for r in records} == set(itertools.product(NETS, quality.STEPS))

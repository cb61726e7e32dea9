"""`summary()`: what trains which parameters and why, what K-FAC costs; one record of the log."""

import logging
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributions import Categorical
from torch.nn.utils import prune

import kfac2
from kfac2 import summary


class Block(nn.Module):
    """Of a Llama: attention without bias, a gated MLP, two norms."""

    def __init__(self, width):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate_proj, self.up_proj = (nn.Linear(width, 3 * width, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(3 * width, width, bias=False)
        self.input_norm, self.post_norm = nn.RMSNorm(width), nn.RMSNorm(width)

    def forward(self, x):
        h = self.input_norm(x)
        x = x + self.o_proj(F.scaled_dot_product_attention(self.q_proj(h), self.k_proj(h), self.v_proj(h)))
        h = self.post_norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class Llama(nn.Module):
    def __init__(self, width=12, depth=6, words=30, tied=True):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, words, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x):
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


def by_kind(made):
    return {(row.treatment, row.kind): (len(row.names), row.parameters) for row in made.rows}


@pytest.mark.parametrize("tied", [False, True])
def test_of_a_llama(tied, caplog):
    model = Llama(tied=tied)
    with caplog.at_level(logging.INFO, logger="kfac2"):
        opt = kfac2.KFAC(model)
    made = opt.summary()
    (record,) = caplog.records
    assert record.getMessage() == str(made) and len(str(made).splitlines()) < 25
    assert record.levelno == (logging.WARNING if tied else logging.INFO)
    own, words = 6 * 13 * 12**2, 30 * 12
    assert by_kind(made) == {
        ("K-FAC", "Linear"): (42 + (not tied), own + words * (not tied)),
        ("AdamW", "RMSNorm"): (13, 13 * 12),
        ("AdamW", "Embedding"): (1, words),
        **({("AdamW", "Linear"): (1, 0)} if tied else {}),  # a shared weight counts with the module that comes first
    }
    assert made.parameters == sum(p.numel() for p in model.parameters())
    sides = [(12, 12)] * 24 + [(12, 36)] * 18 + ([] if tied else [(12, 30)])
    assert made.inverse_bytes == 4 * sum(a**2 + g**2 for a, g in sides)
    assert made.factor_bytes == 2 * sum(a * (a + 1) + g * (g + 1) for a, g in sides)  # triangles
    assert made.inverse_work == sum(a**3 + g**3 for a, g in sides)
    assert math.isclose(made.share("K-FAC"), 1 - (13 * 12 + words) / made.parameters)
    if tied:
        assert "AdamW: 1 Linear, its weight is tied to another module's, a Embedding (head)" in str(made)


def test_modules_without_linear_or_conv():
    model = nn.ModuleDict({
        "lstm": nn.LSTM(3, 4), "attention": nn.MultiheadAttention(4, 2), "norm": nn.BatchNorm1d(4),
        "embedding": nn.Embedding(5, 3), "conv": nn.Conv1d(2, 3, 2), "head": nn.Linear(4, 2),
    })  # fmt: skip
    model.token = nn.Parameter(torch.zeros(7))
    model["head"].bias.requires_grad_(False)
    outside = nn.Parameter(torch.zeros(9))
    made = kfac2.KFAC(model, params=[*model.parameters(), outside], rest="sgd").summary()
    assert by_kind(made) == {
        ("K-FAC", "Linear"): (1, 8), ("K-FAC", "Conv1d"): (1, 15),
        ("SGD", "LSTM"): (1, 4 * 4 * (3 + 4 + 2)), ("SGD", "MultiheadAttention"): (1, 60), ("SGD", "BatchNorm1d"): (1, 8),
        ("SGD", "Embedding"): (1, 15), ("SGD", "ModuleDict"): (1, 7), ("SGD", "Parameter"): (1, 9),
        ("SGD", "NonDynamicallyQuantizableLinear"): (1, 20), ("not trained", "Linear"): (1, 2),
    }  # fmt: skip


def test_of_many_kinds_the_smallest_share_a_line():
    kinds = [type(f"Kind{i}", (nn.Module,), {}) for i in range(40)]
    model = nn.ModuleList([nn.Linear(2, 2), *(kind() for kind in kinds)])
    for i, module in enumerate(model):
        if i:
            module.own = nn.Parameter(torch.zeros(100 - i))
    made = kfac2.Curvature(model).summary()
    lines = str(made).splitlines()
    assert len(lines) == 23 and "in 21 more modules" in lines[-2] and len(made.rows) == 41


@pytest.mark.parametrize("alone", ["skip", "frozen", "ungrouped", "skipped attention", "frozen attention"])
def test_what_was_asked_for_is_no_warning(alone, caplog):
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    skip, params = (), None
    if alone == "skip":
        skip = "b"
    elif alone == "frozen":
        model["b"].weight.requires_grad_(False)
    elif alone == "ungrouped":
        params = model["a"].parameters()
    else:
        model["attention"] = nn.MultiheadAttention(4, 2)
        if alone == "skipped attention":
            skip = r"attention\.out_proj"
        else:
            model["attention"].out_proj.weight.requires_grad_(False)
    with caplog.at_level(logging.INFO, logger="kfac2"):
        kfac2.Preconditioner(model, params=params, skip=skip)
    assert [record.levelno for record in caplog.records] == [logging.INFO]


@pytest.mark.parametrize("inverse, squares, outer", [("cholesky", 1, 0), ("eigh", 1, 0), ("ekfac", 1, 1)])
@pytest.mark.parametrize("make", [kfac2.KFAC, kfac2.Preconditioner, kfac2.Curvature])
def test_memory_is_what_is_kept(make, inverse, squares, outer, caplog):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, dtype=torch.float64).float())
    with caplog.at_level(logging.INFO, logger="kfac2"):
        user = make(model, inverse=inverse)
    assert len(caplog.records) == 1
    curvature = user if make is kfac2.Curvature else user.curvature
    curvature.accumulate(Categorical(logits=model(torch.randn(6, 4))))
    inverses = curvature.estimates.inverted(curvature.averages, None, kfac2.fine.Damping(0.1))
    held = sum(t.nbytes for stacks in (curvature.averages.A, curvature.averages.G) for t in stacks)
    assert user.summary().factor_bytes == held
    assert user.summary().inverse_bytes == sum(t.nbytes for stacks in inverses.fields.values() for t in stacks)


def test_layers_that_leave_later_are_in_the_next_summary_with_the_reason():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    opt = kfac2.KFAC(model)

    def step():
        opt.zero_grad()
        out = model(torch.randn(8, 4))
        opt.accumulate_fisher(Categorical(logits=out))
        F.cross_entropy(out, torch.arange(8) % 4).backward()
        opt.step()

    step()
    assert [row.names for row in opt.summary().rows] == [["0", "1", "2", "3"]]
    prune.identity(model[1], "weight")
    for layer in opt.curvature.layout.layers[2:]:
        with pytest.warns(RuntimeWarning, match="leaves K-FAC"):
            opt.curvature.drop(layer, f"its rows are off by {30 + len(layer.name)} %: so it is")
    with pytest.warns(RuntimeWarning, match="1 leaves K-FAC"):
        step()
    rows = {tuple(row.names): (row.treatment, row.reason, row.parameters) for row in opt.summary().rows}
    assert rows == {
        ("0",): ("K-FAC", "", 20),
        ("1",): ("AdamW", "its weight is parametrised", 20),
        ("2", "3"): ("AdamW", "its rows are off by some %: so it is", 40),
    }


def test_a_large_factor_is_warned_of_with_its_size_and_name(monkeypatch):
    monkeypatch.setattr(summary, "LARGE", 40)
    model = nn.ModuleDict({"body": nn.Linear(39, 8), "head": nn.Linear(8, 50), "other": nn.Conv2d(5, 4, 3)})
    size = 4e-6 * sum(1.5 * n**2 + n / 2 for n in (9, 50, 46, 4))
    with pytest.warns(RuntimeWarning, match=rf"up to 50 rows take {size:.3g} MB.* skip=\['head', 'other'\]") as caught:
        opt = kfac2.KFAC(model)
    assert len(caught) == 1 and opt.layers == ["body", "head", "other"]
    kfac2.KFAC(model, skip=["head", "other"])


def test_a_large_factor_is_warned_of_from_8192_rows():
    assert summary.LARGE == 8192


@pytest.mark.parametrize("options, per_layer", [({}, 0), ({"levels": 2}, 1), ({"coarse": "directions"}, 2)])
def test_the_second_level_is_told_with_its_unknowns(options, per_layer):
    opt = kfac2.KFAC(nn.Sequential(nn.Linear(4, 3), nn.Conv1d(3, 2, 1), nn.Linear(2, 2)), **options)
    made = opt.summary()
    assert made.unknowns == 3 * per_layer
    assert str(made).endswith(f", second level of {3 * per_layer} unknowns" if per_layer else ", one level")

"""What is captured, what is left alone, and which layers are handled."""

import copy
import logging
import pickle

import models
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from compare import assert_equal
from hypothesis import given
from hypothesis import strategies as st
from paper import KFAC
from torch.autograd.graph import GradientEdge
from torch.distributions import Categorical
from torch.nn.utils.parametrizations import weight_norm

from kfac2.capture import lowest_of


def net(inplace=False):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(inplace), nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.1, inplace), nn.Flatten(),
        nn.Linear(16, 5), nn.ELU(inplace=inplace), nn.Linear(5, 3),
    ).double()  # fmt: skip


def batch():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(6, 2, 4, 4, dtype=torch.float64, generator=generator), torch.arange(6) % 3


def iterate(model, opt, before=lambda: None, after=lambda: None):
    x, y = batch()
    opt.zero_grad()
    before()
    out = model(x)
    after()
    torch.manual_seed(7)
    opt.accumulate_fisher(Categorical(logits=out))
    F.cross_entropy(out, y).backward()
    opt.step()


def assert_same_statistics(opt, other):
    assert opt.layers == other.layers
    for name in opt.layers:
        for ours, theirs in zip(opt.factors(name), other.factors(name), strict=True):
            assert torch.equal(ours, theirs)
    assert torch.equal(opt.coarse_fisher(), other.coarse_fisher())


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_in_place_activations_change_nothing(fisher):
    optimizers = []
    for inplace in (False, True):
        model = net(inplace)
        optimizers.append(KFAC(model, fisher=fisher))
        iterate(model, optimizers[-1])
    opt, other = optimizers
    assert_equal(opt.coarse_fisher(), other.coarse_fisher())
    for name in opt.layers:
        for ours, theirs in zip(opt.factors(name), other.factors(name), strict=True):
            assert_equal(ours, theirs)


def test_other_forwards_leave_the_statistics_alone():
    plain, disturbed = net(), net()
    opt, other = KFAC(plain), KFAC(disturbed)
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)

    def disturb():
        disturbed.eval()
        disturbed(x)  # captured, but not in the distribution's graph
        disturbed.train()
        with torch.no_grad():
            disturbed(x)
        disturbed(x * 2)

    iterate(plain, opt)
    iterate(disturbed, other, before=disturb, after=disturb)
    assert_same_statistics(opt, other)


def test_a_forward_in_eval_mode_counts_if_it_is_in_the_graph():
    model = net().eval()
    opt = KFAC(model)
    iterate(model, opt)
    assert opt.factors("0")[0].norm() > 0


def test_grads_stay_untouched_and_nothing_is_done_between_updates():
    model = net()
    opt = KFAC(model, cov_every=2)
    x, y = batch()
    assert opt.needs_fisher
    out = model(x)
    opt.accumulate_fisher(Categorical(logits=out))
    assert all(p.grad is None for p in model.parameters())
    F.cross_entropy(out, y).backward()
    opt.step()
    assert not opt.needs_fisher
    before = opt.coarse_fisher()
    state = torch.get_rng_state()
    opt.accumulate_fisher(Categorical(logits=model(x)))
    assert torch.equal(torch.get_rng_state(), state)
    F.cross_entropy(model(x), y).backward()
    opt.step()
    assert torch.equal(opt.coarse_fisher(), before)
    assert opt.needs_fisher


def test_captures_are_freed_at_the_step():
    model = net()
    opt = KFAC(model)
    iterate(model, opt)
    assert opt.curvature.collector.captures.count == 0


def test_a_copy_of_the_model_does_not_disturb():
    plain, copied = net(), net()
    opt, other = KFAC(plain), KFAC(copied)
    average = copy.deepcopy(copied)
    restored = pickle.loads(pickle.dumps(copied))
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    iterate(plain, opt)
    iterate(copied, other, before=lambda: (average(x), restored(x)))
    assert_same_statistics(opt, other)
    assert other.curvature.collector.captures.count == 0
    model = net()
    del opt
    KFAC(model)  # an optimizer that is gone leaves hooks that do nothing
    model(x)


def test_frozen_parameters():
    model = net()
    model[2].weight.requires_grad_(False)
    model[5].bias.requires_grad_(False)
    opt = KFAC(model)
    assert opt.layers == ["0", "5", "7"]
    before = [model[2].weight.clone(), model[5].bias.clone()]
    iterate(model, opt)
    assert opt.factors("5")[0].shape == (16, 16)
    assert opt.factors("7")[0].shape == (6, 6)
    assert torch.equal(before[0], model[2].weight) and torch.equal(before[1], model[5].bias)
    model[0].weight.requires_grad_(False)  # later: no gradient, no step, no crash
    model[0].bias.requires_grad_(False)
    before = model[0].weight.clone()
    for _ in range(11):
        iterate(model, opt)
    assert torch.equal(before, model[0].weight)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)
        self.use = ["a", "b"]

    def forward(self, x):
        return self.head(torch.tanh(sum(getattr(self, name)(x) for name in self.use)))


def branch_step(model, opt, use):
    model.use = use
    x, y = torch.randn(5, 3).double(), torch.arange(5) % 2
    opt.zero_grad()
    out = model(x)
    opt.accumulate_fisher(Categorical(logits=out))
    F.cross_entropy(out, y).backward()
    gradient = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    opt.step()
    return gradient


def test_an_unused_layer_is_a_zero_map_and_keeps_its_factors():
    model = Branches().double()
    opt = KFAC(model, cov_every=1, inv_every=1, stat_decay=0.9)
    branch_step(model, opt, ["a", "b"])
    factors, sums = opt.factors("b"), opt.coarse_sums()
    weight = model.b.weight.clone()
    branch_step(model, opt, ["a"])
    assert all(torch.equal(ours, old) for ours, old in zip(opt.factors("b"), factors, strict=True))
    assert torch.equal(model.b.weight, weight)
    for now, old in zip(opt.coarse_sums(), sums, strict=True):
        assert_equal(now[1], 0.5 * old[1])  # t = 2 is everyone's: averaged with zero by half
    branch_step(model, opt, ["a", "b"])


def test_a_layer_without_statistics_takes_its_plain_gradient():
    model = Branches().double()
    opt = KFAC(model, cov_every=2, inv_every=1, kl_clip=None, momentum=0)
    branch_step(model, opt, ["a"])
    with pytest.raises(RuntimeError, match="b has no statistics yet"):
        opt.factors("b")
    model.use = ["a", "b"]
    before = model.b.weight.clone()
    model(torch.randn(5, 3).double()).sum().backward()  # without accumulate_fisher
    gradient = model.b.weight.grad.clone()
    opt.step()
    assert_equal(before - model.b.weight, 1e-2 * gradient)


def test_a_layer_that_is_used_late_has_statistics_at_its_first_use():
    model = Branches().double()
    opt = KFAC(model, cov_every=10, inv_every=10)
    for use in "aaab":
        branch_step(model, opt, [use])
    assert all(opt.curvature.averages.seen)
    assert not opt.needs_fisher and opt.curvature.averages.updates == 2


def test_a_layer_that_does_not_fit_leaves_the_coarse_space():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.odd, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            h = torch.tanh(self.first(x))
            extra = self.odd(torch.cat([h, h[:1]]))  # N + 1 rows
            return self.head(h + extra[:-1])

    model = Odd().double()
    opt = KFAC(model, cov_every=1)
    x = torch.randn(4, 3).double()
    for step in range(2):
        opt.zero_grad()
        out = model(x)
        if step == 0:
            with pytest.warns(
                RuntimeWarning, match="odd has rows that do not belong to the 4 samples one by one .leading size 5"
            ):
                opt.accumulate_fisher(Categorical(logits=out))
        else:
            opt.accumulate_fisher(Categorical(logits=out))
        out.sum().backward()
        opt.step()
    fisher = opt.coarse_fisher()
    assert fisher.shape == (3, 3) and not fisher[1].any() and fisher[0, 0] > 0
    assert opt.factors("odd")[0].norm() > 0


def test_unbatched_inputs_are_one_sample():
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten(0), nn.Linear(9, 3)).double()
    twin = copy.deepcopy(model)
    opt, other = KFAC(model), KFAC(twin)
    x = torch.randn(2, 4, dtype=torch.float64)
    for m, o, value in (
        (model, opt, x),
        (nn.Sequential(twin[0], nn.Flatten(1), twin[2]), other, x.unsqueeze(0)),
    ):
        torch.manual_seed(0)
        out = m(value)
        o.accumulate_fisher(Categorical(logits=out))
        out.sum().backward()
        o.step()
    assert_equal(opt.coarse_fisher(), other.coarse_fisher())


def test_keyword_input():
    class Keyword(nn.Linear):
        pass

    model = nn.Sequential(Keyword(3, 2)).double()
    opt = KFAC(model)
    out = model[0](input=torch.randn(4, 3).double())
    opt.accumulate_fisher(Categorical(logits=out))
    out.sum().backward()
    opt.step()
    assert opt.layers == ["0"] and opt.factors("0")[0].shape == (4, 4)


def test_layers_left_to_sgd_are_in_the_summary_with_the_reason(caplog):
    class Own(nn.Linear):
        def forward(self, input):
            return super().forward(input) * 2

    model = nn.ModuleDict({
        "plain": nn.Linear(2, 2),
        "attention": nn.MultiheadAttention(4, 2),
        "normed": weight_norm(nn.Linear(2, 2)),
        "reflect": nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"),
        "own": Own(2, 2),
        "tied": nn.Linear(3, 5, bias=False),
        "embedding": nn.Embedding(5, 3),
        "lazy": nn.LazyLinear(2),
        "frozen": nn.Linear(2, 2).requires_grad_(False),
        "skipped": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)),
    })  # fmt: skip
    model["tied"].weight = model["embedding"].weight
    with caplog.at_level(logging.INFO, logger="kfac2"):
        opt = KFAC(model, skip=(r"skipped\..",))
    assert opt.layers == ["plain", "reflect", "own"]
    rows = opt.summary().rows
    for name, reason in {
        "attention.out_proj": "inside of one function", "normed": "parametrised", "tied": "tied to another module's, a Emb",
        "frozen": "frozen", "lazy": "no shape yet", "skipped.0": "named by skip", "skipped.1": "named by skip",
        "attention": "not a Linear or Conv", "embedding": "not a Linear or Conv",
        "plain": "", "reflect": "", "own": "",
    }.items():  # fmt: skip
        (row,) = [row for row in rows if name in row.names]
        assert reason in row.reason and (row.treatment == "K-FAC") == (reason == ""), name
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and record.getMessage() == str(opt.summary())


def test_layers_follow_named_modules():
    model = models.task("tokens").model
    assert KFAC(model).layers == ["inner", "flat", "head"]
    assert KFAC(nn.Linear(2, 2)).layers == [""]


def test_low_precision_models_keep_float32_factors():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).to(torch.bfloat16)
    opt = KFAC(model, kl_clip=1e-3)
    x = torch.randn(8, 4).to(torch.bfloat16)
    for _ in range(3):
        opt.zero_grad()
        out = model(x)
        opt.accumulate_fisher(Categorical(logits=out.float()))
        F.cross_entropy(out.float(), torch.arange(8) % 3).backward()
        opt.step()
    assert opt.factors("0")[0].dtype == torch.float32
    assert model[0].weight.dtype == torch.bfloat16 and model[0].weight.isfinite().all()


def test_channels_last_changes_nothing():
    plain, last = net(), net().to(memory_format=torch.channels_last)
    optimizers = [KFAC(plain), KFAC(last)]
    for model, opt in zip((plain, last), optimizers, strict=True):
        iterate(model, opt)
    for name in optimizers[0].layers:
        for ours, theirs in zip(optimizers[0].factors(name), optimizers[1].factors(name), strict=True):
            assert_equal(ours, theirs)
    for p, q in zip(plain.parameters(), last.parameters(), strict=True):
        assert_equal(p, q)


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(10, 4, sparse=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.embedding(x))


def test_sparse_gradients_of_other_parameters():
    model = Words().double()
    opt = KFAC(model, momentum=0)
    out = model(torch.arange(5))
    opt.accumulate_fisher(Categorical(logits=out))
    out.square().sum().backward()
    before, gradient = model.embedding.weight.detach().clone(), model.embedding.weight.grad.to_dense()
    opt.step()
    assert_equal(before - model.embedding.weight, 1e-2 * gradient)


def test_an_empty_batch_adds_nothing():
    model = net()
    opt = KFAC(model, cov_every=1)
    iterate(model, opt)
    before = opt.coarse_fisher()
    opt.zero_grad()
    out = model(torch.zeros(0, 2, 4, 4, dtype=torch.float64))
    opt.accumulate_fisher(Categorical(logits=out, validate_args=False))  # torch cannot check an empty one
    with pytest.warns(RuntimeWarning, match="older ones are used"):
        opt.step()
    assert torch.equal(opt.coarse_fisher(), before)


@pytest.mark.slow
def test_a_compiled_model():
    plain, twin = net(), net()
    opt, other = KFAC(plain), KFAC(twin)
    compiled = torch.compile(twin, backend="aot_eager")
    for _ in range(3):
        iterate(plain, opt)
        iterate(compiled, other)
    assert_equal(other.coarse_fisher(), opt.coarse_fisher())
    for p, q in zip(plain.parameters(), twin.parameters(), strict=True):
        assert_equal(q, p)


@given(st.data())
def test_the_lowest_uses_are_those_from_which_no_path_leads_to_another(data):
    tensors = [torch.ones(1, requires_grad=True)]
    for _ in range(data.draw(st.integers(1, 8))):
        before = data.draw(st.lists(st.sampled_from(tensors), min_size=1, max_size=3))
        tensors.append(torch.stack(before).sum(0))
    nodes = [tensor.grad_fn for tensor in data.draw(st.lists(st.sampled_from(tensors[1:]), min_size=1, unique_by=id))]

    def below(node):
        children = [child for child, _ in node.next_functions if child is not None]
        return {*children, *(far for child in children for far in below(child))}

    found = [(number, GradientEdge(node, 0)) for number, node in enumerate(nodes)]
    assert [n for n, _ in lowest_of(found)] == [n for n, node in enumerate(nodes) if not below(node) & {*nodes}]

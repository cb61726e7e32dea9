"""Uses of weights: shared, repeated, functional, padded, partial; exact against the dense Fisher, or reported."""

import contextlib
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from compare import assert_equal
from hypothesis import given, settings
from hypothesis import strategies as st
from paper import KFAC, Curvature
from torch.distributions import Bernoulli, Categorical, Independent, Normal
from torch.utils.checkpoint import checkpoint_sequential

import kfac2

X, Y = torch.randn(16, 6, generator=torch.Generator().manual_seed(0)).double(), torch.arange(16) % 3


def trace(factors, columns=None):
    A, G = factors
    return float(A[:columns, :columns].trace() * G.trace())


def block(factors):
    """The Kronecker block of a Linear layer, rows of its gradient matrix one after the other."""
    return torch.kron(factors[1], factors[0])


def scores(model, parameters, log_prob):
    """By case, the gradient of its log-probability: the dense Fisher is the mean of their outer products."""
    rows = []
    for case in log_prob.flatten():
        grads = torch.autograd.grad(case, parameters, retain_graph=True, allow_unused=True)
        zeros = zip(grads, parameters, strict=True)
        rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zeros]))
    return torch.stack(rows)


# -- several uses of one weight ---------------------------------------------------------------------------------


class Shared(nn.Module):
    """One weight used as a module twice, as a function, by another module that shares it, and by `forward` itself."""

    def __init__(self, how):
        super().__init__()
        self.how, self.w, self.twin, self.head = how, nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.twin.weight, self.twin.bias = self.w.weight, self.w.bias

    def forward(self, x):
        again = {
            "module": self.w,
            "function": lambda h: F.linear(h, self.w.weight, bias=self.w.bias),
            "forward": self.w.forward,
            "twin": self.twin,
        }[self.how]
        return self.head(torch.tanh(again(torch.tanh(self.w(x)))))


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@pytest.mark.parametrize("how", ["module", "function", "forward", "twin"])
def test_rows_of_all_uses_are_concatenated(how, fisher):
    torch.manual_seed(0)
    model = Shared(how).double()
    opt = KFAC(model, fisher=fisher, levels=2)
    assert opt.layers == ["w", "head"]
    out = model(X)
    torch.manual_seed(1)
    opt.accumulate_fisher(Categorical(logits=out))
    with torch.no_grad():
        inputs = [X, torch.tanh(model.w(X))]
    h = [x.clone().requires_grad_() for x in inputs]
    outputs = [model.w(h[0])]
    outputs.append(model.w(torch.tanh(outputs[0])))
    logits = model.head(torch.tanh(outputs[1]))
    torch.manual_seed(1)
    labels = Categorical(logits=logits).sample() if fisher == "mc" else Y
    g = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), outputs)
    F.cross_entropy(out, Y).backward()
    opt.step()
    rows = torch.cat([torch.cat([x, torch.ones(16, 1).double()], 1) for x in inputs]), torch.cat(g)
    A, G = opt.factors("w")
    assert_equal(A, rows[0].T @ rows[0] / 16)
    assert_equal(G, rows[1].T @ rows[1] / 32)
    s, u = (torch.stack([part.sum(1) for part in side.chunk(2)]) for side in rows)
    assert_equal(opt.coarse_fisher()[0, 0], s.square().sum() / 16 * u.square().sum() / 32)


def test_a_shared_layer_by_ekfac_is_the_diagonal_of_the_dense_fisher():
    torch.manual_seed(0)
    model = Shared("function").double()
    curvature = Curvature(model, inverse="ekfac")
    gradients = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    out = model(X)
    curvature.accumulate(Categorical(logits=out))
    curvature.solve(gradients, 0.1)
    torch.manual_seed(3)
    curvature.accumulate(Categorical(logits=model(X)))
    torch.manual_seed(3)
    distribution = Categorical(logits=model(X))
    J = scores(model, [model.w.weight, model.w.bias], distribution.log_prob(distribution.sample()))
    J = torch.cat([J[:, :36].reshape(-1, 6, 6), J[:, 36:].unsqueeze(2)], 2)
    fields = {name: curvature.layout.view(stack, 0)[0] for name, stack in curvature.inverses.fields.items()}
    turned = fields["G_vectors"].T @ J @ fields["A_vectors"]
    assert_equal(fields["diagonal"], turned.square().mean(0))


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_micro_batches_of_a_repeated_layer(fisher):
    torch.manual_seed(0)
    model = Shared("module").double()
    opt, whole = KFAC(model, fisher="empirical"), KFAC(model, fisher="empirical")
    F.cross_entropy(model(X), Y).backward()
    whole.step()
    model.load_state_dict({k: v for k, v in model.state_dict().items()})
    del whole
    model.zero_grad()
    for x, y in zip(X.chunk(4), Y.chunk(4), strict=True):
        (F.cross_entropy(model(x), y) / 4).backward()
    opt.step()
    assert opt.layers == ["w", "head"] and opt.factors("w")[0].shape == (7, 7)


def test_a_layer_that_a_hook_of_a_plain_module_calls():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    adapter = nn.Linear(6, 6).double()
    m[1].adapter = [adapter]  # no submodule
    whole = nn.ModuleList([m, adapter])
    m[1].register_forward_pre_hook(lambda module, args: (args[0] + F.relu(adapter(args[0])),))
    opt = KFAC(whole)
    step(m, opt)
    assert opt.layers == ["0.0", "0.2", "1"] and trace(opt.factors("1")) > 0


# -- the self-check ---------------------------------------------------------------------------------------------


def leaves(opt, name, reason, run):
    with pytest.warns(RuntimeWarning, match=f"{name} leaves K-FAC.*{reason}"):
        run()
    assert name not in opt.layers


def test_a_derivative_in_the_loss_is_found():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.rand(32, 1, requires_grad=True)
    opt = KFAC(m)
    (ux,) = torch.autograd.grad(m(x).sum(), x, create_graph=True)
    with pytest.warns(RuntimeWarning) as caught:
        opt.accumulate_fisher(Normal(ux.squeeze(1), 1.0))
    assert {str(w.message).split()[1] for w in caught if "leaves K-FAC" in str(w.message)} == {"0", "2"}
    assert opt.layers == []


def test_a_derivative_in_the_loss_is_found_by_the_empirical_fisher():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.rand(32, 1, requires_grad=True)
    opt = KFAC(m, fisher="empirical")
    (ux,) = torch.autograd.grad(m(x).sum(), x, create_graph=True)
    (0.5 * ux.square().mean()).backward()
    with pytest.warns(RuntimeWarning, match="leaves K-FAC"):
        opt.step()
    assert "0" not in opt.layers


def test_a_weight_that_is_used_otherwise_is_found():
    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(torch.tanh(x @ self.a.weight.T))

    model = Transposed().double()
    opt = KFAC(model)
    out = model(X)
    leaves(opt, "a", "was used in no call", lambda: opt.accumulate_fisher(Categorical(logits=out)))


def test_another_bias_is_named():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(torch.tanh(F.linear(x, self.a.weight, 2 * self.a.bias)))

    model = Other().double()
    opt = KFAC(model)
    out = model(X)
    leaves(opt, "a", "without its bias, or with another", lambda: opt.accumulate_fisher(Categorical(logits=out)))


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@pytest.mark.parametrize("shape", [(4, 5, 6), (4, 2, 3, 6), (6,)])
def test_an_activation_in_place_on_positions(shape, fisher):
    """The output of `F.linear` is a view there, and the node of a view leaves the graph."""
    x, factors = torch.randn(shape).double(), []
    for inplace in (False, True):
        torch.manual_seed(0)
        m = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=inplace), nn.Linear(5, 3)).double()
        opt = KFAC(m, fisher=fisher, cases="rows" if fisher == "empirical" else None, lr=0.0)
        out = m(x).reshape(-1, 3)
        opt.accumulate_fisher(Categorical(logits=out))
        F.cross_entropy(out, torch.arange(len(out)) % 3).backward()
        opt.step()
        assert opt.layers == ["0", "2"]
        factors.append([*opt.factors("0"), opt.coarse_fisher()])
    for one, other in zip(*factors, strict=True):
        assert torch.equal(one, other)


def test_reentrant_checkpointing():
    torch.manual_seed(0)
    m = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)), nn.Linear(6, 3)).double()
    x = X.clone().requires_grad_()
    traces = []
    for run in (lambda: m(x), lambda: checkpoint_sequential(m, 4, x, use_reentrant=True)):
        m.zero_grad()
        o = KFAC(m, fisher="empirical", lr=0.0)
        F.cross_entropy(run(), Y).backward()
        o.step()
        traces.append([trace(o.factors(name)) for name in o.layers])
    assert_equal(torch.tensor(traces[1]), torch.tensor(traces[0]))
    drawn = KFAC(m)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        drawn.accumulate_fisher(Categorical(logits=checkpoint_sequential(m, 4, x, use_reentrant=True)))


@pytest.mark.parametrize("scale", [65536.0, 8.0])
def test_a_loss_scale_that_was_taken_out_is_taken_out_of_the_rows(scale):
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    traces = []
    for factor in (1.0, scale):
        m.zero_grad()
        opt = KFAC(m, fisher="empirical", lr=0.0)
        (F.cross_entropy(m(X), Y) * factor).backward()
        for p in m.parameters():
            p.grad /= factor
        opt.step()
        traces.append(trace(opt.factors("0")))
    assert_equal(torch.tensor(traces[1]), torch.tensor(traces[0]))


def test_clipped_gradients_leave_the_rows_as_they_are():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    traces = []
    for clip in (1e9, 1e-2):
        m.zero_grad()
        opt = KFAC(m, fisher="empirical", lr=0.0)
        F.cross_entropy(m(X), Y).backward()
        torch.nn.utils.clip_grad_norm_(m.parameters(), clip)
        opt.step()
        assert opt.layers == ["0", "2"]
        traces.append(trace(opt.factors("0")))
    assert_equal(torch.tensor(traces[1]), torch.tensor(traces[0]))


# -- padding, axes, cases ---------------------------------------------------------------------------------------


def test_padded_and_packed_agree():
    torch.manual_seed(0)
    x = torch.randn(16, 20, 4).double()
    mask = torch.arange(20) < torch.randint(1, 5, (16, 1))
    x[~mask] = 0
    results = []
    for forward in (lambda m: m(x)[mask], lambda m: m(x[mask])):
        m = nn.Linear(4, 3).double()
        nn.init.zeros_(m.weight)
        nn.init.zeros_(m.bias)
        opt = KFAC(m)
        torch.manual_seed(1)
        out = forward(m)
        opt.accumulate_fisher(Categorical(logits=out))
        out.sum().backward()
        opt.step()
        results.append((*opt.factors(""), opt.coarse_fisher()))
    for padded, packed in zip(*results, strict=True):
        assert_equal(padded, packed)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 6), st.integers(1, 7), st.integers(0, 2**31), st.sampled_from(["cholesky", "ekfac"]), st.booleans()
)
def test_drawn_padding(N, S, seed, inverse, flattened):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, S, 3, generator=generator).double()
    mask = torch.rand(N, S, generator=generator) < 0.5
    mask[0, 0] = True
    x[~mask] = 100.0  # of no consequence
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    results = []
    padded = (lambda: net(x.flatten(0, 1))[mask.flatten()]) if flattened else (lambda: net(x)[mask])
    for forward in (padded, lambda: net(x[mask])):
        curvature = Curvature(net, inverse=inverse)
        for again in range(2):
            torch.manual_seed(again)
            curvature.accumulate(Categorical(logits=forward()))
        results.append([*curvature.factors("0"), *curvature.factors("2"), curvature.coarse_fisher()])
    for one, other in zip(*results, strict=True):
        assert_equal(one, other)


def test_a_mask_where_positions_mix():
    torch.manual_seed(0)
    net = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 3)}).double()
    x, mask = torch.randn(5, 6, 4).double(), torch.arange(6) < torch.randint(1, 6, (5, 1))
    results = []
    for padding in (0.0, 50.0):  # what is in padded rows does not count, though it reaches the loss
        h = x.masked_fill(~mask[..., None], padding)
        curvature = Curvature(net)

        def forward(h=h):
            out = net["a"](h)
            mixed = torch.where(mask[..., None], out, out * 1e-30)
            return net["b"](mixed + mixed.mean(1, keepdim=True))

        torch.manual_seed(1)
        curvature.collect(Categorical(logits=forward()), mask)
        assert curvature.iteration.settle() is None
        curvature.estimates.commit(*curvature.estimates.averaged(curvature.iteration.sums))
        curvature.iteration.discard()
        results.append(curvature.factors("a"))
    assert_equal(results[0][0], results[1][0])
    rows = torch.cat([x[mask], torch.ones(int(mask.sum()), 1).double()], 1)
    assert_equal(results[0][0], rows.T @ rows / 30)
    with pytest.raises(ValueError, match=r"mask must have the shape \(N, S\)"):
        Curvature(net).collect(Categorical(logits=net["b"](net["a"](x))), mask[:, :2])


def test_a_mask_leaves_out_places_of_a_convolution():
    """The rows of both factors: patches around masked places are none."""
    for conv in (nn.Conv1d(3, 4, 3, padding=1, groups=1), nn.ConvTranspose1d(3, 4, 3, padding=1)):
        torch.manual_seed(0)
        conv = conv.double()
        x, mask = torch.randn(5, 3, 7).double(), torch.arange(7) < torch.randint(1, 7, (5, 1))
        curvature = Curvature(conv, levels=1)
        curvature.collect(Normal(conv(x), 1.0), mask)
        assert curvature.iteration.settle() is None
        curvature.estimates.commit(*curvature.estimates.averaged(curvature.iteration.sums))
        curvature.iteration.discard()
        weight = conv.weight.detach().requires_grad_()
        pairs = []
        for n, t in mask.nonzero():
            F_conv = F.conv1d if isinstance(conv, nn.Conv1d) else F.conv_transpose1d
            out = F_conv(x[n : n + 1], weight, None, padding=1)[0, 0, t]
            (row,) = torch.autograd.grad(out, weight)
            row = row[0] if isinstance(conv, nn.Conv1d) else row[:, 0]
            pairs.append(torch.cat([row.flatten(), torch.ones(1).double()]))
        rows = torch.stack(pairs)
        assert_equal(curvature.factors("")[0], rows.T @ rows / (5 * 4 * 7))


class Expert(nn.Module):
    """One expert that gets some of the rows, in slots."""

    def __init__(self, tokens, slots=0):
        super().__init__()
        self.a, self.e, self.f, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.tokens, self.slots = torch.tensor(tokens), slots

    def forward(self, x):
        h = torch.tanh(self.a(x))
        flat = h.flatten(0, -2)
        rows = F.pad(flat[self.tokens], (0, 0, 0, self.slots))
        out = torch.tanh(self.e(rows))[: len(self.tokens)]
        return self.head(torch.tanh(self.f((flat.index_add(0, self.tokens, out)).reshape(h.shape))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_share_of_as_many_rows_as_there_are_samples_is_no_batch(dtype):
    torch.manual_seed(0)
    m = Expert([5, 4, 3, 2]).to(dtype)
    for inverse in ("cholesky", "ekfac"):
        curvature = Curvature(m, inverse=inverse)
        with pytest.warns(RuntimeWarning, match="e has rows that do not belong to the 4 samples"):
            curvature.accumulate(Categorical(logits=m(torch.randn(4, 2, 6, dtype=dtype)).flatten(0, 1)))
        fisher = curvature.coarse_fisher()
        assert not fisher[1].any() and fisher[0, 3] != 0


def test_empty_slots_of_an_expert_are_no_rows():
    torch.manual_seed(0)
    results = []
    m = Expert([5, 4, 3]).double()
    x = torch.randn(7, 2, 6).double()
    for slots in (0, 8):
        m.slots = slots
        curvature = Curvature(m, levels=1)
        torch.manual_seed(1)
        curvature.accumulate(Categorical(logits=m(x).flatten(0, 1)))
        results.append(curvature.factors("e"))
    for one, other in zip(*results, strict=True):
        assert_equal(one, other)


@pytest.mark.parametrize("named", [False, True])
def test_time_major(named):
    results = []
    for major in (0, 1):
        torch.manual_seed(0)
        net = nn.ModuleDict({"a": nn.Linear(4, 5), "head": nn.Linear(5, 3)}).double()
        x = torch.randn(8, 4, 4).double()  # (N, T, F)
        opt = KFAC(net, batch_dim=major if named else 0)
        h = torch.tanh(net["a"](x if major == 0 else x.transpose(0, 1))).mean(1 - major)
        torch.manual_seed(1)
        out = net["head"](h)
        if major and not named:
            with pytest.warns(RuntimeWarning, match="batch_dim="):
                opt.accumulate_fisher(Categorical(logits=out))
        else:
            opt.accumulate_fisher(Categorical(logits=out))
        out.sum().backward()
        opt.step()
        results.append((opt.factors("a"), opt.coarse_fisher()))
    assert_equal(results[0][0][0], results[1][0][0])
    if named:
        assert_equal(results[0][1], results[1][1])
    else:
        assert not results[1][1][0].any() and results[1][1][1, 1] > 0


def test_a_table_of_one_row_is_out_of_the_coarse_space():
    torch.manual_seed(0)
    net = nn.ModuleDict({"table": nn.Linear(3, 4), "a": nn.Linear(4, 4), "head": nn.Linear(4, 3)}).double()
    positions, x = torch.randn(1, 5, 3).double(), torch.randn(6, 5, 4).double()
    opt = KFAC(net)
    out = net["head"](torch.tanh(net["a"](x + net["table"](positions))))
    with pytest.warns(RuntimeWarning, match="table has rows that do not belong to the 6 samples"):
        opt.accumulate_fisher(Categorical(logits=out))
    out.sum().backward()
    opt.step()
    fisher = opt.coarse_fisher()
    assert not fisher[0].any() and fisher[1, 1] > 0 and trace(opt.factors("table")) > 0


def test_a_token_loss_with_the_empirical_fisher_is_asked_for_its_cases():
    torch.manual_seed(0)
    net, x, y = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3)), torch.randn(8, 16, 4), torch.arange(128) % 3
    opt = KFAC(net, fisher="empirical", lr=0.0)
    F.cross_entropy(net(x).flatten(0, 1), y).backward()
    with pytest.raises(ValueError, match=r"cases must be given.*128 rows of 2 and 8 samples: cases='rows'"):
        opt.step()
    traces = []
    for cases, inputs in (("rows", x), (128, x), (None, x.flatten(0, 1))):
        net.zero_grad()
        opt = KFAC(net, fisher="empirical", cases=cases, lr=0.0)
        F.cross_entropy(net(inputs).flatten(0, -2), y).backward()
        opt.step()
        traces.append(float(opt.factors("2")[1].trace()))
    assert_equal(torch.tensor(traces[0]), torch.tensor(traces[2]), 1e-5)
    assert_equal(torch.tensor(traces[1]), torch.tensor(traces[2]), 1e-5)
    assert 0.1 < traces[0] < 1


@pytest.mark.parametrize("micro", [1, 2])
def test_a_loss_that_is_a_sum_is_refused_by_the_empirical_fisher(micro):
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    opt = KFAC(m, fisher="empirical")
    for x, y in zip(X.chunk(micro), Y.chunk(micro), strict=True):
        F.cross_entropy(m(x), y, reduction="sum").backward()
    with pytest.raises(ValueError, match=r"must be the mean over its cases.*reduction='mean'"):
        opt.step()
    m.zero_grad()
    opt = KFAC(m, fisher="empirical")
    for x, y in zip(X.chunk(micro), Y.chunk(micro), strict=True):
        weight = torch.tensor([10.0, 1.0, 0.1]).double()  # of classes: a mean all the same
        (F.cross_entropy(m(x), y, weight=weight, label_smoothing=0.1) / micro).backward()
    opt.step()
    assert opt.layers == ["0", "2"]


# -- whose iteration it is --------------------------------------------------------------------------------------


def step(m, opt, x=X, y=Y):
    opt.zero_grad()
    out = m(x)
    opt.accumulate_fisher(Categorical(logits=out))
    F.cross_entropy(out, y).backward()
    opt.step()


@pytest.mark.parametrize("value", [1000.0, float("nan")])
def test_a_batch_that_is_thrown_away_takes_its_statistics_with_it(value):
    results = []
    for throws in (False, True):
        torch.manual_seed(0)
        m = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        opt = KFAC(m)
        if throws:
            opt.accumulate_fisher(Categorical(logits=m(value * X), validate_args=False))
            opt.zero_grad()
        torch.manual_seed(1)
        step(m, opt)
        results.append(opt.factors("0")[0])
    assert torch.equal(*results)


@pytest.mark.parametrize("to_none", [True, False])
def test_steps_that_another_optimizer_takes_leave_no_statistics(to_none):
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    opt = KFAC(m)
    for scale in (100.0, 50.0, 1.0):  # the first two are a warm-up: opt does not step
        opt.zero_grad(set_to_none=to_none)
        out = m(scale * X)
        opt.accumulate_fisher(Categorical(logits=out))
        F.cross_entropy(out, Y).backward()
    opt.step()
    rows = torch.cat([X, torch.ones(16, 1).double()], 1)
    assert_equal(opt.factors("0")[0], rows.T @ rows / 16)


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_an_input_that_is_overwritten_is_found(fisher):
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    opt, x = KFAC(m, fisher=fisher, check_every=0), X.clone()
    out = m(x)
    F.cross_entropy(out, Y).backward(retain_graph=True)
    x.zero_()
    with pytest.warns(RuntimeWarning, match="0 leaves K-FAC.*its input was overwritten"):
        opt.accumulate_fisher(Categorical(logits=out))
        opt.step()
    assert opt.layers == ["2"] and trace(opt.factors("2")) > 0


@pytest.mark.parametrize("first", ["accumulate", "backward"])
def test_either_order_of_the_calls(first):
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    opt = KFAC(m)
    out = m(X)
    if first == "backward":
        F.cross_entropy(out, Y).backward(retain_graph=True)
    opt.accumulate_fisher(Categorical(logits=out))
    if first == "accumulate":
        opt.zero_grad()
        F.cross_entropy(out, Y).backward()
    opt.step()
    assert opt.factors("0")[0].norm() > 0


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_a_capture_lives_as_long_as_its_graph(fisher):
    m = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    opt = KFAC(m, fisher=fisher)
    adam = torch.optim.Adam(m.parameters())
    for _ in range(50):
        adam.zero_grad()
        F.cross_entropy(m(X), Y).backward()
        adam.step()
        m(X)  # an evaluation without no_grad
    assert opt.curvature.collector.captures.count <= 2
    step(m, opt)
    assert opt.curvature.collector.captures.count == 0


def test_two_heads_in_turn():
    torch.manual_seed(0)
    m = nn.ModuleDict({"body": nn.Linear(6, 5), "t0": nn.Linear(5, 3), "t1": nn.Linear(5, 3)}).double()
    opt = KFAC(m, cov_every=10)
    for k in range(2):
        opt.zero_grad()
        out = m[f"t{k % 2}"](torch.tanh(m["body"](X)))
        opt.accumulate_fisher(Categorical(logits=out))
        F.cross_entropy(out, Y).backward()
        opt.step()
    assert all(trace(opt.factors(name)) > 0 for name in opt.layers)


@pytest.mark.parametrize("change", ["bias frozen", "weight frozen", "unfrozen", "assigned", "double"])
def test_a_model_that_changes(change):
    results = []
    for late in (False, True):
        torch.manual_seed(0)
        m = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
        m = m.double() if change != "double" else m
        if change == "unfrozen":
            m[2].requires_grad_(False)

        def alter(m=m):
            if change == "bias frozen":
                m[2].bias.requires_grad_(False)
            elif change == "weight frozen":
                m[2].weight.requires_grad_(False)
            elif change == "unfrozen":
                m[2].requires_grad_(True)
            elif change == "double":
                m.double()

        if not late:
            alter()
        opt = KFAC(m, params=list(m.parameters()), cov_every=1, inv_every=1, momentum=0)
        if late:
            alter()
        if change == "assigned" and late:
            m.load_state_dict({name: value.clone() for name, value in m.state_dict().items()}, assign=True)
            with pytest.warns(RuntimeWarning, match="0 leaves K-FAC.*in no parameter group"):
                step(m, opt)
            return
        torch.manual_seed(1)
        warns = change == "weight frozen" and late
        with pytest.warns(RuntimeWarning, match="frozen") if warns else contextlib.nullcontext():
            step(m, opt)
        if change == "unfrozen" and late:
            torch.manual_seed(1)
            step(m, opt)
            assert opt.layers == ["0", "2", "4"] and trace(opt.factors("2")) > 0
            return
        results.append([p.detach().double() for p in m.parameters()])
    if results[1:]:
        for one, other in zip(*results, strict=True):
            assert_equal(other, one, 1e-6)


def test_double_in_the_middle_of_training():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    opt = kfac2.KFAC(m, cov_every=2, inv_every=4)
    for k in range(12):
        if k == 5:
            m.double()
        step(m, opt, X.to(m[0].weight.dtype))
    assert all(p.isfinite().all() for p in m.parameters()) and opt.factors("0")[0].dtype == torch.float64


# -- any likelihood ---------------------------------------------------------------------------------------------


def heads():
    torch.manual_seed(0)
    return nn.ModuleDict({"h": nn.Linear(6, 5), "pi": nn.Linear(5, 3), "v": nn.Linear(5, 1)}).double()


def test_the_fishers_of_several_heads_add_up():
    m = heads()
    curvature = Curvature(m, samples=400)
    h = torch.tanh(m["h"](X))
    curvature.accumulate([Categorical(logits=m["pi"](h)), Normal(m["v"](h).squeeze(1), 1.0)])
    assert_equal(curvature.factors("v")[1], torch.ones(1, 1).double(), 0.1)
    exact = Curvature(m, fisher="exact")
    h = torch.tanh(m["h"](X))
    pi = Categorical(logits=m["pi"](h))
    exact.accumulate([pi, Normal(m["v"](h).squeeze(1), 1.0)])
    assert_equal(exact.factors("v")[1], torch.ones(1, 1).double())
    p = pi.probs.detach()
    assert_equal(exact.factors("pi")[1], torch.diag(p.mean(0)) - p.T @ p / 16)
    assert_equal(curvature.factors("h")[1], exact.factors("h")[1], 0.3)


def test_the_exact_fisher_under_batch_norm_is_the_mean_of_the_drawn_ones():
    """Scores of two samples are products of independent labels: they vanish, though batch norm couples the samples."""
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 5)).double()

    def mean(fisher, times):
        curvature = Curvature(m, fisher=fisher, stat_decay=1 - 1e-9, check_every=0)
        for _ in range(times):
            curvature.accumulate(Categorical(logits=m(X)))
        return curvature.factors("0")[1]

    assert_equal(mean("exact", 100), mean("mc", 400), 0.1)


@pytest.mark.parametrize("kind", ["categorical", "bernoulli", "normal", "independent", "scale"])
def test_the_exact_fisher_is_the_dense_one(kind):
    """Over all labels, or by the closed form: the block of the last layer, whose rows are one for each sample."""
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    curvature = Curvature(m, fisher="exact", levels=1)
    out = m(X)
    distribution = {
        "categorical": lambda: Categorical(logits=out),
        "bernoulli": lambda: Bernoulli(logits=out),
        "normal": lambda: Normal(out, 0.5),
        "independent": lambda: Independent(Normal(out, 0.5), 1),
        "scale": lambda: Normal(out[:, :2], out[:, 2:].exp()),
    }[kind]()
    curvature.accumulate(distribution)
    cases = distribution.log_prob(distribution.sample()).numel()
    p = out.detach().softmax(1) if kind == "categorical" else out.detach().sigmoid()
    per_sample = {
        "categorical": lambda: torch.diag_embed(p) - p[:, :, None] * p[:, None, :],
        "bernoulli": lambda: torch.diag_embed(p * (1 - p)),
        "normal": lambda: torch.eye(3).double().expand(16, 3, 3) * 4,
        "independent": lambda: torch.eye(3).double().expand(16, 3, 3) * 4,
        "scale": lambda: torch.diag_embed(
            torch.cat([(-2 * out[:, 2:]).exp().expand(-1, 2), torch.full((16, 1), 4.0)], 1).detach()
        ),
    }[kind]()
    assert_equal(curvature.factors("2")[1], per_sample.mean(0))
    h = torch.cat([torch.tanh(m[0](X)), torch.ones(16, 1)], 1).detach()
    assert_equal(curvature.factors("2")[0], h.T @ h / cases)


def test_log_probabilities_of_labels_that_the_user_drew():
    m = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    one, other = Curvature(m), Curvature(m)
    torch.manual_seed(1)
    one.accumulate(Categorical(logits=m(X)))
    distribution = Categorical(logits=m(X))
    torch.manual_seed(1)
    other.accumulate(distribution.log_prob(distribution.sample()))
    assert torch.equal(one.factors("0")[1], other.factors("0")[1])


def test_a_label_whose_log_probability_is_not_finite_is_drawn_again():
    from torch.distributions import TanhTransform, TransformedDistribution

    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    with torch.no_grad():
        m[2].bias += 16  # most draws are saturated
    curvature = Curvature(m)
    curvature.accumulate(TransformedDistribution(Normal(m(X).squeeze(1), 3.0), TanhTransform()))
    assert curvature.factors("0")[1].isfinite().all()


# -- elsewhere --------------------------------------------------------------------------------------------------


def test_tensors_that_give_no_rows_are_named():
    m = nn.Linear(4, 3)
    opt = KFAC(m)
    jagged = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)], layout=torch.jagged)
    with pytest.raises(TypeError, match=r"input of the model must be a plain tensor.*nested"):
        m(jagged)
    with pytest.raises(TypeError, match=r"must be a plain tensor.*vmap"):
        torch.vmap(m)(torch.randn(5, 4))
    with pytest.raises(TypeError, match=r"must be a plain tensor.*sparse"):
        m(torch.eye(4).to_sparse())
    opt.close()
    m(jagged)
    torch.jit.script(m)


def test_default_device_is_of_no_consequence():
    m = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    opt = kfac2.KFAC(m, cov_every=1)
    torch.set_default_device("meta")
    try:
        step(m, opt)
        step(m, opt)
    finally:
        torch.set_default_device(None)
    assert all(p.isfinite().all() for p in m.parameters())


def test_an_optimizer_that_is_gone_leaves_nothing():
    import gc

    from torch.nn.modules import module
    from torch.overrides import _get_current_function_mode_stack

    gc.collect()
    assert not module._global_forward_hooks
    m = nn.Linear(6, 3).double()
    opt = KFAC(m)
    assert len(module._global_forward_hooks) == 1
    step(m, opt)
    assert not module._global_forward_hooks
    other = KFAC(m)
    del opt, other
    gc.collect()
    assert not module._global_forward_hooks and not _get_current_function_mode_stack()
    assert not m._forward_hooks and not m._forward_pre_hooks
    assert math.isfinite(float(m(X).sum()))


def test_an_exception_in_a_forward_pass_leaves_no_mode():
    from torch.overrides import _get_current_function_mode_stack

    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.error = nn.Linear(6, 3), KeyboardInterrupt

        def forward(self, x):
            h = self.a(x)
            if self.error:
                raise self.error
            return h

    m = Fails().double()
    opt = KFAC(m)
    for error in (ValueError, KeyboardInterrupt):
        m.error = error
        with pytest.raises(error):
            m(X)
    m.error = None
    step(m, opt)
    assert not _get_current_function_mode_stack() and trace(opt.factors("a")) > 0

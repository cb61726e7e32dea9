"""The bounds on a step: a measured divergence, exact against the dense Fisher, and a share of each layer's weights."""

import copy
from dataclasses import replace

import models
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from compare import assert_equal
from inside import curvature_of
from test_unread import Calls
from torch.distributions import Categorical

import kfac2
from kfac2.bound import Bound
from kfac2.collector import Collector
from kfac2.divergence import divergence, kept_of
from kfac2.followed import Followed
from kfac2.layers import find_layers
from kfac2.likelihood import scores_of
from kfac2.rise import Rise


def sampled_pass(task, seed=0):
    layers = find_layers(task.model, list(task.model.parameters()), (), 32).layers
    followed = Followed(layers, False, lambda layer, reason: pytest.fail(f"{layer.name} is to be dropped: {reason}"))
    collector = Collector(followed)
    collector.captures.turn(True)
    torch.manual_seed(seed)
    (passed,), _ = collector.sample(scores_of(task.distribution(task.model(task.x))))
    return layers, passed


def scores(task, parameters, samples, seed=0):
    """The gradient of each sample's log-probability of the labels that are drawn with this seed."""
    torch.manual_seed(seed)
    distribution = task.distribution(task.model(task.x))
    log_prob = distribution.log_prob(distribution.sample())
    rows = []
    for n in range(samples):
        grads = torch.autograd.grad(-log_prob[n].sum(), parameters, retain_graph=True)
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    return torch.stack(rows), log_prob.numel()


def trained_on(buffer, make, shape, **options):
    """Two steps of two batches each; with a buffer, each batch is copied there, and it is overwritten before the step."""
    torch.manual_seed(0)
    model = make()
    opt = kfac2.KFAC(model, cov_every=1, inv_every=1, **options)
    for step in range(2):
        opt.zero_grad()
        for batch in range(2):
            generator = torch.Generator().manual_seed(2 * step + batch)
            x, y = torch.randn(shape, generator=generator), torch.randint(3, shape[:1], generator=generator)
            out = model(x if buffer is None else buffer.copy_(x))
            opt.accumulate_fisher(Categorical(logits=out))
            (F.cross_entropy(out, y) / 2).backward()
        if buffer is not None:
            buffer.zero_()
        opt.step()
    return [opt.last_step.bound_factor, *(p.detach() for p in model.parameters())]


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_buffer_that_batches_are_copied_to_changes_nothing(kind, levels):
    """What is kept of the user's own tensors is kept apart: the bound is measured when the step is known."""
    linear = [nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)], (64, 6)
    conv = [nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 3)], (64, 2, 5, 5)
    layers, shape = linear if kind == "linear" else conv
    options = {"kl_bound": 1e-6, "levels": levels}
    expected, got = (
        trained_on(buffer, lambda: nn.Sequential(*copy.deepcopy(layers)), shape, **options)
        for buffer in (None, torch.empty(shape))
    )
    assert expected[0] < 1
    assert expected[0] == got[0] and all(torch.equal(a, b) for a, b in zip(expected[1:], got[1:], strict=True))


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("name", models.NAMES)
def test_the_divergence_is_that_of_the_dense_fisher(name, share):
    task = models.task(name)
    layers, passed = sampled_pass(task)
    parameters = [p for layer in layers for p in (layer.weight, layer.bias) if p is not None]
    step = {id(p): torch.randn_like(p) for p in parameters}
    kept = kept_of(passed, max(1, int(passed.samples * share)))
    measured = divergence([kept], lambda p: step[id(p)])
    samples = int(len(task.x) * share)
    J, cases = scores(task, parameters, samples)
    fisher = J.T @ J / (cases * samples / len(task.x))
    d = torch.cat([step[id(p)].flatten() for p in parameters])
    assert_equal(measured, d @ fisher @ d, 1e-12)


def test_a_layer_that_does_not_move_and_scaled_gradients():
    task = models.task("linear")
    layers, passed = sampled_pass(task)
    moving = {id(layers[1].weight): torch.randn_like(layers[1].weight)}
    measured = divergence([kept_of(passed, passed.samples)], lambda p: moving.get(id(p)))
    J, cases = scores(task, [layers[1].weight], len(task.x))
    assert_equal(measured, (J @ moving[id(layers[1].weight)].flatten()).square().sum() / cases)
    for use in passed.uses:
        use.grads.tensor.div_(7.0)
    scaled = kept_of(replace(passed, scale=7.0), passed.samples)
    assert_equal(divergence([scaled], lambda p: moving.get(id(p))), measured)


@pytest.mark.parametrize("name", models.NAMES)
def test_rows_rounded_to_16_bits_change_the_divergence_less_than_the_labels_do(name):
    task = models.task(name)
    task.model.float()
    task.x = task.x.float() if task.x.is_floating_point() else task.x
    parameters = [p for p in task.model.parameters() if p.requires_grad]
    step = {id(p): torch.randn_like(p) for p in parameters}
    measured, errors = [], []
    for seed in range(20):
        _, passed = sampled_pass(task, seed)
        exact, rounded = (divergence([kept_of(passed, 10**6, r)], lambda p: step[id(p)]) for r in (False, True))
        measured.append(exact)
        errors.append(rounded / exact - 1)
    spread = torch.stack(measured).std() / torch.stack(measured).mean()
    assert 0 < torch.stack(errors).abs().max() < 1e-2
    assert torch.stack(errors).square().mean().sqrt() < 0.05 * spread


def test_only_the_rows_of_the_bound_are_rounded_and_none_but_float32():
    task = models.task("conv2d")
    for dtype in (torch.float32, torch.float64):
        task.model.to(dtype)
        task.x = task.x.to(dtype)
        _, passed = sampled_pass(task)
        for rounds in (False, True):
            kept = kept_of(passed, passed.samples // 2, rounds)
            wanted = torch.bfloat16 if rounds and dtype == torch.float32 else dtype
            assert {use.grads.tensor.dtype for use in kept.uses} == {wanted}
            for use, whole in zip(kept.uses, passed.uses, strict=True):
                g = use.grads.tensor
                assert g.untyped_storage().nbytes() == g.numel() * g.element_size()  # no part of it holds the whole
                assert_equal(g.to(dtype), whole.grads.tensor[: len(g)], 4e-3 if rounds else 0.0)


@pytest.mark.parametrize("at_once", [True, False])
def test_the_factor_falls_at_once_and_rises_slowly(at_once):
    bound = Bound()
    seen = []
    for squared in (0.4, 40.0, 0.1, 0.1, 0.1, float("nan")):
        bound.measured(torch.tensor(squared, dtype=torch.float64), 0.4, at_once)
        seen.append(float(bound.factor))
    assert seen == pytest.approx([1.0, 0.1, 0.15, 0.225, 0.3375, 0.50625], rel=1e-6)


def train(model, x, y, steps, **options):
    opt = kfac2.KFAC(model, **options)
    losses = []
    for _ in range(steps):
        opt.zero_grad()
        out = model(x)
        opt.accumulate_fisher(Categorical(logits=out))
        loss = F.cross_entropy(out, y)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return opt, losses


def mlp(depth=6):
    torch.manual_seed(0)
    return nn.Sequential(*(m for _ in range(depth) for m in (nn.Linear(8, 8), nn.Tanh())), nn.Linear(8, 3))


def test_the_whole_step_momentum_included_is_held_to_the_bound():
    """The step that was taken, measured afterwards on the same rows by the dense way."""
    model, x, y = mlp(3).double(), torch.randn(16, 8).double(), torch.arange(16) % 3
    settings = {"kl_clip": None, "max_change": None, "momentum": 0.9, "cov_every": 1, "inv_every": 1}
    opt, _ = train(model, x, y, 3, kl_bound=None, **settings)
    opt.options.kl_bound = 1e-3
    before = [p.detach().clone() for p in model.parameters()]
    torch.manual_seed(5)
    opt.zero_grad()
    out = model(x)
    opt.accumulate_fisher(Categorical(logits=out))
    torch.manual_seed(5)
    labels = Categorical(logits=out).sample()
    log_prob = F.log_softmax(out, 1).gather(1, labels[:, None])
    J = torch.stack([
        torch.cat([g.flatten() for g in torch.autograd.grad(log_prob[n].sum(), list(model.parameters()), retain_graph=True)])
        for n in range(16)
    ])  # fmt: skip
    F.cross_entropy(out, y).backward()
    opt.step()
    d = torch.cat([(p - q).flatten() for p, q in zip(model.parameters(), before, strict=True)]).detach()
    assert_equal((J @ d).square().sum() / 16, torch.tensor(1e-3, dtype=torch.float64))
    assert not opt.curvature.iteration.kept  # nothing is kept beyond the step


def test_a_careless_setting_does_not_blow_up_under_the_bound():
    x, y = torch.randn(64, 8), torch.arange(64) % 3
    careless = {"momentum": 0.9, "kl_clip": 1.0, "damping": 1e-3, "relative_damping": False, "max_change": None}
    _, loose = train(mlp(12), x, y, 40, kl_bound=None, **careless)
    _, held = train(mlp(12), x, y, 40, kl_bound=0.1, **careless)
    assert max(loose) > 2 * loose[0] and max(held) < max(loose)


def test_no_layer_changes_by_more_than_its_share():
    model, x, y = mlp(), torch.randn(64, 8), torch.arange(64) % 3
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()
    before = copy.deepcopy(model)
    train(model, x, y, 1, max_change=0.01, momentum=0.0, kl_clip=None, kl_bound=None, damping=1e-4)
    for layer, old in zip(model, before, strict=True):
        if isinstance(layer, nn.Linear):
            own = torch.cat([p.detach().flatten() for p in old.parameters()])
            change = torch.cat(
                [(p - q).detach().flatten() for p, q in zip(layer.parameters(), old.parameters(), strict=True)]
            )
            limit = max(0.01 * own.norm().item(), 1e-3 * change.numel() ** 0.5)
            assert 0 < change.norm().item() <= limit * 1.001
            assert layer is not model[0] or change.norm().item() == pytest.approx(limit, rel=1e-3)  # it may leave 0


def test_limits_where_a_gradient_is_missing():
    model, x, y = mlp(2), torch.randn(16, 8), torch.arange(16) % 3
    opt, _ = train(model, x, y, 2)
    before = [p.detach().clone() for p in model.parameters()]
    opt.zero_grad()
    F.cross_entropy(model(x), y).backward()
    model[0].bias.grad = None
    model[2].weight.grad = model[2].bias.grad = None
    opt.step()
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert moved == [True, False, False, False, True, True]


def changes_of(model, before):
    """By name of the layer the norm of its change, weight and bias, and that of what it was before."""
    norms = {}
    for (name, layer), old in zip(model.named_modules(), before.modules(), strict=True):
        if isinstance(layer, nn.Linear):
            pairs = list(zip(layer.parameters(), old.parameters(), strict=True))
            change = torch.cat([(p - q).detach().flatten() for p, q in pairs])
            norms[name] = change.norm().item(), torch.cat([q.detach().flatten() for _, q in pairs]).norm().item()
    return norms


def test_a_layer_with_statistics_and_no_inverse_is_limited_along_its_plain_gradient():
    model, x, y = mlp(2), torch.randn(64, 8), torch.arange(64) % 3
    opt, _ = train(model, x, y, 1, max_change=0.01, momentum=0.0, kl_bound=None)
    state = opt.state_dict()
    state["kfac"]["statistics"]["factors"]["0"]["A"].fill_(float("nan"))
    state["kfac"]["inverses"] = None
    opt.load_state_dict(state)
    opt.zero_grad()
    F.cross_entropy(model(x), y).backward()
    model[0].weight.grad *= 100
    gradient, before = model[0].weight.grad.clone(), copy.deepcopy(model)
    with pytest.warns(RuntimeWarning, match="a factor of 0 is not finite"):
        opt.step()
    direction = before[0].weight - model[0].weight
    assert F.cosine_similarity(direction.flatten(), gradient.flatten(), 0) > 0.9999
    change, norm = changes_of(model, before)["0"]
    assert change == pytest.approx(0.01 * norm, rel=0.1)  # of the weights as they were at the last statistics
    assert opt.last_step.changes["0"] > 0.1


def test_a_preconditioner_limits_changes_and_goes_on_from_its_state():
    ends = []
    for resumed in (False, True):
        model = mlp(3).double()
        torch.manual_seed(1)
        x, y = torch.randn(32, 8).double(), torch.arange(32) % 3
        preconditioner = kfac2.Preconditioner(model, max_change=0.01, kl_clip=None, cov_every=4)
        for k in range(7):
            if resumed and k == 6:
                state = copy.deepcopy(preconditioner.state_dict())
                preconditioner = kfac2.Preconditioner(model, max_change=0.01, kl_clip=None, cov_every=4)
                preconditioner.load_state_dict(state)
            model.zero_grad()
            before, out = copy.deepcopy(model), model(x)
            preconditioner.accumulate_fisher(Categorical(logits=out))
            F.cross_entropy(out, y).backward()
            preconditioner.step()
            torch.optim.SGD(model.parameters(), lr=1.0).step()
            if k % 4 == 0:
                assert all(change <= 0.01001 * norm for change, norm in changes_of(model, before).values())
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*ends)
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    plain = copy.deepcopy([p.grad for p in model.parameters()])
    preconditioner.options.max_change = None
    preconditioner.step()
    assert sum(p.grad.norm() for p in model.parameters()) > sum(g.norm() for g in plain)


def test_a_share_that_is_set_during_training_counts_at_once():
    model, x, y = mlp(2), torch.randn(64, 8), torch.arange(64) % 3
    opt, _ = train(model, x, y, 2, kl_clip=None, kl_bound=None, momentum=0.0, max_change=0.02, cov_every=10)
    opt.options.max_change = 0.005
    before = copy.deepcopy(model)
    opt.zero_grad()
    F.cross_entropy(model(x), y).backward()
    opt.step()
    floor = 1e-3 * 72**0.5
    for name, (change, norm) in changes_of(model, before).items():
        assert change <= max(0.0051 * norm, floor) and opt.last_step.changes[name] > 0


def test_a_bias_whose_weight_has_no_gradient_is_left_to_adamw():
    model, x, y = mlp(2), torch.randn(16, 8), torch.arange(16) % 3
    opt, _ = train(model, x, y, 1, rest_lr=0.01)
    before = model[0].bias.detach().clone()
    opt.zero_grad()
    F.cross_entropy(model(x), y).backward()
    model[0].weight.grad = None
    opt.step()
    assert_equal((model[0].bias - before).abs(), torch.full((8,), 0.01), 1e-3)  # the first step of Adam


@pytest.mark.parametrize("at_once", [True, False])
def test_bounded_training_reads_nothing_back_where_it_may_not_and_is_the_same(at_once):
    ends = []
    for way in (True, at_once):
        model = mlp().double()
        torch.manual_seed(1)
        x, y = torch.randn(32, 8).double(), torch.arange(32) % 3
        opt = kfac2.KFAC(model, kl_bound=1e-3)
        curvature_of(opt).health.at_once = way
        torch.manual_seed(2)
        for _ in range(12):
            opt.zero_grad()
            out = model(x)
            opt.accumulate_fisher(Categorical(logits=out))
            F.cross_entropy(out, y).backward()
            opt.step()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert_equal(ends[0], ends[1], 1e-6)  # the factor on a device is float32


# -- a rise of the loss -------------------------------------------------------------------------------------


def followed(losses, at_once=True, rise=None):
    """The factor after each loss."""
    rise = rise or Rise()
    factors = []
    for loss in losses:
        rise.follow(loss, torch.device("cpu"), at_once)
        factors.append(float(rise.factor(at_once)))
    return factors


@pytest.mark.parametrize("at_once", [True, False])
def test_a_loss_out_of_bounds_halves_the_factor_and_others_let_it_recover(at_once):
    high = [9.0, 8.0, float("nan"), torch.tensor([float("inf")])]
    losses = [2.0, 1.9, 2.1, 1.8, *high, 1.9, torch.tensor(1.8), 1.7, 1.8, 2, 2.0]
    factors = followed(losses, at_once)
    assert factors == pytest.approx([1, 1, 1, 1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, *(1.5**k / 16 for k in range(1, 7))])
    assert (
        followed([1.5] * 3 + [float("nan")] * 100 + [1.5] * 40)[-1] == 1
    )  # it never falls to where nothing leads back


def test_the_bound_is_that_of_mean_and_spread():
    """Against means over explicit lists, while all weigh alike; then the mean must follow where losses stay high."""
    for scale, level in ((1.0, 2.0), (0.1, -3.0), (1e-3, 0.0)):
        drawn = [level + scale * v for v in torch.randn(12, dtype=torch.float64).tolist()]
        mean = sum(drawn) / 12
        spread = (sum((v - mean) ** 2 for v in drawn) / 12) ** 0.5
        bound = mean + max(8 * spread, abs(mean))
        for above, wanted in ((-1e-6, 1.0), (1e-6, 0.5)):
            rise = Rise()
            followed(drawn, rise=rise)
            rise.load([*rise.state()[:3], 1.0, 0.0])  # whatever the first few did
            assert followed([bound + above], rise=rise) == [wanted]
    assert followed([1.0] * 10 + [30.0] * 200)[-1] == 1


def test_what_is_no_loss_tells_nothing():
    assert followed([None, "0.3", torch.ones(2), (1.0,)]) == [1.0] * 4


def closed(model, opt, x, y, scale=1.0):
    """A step whose closure returns the loss."""

    def closure():
        opt.zero_grad()
        out = model(x)
        opt.accumulate_fisher(Categorical(logits=out))
        loss = F.cross_entropy(out, y)
        loss.backward()
        return loss * scale

    return opt.step(closure)


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("rest", ["sgd", "adamw"])
def test_a_rise_shortens_the_step_and_is_kept_in_the_state(rest, at_once, caplog):
    x, y = torch.randn(32, 8), torch.arange(32) % 3
    twins = [mlp(2), mlp(2)]
    options = {"kl_bound": None, "momentum": 0.0, "rest": rest, "cov_every": 100}
    opts = [kfac2.KFAC(model, **options) for model in twins]
    for model, opt in zip(twins, opts, strict=True):
        curvature_of(opt).health.at_once = at_once
        torch.manual_seed(0)
        for _ in range(4):
            closed(model, opt, x, y)
    assert not caplog.records
    changes = []
    for model, opt, scale in zip(twins, opts, (1.0, 10.0), strict=True):
        before = model[0].weight.detach().clone()
        closed(model, opt, x, y, scale)
        changes.append(model[0].weight.detach() - before)
    assert_equal(changes[1], changes[0] / 2, 1e-5)
    assert [opt.last_step.rise_factor for opt in opts] == [1, 0.5]
    closed(twins[1], opts[1], x, y, 10.0)
    assert opts[1].last_step.rise_factor == 0.25 and "rise_factor=0.25" in repr(opts[1].last_step)
    assert len(caplog.records) == at_once and all("rose out of bounds" in r.getMessage() for r in caplog.records)
    state = copy.deepcopy(opts[1].state_dict())
    other = kfac2.KFAC(twins[1], **options)
    other.load_state_dict(state)
    assert other.last_step.rise_factor == 0.25
    closed(twins[1], other, x, y)
    assert other.last_step.rise_factor == 0.375
    del state["kfac"]["bounds"]["rise"]  # as it was before losses were followed
    other.load_state_dict(state)
    assert other.last_step.rise_factor == 1


def test_a_run_that_blows_up_is_seen_and_ordinary_ones_are_not():
    x, y = torch.randn(64, 8), torch.arange(64) % 3
    careless = {"momentum": 0.9, "kl_clip": 1.0, "damping": 1e-3, "relative_damping": False, "max_change": None}
    seen = []
    for options in ({}, {**careless, "kl_bound": None}):
        torch.manual_seed(2)
        model, least = mlp(12), 1.0
        opt = kfac2.KFAC(model, **options)
        for _ in range(40):
            closed(model, opt, x, y)
            least = min(least, opt.last_step.rise_factor)
        seen.append(least)
    assert seen[0] == 1 and seen[1] < 1


def test_following_a_loss_reads_nothing_back():
    rise, loss = Rise(), torch.tensor(1.0)
    followed([loss, 2.0], at_once=False, rise=rise)
    with Calls() as calls:
        rise.follow(loss, torch.device("cpu"), False)
        rise.factor(False)
    assert calls.names and not [name for name in calls.names if "_local_scalar_dense" in name]

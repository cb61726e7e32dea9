"""Processes, threads, copies, checkpoints, and models and groups that change while they are trained."""

import copy
import gc
import io
import pickle
import threading
import warnings
import weakref

import paper
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from compare import assert_equal
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributions import Categorical
from torch.nn.utils import parametrize, prune

import kfac2

X, Y = torch.randn(16, 6, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


LAYERS = ["0", "3", "5"]


def step(m, opt, x=X):
    opt.zero_grad()
    out = m(x)
    opt.accumulate_fisher(Categorical(logits=out))
    F.cross_entropy(out, Y).backward()
    opt.step()


def steps(m, opt, count):
    """Take steps; return what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(count):
            step(m, opt)
    return [str(warning.message) for warning in caught]


# -- processes --------------------------------------------------------------------------------------------------


def _in_a_group(rank, path):
    """One of two processes; what it raises fails the test."""
    torch.set_num_threads(1)
    early = kfac2.KFAC(net())
    distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    distributed.barrier()  # nothing below waits for the other, which may still be connecting when this one leaves
    try:
        m = early.curvature.handled.model
        out = m(X)
        early.accumulate_fisher(Categorical(logits=out))
        F.cross_entropy(out, Y).backward()
        before = [p.clone() for p in m.parameters()]
        with pytest.raises(RuntimeError, match=r"built before .* had its 2 processes"):
            early.step()
        assert all(torch.equal(p, old) for p, old in zip(m.parameters(), before, strict=True))
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
def test_a_group_that_comes_after_the_optimizer_is_refused(tmp_path):
    torch.multiprocessing.spawn(_in_a_group, (str(tmp_path / "group"),), nprocs=2)


@pytest.fixture
def alone(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_sharded_parameters_are_refused(alone):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_module

    kfac2.KFAC(net())  # a group of one process is no reason
    sharded = distribute_module(net(), init_device_mesh("cpu", (1,)))
    with pytest.raises(
        ValueError,
        match=r"must be plain tensors, got a DTensor \(FSDP2.* of shape \(5, 6\) at number 0.*DistributedDataParallel",
    ):
        kfac2.KFAC(sharded)


# -- checkpoints ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"momentum": 0.0}, {"inverse": "ekfac"}, {"levels": 2, "rest": "sgd"}, {"coarse": "directions"}],
)
@pytest.mark.parametrize("offload", [False, True])
def test_distributed_checkpoints_resume_bit_for_bit(settings, offload):
    options = StateDictOptions(cpu_offload=offload)
    m = net()
    opt = kfac2.KFAC(m, **settings)
    steps(m, opt, 7)
    file = io.BytesIO()
    torch.save(get_optimizer_state_dict(m, opt, options=options), file)
    file.seek(0)
    other = net()
    other.load_state_dict(m.state_dict())
    resumed = kfac2.KFAC(other, **settings)
    set_optimizer_state_dict(other, resumed, torch.load(file, weights_only=True), options=options)
    for model, optimizer in ((m, opt), (other, resumed)):
        torch.manual_seed(1)
        steps(model, optimizer, 6)
    assert all(torch.equal(p, q) for p, q in zip(m.parameters(), other.parameters(), strict=True))
    assert "kfac" not in resumed.param_groups[0]


def test_asking_for_state_is_no_step():
    m, twin = net(), net()
    opt, plain = kfac2.KFAC(m), kfac2.KFAC(twin)
    get_optimizer_state_dict(m, opt)
    assert opt.preconditioner.iteration == 0 and not opt.curvature.averages.updates
    assert all(torch.equal(p, q) for p, q in zip(m.parameters(), twin.parameters(), strict=True))
    with pytest.raises(RuntimeError, match="no statistics at all"):  # which a step without them still is
        plain.step()


@pytest.mark.parametrize("loss", ["flattened", "without statistics"])
def test_a_checkpoint_that_lost_its_state_is_refused(loss):
    m = net()
    opt = kfac2.KFAC(m)
    options = StateDictOptions(flatten_optimizer_state_dict=loss == "flattened")
    if loss == "flattened":
        steps(m, opt, 1)
    state = get_optimizer_state_dict(m, opt, options=options)
    with pytest.raises(
        ValueError, match=r"must be one of kfac2.KFAC, with K-FAC's state in 'kfac'.*distributed.checkpoint"
    ):
        set_optimizer_state_dict(m, opt, state, options=options)


def test_a_state_dict_is_saved_once():
    m = net()
    opt = kfac2.KFAC(m)
    steps(m, opt, 3)
    state = opt.state_dict()
    assert state["param_groups"][0]["kfac"] is state["kfac"]
    other = kfac2.KFAC(m)
    del state["kfac"]
    other.load_state_dict(state)
    assert other.preconditioner.iteration == 3


# -- what is left of it in the model ----------------------------------------------------------------------------


def assert_usable(m):
    """Script, save, pickle and copy a model."""
    expected = m(X)
    file = io.BytesIO()
    torch.save(m, file)
    file.seek(0)
    scripted = torch.jit.script(m)
    for other in (scripted, torch.load(file, weights_only=False), pickle.loads(pickle.dumps(m)), copy.deepcopy(m)):
        assert torch.equal(other(X), expected)
    copied = copy.deepcopy(m)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in copied.modules())


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@pytest.mark.parametrize("when", ["at once", "after steps", "in an iteration of statistics", "closed", "collected"])
def test_the_model_carries_nothing(fisher, when):
    m = net()
    opt = kfac2.KFAC(m, fisher=fisher, cov_every=2)
    if when != "at once":
        steps(m, opt, 3)
    if when == "in an iteration of statistics":
        steps(m, opt, 1)
        m(X).sum().backward()
    elif when == "closed":
        opt.close()
    elif when == "collected":
        gone = weakref.ref(opt.curvature)
        del opt
        gc.collect()
        assert gone() is None
    assert_usable(m)


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@pytest.mark.parametrize("before", [0, 3])
def test_steps_after_close_go_on_with_what_there_is(fisher, before):
    from torch.nn.modules import module

    m = net()
    opt = kfac2.KFAC(m, fisher=fisher, cov_every=1, inv_every=1)
    steps(m, opt, before)
    factors = {name: opt.factors(name) for name in opt.layers} if before else {}
    opt.close()
    opt.close()
    weights = [p.clone() for p in m.parameters()]
    assert steps(m, opt, 5) == [] and not opt.needs_fisher
    assert opt.layers == LAYERS and opt.curvature.averages.updates == before
    for name, kept in factors.items():
        assert all(torch.equal(one, other) for one, other in zip(opt.factors(name), kept, strict=True))
    assert not any(torch.equal(p, old) for p, old in zip(m.parameters(), weights, strict=True))
    assert not module._global_forward_hooks and not any(p._post_accumulate_grad_hooks for p in m.parameters())


def test_a_closed_curvature_takes_no_statistics():
    m = net()
    curvature = kfac2.Curvature(m)
    out = m(X)
    curvature.close()
    with pytest.raises(RuntimeError, match=r"close\(\) has ended"):
        curvature.accumulate(Categorical(logits=out))


# -- parameter groups -------------------------------------------------------------------------------------------


def grouped(m, **settings):
    return kfac2.KFAC(m, params=[{"params": m[int(name)].parameters()} for name in LAYERS], **settings)


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@pytest.mark.parametrize("when", ["between", "before step"])
@pytest.mark.parametrize("steps_before", [0, 1, 4, 5])  # statistics come every 5
def test_a_group_that_is_removed(fisher, when, steps_before):
    m = net()
    opt = grouped(m, fisher=fisher)
    steps(m, opt, 1 if when == "before step" else steps_before)
    weight = m[3].weight.clone()
    with pytest.warns(
        RuntimeWarning, match="3 leaves K-FAC, and is trained no more: its weight is in no parameter group any"
    ):
        if when == "between":
            del opt.param_groups[1]
            step(m, opt)
        else:
            opt.zero_grad()
            out = m(X)
            opt.accumulate_fisher(Categorical(logits=out))
            F.cross_entropy(out, Y).backward()
            del opt.param_groups[1]
            opt.step()
    assert steps(m, opt, 12) == [] and opt.layers == ["0", "5"]
    assert torch.equal(m[3].weight, weight)  # though its gradient still comes
    m[3].weight.grad.fill_(torch.nan)
    other = m[0].weight.clone()
    opt.step()
    assert not torch.equal(m[0].weight, other)
    rows = {row.kind: (row.treatment, row.reason) for row in opt.summary().rows if row.names == ["3"]}
    assert rows == {"Linear": ("not trained", "in no parameter group")}
    opt.add_param_group({"params": m[3].parameters()})
    assert steps(m, opt, 10) == [] and opt.layers == LAYERS and not torch.equal(m[3].weight, weight)


@pytest.mark.parametrize("steps_after", [0, 2])
@pytest.mark.parametrize("settings", [{}, {"levels": 2}, {"inverse": "ekfac"}, {"coarse": "directions"}])
def test_the_state_without_a_group_is_that_of_an_optimizer_without_it(steps_after, settings):
    m = net()
    opt = grouped(m, **settings)
    steps(m, opt, 3)
    del opt.param_groups[1]
    with pytest.warns(RuntimeWarning, match="3 leaves K-FAC"):
        steps_after and step(m, opt)
        state = opt.state_dict()
    other = kfac2.KFAC(m, params=[{"params": m[int(name)].parameters()} for name in ("0", "5")], **settings)
    other.load_state_dict(state)
    assert other.layers == ["0", "5"]
    for name in other.layers:
        assert all(torch.equal(*pair) for pair in zip(opt.factors(name), other.factors(name), strict=True))


def test_a_bias_that_leaves_its_group_is_as_if_it_had_never_been_there():
    results = []
    for late in (False, True):
        m = net()
        params = list(m.parameters())
        bias = params[5]
        assert bias is m[3].bias
        opt = paper.KFAC(m, params=params if late else [p for p in params if p is not bias], momentum=0.0)
        if late:
            (group,) = opt.param_groups
            group["params"] = [p for p in group["params"] if p is not bias]
        torch.manual_seed(1)
        assert steps(m, opt, 3) == []
        assert opt.factors("3")[0].shape == (5, 5)
        results.append([p.detach() for p in m.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_a_new_layer_that_joins_later_is_left_to_the_rest():
    m = nn.ModuleList([net(), nn.Linear(3, 3)])
    opt = kfac2.KFAC(m, params=m[0].parameters())
    forward = nn.Sequential(*m)
    steps(forward, opt, 2)
    opt.add_param_group({"params": m[1].parameters(), "rest_lr": 0.5})
    m[0][0].bias.requires_grad_(False)  # layers are looked for anew
    before = m[1].weight.clone()
    opt.zero_grad()
    assert steps(forward, opt, 1) == []
    assert "1" not in opt.layers and opt.param_groups[-1]["method"] == "adamw"
    assert_equal((m[1].weight - before).abs(), torch.full((3, 3), 0.5), 1e-2)  # a first step of AdamW
    assert any(row.reason == "its weight joined later" and row.names == ["1"] for row in opt.summary().rows)


# -- models that change -----------------------------------------------------------------------------------------


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


def pruned(m):
    prune.l1_unstructured(m[3], "weight", 0.3)


def parametrised(m):
    parametrize.register_parametrization(m[3], "weight", Double())


def replaced(m):
    m[3].weight = nn.Parameter(torch.randn(4, 5))


def assigned(m):
    m.load_state_dict({name: value.clone() for name, value in m.state_dict().items()}, assign=True)


def taken_out(m):
    m[3] = nn.Linear(5, 4)


CHANGES = {
    pruned: "3 leaves K-FAC, and takes its plain gradient: its weight is parametrised",
    parametrised: "3 leaves K-FAC, and takes its plain gradient: its weight is parametrised",
    replaced: "3 leaves K-FAC, and is trained no more: its weight was replaced by another tensor",
    taken_out: "3 leaves K-FAC, and is trained no more: its weight was replaced by another tensor",
    assigned: "leaves K-FAC, and is trained no more: its weight was replaced by another tensor",
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@pytest.mark.parametrize("when", ["between", "after forward"])
@pytest.mark.parametrize("make", ["KFAC", "Preconditioner"])
@pytest.mark.parametrize("steps_before", [1, 5])
def test_a_layer_that_changes_leaves_with_one_sentence(change, fisher, when, make, steps_before):
    if change is parametrised and when == "after forward":
        pytest.skip("torch initialises the weight anew, and refuses the backward pass")
    m = net()
    if make == "KFAC":
        opt = kfac2.KFAC(m, fisher=fisher)
    else:
        opt = kfac2.Preconditioner(m, fisher=fisher, kl_clip=None)
        opt.zero_grad = m.zero_grad
    steps(m, opt, steps_before)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        m.zero_grad()
        if when == "between":
            change(m)
        out = m(X)
        if when == "after forward":
            change(m)
        opt.accumulate_fisher(Categorical(logits=out))
        F.cross_entropy(out, Y).backward()
        opt.step()
        for _ in range(7):
            step(m, opt)
    messages = [str(warning.message) for warning in caught]
    leaving = [message for message in messages if "leaves K-FAC" in message]
    assert len(leaving) == (3 if change is assigned else 1) and all(CHANGES[change] in message for message in leaving)
    assert len(messages) - len(leaving) <= 1, messages
    assert opt.layers == ([] if change is assigned else ["0", "5"])
    assert all(p.isfinite().all() for p in m.parameters())


def test_what_skip_has_named_may_go():
    m = net()
    opt = kfac2.KFAC(m, skip="3")
    steps(m, opt, 1)
    m[3] = nn.Sequential(m[3])
    prune.identity(m[0], "weight")
    assert ["kfac2: 0 leaves K-FAC" in message for message in steps(m, opt, 1)] == [True]
    assert opt.layers == ["5"]


def test_a_layer_with_another_name_goes_on():
    m = net()
    opt = kfac2.KFAC(m, lr=0.0, rest_lr=0.0)
    steps(m, opt, 6)
    m[3] = nn.Sequential(m[3], nn.Identity())
    assert steps(m, opt, 5) == [] and opt.layers == ["0", "3.0", "5"]
    assert opt.factors("3.0")[0].norm() > 0


def test_unfrozen_layers_are_stepped_by_kfac_from_their_first_statistics_on():
    m = net()
    late = [*m[3].parameters(), m[0].bias]
    for p in late:
        p.requires_grad_(False)
    opt = kfac2.KFAC(m, kl_bound=None)
    steps(m, opt, 2)
    assert "3" not in opt.layers and opt.factors("0")[0].shape == (6, 6)
    m.requires_grad_(True)
    assert steps(m, opt, 1) == []  # this forward pass came before anyone knew: a plain gradient, for AdamW
    before = {p: p.clone() for p in late}
    assert steps(m, opt, 1) == [] and opt.layers == LAYERS and opt.factors("0")[0].shape == (7, 7)
    for p in late:
        assert opt.state[p].get("step", 1) == 1
        buffer = opt.state[p]["momentum_buffer"]  # its first: the preconditioned gradient
        assert torch.equal(buffer, p.grad)
        assert_equal(before[p] - p, buffer, 1e-4)


def test_unfrozen_between_statistics_with_one_rate():
    m = net()
    m[3].requires_grad_(False)
    preconditioner = kfac2.Preconditioner(m, cov_every=10)
    sgd = torch.optim.SGD(m.parameters(), 1e-3)
    for k in range(12):
        if k == 2:
            m.requires_grad_(True)
        m.zero_grad()
        out = m(X)
        preconditioner.accumulate_fisher(Categorical(logits=out))
        F.cross_entropy(out, Y).backward()
        assert preconditioner.step(lr=1e-3)
        sgd.step()
    assert preconditioner.layers == LAYERS and all(preconditioner.curvature.averages.seen)


# -- who calls the model ----------------------------------------------------------------------------------------


def factors_of(opt):
    return [factor for name in opt.layers for factor in opt.factors(name)]


def test_two_optimizers_over_one_model():
    m, twin = net(), net()
    one, other, plain = kfac2.KFAC(m, lr=0.0), kfac2.KFAC(m, inverse="eigh", lr=0.0), kfac2.KFAC(twin, lr=0.0)
    for model, optimizers in ((m, (one, other)), (twin, (plain,))):
        for _ in range(3):
            model.zero_grad()
            out = model(X)
            for opt in optimizers:
                torch.manual_seed(1)
                opt.accumulate_fisher(Categorical(logits=out))
            F.cross_entropy(out, Y).backward()
            gradients = [p.grad.clone() for p in model.parameters()]
            for opt in optimizers:
                for p, gradient in zip(model.parameters(), gradients, strict=True):
                    p.grad = gradient.clone()
                opt.step()
    for ours, theirs, alone_ in zip(factors_of(one), factors_of(other), factors_of(plain), strict=True):
        assert torch.equal(ours, alone_) and torch.equal(theirs, alone_)


def test_inference_in_another_thread_changes_nothing():
    results = []
    for beside in (False, True):
        m = net()
        opt = kfac2.KFAC(m, cov_every=1, lr=0.0, rest_lr=0.0)
        stop, calls = threading.Event(), []

        def infer(m=m, stop=stop, calls=calls):
            while not stop.is_set():
                calls.append(m(100 * X).detach())

        thread = threading.Thread(target=infer)
        if beside:
            thread.start()
        torch.manual_seed(1)
        try:
            assert steps(m, opt, 20) == []
        finally:
            stop.set()
            if beside:
                thread.join()
        assert not beside or len(calls) > 0
        results.append(factors_of(opt))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def in_thread(function):
    raised = []

    def run():
        try:
            function()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised


def test_training_in_another_thread():
    m = net()

    def train():
        step(m, kfac2.KFAC(m))

    assert in_thread(train) == []
    opt = kfac2.KFAC(m)
    (error,) = in_thread(lambda: step(m, opt))
    assert "in the thread that has built the optimizer" in str(error)


def test_a_thread_that_was_in_the_middle_of_a_call_is_looked_at_later():
    inside, go_on = threading.Event(), threading.Event()

    class Waits(nn.Module):
        def forward(self, x):
            inside.set()
            assert go_on.wait(10)
            return x

    m = net()
    opt = kfac2.KFAC(m)

    def run():
        Waits()(X)  # in its middle the hooks go
        step(m, kfac2.KFAC(m))

    raised = []
    thread = threading.Thread(target=lambda: raised.extend(in_thread_now(run)))
    thread.start()
    assert inside.wait(10)
    opt.close()
    go_on.set()
    thread.join()
    assert raised == []


def in_thread_now(function):
    try:
        function()
    except Exception as error:
        return [error]
    return []


def test_data_parallel_without_devices_falls_through():
    m, twin = net(), net()
    opt, other = kfac2.KFAC(m), kfac2.KFAC(twin)
    for model, optimizer in ((nn.DataParallel(m), opt), (twin, other)):
        torch.manual_seed(1)
        steps(model, optimizer, 3)
    assert all(torch.equal(*pair) for pair in zip(factors_of(opt), factors_of(other), strict=True))


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_a_closure_that_calls_the_model_several_times(fisher):
    """A line search: each trial zeroes the gradients, and goes forward and backward."""
    results = []
    for trials in (1, 3):
        m = net()
        opt = kfac2.KFAC(m, fisher=fisher, lr=0.0, rest_lr=0.0)

        def closure(m=m, opt=opt, trials=trials):
            for _ in range(trials):
                opt.zero_grad()
                out = m(X)
                torch.manual_seed(1)
                opt.accumulate_fisher(Categorical(logits=out))
                loss = F.cross_entropy(out, Y)
                loss.backward()
            return float(loss)

        for _ in range(2):
            opt.step(closure)
        results.append(factors_of(opt))
    for one, other in zip(*results, strict=True):
        assert_equal(other, one, 1e-5)

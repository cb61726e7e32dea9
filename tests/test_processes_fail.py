"""States of several processes, and processes that die."""

import copy
import os
import re
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from together import Batches, assert_replicas_are_equal, average_gradients, family, rank, size, spawn
from torch import distributed
from torch.distributions import Categorical
from torch.nn.functional import cross_entropy

import kfac2

SETTINGS = (
    {},
    {"levels": 2, "inverse": "ekfac", "share": "inverses"},
    {"inverse": "eigh", "share": "gradients"},
    {"coarse": "directions", "share": "gradients", "cov_every": 3},
)


# -- states -----------------------------------------------------------------------------------------------------


def _equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) or bool((a.isnan() & b.isnan() | (a == b)).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a == b


def _step(m, opt, batches):
    """A step with labels that are drawn, not given."""
    x, target, _ = batches.next()
    part = batches.part() if opt.curvature.solvers.processes.size > 1 else slice(None)
    opt.zero_grad()
    out = m(x[part])
    opt.accumulate_fisher(Categorical(logits=out))
    cross_entropy(out, target[part]).backward()
    if opt.curvature.solvers.processes.size > 1:
        average_gradients(m)
    opt.step()


def _save(folder, steps):
    for number, settings in enumerate(SETTINGS):
        batches = Batches()
        m = copy.deepcopy(batches.task.model)
        opt = kfac2.KFAC(m, **settings)
        for _ in range(steps):
            _step(m, opt, batches)
        state = opt.state_dict()
        states = [None] * size()
        distributed.all_gather_object(states, state)
        assert all(_equal(state, other) for other in states)
        if rank() == 0:
            torch.save({"model": m.state_dict(), "opt": state}, f"{folder}/{number}")
        for _ in range(steps):
            _step(m, opt, batches)
        if rank() == 0:
            torch.save(m.state_dict(), f"{folder}/{number} later")


def _resume(folder, steps, is_same):
    for number, settings in enumerate(SETTINGS):
        batches = Batches()
        for _ in range(steps):
            batches.next()
        saved = torch.load(f"{folder}/{number}", weights_only=True)
        m = copy.deepcopy(batches.task.model)
        m.load_state_dict(saved["model"])
        opt = kfac2.KFAC(m, **settings)
        opt.load_state_dict(saved["opt"])
        together = opt.curvature.solvers.processes.size
        if together > 1:
            assert _equal(opt.state_dict()["kfac"], saved["opt"]["kfac"])
        for _ in range(steps):
            _step(m, opt, batches)
        if together > 1:
            assert_replicas_are_equal(m)
        if is_same:
            for name, p in torch.load(f"{folder}/{number} later", weights_only=True).items():
                assert torch.equal(m.state_dict()[name], p), (number, name)


@pytest.mark.slow
def test_states_are_the_same_in_each_process_and_go_on_in_another_number_of_them(tmp_path):
    spawn(2, _save, str(tmp_path), 7)
    spawn(2, _resume, str(tmp_path), 7, True)  # bit for bit
    _resume(str(tmp_path), 7, False)  # in one
    spawn(3, _resume, str(tmp_path), 7, False)


# -- processes that die -----------------------------------------------------------------------------------------

TIMEOUT = timedelta(seconds=15)
# What a rank was about to do when it died, how the work is shared, and what the others say failed.
DEATHS = {
    "statistics": (("meet", "statistics"), "all", r"all-gather of what is agreed on \(statistics\)"),
    "sums": (("added", "the statistics"), "all", "all-reduce of the statistics"),
    "inverses": (("send", "inverses"), "inverses", "broadcast of inverses by rank [01]"),
    "flags": (("added", "which layers have inverses"), "inverses", "all-reduce of which layers have inverses"),
    "ordinary": (
        ("send", "preconditioned gradients"),
        "gradients",
        "broadcast of preconditioned gradients by rank [01]",
    ),
    "state_dict": (("meet", "state_dict"), "gradients", r"all-gather of what is agreed on \(state_dict\)"),
    "bound": (("added", "the measured divergence"), "all", "all-reduce of the measured divergence"),
}


def _checkpoint(folder, m, opt):
    """A state is complete before it takes the place of the last one, and a rank that is not there ends it before."""
    state = {"model": m.state_dict(), "opt": opt.state_dict()}
    if rank() == 0:
        torch.save(state, f"{folder}/state.new")
        os.replace(f"{folder}/state.new", f"{folder}/state")


def _until_one_dies(number, path, folder, collective, share, kind):
    torch.set_num_threads(1)
    method = f"file://{path}"
    distributed.init_process_group("gloo", init_method=method, rank=number, world_size=2, timeout=TIMEOUT)
    batches = Batches()
    m = copy.deepcopy(batches.task.model)
    opt = kfac2.KFAC(m, share=share)
    processes, (method, what) = opt.curvature.solvers.processes, collective
    own = getattr(processes, method)

    def die(first, *arguments, **others):
        if number == 1 and first == what and opt.preconditioner.iteration >= 10:
            if kind == "stuck":
                time.sleep(3600)
            os.kill(os.getpid(), signal.SIGKILL)
        return own(first, *arguments, **others)

    setattr(processes, method, die)
    begin = time.monotonic()
    try:
        for step in range(30):
            begin = time.monotonic()
            if step in (7, 14):
                _checkpoint(folder, m, opt)
            _step(m, opt, batches)
    except RuntimeError as error:
        Path(folder, "error").write_text(str(error))
        Path(folder, "seconds").write_text(str(time.monotonic() - begin))
        os._exit(3)
    os._exit(0)


def _deaths(_, folder, names, kind):
    for name in names:
        own = Path(folder, name)
        own.mkdir()
        collective, share, _ = DEATHS[name]
        arguments = (str(own / "group"), str(own), collective, share, kind)
        context = torch.multiprocessing.start_processes(
            _until_one_dies, arguments, nprocs=2, join=False, start_method="fork"
        )
        survivor, dead = context.processes
        survivor.join(120)
        dead.kill()  # where it is stuck
        dead.join(10)
        assert (name, survivor.exitcode, dead.exitcode) == (name, 3, -signal.SIGKILL)


@pytest.mark.slow
def test_others_end_when_one_dies_and_name_the_collective(tmp_path):
    family(1, _deaths, tmp_path, [*DEATHS], "dead")
    for name, (_, _, message) in DEATHS.items():
        error = Path(tmp_path, name, "error").read_text()
        assert re.search(rf"the {message} failed on rank 0 of 2: another process has ended", error), (name, error)
        assert float(Path(tmp_path, name, "seconds").read_text()) < TIMEOUT.total_seconds() + 5
        state = torch.load(Path(tmp_path, name, "state"), weights_only=True)  # the last good one
        assert state["opt"]["kfac"]["iteration"] in (7, 14)
        assert not Path(tmp_path, name, "state.new").exists()


@pytest.mark.slow
def test_others_end_when_one_does_not_come(tmp_path):
    family(1, _deaths, tmp_path, ["sums"], "stuck")
    assert "all-reduce of the statistics failed" in Path(tmp_path, "sums", "error").read_text()
    assert float(Path(tmp_path, "sums", "seconds").read_text()) < 2 * TIMEOUT.total_seconds()

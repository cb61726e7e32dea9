"""States in torch.distributed.checkpoint: each process writes and reads what it holds, in any number of processes."""

import copy
import os
import signal
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from test_processes_apart import Routed
from test_processes_apart import step as routed_step
from test_processes_fail import _equal, _step
from together import Batches, assert_replicas_are_equal, family, rank, size, spawn
from torch import distributed
from torch.distributed import checkpoint
from torch.distributions import Categorical

import kfac2

SETTINGS = (
    {"inverse": "eigh", "share": "gradients"},
    {"levels": 2, "inverse": "ekfac", "share": "inverses", "momentum": 0.9},
    {"coarse": "directions", "cov_every": 3},
)
STEPS = 7
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def _built(settings):
    batches = Batches()
    m = copy.deepcopy(batches.task.model)
    return batches, m, kfac2.KFAC(m, **settings)


def _save(m, opt, folder):
    checkpoint.save({"model": m, "opt": opt.sharded_state()}, checkpoint_id=folder)


def _load(m, opt, folder):
    checkpoint.load({"model": m, "opt": opt.sharded_state()}, checkpoint_id=folder)


def _written_by(folder):
    """By name, the numbers of the ranks that wrote it."""
    written = {}
    for index, where in checkpoint.FileSystemReader(folder).read_metadata().storage_data.items():
        written.setdefault(index.fqn, []).append(int(where.relative_path.split("_")[2]))
    return written


def _saves(folder):
    for number, settings in enumerate(SETTINGS):
        batches, m, opt = _built(settings)
        for _ in range(STEPS):
            _step(m, opt, batches)
        _save(m, opt, f"{folder}/{number}")
        own = list(opt.sharded_state().state_dict()["inverses"])
        all_own = [None] * size()
        distributed.all_gather_object(all_own, own)
        written = _written_by(f"{folder}/{number}")
        assert all(len(ranks) == 1 for ranks in written.values())  # what all have, too
        if settings.get("share") == "gradients":
            assert sorted(name for names in all_own for name in names) == opt.layers and max(map(len, all_own)) < len(
                opt.layers
            )
            for owner, names in enumerate(all_own):
                fields = [
                    f"opt.inverses.{name}.{field}" for name in names for field in opt.curvature.solvers.fine.fields
                ]
                assert all(written[field] == [owner] for field in fields)
        else:
            assert own == opt.layers
        for _ in range(STEPS):
            _step(m, opt, batches)
        state = opt.state_dict()
        if rank() == 0:
            torch.save({"model": m.state_dict(), "opt": state}, f"{folder}/{number} later")


def _saves_and_resumes(folder):
    _saves(folder)
    distributed.barrier()
    _resumes(folder, is_same=True)  # bit for bit


def _resumes(folder, is_same, others=None):
    for number, settings in enumerate(SETTINGS):
        batches, m, opt = _built({**settings, **(others or {})})
        for _ in range(STEPS):
            batches.next()
        _load(m, opt, f"{folder}/{number}")
        for _ in range(STEPS):
            _step(m, opt, batches)
        later, state = torch.load(f"{folder}/{number} later", weights_only=True), opt.state_dict()
        if is_same:
            assert _equal(m.state_dict(), later["model"]) and _equal(state, later["opt"])
        else:
            assert state["kfac"]["iteration"] == 2 * STEPS
        if opt.curvature.solvers.processes.size > 1:
            assert_replicas_are_equal(m)


def _resumes_otherwise(folder):
    _resumes(folder, False, {"share": "all"})
    _reads_only_what_it_holds(f"{folder}/0")
    _goes_on_without_a_layer(folder)


def _reads_only_what_it_holds(folder):
    class Reader(checkpoint.FileSystemReader):
        def read_data(self, plan, planner):
            self.names = {item.dest_index.fqn for item in plan.items}
            return super().read_data(plan, planner)

    _, _, opt = _built(SETTINGS[0])
    reader = Reader(folder)
    checkpoint.load({"opt": opt.sharded_state()}, storage_reader=reader)
    held = [layer.name for layer in opt.curvature.solvers.division.held(opt.curvature.layout).layers]
    assert {name.split(".")[2] for name in reader.names if name.startswith("opt.inverses")} == {*held}
    assert len(held) < len(opt.layers)


def _goes_on_without_a_layer(folder):
    """Who holds what is another question without it."""
    m = Routed()
    opt = kfac2.KFAC(m, share="gradients", check_every=1, inverse="eigh")
    for number in range(7):
        m.is_seen = number < 5
        routed_step(m, opt)
    assert opt.layers == ["b", "head"]
    _save(m, opt, f"{folder}/without")
    other = Routed()
    other.is_seen = False
    resumed = kfac2.KFAC(other, share="gradients", check_every=1, inverse="eigh")
    _load(other, resumed, f"{folder}/without")
    assert resumed.layers == ["b", "head"]
    assert _equal(resumed.state_dict(), opt.state_dict())
    routed_step(m, opt), routed_step(other, resumed)
    assert _equal(m.state_dict(), other.state_dict())


@pytest.mark.slow
def test_states_are_saved_by_their_owners_and_read_in_another_number_of_processes(tmp_path):
    spawn(2, _saves_and_resumes, str(tmp_path))
    spawn(3, _resumes_otherwise, str(tmp_path))
    _resumes(str(tmp_path), False)  # in one


# -- alone ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [kfac2.KFAC, kfac2.Preconditioner, kfac2.Curvature])
def test_each_has_a_sharded_state(make, tmp_path):
    x = torch.randn(8, 6)

    def built(seed):
        torch.manual_seed(seed)
        m = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))
        return m, make(m, inverse="ekfac", levels=2)

    m, one = built(0)
    for _ in range(2):
        if make is kfac2.Curvature:
            one.accumulate(Categorical(logits=m(x)))
        else:
            out = m(x)
            one.accumulate_fisher(Categorical(logits=out))
            out.square().mean().backward()
            one.step(lr=0.1) if make is kfac2.Preconditioner else one.step()
    checkpoint.save({"of": one.sharded_state()}, checkpoint_id=tmp_path)
    _, other = built(1)
    before = copy.deepcopy(other.state_dict())
    checkpoint.load({"of": other.sharded_state()}, checkpoint_id=tmp_path)
    assert _equal(other.state_dict(), one.state_dict()) and not _equal(before, one.state_dict())


def test_a_state_of_another_model_changes_nothing(tmp_path):
    batches, m, opt = _built({"process_group": None})
    _step(m, opt, batches)
    _save(m, opt, tmp_path)
    other = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))
    wrong = kfac2.KFAC(other)
    with pytest.raises(checkpoint.api.CheckpointException, match=r"Size mismatch between saved|Missing key"):
        checkpoint.load({"opt": wrong.sharded_state()}, checkpoint_id=tmp_path)
    _, _, wrong = _built({"inverse": "cholesky", "levels": 2})
    with pytest.raises(ValueError, match="saved with levels=2, got 1"):
        checkpoint.load({"opt": wrong.sharded_state()}, checkpoint_id=tmp_path)
    assert wrong.preconditioner.iteration == 0 and not wrong.curvature.averages.updates


def test_a_plain_state_is_saved_too_and_read_where_there_is_one(tmp_path):
    """`state_dict()` is nested dicts of tensors and numbers, whose names depend on what there is so far."""
    batches, m, opt = _built({})
    _step(m, opt, batches)
    state = copy.deepcopy(opt.state_dict())
    checkpoint.save({"opt": opt.state_dict()}, checkpoint_id=tmp_path)
    _, _, new = _built({})
    with pytest.raises(checkpoint.api.CheckpointException, match=r"Missing key in checkpoint state_dict: opt\.kfac"):
        checkpoint.load({"opt": new.state_dict()}, checkpoint_id=tmp_path)
    _step(m, opt, batches)
    read = {"opt": opt.state_dict()}
    checkpoint.load(read, checkpoint_id=tmp_path)
    opt.load_state_dict(read["opt"])
    assert _equal(opt.state_dict(), state)


# -- processes that die -----------------------------------------------------------------------------------------

TIMEOUT = timedelta(seconds=15)
DEATHS = ("before its data", "after its data", "before the metadata")


class Dying(checkpoint.FileSystemWriter):
    """Of a rank that dies in the middle."""

    def __init__(self, folder, when, dies):
        super().__init__(folder)
        self.when, self.dies = when, dies

    def _die(self, when):
        if self.dies and when == self.when:
            os.kill(os.getpid(), signal.SIGKILL)

    def write_data(self, plan, planner):
        self._die("before its data")
        result = super().write_data(plan, planner)
        self._die("after its data")
        return result

    def finish(self, metadata, results):
        self._die("before the metadata")
        super().finish(metadata, results)


def _until_one_dies(number, path, folder, when):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    distributed.init_process_group("gloo", init_method=f"file://{path}", rank=number, world_size=2, timeout=TIMEOUT)
    batches, m, opt = _built(SETTINGS[0])
    for step in (STEPS, 2 * STEPS):
        for _ in range(STEPS):
            _step(m, opt, batches)
        first_to_finish = when == "before the metadata"  # which the first rank writes
        writer = Dying(f"{folder}/{step}", when, step > STEPS and number == (0 if first_to_finish else 1))
        try:
            checkpoint.save({"model": m, "opt": opt.sharded_state()}, storage_writer=writer)
        except Exception as error:
            Path(folder, "error").write_text(f"{type(error).__name__} {error}")
            os._exit(3)
    os._exit(0)


def _deaths(_, folder):
    for when in DEATHS:
        own = Path(folder, when)
        own.mkdir()
        arguments = (str(own / "group"), str(own), when)
        context = torch.multiprocessing.start_processes(
            _until_one_dies, arguments, nprocs=2, join=False, start_method="fork"
        )
        for process in context.processes:
            process.join(120)
        codes = sorted(process.exitcode for process in context.processes)
        assert (when, codes) == (when, [-signal.SIGKILL, 3])


def _resume_the_good_one(folder):
    batches, m, opt = _built(SETTINGS[0])
    for _ in range(STEPS):
        batches.next()
    _load(m, opt, f"{folder}/{STEPS}")
    assert opt.preconditioner.iteration == STEPS
    _step(m, opt, batches)


@pytest.mark.slow
def test_a_checkpoint_that_one_dies_in_takes_no_ones_place(tmp_path):
    family(1, _deaths, str(tmp_path))
    for when in DEATHS:
        own = Path(tmp_path, when)
        assert (own / "error").exists()
        assert (own / str(STEPS) / ".metadata").exists()
        assert list((own / str(2 * STEPS)).iterdir()) and not (own / str(2 * STEPS) / ".metadata").exists()
        _resume_the_good_one(own)

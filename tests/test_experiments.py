"""The experiments run, at tiny sizes; a run that is killed ends as one that never was; bad data is refused by name."""

import gzip
import itertools
import json
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import experiment
import numpy as np
import pytest
import torch
from experiments import data, grid, images, intervals, pickles, pictures, recipes, records, runs, tasks
from experiments.coarse import Follower
from problems import ResNet, initialised

import kfac2

ROOT = Path(__file__).parent.parent
NOTHING = (lambda: None, lambda epochs: None)
TINY = {"train": 96, "test": 40, "batch": 32, "layers": 4, "epochs": 3}
fashion_mnist = pytest.mark.skipif(
    not data.FASHION_MNIST.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed"
)


# -- data -----------------------------------------------------------------------------------------------------


def idx(array, magic=None):
    magic = 0x0800 + array.ndim if magic is None else magic
    return struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.astype(np.uint8).tobytes()


def mnist_folder(folder, count=64, zipped=True, seed=0, classes=10):
    generator = np.random.default_rng(seed)
    for part in ("train", "t10k"):
        for name, array in (
            (f"{part}-images-idx3-ubyte", generator.integers(256, size=(count, 28, 28))),
            (f"{part}-labels-idx1-ubyte", generator.integers(classes, size=count)),
        ):
            raw = idx(array)
            (folder / (name + ".gz" * zipped)).write_bytes(gzip.compress(raw) if zipped else raw)
    return folder


@pytest.mark.parametrize("zipped", [True, False])
def test_idx_files_are_read(tmp_path, zipped):
    found = data.read_mnist(mnist_folder(tmp_path, 7, zipped))
    generator = np.random.default_rng(0)
    assert torch.equal(found.train.x[:, 0], torch.as_tensor(generator.integers(256, size=(7, 28, 28))).byte())
    assert torch.equal(found.train.y, torch.as_tensor(generator.integers(10, size=7)))
    assert found.test.x.shape == (7, 1, 28, 28) and found.train.y.dtype == torch.int64


IMAGES = idx(np.zeros((4, 28, 28)))
BAD_IMAGES = {
    "magic": (idx(np.zeros((4, 28, 28)), 0x0D03), "must start with the magic number 0x00000803, got 0x00000d03"),
    "empty": (b"", "must start with the magic number 0x00000803, got 0x"),
    "header": (IMAGES[:9], "is truncated: 9 bytes are no whole header"),
    "data": (IMAGES[:-1], "is truncated: 3136 bytes of data should follow its header, got 3135"),
    "long": (IMAGES + b"x", "is too long: 3136 bytes of data should follow its header, got 3137"),
    "huge": (struct.pack(">4I", 0x0803, *[2**32 - 1] * 3), "is truncated"),
    "size": (idx(np.zeros((4, 28, 27))), "must hold images of 28 by 28 pixels, got 28 by 27"),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
@pytest.mark.parametrize("zipped", [True, False])
def test_bad_idx_files_are_named(tmp_path, kind, zipped):
    content, message = BAD_IMAGES[kind]
    path = mnist_folder(tmp_path, 4, zipped) / ("train-images-idx3-ubyte" + ".gz" * zipped)
    path.write_bytes(gzip.compress(content) if zipped else content)
    with pytest.raises(data.DataError, match=re.escape(message)) as refused:
        data.read_mnist(tmp_path)
    assert str(path) in str(refused.value)


def test_other_faults_of_idx_files_are_named(tmp_path):
    mnist_folder(tmp_path, 4)
    images_path, labels_path = (tmp_path / f"t10k-{name}-ubyte.gz" for name in ("images-idx3", "labels-idx1"))
    whole = labels_path.read_bytes()
    for content, message in (
        (whole[:-9], "is truncated: its compressed data ends too early"),
        (b"not gzip at all", "cannot be read: Not a gzipped file"),
        (gzip.compress(idx(np.array([0, 1, 2]))), "must hold a label for each of 4 images, got 3"),
        (gzip.compress(idx(np.array([0, 1, 2, 10]))), "must hold labels from 0 to 9, got one outside"),
    ):
        labels_path.write_bytes(content)
        with pytest.raises(data.DataError, match=re.escape(f"{labels_path} {message}")):
            data.read_mnist(tmp_path)
    images_path.unlink()
    with pytest.raises(data.DataError, match=r"lacks t10k-images-idx3-ubyte or t10k-images-idx3-ubyte\.gz"):
        data.read_mnist(tmp_path)


def python_batch(x, y, protocol=2):
    """Pickle a batch as Python 2 has: the keys and the array's bytes are its strings."""
    return pickle.dumps({b"data": x, b"labels": y, b"batch_label": b"a batch", b"filenames": [b"a.png"]}, protocol)


def cifar_folder(folder, binary, count=6):
    generator = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        x = generator.integers(256, size=(count, 3072)).astype(np.uint8)
        y = generator.integers(10, size=count)
        if binary:
            (folder / f"{name}.bin").write_bytes(np.concatenate([y[:, None].astype(np.uint8), x], 1).tobytes())
        else:
            (folder / name).write_bytes(python_batch(x, y.tolist()))
    return folder


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(data, "CIFAR_BATCH", 6)


def test_both_archives_of_cifar10_hold_the_same(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "p" / "cifar-10-batches-py").mkdir(parents=True)
    binary = data.read_cifar10(cifar_folder(tmp_path / "b", True))
    cifar_folder(tmp_path / "p" / "cifar-10-batches-py", False)
    python = data.read_cifar10(tmp_path / "p")
    assert binary.train.x.shape == (30, 3, 32, 32) and binary.test.x.shape == (6, 3, 32, 32)
    for part in ("train", "test"):
        one, other = getattr(binary, part), getattr(python, part)
        assert torch.equal(one.x, other.x) and torch.equal(one.y, other.y)


def test_a_pickle_of_python_2_is_read():
    """Its strings become bytes, and the array's bytes are such a string."""
    old = (
        b"\x80\x02}(U\x04dataq\x01cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\x00\x85U\x01b\x87R"
        b"(K\x01K\x02K\x03\x86cnumpy\ndtype\nq\x04U\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff"
        b"K\x00tb\x89U\x06\x00\x01\x02\xff\xfe\xfdtbU\x06labelsq\x05]q\x06(K\x01K\x02eu."
    )
    found = pickles.loads(old)
    assert found[b"labels"] == [1, 2] and found[b"data"].tolist() == [[0, 1, 2], [255, 254, 253]]


@pytest.mark.parametrize("binary", [True, False])
def test_bad_batches_of_cifar10_are_named(tmp_path, binary):
    cifar_folder(tmp_path, binary)
    path = tmp_path / ("data_batch_3" + ".bin" * binary)
    x = np.zeros((2, 3072), np.uint8)
    bad = [
        (b"\x0a" + bytes(3072), "must hold labels from 0 to 9"),
        (path.read_bytes()[:-5], "must hold records of 3073 bytes, got 18433 bytes"),
        (path.read_bytes()[:-3073], "must hold 6 images, got 5"),
        (b"", "must hold records of 3073 bytes, got 0 bytes"),
    ]
    if not binary:
        bad = [
            (python_batch(x, [1, 10]), "must hold labels from 0 to 9"),
            (python_batch(x, [1, 10**40]), "must hold labels from 0 to 9"),
            (python_batch(x, [1]), "must hold data in uint8 of shape (1, 3072), a row for each label, got uint8 of"),
            (python_batch(x, [1, 2]), "must hold 6 images, got 2"),
            (python_batch(x[:, 1:], [1, 2]), "got uint8 of shape (2, 3071)"),
            (python_batch(x.tolist(), [1, 2]), "must hold a dict with an array 'data'"),
            (pickle.dumps([1], 2), "must hold a dict with an array 'data'"),
            (python_batch(x.astype(float), [1, 2]), "an array must hold unsigned bytes, got dtype 'f8'"),
            (python_batch(x, [1, 2])[:-500], "is damaged"),
            (b"", "is damaged"),
        ]
    for content, message in bad:
        path.write_bytes(content)
        with pytest.raises(data.DataError, match=re.escape(message)) as refused:
            data.read_cifar10(tmp_path)
        assert str(path) in str(refused.value)
    path.unlink()
    with pytest.raises(data.DataError, match=re.escape(f"{tmp_path} lacks {path.name}")):
        data.read_cifar10(tmp_path)
    with pytest.raises(data.DataError, match="must hold CIFAR-10's batches"):
        data.read_cifar10(tmp_path / "nowhere")


class Evil:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize("protocol", range(6))
def test_no_pickle_runs_anything(tmp_path, protocol):
    cifar_folder(tmp_path, False)
    trace = tmp_path / "trace"
    for call, arguments in (
        (os.system, (f"touch {trace}",)),
        (eval, (f"open({str(trace)!r}, 'w')",)),
        (Path.touch, (trace,)),
        (np.fromfile, (str(trace),)),
        (np.lib.format.read_array, (None,)),
    ):
        try:
            content = pickle.dumps({b"data": Evil(call, *arguments), b"labels": [1]}, protocol)
        except (AttributeError, pickle.PicklingError):  # the oldest protocols know no nested names
            continue
        (tmp_path / "data_batch_2").write_bytes(content)
        with pytest.raises(data.DataError, match=r"data_batch_2 is not one of CIFAR-10's pickles: it asks for"):
            data.read_cifar10(tmp_path)
        assert not trace.exists()


def test_a_pickle_changes_nothing_of_the_readers():
    before = pickles._latin1.__defaults__
    state = b"N}\x8c\x0c__defaults__\x8c\x01x\x8c\x06latin1\x86s\x86"  # (None, {"__defaults__": ("x", "latin1")})
    pickles.loads(b"\x80\x04c_codecs\nencode\n" + state + b"b.")
    assert pickles._latin1.__defaults__ == before


@pytest.mark.parametrize("state", [
    None,
    (1,),
    (1, (2, 2), 0, False, b"1234"),
    (1, (2, 3), pickles._Dtype("u1"), False, b"1234"),
])  # fmt: skip
def test_arrays_that_do_not_fit_are_refused(state):
    array = pickles._Array()
    with pytest.raises((pickles.RefusedError, TypeError, ValueError)):
        array.__setstate__(state)


@fashion_mnist
def test_the_real_fashion_mnist():
    found = data.read_mnist(data.FASHION_MNIST)
    assert found.train.x.shape == (60_000, 1, 28, 28) and found.test.x.shape == (10_000, 1, 28, 28)
    assert torch.bincount(found.train.y).tolist() == [6000] * 10
    normal = images.Normalisation.of(found.train)
    assert normal.mean.item() == pytest.approx(0.2860, abs=1e-4)
    assert normal.deviation.item() == pytest.approx(0.3530, abs=1e-4)


# -- images ---------------------------------------------------------------------------------------------------


def test_images_are_padded_and_normalised():
    x = torch.randint(256, (9, 2, 28, 28), dtype=torch.uint8)
    found = images.padded(data.Images(x, torch.zeros(9)))
    assert found.x.shape == (9, 2, 32, 32) and torch.equal(found.x[:, :, 2:-2, 2:-2], x)
    assert found.x.sum() == x.sum()
    normal = images.Normalisation.of(found)(found.x)
    assert torch.allclose(normal.mean((0, 2, 3)), torch.zeros(2), atol=1e-5)
    assert torch.allclose(normal.var((0, 2, 3), correction=0), torch.ones(2), atol=1e-5)


def test_each_image_is_cropped_and_flipped_by_itself():
    x = torch.randint(1, 256, (400, 3, 8, 8), dtype=torch.uint8)
    found = images.augmented(x, torch.Generator().manual_seed(1))
    assert torch.equal(found, images.augmented(x, torch.Generator().manual_seed(1)))
    wide = torch.nn.functional.pad(x, (4, 4, 4, 4))
    seen = set()
    for image, result in zip(wide, found, strict=True):
        places = [
            (i, j, flip)
            for i in range(9)
            for j in range(9)
            for flip in (False, True)
            if torch.equal(result, image[:, i : i + 8, j : j + 8].flip(-1) if flip else image[:, i : i + 8, j : j + 8])
        ]
        assert places
        seen.add(places[0])
    assert len({place[:2] for place in seen}) > 70 and {flip for *_, flip in seen} == {False, True}


@pytest.mark.parametrize("pads", [False, True])
def test_both_shortcuts(pads):
    network = ResNet(2, 1, 4, pads=pads)
    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == (13 if pads else 15)
    assert network(torch.randn(2, 1, 32, 32)).shape == (2, 10)


def test_a_task_is_what_its_settings_say(tmp_path):
    folder = mnist_folder(tmp_path, 96)
    made = [
        tasks.task_of(settings, folder).problem.model
        for settings in (tiny("sgd", "resnet"), tiny("sgd", "resnet", shortcut="pad"), tiny("sgd", "resnet", seed=1))
    ]
    assert [sum(isinstance(m, torch.nn.Conv2d) for m in model.modules()) for model in made] == [9, 7, 9]
    assert not torch.equal(made[0].head.weight, made[2].head.weight)
    one, other = (tasks.task_of(tiny("sgd", seed=seed), None).problem for seed in (0, 1))
    assert not torch.equal(one.train[0], other.train[0])
    assert not torch.equal(one.model.head.weight, other.model.head.weight)
    with pytest.raises(data.DataError, match=re.escape(f"{tmp_path} holds 96 images where 97 are asked for")):
        tasks.task_of(tiny("sgd", "resnet", train=97), folder)


# -- runs -----------------------------------------------------------------------------------------------------


def tiny(optimizer="kfac2", problem="deep-linear", **changes):
    if problem == "deep-linear":
        return replace(recipes.deep_linear(optimizer), **{**TINY, **changes})
    return replace(
        recipes.resnet(optimizer), **{**TINY, "layers": 8, "width": 2, "cov_every": 2, "inv_every": 4, **changes}
    )


def numbers(out, settings):
    record = records.load(out / f"{settings.name}.jsonl")
    assert record.is_done and record.settings == settings
    return [{key: value for key, value in row.items() if "seconds" not in key} for row in record.epochs]


class Killed(BaseException):
    pass


class Kill:
    """Raises Killed when it is called for the `moment`-th time."""

    def __init__(self, moment):
        self.left = moment

    def __call__(self):
        self.left -= 1
        if self.left == 0:
            raise Killed

    def around(self, function):
        def both(*arguments):
            self()
            function(*arguments)
            self()

        return both


@pytest.mark.parametrize("settings", [
    tiny("sgd"), tiny("adam"), tiny("kfac1", inverse="cholesky"),
    tiny("kfac2", follow=True, cov_every=2, inv_every=4, coarse_until=5),
    tiny("kfac2", "resnet", milestones=(1,)),
], ids=lambda settings: f"{settings.optimizer}-{settings.problem}")  # fmt: skip
def test_a_run_that_is_stopped_anywhere_ends_the_same(settings, tmp_path, monkeypatch):
    """Stopped once in each step, and before and after each file is put in its place."""
    folder = mnist_folder(tmp_path, 96) if settings.problem == "resnet" else None
    runs.run(settings, folder, tmp_path, *NOTHING)
    expected = numbers(tmp_path, settings)
    for moment in range(1, 100):
        out = tmp_path / str(moment)
        out.mkdir()
        with monkeypatch.context() as patched:
            kill = Kill(moment)
            patched.setattr(os, "replace", kill.around(os.replace))
            try:
                runs.run(settings, folder, out, kill, NOTHING[1])
            except Killed:
                pass
            else:
                break
        runs.run(settings, folder, out, *NOTHING)
        assert numbers(out, settings) == expected
        assert not list(out.glob("*.pt"))
    steps = 3 * -(-settings.train // settings.batch)
    assert moment > steps + 2 * 2 * 3  # two files after each epoch


@pytest.mark.slow
def test_a_run_that_is_killed_ends_the_same(tmp_path):
    """SIGKILL at random moments, from outside."""
    command = [sys.executable, str(ROOT / "bench/experiment.py"), "deep-linear", "--optimizers", "kfac2"]
    command += ["--inverses", "eigh", "--seeds", "1", "--epochs", "8", "--train", "8192", "--test", "100"]
    subprocess.run([*command, "--out", tmp_path / "whole"], check=True, capture_output=True)
    shuffle, folder, kills = random.Random(time.time_ns()), tmp_path / "killed" / "deep-linear", 0
    for _ in range(4):
        process = subprocess.Popen(
            [*command, "--out", tmp_path / "killed"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        before = max((path.stat().st_mtime_ns for path in folder.glob("*.pt")), default=0)
        while process.poll() is None and not any(path.stat().st_mtime_ns > before for path in folder.glob("*.pt")):
            time.sleep(0.01)
        time.sleep(shuffle.uniform(0, 0.3))
        kills += process.poll() is None
        process.kill()
        process.wait()
    subprocess.run([*command, "--out", tmp_path / "killed"], check=True, capture_output=True)
    settings = replace(recipes.deep_linear("kfac2"), epochs=8, train=8192, test=100)
    assert kills >= 1
    assert numbers(folder, settings) == numbers(tmp_path / "whole" / "deep-linear", settings)
    assert [path.suffix for path in folder.iterdir()] == [".jsonl"]


def test_a_damaged_checkpoint_is_named(tmp_path):
    settings = tiny("sgd")
    path = tmp_path / f"{settings.name}.pt"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(runs.CheckpointError, match=re.escape(str(path))):
        runs.run(settings, None, tmp_path, *NOTHING)


def test_a_finished_run_is_left_alone(tmp_path):
    settings = tiny("sgd")
    runs.run(settings, None, tmp_path, *NOTHING)
    before = (tmp_path / f"{settings.name}.jsonl").read_bytes()
    done = []
    runs.run(settings, None, tmp_path, lambda: done.append("step"), done.append)
    assert done == [3] and (tmp_path / f"{settings.name}.jsonl").read_bytes() == before


def test_a_run_of_another_process_comes_last(tmp_path):
    first, second = tiny("sgd"), tiny("sgd", seed=1)
    started = []
    thread = threading.Thread(
        target=runs.run_all, args=([first, second], None, tmp_path, started.append, *NOTHING), daemon=True
    )
    with runs._locked(tmp_path / f"{first.name}.lock", False) as got:
        assert got
        thread.start()
        while thread.is_alive() and not (tmp_path / f"{second.name}.jsonl").exists():
            time.sleep(0.01)
        assert started == [second]
    thread.join(60)
    assert started == [second, first] and not list(tmp_path.glob("*.lock"))
    assert numbers(tmp_path, first) and numbers(tmp_path, second)


def by_hand(settings, folder):
    """The run again, written out; return its rows."""
    found = data.read_mnist(folder)
    (x, y), (test_x, test_y) = (
        (torch.nn.functional.pad(part.x[:count], (2, 2, 2, 2)), part.y[:count])
        for part, count in ((found.train, settings.train), (found.test, settings.test))
    )
    mean, deviation = (x / 255).mean(), (x / 255).std(correction=0)
    model = ResNet(1, 1, settings.width)
    torch.nn.utils.convert_conv2d_weight_memory_format(model, torch.channels_last)
    initialised(model, torch.Generator().manual_seed(settings.seed))
    common = {"lr": settings.lr, "weight_decay": 1e-3}
    if settings.optimizer == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), momentum=0.8, **common)
    elif settings.optimizer == "adam":
        optimizer = torch.optim.Adam(model.parameters(), betas=(0.8, 0.999), **common)
    else:
        optimizer = kfac2.KFAC(
            model, levels=int(settings.optimizer[-1]), momentum=0.8, damping=1e-3, kl_clip=1e-2, cov_every=2,
            inv_every=4, **common,
        )  # fmt: skip
    torch.manual_seed(settings.seed + 1000)
    order = torch.Generator().manual_seed(settings.seed + 2000)
    generator = torch.Generator().manual_seed(settings.seed + 3000)
    rows = []
    for epoch in range(settings.epochs):
        optimizer.param_groups[0]["lr"] = settings.lr * 0.1**epoch  # milestones 1 and 2
        total = right = 0
        for batch in torch.randperm(len(x), generator=order).split(settings.batch):
            optimizer.zero_grad()
            out = model((images.augmented(x[batch], generator) / 255 - mean) / deviation)
            loss = torch.nn.functional.cross_entropy(out, y[batch])
            if settings.is_kfac:
                optimizer.accumulate_fisher(torch.distributions.Categorical(logits=out))
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
            right += (out.argmax(1) == y[batch]).sum().item()
        model.eval()
        with torch.no_grad():
            out = model((test_x / 255 - mean) / deviation)
        model.train()
        test_loss = torch.nn.functional.cross_entropy(out, test_y).item()
        rows.append([total / len(x), right / len(x), test_loss, (out.argmax(1) == test_y).float().mean().item()])
    return rows


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "kfac1", "kfac2"])
def test_a_run_is_what_a_loop_by_hand_does(optimizer, tmp_path):
    """The last batch is smaller; rates fall after each epoch."""
    settings = tiny(optimizer, "resnet", train=75, momentum=0.8, milestones=(1, 2), lr=1e-2)
    folder = mnist_folder(tmp_path, 80)
    runs.run(settings, folder, tmp_path, *NOTHING)
    found = [[row[metric] for metric in records.METRICS] for row in numbers(tmp_path, settings)]
    assert np.array(found) == pytest.approx(np.array(by_hand(settings, folder)), rel=1e-4)


def test_seconds_add_up_and_arithmetic_is_exact(tmp_path):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    settings = tiny("sgd")
    runs.run(settings, None, tmp_path, *NOTHING)
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    rows = records.load(tmp_path / f"{settings.name}.jsonl").epochs
    for clock in ("seconds", "wall_seconds"):
        times = [0.0, *(row[clock] for row in rows)]
        taken = [after - before for before, after in itertools.pairwise(times)]
        assert min(taken) > 0 and times[-1] > 1.5 * max(taken)


def test_rates_fall_at_milestones():
    settings = replace(recipes.resnet("sgd"), milestones=(40, 80))
    assert [settings.rate(epoch) for epoch in (1, 40, 41, 80, 81)] == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3, 1e-4])


@pytest.mark.parametrize("settings", [
    tiny("sgd", "resnet", lr=1e30), tiny("kfac2", "resnet", lr=1e20), tiny("kfac2", lr=1e6, epochs=6)
], ids=lambda settings: f"{settings.optimizer}-{settings.problem}")  # fmt: skip
def test_a_diverged_run_is_recorded(settings, tmp_path):
    runs.run(settings, mnist_folder(tmp_path, 96), tmp_path, *NOTHING)
    assert numbers(tmp_path, settings)[-1]["train_loss"] is None
    record = records.load(tmp_path / f"{settings.name}.jsonl")
    assert "(1 of 1 diverged)" in experiment.tables.comparison([record])


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"settings": {}, "machine": {}}', "not json"])
def test_a_file_that_is_no_record_is_named(tmp_path, text):
    path = tmp_path / "run.jsonl"
    path.write_text(text)
    with pytest.raises(records.RecordError, match=re.escape(f"{path} is no record of a run")):
        records.load(path)


# -- the coarse step ------------------------------------------------------------------------------------------


def test_the_coarse_step_is_measured_right():
    """Beside the steps of the same model with one level and no clip, which are the fine steps."""
    settings = tiny("kfac2", follow=True, cov_every=1, inv_every=2)
    for kappa in (1e-6, 1e6):
        one, two = replace(settings, optimizer="kfac1", kl_clip=None), replace(settings, kl_clip=kappa)
        grads, followers = {}, []
        for each in (one, two):
            task = tasks.task_of(each, None)
            model, problem = task.problem.model, task.problem
            optimizer = tasks.optimizer_of(each, model)
            follower = Follower(model, optimizer, two) if each is two else None
            torch.manual_seed(0)
            out = model(problem.train[0])
            optimizer.accumulate_fisher(problem.distribution(out))
            problem.loss(out, problem.train[1]).backward()
            if follower:
                follower.before()
                followers.append(follower)
            optimizer.step()
            if follower:
                follower.after(0, out.detach())
            grads[each.optimizer] = [model.get_submodule(name).weight.grad.double() for name in optimizer.layers]
        (row,) = followers[0].rows
        clip = row["clip"]
        assert (clip < 0.9) == (kappa < 1)
        fine, whole = grads["kfac1"], grads["kfac2"]
        coarse = [w / clip - f for w, f in zip(whole, fine, strict=True)]
        assert all(c.std() < 1e-3 * c.abs().mean() for c in coarse)  # the same on every weight of a layer

        def norm(parts):
            return torch.cat([part.flatten() for part in parts]).norm().item()

        assert row["coarse_to_fine"] == pytest.approx(norm(coarse) / norm(fine), rel=1e-3)
        hidden = [model.get_submodule(name).weight for name in optimizer.layers[:-1]]
        shares = [(w.sum() ** 2 / 100 / w.norm() ** 2).item() for w in hidden]
        assert row["all_ones"] == pytest.approx(np.mean(shares), rel=1e-5)


def test_a_window_that_is_never_is_one_level(tmp_path):
    one, never = tiny("kfac1"), tiny("kfac2", coarse_until=0)
    always, early = tiny("kfac2"), tiny("kfac2", coarse_until=3)
    found = []
    for settings in (one, never, always, early):
        runs.run(settings, None, tmp_path, *NOTHING)
        found.append([row["train_loss"] for row in numbers(tmp_path, settings)])
    assert found[0] == found[1]
    assert found[2][0] == found[3][0] != found[1][0] and found[2][1:] != found[3][1:]


# -- grid, intervals, pictures, tables ------------------------------------------------------------------------


def record(loss, accuracy=0.5, **changes):
    row = {
        "epoch": 1,
        "lr": 0.1,
        "train_loss": loss,
        "train_accuracy": accuracy,
        "test_loss": 1.0,
        "test_accuracy": 0.5,
    }
    settings = replace(recipes.deep_linear(changes.pop("optimizer", "sgd")), epochs=1, **changes)
    clock = "CPU time" if settings.threads == 1 else "wall time"
    machine = {"cpu": "a CPU", "device": "cpu", "threads": settings.threads, "torch": "2", "clock": clock}
    return records.Record(settings, machine, [row | {"seconds": 1.0, "wall_seconds": 2.0}])


def test_the_grid_is_the_papers():
    points = {name: grid.Grid().of(recipes.deep_linear(name)) for name in ("sgd", "adam", "kfac1", "kfac2")}
    assert [len(set(some)) for some in points.values()] == [6, 6, 24, 24]
    assert {(s.lr, s.momentum) for s in points["adam"]} == {(a, b) for a in (1e-2, 1e-3, 1e-4) for b in (0, 0.9)}
    assert {(s.damping, s.kl_clip) for s in points["kfac2"]} == {(a, b) for a in (1e-2, 1e-3) for b in (1e-2, 1e-3)}


def test_the_winner_is_the_best_mean():
    tried = [
        record(0.1, lr=1e-2), record(0.9, lr=1e-2, seed=1),
        record(0.4, 0.4, lr=1e-3), record(0.4, 0.4, lr=1e-3, seed=1),
        record(0.01, lr=1e-4), record(None, lr=1e-4, seed=1),
        record(0.3, optimizer="kfac2"),
    ]  # fmt: skip
    best = grid.winners(tried, "train_loss")
    assert [(s.optimizer, s.lr) for s in best] == [("sgd", 1e-3), ("kfac2", 1e-3)]
    assert grid.winners(tried[:4], "train_accuracy")[0].lr == 1e-2
    diverged = [record(None, 0.9, lr=1e-4), record(0.9, 0.1, lr=1e-3)]
    assert grid.winners(diverged, "train_accuracy")[0].lr == 1e-3
    more_seeds = [record(0.5, lr=1e-2), record(0.9, lr=1e-2, seed=1), record(0.6, lr=1e-3)]
    assert grid.winners(more_seeds, "train_loss")[0].lr == 1e-2
    text = experiment.tables.winners(tried, "train_loss")
    assert re.search(r"\| SGD, 2 seeds +\| 3 +\| 0.001 \| 0.9 \| none +\|", text)


def test_grids_of_other_settings_are_others():
    tried = [record(0.5, lr=0.1), record(0.1, lr=0.01, batch=64), record(0.2, lr=0.03, batch=64)]
    assert [s.lr for s in grid.winners(tried, "train_loss")] == [0.1, 0.01]
    text = experiment.tables.winners(tried, "train_loss")
    assert re.search(r"\| SGD, batch 512, η 0.1 +\| 1 ", text) and re.search(r"\| SGD, batch 64, η 0.01 +\| 2 ", text)


def test_names_tell_what_differs():
    groups = [
        [record(0.5), record(None, seed=1)],
        [record(0.5, batch=64)],
        [record(0.5, optimizer="adam", damping=1e-2), record(0.4, optimizer="adam", damping=1e-2, seed=1)],
    ]
    names = ["SGD, batch 512, 2 seeds (1 of 2 diverged)", "SGD, batch 64, 1 seed", "Adam, 2 seeds"]
    assert records.labels(groups) == names
    assert records.labels(groups[2:]) == ["Adam"]
    windows = [[record(0.5, coarse_until=0)], [record(0.5, coarse_until=0, layers=9)]]
    found = records.labels(windows, lambda settings: settings.window)
    assert found == ["never (one level), layers 64", "never (one level), layers 9"]


def test_curves_are_means_with_intervals(tmp_path):
    def run_of(seed, losses, **changes):
        rows = [
            {**record(loss).epochs[0], "epoch": i, "seconds": 3.0 * i, "wall_seconds": 5.0 * i}
            for i, loss in enumerate(losses, start=1)
        ]
        first = record(0.1, seed=seed, **changes)
        return records.Record(replace(first.settings, epochs=len(rows)), first.machine, rows)

    group = [run_of(0, [1.0, 2.0, 3.0]), run_of(1, [3.0, 2.0, 1.0]), run_of(2, [1.0, None, None])]
    figure, (by_epoch, by_time, mixed) = pictures.plt.subplots(1, 3)
    pictures._curves(by_epoch, [group], "train_loss", False)
    pictures._curves(by_time, [group], "train_loss", True)
    pictures._curves(mixed, [group, [run_of(0, [1.0, 1.0, 1.0], threads=2)]], "train_loss", True)
    (curve,) = by_epoch.lines
    assert curve.get_xdata().tolist() == [1, 2, 3] and curve.get_ydata().tolist() == [2, 2, 2]
    assert curve.get_label() == "SGD (1 of 3 diverged)"
    (band,) = by_epoch.collections
    low, high = band.get_paths()[0].get_extents().intervaly
    assert high - 2 == pytest.approx(12.706) and 2 - low == pytest.approx(12.706)
    assert by_time.lines[0].get_xdata().tolist() == [3, 6, 9] and "(CPU time)" in by_time.get_xlabel()
    assert mixed.lines[0].get_xdata().tolist() == [5, 10, 15] and "(wall time)" in mixed.get_xlabel()
    pictures._curves(mixed, [[run_of(0, [1.0])]], "train_loss", False)
    assert mixed.lines[-1].get_marker() == "."
    styles = [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in mixed.lines[:2]]
    assert len({*styles}) == 2
    pictures.plt.close(figure)


def test_intervals_are_students():
    mean, half = intervals.mean_and_half([[1.0], [2.0], [3.0], [4.0], [5.0]])
    assert mean[0] == 3 and half[0] == pytest.approx(2.776 * np.sqrt(2.5 / 5))
    assert np.isnan(intervals.mean_and_half([[1.0]])[1][0])


def call(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["experiment.py", *map(str, arguments)])
    before = torch.get_num_threads()
    try:
        experiment.main()
    finally:
        torch.set_num_threads(before)
    return capsys.readouterr().out


SMALL = ("--train", 96, "--test", 40, "--batch", 32, "--epochs", 2)


def test_deep_linear_and_grid_and_tuned(tmp_path, monkeypatch, capsys):
    options = (*SMALL, "--layers", 4, "--inverses", "eigh", "--out", tmp_path)
    text = call(monkeypatch, capsys, "deep-linear", *options, "--seeds", 2, "--rates", "sgd=0.1,kfac2=0.02")
    assert "K-FAC, two levels (eigendecomposition)" in text and re.search(r"SGD +\| 0.1 ", text)
    assert re.search(r"two levels \(eigendecomposition\) +\| 0.02 ", text)
    for name in ("figure1.png", "figure2-deep-linear-network-4-hidden-layers-96-samples.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    text = call(monkeypatch, capsys, "grid", "deep-linear", *options, "--etas", "1e-2,1e-3", "--dampings", "1e-2")
    assert "### Grid: deep linear network, 4 hidden layers (96 samples), by train loss" in text
    assert len(list((tmp_path / "grid-deep-linear").glob("*.jsonl"))) == 4 + 4 + 8 + 8
    text = call(monkeypatch, capsys, "deep-linear", *options, "--seeds", 2, "--tuned", "--first-seed", 3)
    assert "(96 samples), tuned" in text and any(tmp_path.glob("figure2-tuned-*.png"))
    tuned = records.load_all(tmp_path / "deep-linear-tuned")
    assert {record.settings.seed for record in tuned} == {3, 4}
    won = grid.winners(records.load_all(tmp_path / "grid-deep-linear"), "train_loss")
    assert {record.settings.of_seed(0) for record in tuned} == {*won}


def test_tuned_runs_take_the_grid_of_their_own_network(tmp_path, monkeypatch, capsys):
    options = (*SMALL, "--optimizers", "sgd", "--out", tmp_path)
    for layers, rate in ((3, "1e-3"), (4, "1e-2")):
        call(monkeypatch, capsys, "grid", "deep-linear", *options, "--layers", layers, "--etas", rate)
    for layers, rate in ((3, 1e-3), (4, 1e-2)):
        call(monkeypatch, capsys, "deep-linear", *options, "--layers", layers, "--tuned", "--seeds", 1)
        newest, *_ = (r for r in records.load_all(tmp_path / "deep-linear-tuned") if r.settings.layers == layers)
        assert newest.settings.lr == rate
    with pytest.raises(SystemExit):
        call(monkeypatch, capsys, "deep-linear", *options, "--layers", 5, "--tuned", "--seeds", 1)
    assert "a single one with other options; there are 2" in capsys.readouterr().err
    path = next((tmp_path / "grid-deep-linear").glob("*.jsonl"))
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(SystemExit):
        call(monkeypatch, capsys, "deep-linear", *options, "--layers", 3, "--tuned", "--seeds", 1)
    assert "holds runs that are not: go on with them first" in capsys.readouterr().err


@fashion_mnist
def test_resnet_on_real_images(tmp_path, monkeypatch, capsys):
    options = (*SMALL, "--layers", 8, "--width", 4, "--cov-every", 2, "--inv-every", 4, "--out", tmp_path)
    text = call(monkeypatch, capsys, "resnet", *options, "--seeds", 1, "--milestones", "1")
    assert "ResNet-8, width 4, on fashion-mnist (96 samples)" in text
    call(monkeypatch, capsys, "resnet", *options, "--seeds", 1, "--optimizers", "kfac2", "--shortcut", "pad")
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "figure1.png",
        "figure3-resnet-8-width-4-on-fashion-mnist-96-samples.png",
        "figure3-resnet-8-width-4-with-padding-shortcuts-on-fashion-mnist-96-samples.png",
    }
    call(monkeypatch, capsys, "grid", "resnet", *options, "--optimizers", "sgd", "--momenta", "0.9")
    assert len(list((tmp_path / "grid-resnet").glob("*.jsonl"))) == 3


@pytest.mark.parametrize("binary", [True, False])
def test_resnet_on_ones_own_cifar10(tmp_path, monkeypatch, capsys, binary):
    cifar_folder(tmp_path, binary)
    options = ("--layers", 8, "--width", 2, "--epochs", 1, "--seeds", 1, "--optimizers", "sgd", "--out", tmp_path)
    text = call(monkeypatch, capsys, "resnet", "--data", "cifar10", "--folder", tmp_path, *options)
    assert "ResNet-8, width 2, on cifar10" in text


def test_coarse_and_plot_and_report(tmp_path, monkeypatch, capsys):
    options = (*SMALL, "--layers", 4, "--out", tmp_path)
    text = call(monkeypatch, capsys, "coarse", *options, "--seeds", 2)
    for window in ("always (two levels)", "never (one level)", "steps 0 to 99", "from step 500"):
        assert window in text
    call(monkeypatch, capsys, "coarse", *options, "--seeds", 1, "--coarse-from", 2, "--coarse-until", 4)
    head, *rows = (json.loads(line) for line in next((tmp_path / "coarse").glob("*.jsonl")).read_text().splitlines())
    assert head["settings"]["follow"] and [len(row["steps"]) for row in rows] == [3, 3]
    picture = tmp_path / "coarse-deep-linear-network-4-hidden-layers-96-samples.png"
    picture.unlink()
    assert call(monkeypatch, capsys, "plot", "--out", tmp_path).split() == [str(picture)]
    text = call(monkeypatch, capsys, "report", "--out", tmp_path)
    assert "steps 2 to 3" in text and text in (tmp_path / "experiments.md").read_text()


@pytest.mark.parametrize("arguments, message", [
    ((), "the following arguments are required: COMMAND"),
    (("deep-linear", "--optimizers", "lion"), "must be some of sgd, adam, kfac1, kfac2"),
    (("deep-linear", "--rates", "sgd"), "must be like sgd=0.1, the name one of sgd, adam, kfac1, kfac2, got 'sgd'"),
    (("deep-linear", "--rates", "sgd=0"), "must be a number above 0, got '0'"),
    (("deep-linear", "--epochs", "0"), "must be a whole number of at least 1"),
    (("deep-linear", "--device", "tpu"), "must be cpu or cuda, got 'tpu'"),
    (("deep-linear", "--first-seed", str(2**32)), "must be below 2**32"),
    (("deep-linear", "--train", "33", "--batch", "32"), "--train 33 with --batch 32 leaves one sample for the last step"),
    (("deep-linear", "--tuned"), "a single one with other options; there are 0"),
    (("deep-linear", "--tuned", "--rates", "sgd=1"), "--rates and --tuned both choose learning rates"),
    (("resnet", "--layers", "9"), "must be 6n + 2 (8, 14, 20, ... 110), got '9'"),
    (("resnet", "--data", "cifar10"), "--data cifar10 needs --folder"),
    (("resnet", "--data", "mnist", "--folder", "/nowhere"), "/nowhere lacks train-images-idx3-ubyte"),
    (("resnet", "--milestones", "-1"), "must be a whole number of at least 1"),
    (("resnet", "--shortcut", "none"), "invalid choice: 'none'"),
    (("grid",), "the following arguments are required: PROBLEM"),
    (("grid", "deep-linear", "--momenta", "1"), "must be a number from 0 to below 1, got '1'"),
    (("coarse", "--coarse-from", "x"), "must be a whole number of at least 1, got 'x'"),
    (("coarse", "--coarse-from", "5", "--coarse-until", "3"), "--coarse-until must be above --coarse-from, 5, or both 0"),
    (("deep-linear", "--out", "/dev/null/x"), "Not a directory: '/dev/null/x"),
    (("plot",), "must hold finished records of runs, grids left out, and there are none"),
    (("report",), "must hold finished records of runs and there are none"),
])  # fmt: skip
def test_bad_options_are_refused(arguments, message, monkeypatch, capsys, tmp_path):
    out = () if arguments in ((), ("grid",)) or "--out" in arguments else ("--out", str(tmp_path))
    with pytest.raises(SystemExit) as refused:
        call(monkeypatch, capsys, *arguments, *out)
    assert refused.value.code == 2 and message in capsys.readouterr().err

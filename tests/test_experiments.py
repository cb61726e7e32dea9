"""The experiments run, at tiny sizes; what a record says is what was run; bad data is refused by name."""

import gzip
import json
import re
import struct
import sys
from dataclasses import replace

import experiment
import numpy as np
import pytest
import torch
from experiments import data, grid, pictures, records, runs, tables
from experiments.coarse import Follower
from experiments.settings import coarse, recipe
from networks import ResNet, initialised
from training import METRICS

import kfac2

TINY = {"train": 96, "test": 40, "batch": 32, "layers": 4, "epochs": 3}


def tiny(optimizer="kfac2", problem="deep-linear", **changes):
    more = {"layers": 8, "width": 2, "cov_every": 2, "inv_every": 4, "data": "mnist"} if problem == "resnet" else {}
    return replace(recipe(problem, optimizer), **{**TINY, **more, **changes})


def idx(array, magic=None):
    magic = 0x0800 + array.ndim if magic is None else magic
    return struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.astype(np.uint8).tobytes()


def mnist_folder(folder, count=96, zipped=True):
    generator = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for part in ("train", "t10k"):
        for name, array in (
            (f"{part}-images-idx3-ubyte", generator.integers(256, size=(count, 28, 28))),
            (f"{part}-labels-idx1-ubyte", generator.integers(10, size=count)),
        ):
            (folder / (name + ".gz" * zipped)).write_bytes(gzip.compress(idx(array)) if zipped else idx(array))
    return folder


@pytest.mark.parametrize("zipped", [True, False])
def test_idx_files_are_read_and_padded(tmp_path, zipped):
    (x, y), (test_x, _) = data.read_mnist(mnist_folder(tmp_path, 7, zipped))
    generator = np.random.default_rng(0)
    assert torch.equal(x[:, 0, 2:-2, 2:-2], torch.as_tensor(generator.integers(256, size=(7, 28, 28))).byte())
    assert torch.equal(y, torch.as_tensor(generator.integers(10, size=7)))
    assert test_x.shape == (7, 1, 32, 32) and x.sum() == x[:, :, 2:-2, 2:-2].sum()


IMAGES = idx(np.zeros((4, 28, 28)))
BAD = "is no whole IDX file of bytes in 3 dimensions"
BAD_IMAGES = {
    "magic": (gzip.compress(idx(np.zeros((4, 28, 28)), 0x0D03)), BAD),
    "header": (gzip.compress(IMAGES[:9]), BAD),
    "short": (gzip.compress(IMAGES[:-1]), BAD),
    "long": (gzip.compress(IMAGES + b"x"), BAD),
    "huge": (gzip.compress(struct.pack(">4I", 0x0803, *[2**32 - 1] * 3)), BAD),
    "size": (gzip.compress(idx(np.zeros((4, 28, 27)))), "must hold images of 28 by 28 pixels, got 28 by 27"),
    "cut": (gzip.compress(IMAGES)[:-9], "cannot be read: Compressed file ended"),
    "plain": (b"not gzip at all", "cannot be read: Not a gzipped file"),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_bad_idx_files_are_named(tmp_path, kind):
    path = mnist_folder(tmp_path, 4) / "train-images-idx3-ubyte.gz"
    path.write_bytes(BAD_IMAGES[kind][0])
    with pytest.raises(data.DataError, match=re.escape(f"{path} {BAD_IMAGES[kind][1]}")):
        data.read_mnist(tmp_path)


def test_bad_labels_and_missing_files_are_named(tmp_path):
    path = mnist_folder(tmp_path, 4) / "t10k-labels-idx1-ubyte.gz"
    for labels in ([0, 1, 2], [0, 1, 2, 10]):
        path.write_bytes(gzip.compress(idx(np.array(labels))))
        with pytest.raises(data.DataError, match=f"{path} must hold a label from 0 to 9 for each of 4 images"):
            data.read_mnist(tmp_path)
    path.unlink()
    with pytest.raises(data.DataError, match=r"lacks t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte\.gz"):
        data.read_mnist(tmp_path)
    with pytest.raises(data.DataError, match="holds 4 images where 96 are asked for"):
        runs.problem_of(tiny("sgd", "resnet"), mnist_folder(tmp_path, 4))


def cifar_folder(folder, count=6):
    generator = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        y, x = generator.integers(10, size=(count, 1)), generator.integers(256, size=(count, 3072))
        (folder / f"{name}.bin").write_bytes(np.concatenate([y, x], 1).astype(np.uint8).tobytes())
    return folder


def test_cifar10_is_read_and_bad_batches_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CIFAR_BATCH", 6)
    (x, y), (test_x, _) = data.read_cifar10(cifar_folder(tmp_path))
    raw = (tmp_path / "data_batch_2.bin").read_bytes()
    assert x.shape == (30, 3, 32, 32) and test_x.shape == (6, 3, 32, 32)
    assert y[6] == raw[0] and x[6].flatten().tolist() == list(raw[1:3073])
    path = tmp_path / "data_batch_3.bin"
    for content in (raw[:-5], b""):
        path.write_bytes(content)
        with pytest.raises(data.DataError, match=f"{path} must hold 6 images of 3073 bytes, got {len(content)} bytes"):
            data.read_cifar10(tmp_path)
    path.unlink()
    with pytest.raises(data.DataError, match=r"lacks data_batch_3\.bin"):
        data.read_cifar10(tmp_path)


def test_each_image_is_cropped_and_flipped_by_itself():
    x = torch.randint(1, 256, (400, 3, 8, 8), dtype=torch.uint8)
    wide, seen = torch.nn.functional.pad(x, (4, 4, 4, 4)), set()
    for image, found in zip(wide, data.augmented(x, torch.Generator().manual_seed(1)), strict=True):
        crops = {(i, j): image[:, i : i + 8, j : j + 8] for i in range(9) for j in range(9)}
        places = {
            (*at, flip) for at, crop in crops.items() for flip in (0, 1) if found.equal(crop.flip(-1) if flip else crop)
        }
        assert places
        seen |= places
    assert len({place[:2] for place in seen}) > 70 and {flip for *_, flip in seen} == {0, 1}


def numbers(record):
    return {name: column for name, column in record.epochs.items() if name in METRICS}


def by_hand(settings, folder):
    """The run again, written out; return its rows."""
    (x, y), (test_x, test_y) = (
        (x[:count], y[:count])
        for (x, y), count in zip(data.read_mnist(folder), (settings.train, settings.test), strict=True)
    )
    mean, deviation = (x.double() / 255).mean().float(), (x.double() / 255).std(correction=0).float()
    model = ResNet(8, 1, settings.width)
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
            inv_every=4, burn_in=0, relative_damping=False, kl_bound=None, max_change=None, rest="sgd", **common,
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
            out = model((data.augmented(x[batch], generator) / 255 - mean) / deviation)
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
    folder = mnist_folder(tmp_path)
    record = runs.run(settings, folder)
    found = np.array([record.values(metric) for metric in METRICS]).T
    assert found == pytest.approx(np.array(by_hand(settings, folder)), rel=1e-4)


def test_a_run_repeats_and_its_seed_matters():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    first, again, other = (runs.run(tiny(seed=seed)) for seed in (0, 0, 1))
    assert numbers(first) == numbers(again) != numbers(other)
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    assert all(min(np.diff([0.0, *first.values(clock)])) > 0 for clock in ("seconds", "wall_seconds"))  # they add up


@pytest.mark.parametrize("settings", [
    tiny("sgd", "resnet", lr=1e30), tiny("kfac2", "resnet", lr=1e20), tiny("kfac2", lr=1e6, epochs=6)
], ids=lambda settings: f"{settings.optimizer}-{settings.problem}")  # fmt: skip
def test_a_diverged_run_is_recorded(settings, tmp_path):
    records.append(tmp_path / "x.jsonl", runs.run(settings, mnist_folder(tmp_path / "data")))
    (record,) = records.load(tmp_path / "x.jsonl")
    assert record.epochs["train_loss"][-1] is None and record.has_diverged
    assert "(1 of 1 diverged)" in tables.comparison([record])
    pictures.losses([record], tmp_path / "x.png")


def test_a_record_is_read_as_it_was_written(tmp_path):
    written = [runs.run(settings) for settings in (tiny("kfac2", follow=True), tiny("sgd", milestones=(1,)))]
    for record in written:
        records.append(tmp_path / "x.jsonl", record)
    assert records.load(tmp_path / "x.jsonl") == written[::-1]  # SGD comes first
    keys = [json.loads(line)["key"] for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert keys == [record.settings.key for record in written] and len(set(keys)) == 2
    (tmp_path / "x.jsonl").write_text((tmp_path / "x.jsonl").read_text() + '{"settings": {}}\n')
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'x.jsonl'}, line 3, is no record of a run")):
        records.load(tmp_path / "x.jsonl")


@pytest.mark.parametrize("kappa", [1e-6, 1e6])
def test_the_coarse_step_is_measured_right(kappa):
    """Beside the steps of the same model with one level and no clip, which are the fine steps."""
    settings = tiny("kfac2", follow=True, cov_every=1, inv_every=2, kl_clip=kappa)
    grads = {}
    for each in (replace(settings, optimizer="kfac1", kl_clip=None), settings):
        problem = runs.problem_of(each, None)
        optimizer = runs.optimizer_of(each, problem.model)
        follower = Follower(problem.model, optimizer, each) if each is settings else None
        torch.manual_seed(0)
        out = problem.model(problem.train[0])
        optimizer.accumulate_fisher(problem.prediction.distribution(out))
        problem.prediction.loss(out, problem.train[1]).backward()
        (follower.step(0, out.detach()) if follower else optimizer.step())
        grads[each.optimizer] = [problem.model.get_submodule(n).weight.grad.double() for n in optimizer.layers]
    (row,) = follower.rows
    assert (row["clip"] < 0.9) == (kappa < 1)
    coarse_steps = [w / row["clip"] - f for w, f in zip(grads["kfac2"], grads["kfac1"], strict=True)]
    assert all(c.std() < 1e-3 * c.abs().mean() for c in coarse_steps)  # the same on every weight of a layer

    def norm(parts):
        return torch.cat([part.flatten() for part in parts]).norm().item()

    assert row["coarse_to_fine"] == pytest.approx(norm(coarse_steps) / norm(grads["kfac1"]), rel=1e-3)
    hidden = [problem.model.get_submodule(name).weight for name in optimizer.layers[:-1]]
    shares = [(w.sum() ** 2 / 100 / w.norm() ** 2).item() for w in hidden]
    assert row["all_ones"] == pytest.approx(np.mean(shares), rel=1e-5)


def test_a_window_that_is_never_is_one_level():
    one, never = tiny("kfac1"), tiny("kfac2", follow=True, coarse_until=0)
    always, early = tiny("kfac2"), tiny("kfac2", follow=True, coarse_until=3)
    found = [runs.run(settings).values("train_loss") for settings in (one, never, always, early)]
    assert found[0] == found[1]
    assert found[2][0] == found[3][0] != found[1][0] and found[2][1:] != found[3][1:]
    assert [s.window for s in coarse()] == [
        "always (two levels)",
        "never (one level)",
        "steps 0 to 99",
        "from step 500",
    ]


def record(*losses, optimizer="sgd", **changes):
    settings = replace(recipe("deep-linear", optimizer), epochs=len(losses), **changes)
    clock = "CPU time" if settings.threads == 1 else "wall time"
    machine = {"cpu": "a CPU", "device": "cpu", "threads": settings.threads, "torch": "2", "clock": clock}
    epochs = dict.fromkeys(METRICS, [0.5] * len(losses)) | {"train_loss": list(losses)}
    seconds = {
        name: [each * i for i in range(1, len(losses) + 1)] for name, each in (("seconds", 3.0), ("wall_seconds", 5.0))
    }
    return records.Record(settings, machine, {**epochs, **seconds}, {})


def test_the_grid_is_the_papers():
    points = {name: grid.points(recipe("deep-linear", name)) for name in ("sgd", "adam", "kfac1", "kfac2")}
    assert [len(set(some)) for some in points.values()] == [6, 6, 30, 30]
    assert {(s.lr, s.momentum) for s in points["adam"]} == {(a, b) for a in (1e-2, 1e-3, 1e-4) for b in (0, 0.9)}
    papers = [s for s in points["kfac2"] if s.lr < 1]
    assert {(s.damping, s.kl_clip) for s in papers} == {(a, b) for a in (1e-2, 1e-3) for b in (1e-2, 1e-3)}
    region = [(s.momentum, s.kl_clip) for s in points["kfac1"] if s.lr == 1]
    assert set(region) == {(a, b) for a in (0.5, 0.8) for b in (1e-3, 3e-3, 1e-2)} and len(region) == 6


def winners(tried):
    return [groups[0][0].settings for groups in grid.ranked(tried)]


def test_the_winner_is_the_best_mean_of_what_can_be_compared():
    tried = [
        record(0.1, lr=1e-2), record(0.9, lr=1e-2, seed=1), record(0.4, lr=1e-3), record(0.4, lr=1e-3, seed=1),
        record(0.01, lr=1e-4), record(None, lr=1e-4, seed=1), record(0.3, optimizer="kfac2"),
    ]  # fmt: skip
    assert [(s.optimizer, s.lr) for s in winners(tried)] == [("sgd", 1e-3), ("kfac2", 1e-3)]
    more_seeds = [record(0.5, lr=1e-2), record(0.9, lr=1e-2, seed=1), record(0.6, lr=1e-3)]
    assert winners(more_seeds)[0].lr == 1e-2
    assert re.search(r"\| SGD, 2 seeds +\| 3 +\| 0.001 \| 0.9 \| none +\|", tables.winners(tried))


def test_a_run_is_tuned_by_the_grid_of_its_own_network():
    tried = [record(0.5, lr=0.1), record(0.1, lr=0.01, batch=64), record(0.2, lr=0.03, batch=64)]
    assert [s.lr for s in winners(tried)] == [0.1, 0.01]
    text = tables.winners(tried)
    assert re.search(r"\| SGD, batch 512, η 0.1 +\| 1 ", text) and re.search(r"\| SGD, batch 64, η 0.01 +\| 2 ", text)
    base = recipe("deep-linear", "sgd")
    assert grid.tuned(base, [*tried[:1], record(0.01, lr=0.3, layers=9)]).lr == 0.1
    for some, count in ((tried, 2), ([], 0)):
        with pytest.raises(ValueError, match=f"one grid of SGD on deep linear network.* there are {count}"):
            grid.tuned(base, some)


def test_names_tell_what_differs():
    groups = [
        [record(0.5), record(None, seed=1)],
        [record(0.5, batch=64)],
        [record(0.5, optimizer="adam", damping=1e-2), record(0.4, optimizer="adam", damping=1e-2, seed=1)],
    ]
    names = ["SGD, batch 512, 2 seeds (1 of 2 diverged)", "SGD, batch 64, 1 seed", "Adam, 2 seeds"]
    assert records.labels(groups) == names and records.labels(groups[2:]) == ["Adam"]


def test_curves_are_means_with_intervals():
    group = [record(1.0, 2.0, 3.0), record(3.0, 2.0, 1.0, seed=1), record(1.0, None, None, seed=2)]
    figure, (by_epoch, by_time, other, mixed) = pictures.plt.subplots(1, 4)
    pictures._column((by_epoch, by_time), [group], "train_loss", pictures.means)
    pictures._column((other, mixed), [group, [record(1.0, 1.0, 1.0, threads=2)]], "train_loss", pictures.medians)
    (curve,) = by_epoch.lines
    assert curve.get_xdata().tolist() == [1, 2, 3] and curve.get_ydata().tolist() == [2, 2, 2]
    assert curve.get_label() == "SGD (1 of 3 diverged)"
    low, high = by_epoch.collections[0].get_paths()[0].get_extents().intervaly
    assert high - 2 == pytest.approx(12.706, abs=1e-3) and 2 - low == pytest.approx(12.706, abs=1e-3)
    assert by_time.lines[0].get_xdata().tolist() == [3, 6, 9] and "(CPU time)" in by_time.get_xlabel()
    assert mixed.lines[0].get_xdata().tolist() == [5, 10, 15] and "(wall time)" in mixed.get_xlabel()
    assert len({(line.get_color(), line.get_linestyle(), line.get_marker()) for line in mixed.lines}) == 2
    pictures.plt.close(figure)


def call(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["experiment.py", *map(str, arguments)])
    experiment.main()
    return capsys.readouterr()


SMALL = ("--train", 96, "--test", 40, "--batch", 32, "--epochs", 2)


def test_deep_linear_and_grid_and_tuned(tmp_path, monkeypatch, capsys):
    options = (*SMALL, "--layers", 4, "--inverses", "eigh", "--out", tmp_path)
    text = call(monkeypatch, capsys, "deep-linear", *options, "--seeds", 2).out
    assert "K-FAC, two levels (eigendecomposition)" in text
    for name in ("figure1.png", "figure2-deep-linear-network-4-hidden-layers-96-samples.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(grid, "RATES", (1e-2, 1e-3))
    monkeypatch.setattr(grid, "DAMPINGS", (1e-2,))
    monkeypatch.setattr(grid, "REGION", ((1.0,), (0.5,), (1e-2,), (1e-3,)))
    text = call(monkeypatch, capsys, "--grid", "deep-linear", *options).out
    assert "### Grid: deep linear network, 4 hidden layers (96 samples), by train loss" in text
    tried = records.load(tmp_path / "records/grid-deep-linear.jsonl")
    assert len(tried) == 4 + 4 + 9 + 9
    text = call(monkeypatch, capsys, "deep-linear", *options, "--seeds", 2, "--tuned", "--first-seed", 3).out
    assert "(96 samples), tuned" in text and any(tmp_path.glob("figure2-tuned-*.png"))
    tuned = records.load(tmp_path / "records/deep-linear-tuned.jsonl")
    assert {r.settings.seed for r in tuned} == {3, 4}
    assert {r.settings.of_seed(0) for r in tuned} == {*winners(tried)}
    assert "### Grid" in (tmp_path / "experiments.md").read_text()


def test_an_interrupted_command_goes_on(tmp_path, monkeypatch, capsys):
    """What is recorded is not done again, and the end is as if nothing had happened."""
    options = ("deep-linear", *SMALL, "--layers", 4, "--optimizers", "sgd", "adam", "--seeds", 2)
    call(monkeypatch, capsys, *options, "--out", tmp_path / "whole")
    real, started = experiment.run, []

    def run(settings, *rest):
        started.append(settings.key)
        if len(started) == 3:
            raise KeyboardInterrupt
        return real(settings, *rest)

    monkeypatch.setattr(experiment, "run", run)
    with pytest.raises(SystemExit, match="goes on with the run that was not finished"):
        call(monkeypatch, capsys, *options, "--out", tmp_path / "cut")
    err = call(monkeypatch, capsys, *options, "--out", tmp_path / "cut").err
    assert f"4 runs; writing to {tmp_path / 'cut/records/deep-linear.jsonl'}" in err
    assert len(started) == 5 and started[2] == started[3]
    whole, cut = (records.load(tmp_path / name / "records/deep-linear.jsonl") for name in ("whole", "cut"))
    assert [(r.settings, numbers(r)) for r in whole] == [(r.settings, numbers(r)) for r in cut]


def test_committed_records_are_whole():
    found = {path.stem: records.load(path) for path in (experiment.FOLDER / "results/records").glob("*.jsonl")}
    counts = {"deep-linear": 35, "deep-linear-tuned": 30, "resnet": 19, "resnet-tuned": 18, "coarse": 20}
    assert {name: len(some) for name, some in found.items()} == {**counts, "grid-deep-linear": 132, "grid-resnet": 72}
    for name, some in found.items():
        text = (experiment.FOLDER / f"results/records/{name}.jsonl").read_text()
        assert {json.loads(line)["key"] for line in text.splitlines()} == {r.settings.key for r in some}
        assert all(len(r.values("train_loss")) == r.settings.epochs for r in some)


def test_resnet_on_ones_own_images(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "CIFAR_BATCH", 6)
    monkeypatch.chdir(tmp_path)
    options = ("--layers", 8, "--width", 2, "--epochs", 1, "--seeds", 1, "--cov-every", 1, "--inv-every", 1)
    text = call(
        monkeypatch, capsys, "resnet", "--data", "cifar10", "--folder", cifar_folder(tmp_path), *options, "--lr", "0.5"
    ).out
    assert "ResNet-8, width 2, on cifar10" in text and re.search(
        r"K-FAC, two levels \(factored Tikhonov\) +\| 0.5 ", text
    )
    assert len(records.load(tmp_path / "build/results/records/resnet.jsonl")) == 4


def test_coarse_and_figures(tmp_path, monkeypatch, capsys):
    text = call(monkeypatch, capsys, "coarse", *SMALL, "--layers", 4, "--out", tmp_path, "--seeds", 2).out
    assert all(
        window in text for window in ("always (two levels)", "never (one level)", "steps 0 to 99", "from step 500")
    )
    picture = tmp_path / "coarse-deep-linear-network-4-hidden-layers-96-samples.png"
    picture.unlink()
    text = call(monkeypatch, capsys, "figures", "--out", tmp_path).out
    assert text.splitlines()[-1] == str(picture) and picture.exists()


@pytest.mark.parametrize("arguments, message", [
    ((), "the following arguments are required: experiment"),
    (("deep-linear", "--optimizers", "lion"), "invalid choice: 'lion'"),
    (("deep-linear", "--epochs", "0"), "must be a whole number of at least 1"),
    (("deep-linear", "--train", "33", "--batch", "32"), "33 samples in batches of 32 leave one alone"),
    (("deep-linear", "--tuned"), "needs one grid of SGD on deep linear network, 64 hidden layers, and there are 0"),
    (("coarse", "--tuned"), "coarse has no grid"),
    (("resnet", "--layers", "9"), "a ResNet's layers must be 6n + 2 (8, 14, 20, ... 110), got 9"),
    (("resnet", "--data", "mnist", "--folder", "/nowhere"), "/nowhere lacks train-images-idx3-ubyte"),
    (("figures",), "must hold records, and there are none"),
])  # fmt: skip
def test_bad_options_are_refused(arguments, message, monkeypatch, capsys, tmp_path):
    if arguments == ("resnet", "--layers", "9"):
        arguments = (*arguments, "--data", "mnist", "--folder", mnist_folder(tmp_path / "data"))
    with pytest.raises(SystemExit) as refused:
        call(monkeypatch, capsys, *arguments, *(("--out", tmp_path) if arguments else ()))
    assert refused.value.code == 2 and message in capsys.readouterr().err

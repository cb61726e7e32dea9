"""The table of untuned networks: records are complete, nothing is run twice, a diverged run is recorded as one."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
import untuned
import untuned_nets
from untuned_nets import NETS

SMALL = ["mlp-4-relu", "regression-4-tanh"]


def called(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["untuned.py", "--steps", "26", "--seeds", "1", "--nets", *SMALL, *arguments])
    threads = torch.get_num_threads()
    try:
        untuned.main()
    except SystemExit as end:
        assert not end.code
    torch.set_num_threads(threads)
    return capsys.readouterr().out


def test_runs_are_recorded_once_and_tabulated(tmp_path, monkeypatch, capsys):
    path = tmp_path / "records.jsonl"
    settings = '{"lr": 1e-3, "momentum": 0, "levels": 1}'
    arguments = ["--out", str(path), "--optimizers", "adamw", "sgd", "kfac2", "--kfac2", settings, "--label", "slow"]
    assert "18/18 regression-4-tanh kfac2 slow 0" in called(monkeypatch, capsys, *arguments)
    records = untuned.load(path)
    assert len({untuned.key(record) for record in records}) == len(records) == 18
    for record in records:
        assert len(record["losses"]) == 3 and not record["diverged"] and record["seconds"] > 0
        assert record["final"] > 0 and record["first"] <= record["max"]
    before = path.read_bytes()
    assert called(monkeypatch, capsys, *arguments) == "" and path.read_bytes() == before
    shown = called(monkeypatch, capsys, "--out", str(path), "--table")
    assert "kfac2 slow" in shown and "No worse than the best AdamW on " in shown and " of 2 (" in shown
    with pytest.raises(ValueError, match="take another label"):
        untuned.missing([untuned.Job("mlp-4-relu", "kfac2", "slow", 0, 26, {})], path)


def test_a_diverged_run_is_recorded(tmp_path):
    record = untuned.train(untuned.Job("regression-4-tanh", "sgd", "1e20", 0, 26, {"lr": 1e20}))
    assert record["diverged"] and record["final"] is None and len(record["losses"]) < 3
    json.dumps(record, allow_nan=False)
    assert untuned.final(record) == untuned.rise(record) == untuned.steps_to(record, 1.0) == math.inf
    good = untuned.train(untuned.Job("regression-4-tanh", "adamw", "0.001", 0, 26, {"lr": 1e-3}))
    assert "| sgd" in untuned.comparison([record, good])


def test_an_error_leaves_the_other_runs(tmp_path, capsys):
    jobs = [untuned.Job("mlp-4-relu", "sgd", "x", 0, 3, {"lr": lr}) for lr in (-1.0, 0.1)]
    assert untuned.run(jobs, tmp_path / "records.jsonl", 1) == 1
    assert len(untuned.load(tmp_path / "records.jsonl")) == 1
    assert "Invalid learning rate" in capsys.readouterr().err


def test_the_published_table_is_that_of_the_records():
    """And `default` is what `KFAC(model)` does: every other label says what it changes."""
    folder = Path(untuned.__file__).parent / "results"
    records = untuned.load(folder / "untuned.jsonl")
    assert (folder / "untuned.md").read_text() == untuned.comparison(records) + "\n"
    ours = [record for record in records if record["optimizer"] == "kfac2"]
    assert all((record["label"] == "default") == (not record["settings"]) for record in ours)
    assert sum(record["label"] == "default" for record in ours) == 3 * len(NETS)


@pytest.mark.parametrize("name", NETS)
def test_the_distribution_is_the_loss(name):
    """Up to a constant, so that kfac2's damping means the same on each network."""
    net = NETS[name]
    model, (x, y) = net.make(), net.draw(4, torch.Generator().manual_seed(0))
    out = model(x)
    differences = [
        -net.prediction.distribution(o).log_prob(y).mean() - net.prediction.loss(o, y) for o in (out, 2 * out + 0.1)
    ]
    torch.testing.assert_close(*differences, rtol=1e-4, atol=1e-4)


def test_images_are_drawn_where_fashion_mnist_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(untuned_nets, "FASHION_MNIST", tmp_path)
    x, y = untuned_nets._fashion.__wrapped__()
    assert x.shape == (10_000, 1, 14, 14) and 0 <= x.min() < x.max() <= 1 and y.unique().tolist() == [*range(10)]

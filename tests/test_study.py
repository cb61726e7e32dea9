"""The study of rivals: equal searches, steps to a loss and their change, nothing is run twice."""

import json
import math
import sys
from pathlib import Path

import directions_cost
import numpy as np
import pytest
import study
import study_rivals
import study_tables
import torch
from study_problems import PROBLEMS
from study_rivals import RIVALS, Choice, Either, Log, Uniform

SMALL = "linear-64-batchnorm"  # its data are drawn


def record(losses, rival="one", seed=1, point=0, steps=None, step_seconds=0.1, problem=SMALL):
    return {
        "problem": problem, "rival": rival, "point": point, "seed": seed, "steps": steps or len(losses),
        "settings": {"lr": point} if point else {}, "diverged": losses[-1] is None, "seconds": 1.0,
        "step_seconds": step_seconds, "test_loss": 1.0, "test_accuracy": 0.5, "losses": losses,
    }  # fmt: skip


def falling(rate, steps=100):
    return [math.exp(-rate * i / steps) for i in range(steps)]


def test_steps_to_targets_and_changes():
    """A curve that falls twice as fast needs half the steps, once the mean over five steps is there."""
    seeds = (1, 2, 3)
    slow = [record(falling(1.0), seed=seed) for seed in seeds]
    fast = [record(falling(2.0), "soap", seed, step_seconds=0.15) for seed in seeds]
    slow += [record(falling(1.0), seed=0), record(falling(0.5), seed=0, point=1)]
    fast += [
        record(falling(2.0), "soap", 0),
        record(falling(2.1), "soap", 0, point=1),
        record(falling(2.1), "soap", 1, 1),
    ]
    targets, found = study_tables.outcomes(slow + fast, SMALL, is_tuned=False)
    expected = [math.exp(-i / 100) * np.mean(np.exp(np.arange(5) / 100)) for i in (14, 29, 49, 74, 99)]
    assert targets == pytest.approx(expected)
    assert found["one"].steps == [15, 30, 50, 75, 100] and found["one"].runs == 3
    # exp(-2 i/100) mean(exp(2 j/100)) <= the target: i is half of it, and the mean lags by half a step or so
    for steps, share in zip(found["soap"].steps, study_tables.SHARES, strict=True):
        assert steps == math.ceil(100 * share / 2) + 1 or steps == math.ceil(100 * share / 2) + 2
    assert found["soap"].seconds == pytest.approx([0.15 * s for s in found["soap"].steps])
    text = study_tables.sentence({SMALL: found}, "soap")
    assert f"on 1 of 1 problems: {SMALL}, to each of the last 3 targets on 1" in text
    assert "more time (steps, time; –: never there) on 0; it ends at a loss over 3 % higher on 0." in text  # noqa: RUF001
    _, tuned = study_tables.outcomes(slow + fast, SMALL, is_tuned=True)
    assert tuned["one"].settings == {} and tuned["soap"].settings == {"lr": 1} and tuned["soap"].runs == 1
    assert study_tables.percent(study_tables.change(65, 100)) == "-35 %"
    assert study_tables.percent(study_tables.change(math.inf, 100)) == study_tables.NEVER


def test_what_never_arrives_or_diverges():
    diverged = record([1.0] * 9 + [None], steps=100)
    assert study_tables.final(diverged) == math.inf
    curve = study_tables.smoothed(diverged)
    assert np.isinf(curve[:4]).all() and (curve[4:9] == 1).all() and np.isinf(curve[9:]).all()
    assert study_tables.steps_to(curve, 1.0) == 5 and study_tables.steps_to(curve, 0.9) == math.inf
    rising = np.array([3.0, 2.0, 1.0, 2.0, 3.0])
    assert study_tables.targets_of([rising]) == [
        3.0,
        2.0,
        1.0,
        1.0,
        1.0,
    ]  # a base that rises again is no easier to beat
    assert study_tables.steps_to(curve, math.inf) == 5 and study_tables.median([1.0, 2.0, math.inf, 1.5]) == 2.0
    base = [record(falling(1.0), seed=seed) for seed in range(4)]
    worse = [record(falling(0.5), "adamw", seed) for seed in range(3)] + [{**diverged, "rival": "adamw", "seed": 3}]
    _, found = study_tables.outcomes(base + worse, SMALL, is_tuned=True)
    assert math.isinf(found["adamw"].steps[-1]) and found["adamw"].diverged == 1
    never = study_tables.NEVER
    text = study_tables.sentence({SMALL: found}, "adamw")
    assert f"more time (steps, time; {never}: never there) on 1: {SMALL} ({never}, {never}); it ends" in text
    ends = [np.mean(np.exp(-rate * np.arange(90, 100) / 100)) for rate in (0.5, 1.0)]
    assert text.endswith(f"over 3 % higher on 1: {SMALL} ({study_tables.percent(ends[0] / ends[1] - 1)}).")
    shown = study_tables.readme(base + worse)
    assert f"{SMALL}: {PROBLEMS[SMALL].title}; 3 seeds" in shown and "1 diverged" in shown
    assert json.loads(json.dumps(base + worse, allow_nan=False)) == base + worse


def test_how_much_the_settings_matter():
    ends = [0.1, 0.4, 0.2]
    runs = [record([end] * 10, seed=0, point=point) for point, end in enumerate(ends)]
    runs += [record([0.3] * 10, "soap", 0), record([0.1] * 9 + [None], "soap", 0, point=1), record([9.0] * 10)]
    line = next(line for line in study_tables.sensitivity(runs).splitlines() if SMALL in line)
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[2] == "0.2 (0.4)" and cells[-2] == f"{study_tables.NEVER} ({study_tables.NEVER})"


def inside(axis, value, nats):
    if isinstance(axis, Either):
        return value == axis.value or inside(axis.axis, value, nats)
    if isinstance(axis, Choice):
        return value in axis.values
    scale = nats if isinstance(axis, Log) and axis.is_divergence else 1
    return axis.low * scale * 0.995 <= value <= axis.high * scale * 1.005  # they are rounded


@pytest.mark.parametrize("nats", (1.0, 20.0))
def test_every_rival_has_as_many_points_all_of_them_in_its_box(nats):
    for name, rival in RIVALS.items():
        found = study_rivals.points(name, 12, nats)
        assert len(found) == 12 and found[0] == {} and found[:5] == study_rivals.points(name, 5, nats)
        assert len({json.dumps(point) for point in found}) == 12
        for point in found[1:]:
            assert list(point) == list(rival.box)
            assert all(inside(axis, point[side], nats) for side, axis in rival.box.items()), (name, point)
    assert study_rivals.points("one", 1, nats) == [{}]
    of_one = study_rivals.points("one", 12, nats)
    assert all(study_rivals.points(name, 12, nats) == of_one for name in ("again", "ones", "directions", "pair"))


def test_a_box_with_too_few_points_is_an_error(monkeypatch):
    monkeypatch.setitem(RIVALS, "adamw", RIVALS["adamw"]._replace(box={"lr": Choice((0.1, 0.2))}))
    assert len(study_rivals.points("adamw", 3, 1.0)) == 3
    with pytest.raises(ValueError, match="the box of adamw must have 4 points, got 3"):
        study_rivals.points("adamw", 4, 1.0)


def test_axes_reach_both_ends():
    top = 1 - 2**-20
    assert [Uniform(0.4, 0.9).at(place, 1.0) for place in (0.0, 0.5, top)] == [0.4, 0.65, 0.9]
    assert [Log(1e-3, 1.0, True).at(place, 20.0) for place in (0.0, 0.5, top)] == [0.02, 0.632, 20.0]
    assert [Choice((None, 0.02)).at(place, 1.0) for place in (0.0, 0.49, 0.5, top)] == [None, None, 0.02, 0.02]
    assert [Either("auto", Uniform(0.0, 1.0)).at(place, 1.0) for place in (0.0, 0.5, 0.75)] == ["auto", 0.0, 0.5]


def called(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(study, "images", lambda: None)
    monkeypatch.setattr(sys, "argv", ["study.py", "--problems", SMALL, "--steps", "3", "--seeds", "1", *arguments])
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit) as end:
        study.main()
    torch.set_num_threads(threads)
    return end.value.code, capsys.readouterr()


def test_a_study_is_made_once_and_tabulated(tmp_path, monkeypatch, capsys):
    arguments = ["--out", str(tmp_path), "--rivals", "one", "adamw"]
    code, said = called(monkeypatch, capsys, *arguments, "--points", "2")
    assert code == 0 and "about 0 minutes left" in said.out
    shown = (tmp_path / "README.md").read_text()
    assert f"{SMALL}: " in shown and all(
        (tmp_path / name).exists() for name in ("tuned-steps.png", "untuned-seconds.png")
    )
    before = (tmp_path / "records.jsonl").read_bytes()
    monkeypatch.setattr("study_pictures.pictures", lambda *_: None)  # they take seconds
    records = study.load(tmp_path / "records.jsonl")
    assert len({study.key(r) for r in records}) == len(records)
    for rival in ("one", "adamw"):
        best = study_tables.winner(records, SMALL, rival)
        mine = [(r["seed"], r["point"]) for r in records if r["rival"] == rival]
        assert sorted(mine) == [(0, 0), (0, 1), *((1, point) for point in sorted({0, best}))]
    assert all(
        len(r["losses"]) == (3 if r["seed"] else 1) and r["test_loss"] > 0 and r["step_seconds"] > 0 for r in records
    )
    code, said = called(monkeypatch, capsys, *arguments, "--points", "2")
    assert code == 0 and said.out == f"Tables and pictures: {tmp_path}\n"
    assert (tmp_path / "records.jsonl").read_bytes() == before
    monkeypatch.setitem(RIVALS, "adamw", RIVALS["adamw"]._replace(box={"lr": Log(0.5, 0.6)}))
    code, said = called(monkeypatch, capsys, *arguments, "--points", "2")
    assert code == 2 and "point 1 of adamw" in said.err and "is recorded with" in said.err


def test_the_published_tables_are_those_of_the_records():
    folder = Path(study.__file__).parent / "results" / "study"
    records = study.load(folder / "records.jsonl")
    assert records and study_tables.readme(records) + "\n" == (folder / "README.md").read_text()


def test_a_run_ends_where_its_loss_is_not_finite():
    found = study.train(study.Job(SMALL, "adamw", 1, 1, 9, {"lr": math.inf}))
    assert found["diverged"] and len(found["losses"]) == 2 and found["losses"][-1] is None
    json.dumps({**found, "settings": {}}, allow_nan=False)


def test_an_error_leaves_the_other_runs_and_what_is_missing_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(RIVALS, "soap", RIVALS["soap"]._replace(missing=lambda: "something"))
    monkeypatch.setitem(RIVALS, "one", RIVALS["one"]._replace(make=lambda model, settings: 1 / 0))
    monkeypatch.setattr("study_pictures.pictures", lambda *_: None)
    arguments = ["--out", str(tmp_path), "--rivals", "one", "adamw", "soap", "--points", "1"]
    code, said = called(monkeypatch, capsys, *arguments)
    assert code == 1 and "soap is left out: it needs something" in said.err and "ZeroDivisionError" in said.err
    assert [r["rival"] for r in study.load(tmp_path / "records.jsonl")] == ["adamw", "adamw"]


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_distribution_is_the_loss(name, monkeypatch):
    """Up to a constant, so that kfac2's damping means the same on each problem."""
    data = (torch.rand(50, 1, 14, 14), torch.arange(50) % 10)
    monkeypatch.setattr("study_problems.images", lambda: (data, data))
    problem = PROBLEMS[name]
    model, (x, y) = problem.make(), problem.draw(4, torch.Generator().manual_seed(0))
    out = model(x)
    differences = [
        -problem.prediction.distribution(o).log_prob(y).mean() - problem.prediction.loss(o, y)
        for o in (out, 2 * out + 0.1)
    ]
    torch.testing.assert_close(*differences, rtol=1e-4, atol=1e-3)
    assert math.isfinite(study.tested(problem, model)[0])


def test_the_cost_of_directions_is_measured_beside_one_level():
    shown = directions_cost.measure("regression-whole", rounds=2)
    assert "9 layers" in shown
    for title in ("one level", "left for noise", "rows of the whole batch", "a pass of its own of 288 samples"):
        (line,) = [line for line in shown.splitlines() if line.startswith(f"| {title} ")]
        whole, *parts = line.split("|")[2:-1]
        assert float(whole.split()[0]) == pytest.approx(sum(map(float, parts)), abs=0.2)
        assert (float(parts[0]) > 0) == title.startswith("a pass of its own")

"""The benchmarks run, at tiny sizes, and refuse what they cannot measure. No test looks at a time."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import cases
import contenders
import growth
import kernels
import measure
import memory
import pytest
import report
import steps
import torch
from layer_sets import LayerSet
from networks import NETWORKS

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", ["deep-linear", "resnet-8", "transformer"])
@pytest.mark.parametrize("group", cases.GROUPS)
def test_each_op_agrees_with_its_rivals(name, group):
    case = cases.GROUPS[group](LayerSet(name, 2))
    case.check()
    assert {"paper", "torch", "kfac2"} == set(case.functions)
    assert set(case.scale) <= set(case.functions) and all(scale > 1 for scale in case.scale.values())


def test_a_disagreement_is_found():
    with pytest.raises(AssertionError):
        cases.agree([torch.ones(3)], [torch.tensor([1.0, 1.0, 1.01])])


@pytest.mark.parametrize(
    "name, layers", [("deep-linear", 65), ("resnet-20", 22), ("resnet-110", 112), ("transformer", 25)]
)
def test_layer_sets_have_the_shapes_of_their_networks(name, layers):
    shapes = LayerSet(name, 2).shapes
    modules = [m for m in NETWORKS[name].make().modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    matrices = [(m.weight[0].numel() + (m.bias is not None), m.weight.shape[0]) for m in modules]
    assert len(shapes) == layers
    assert sorted((shape.d_in, shape.d_out) for shape in shapes) == sorted(matrices)


def test_kernels_give_ratios():
    (result,) = kernels.measure(["coarse_fisher"], ["deep-linear"], 2, 1, 0.001, "cpu", 1)
    assert result["over_kfac2"]["paper"]["median"] > 0 and "12 of 2145 pairs" in result["note"]
    assert "coarse_fisher, deep linear network, batch 2" in kernels.report([result])


def test_each_kind_of_step_is_what_it_says():
    contender, x, y = contenders.prepared("kfac2-2", NETWORKS["deep-linear"], 4, "cpu")
    optimizer = contender.optimizers[0]
    name = optimizer.layers[3]

    def after(kind):
        contender.at[kind]()
        contender.step(x, y, lambda: None)
        inverse = optimizer.state_dict()["kfac"]["inverses"]
        return optimizer.factors(name)[0], str(inverse)

    factor, inverse = after("b")
    for kind, new_factor, new_inverse in (
        ("c", False, False),
        ("a", True, False),
        ("b", True, True),
        ("c", False, False),
    ):
        before, (factor, inverse_now) = factor, after(kind)
        assert (not torch.equal(before, factor), inverse_now != inverse) == (new_factor, new_inverse), kind
        inverse = inverse_now


def test_schedules_weigh_the_kinds():
    assert contenders.shares("bac", 10, 100) == pytest.approx({"b": 0.01, "a": 0.09, "c": 0.9})
    assert contenders.shares("ac", 10, 100) == pytest.approx({"a": 0.1, "c": 0.9})
    assert contenders.shares("bc", 200, 2000) == pytest.approx({"b": 0.005, "c": 0.995})
    assert contenders.shares("c", 10, 100) == {"c": 1}
    whole = {("sgd", "c"): [1.0], ("kfac2-2", "b"): [10.0], ("kfac2-2", "a"): [5.0], ("kfac2-2", "c"): [2.0]}
    assert steps.mean_at(whole, "kfac2-2", (10, 100)) == pytest.approx([0.1 + 0.45 + 1.8])


def without_peers(monkeypatch):
    real = importlib.import_module

    def missing(name, *rest):
        if name.partition(".")[0] in ("singd", "pytorch_optimizer"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", missing)


def test_steps_without_any_peer(monkeypatch):
    without_peers(monkeypatch)
    monkeypatch.setattr(steps, "in_jax", lambda *_: (None, "kfac-jax is not installed"))
    result = steps.measure("deep-linear", 4, 1, steps.ALL, "cpu", 1)
    assert set(result["optimizers"]) == {"sgd", "adamw", "kfac2-1", "kfac2-2"}
    assert set(result["missing"]) == {"singd-dense", "singd-diagonal", "soap", "shampoo", "kfac-jax"}
    assert set(result["second_level"]) == set("abc")
    text = steps.report(result, "CPU time")
    assert "soap: pytorch_optimizer is not installed" in text and "kfac-jax: kfac-jax is not installed" in text


@pytest.mark.parametrize("name, module", [
    ("singd-dense", "singd"), ("singd-diagonal", "singd"), ("soap", "pytorch_optimizer"), ("shampoo", "pytorch_optimizer"),
])  # fmt: skip
def test_peers_that_are_installed(name, module):
    pytest.importorskip(module)
    contender, x, y = contenders.prepared(name, NETWORKS["resnet-8"], 2, "cpu")
    whole, parts = steps.timed(contender, x, y, measure.Clock("cpu", 1))
    assert len(parts) == 4 and math.isclose(sum(parts), whole)


@pytest.mark.parametrize("code, output, error, found, why", [
    (0, '{"sgd": [1.0], "b": [4.0], "a": [3.0], "c": [2.0]}', "", True, ""),
    (1, "", "kfac-jax is not installed\n", False, "kfac-jax is not installed"),
    (1, "", "Traceback\nValueError: too many values\n", False, "does not run here: ValueError: too many values"),
])  # fmt: skip
def test_kfac_jax_runs_in_its_own_process(monkeypatch, code, output, error, found, why):
    done = subprocess.CompletedProcess([], code, output, error)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    result, reason = steps.in_jax("deep-linear", 4, 1)
    assert (result is not None, reason) == (found, why)
    if result:
        assert result["optimizers"]["kfac-jax"]["means"]["10/100"]["median"] == pytest.approx(0.04 + 0.27 + 1.8)


def test_memory_is_counted_and_measured():
    two, four = (memory.second_level("resnet-8", batch) for batch in (2, 4))
    maps = 2 * (3 * 32**2 + 2 * 16**2 + 16**2 + 2 * 8**2 + 8**2 + 1) * 4  # of one kind, float32
    assert two["maps_and_sums"] == maps + 5 * 10 * 10 * 4
    assert 1.9 < four["activations"] / two["activations"] < 2.1
    assert memory.peaks("deep-linear", 4, ["sgd", "kfac-jax"], "cpu", 1)["sgd"] > 0


def test_exponents_are_fitted():
    assert growth.fitted([1, 2, 4], [3, 12, 48]) == pytest.approx((2, 3))


def test_growth_draws(tmp_path, monkeypatch, capsys):
    out, data = tmp_path / "growth.png", tmp_path / "growth.json"
    call(monkeypatch, growth, "--largest", 32, "--batch", 2, "--rounds", 1, "--out", out, "--json", data)
    assert out.read_bytes().startswith(b"\x89PNG") and "layers of ResNet-8" in capsys.readouterr().out
    assert json.loads(data.read_text())["growth"]["layers"]["sizes"] == [10, 22]


def test_the_report_holds_each_target(tmp_path, monkeypatch, capsys):
    call(monkeypatch, report, "--tiny", "--parts", "kernels,steps", "--out", tmp_path)
    text = capsys.readouterr().out
    assert text.rstrip("\n") == (tmp_path / "cpu.md").read_text().rstrip("\n")
    for what in (
        "cross_layer_sums, ResNet-8",
        "nine planes",
        "two levels over one, extra time of (b)",
        "mean at 10/100",
    ):
        assert what in text
    assert {"machine", "kernels", "steps"} == set(json.loads((tmp_path / "cpu.json").read_text()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cpu.json", "cpu.md"]


def test_targets_say_whether_they_are_reached():
    spread = measure.Spread.of([0.018, 0.02, 0.03])
    assert report.Target("x", 0.02, False, spread, "share").row() == ["x", "≤ 2 %", "2.00 % [1.90, 2.50]", "yes"]
    assert report.Target("x", 4, True, measure.Spread.of([3.0])).row() == ["x", "≥ 4 times", "3.00 times", "no"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "cpu.json"
    measure.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        measure.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1} and len(list(tmp_path.iterdir())) == 1


def test_functions_take_turns():
    calls = []
    clock = measure.Clock("cpu", 1)
    times = measure.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, clock, 4, shortest=0)
    assert [len(taken) for taken in times.values()] == [4, 4]
    assert all(set(calls[i : i + 2]) == {"a", "b"} for i in range(4, len(calls), 2))


def call(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    before = torch.get_num_threads()
    try:
        module.main()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("module, arguments, message", [
    (kernels, ("--ops", "nothing"), "must be some of channel_sums, input_covariance"),
    (kernels, ("--sets", "resnet-20,vgg"), "got 'vgg'"),
    (kernels, ("--batch", "0"), "must be a whole number of at least 1, got '0'"),
    (kernels, ("--seconds", "-1"), "must be a number above 0, got '-1'"),
    (kernels, ("--json", "/nowhere/at/all.json"), "must be a file in a folder that exists"),
    (kernels, ("--device", "cuda:99"), "must be a device that torch can use here, got 'cuda:99'"),
    (steps, ("--net", "vgg"), "got 'vgg'"),
    (steps, ("--optimizers", "sgd,adam"), "got 'adam'"),
    (steps, ("--rounds", "few"), "must be a whole number of at least 1, got 'few'"),
    (steps, ("--threads", "0"), "must be a whole number of at least 1, got '0'"),
    (growth, ("--over", "time"), "must be some of layers, batch, channels, extent"),
    (growth, ("--largest", "12"), "must leave two sizes of layers, got 12"),
    (growth, ("--out", "growth.pdf"), "must end in .png, got growth.pdf"),
    (memory, ("--net", "vgg", "--batch", "1", "--optimizer", "sgd"), "invalid choice: 'vgg'"),
    (report, ("--parts", "all"), "must be some of kernels, steps, growth, memory"),
    (report, ("--out", "/dev/null/x"), "must be a folder that can be made, got '/dev/null/x'"),
    (report, ("--full", "--tiny"), "not allowed with argument"),
])  # fmt: skip
def test_bad_options_are_refused(module, arguments, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as refused:
        call(monkeypatch, module, *arguments)
    assert refused.value.code == 2 and message in capsys.readouterr().err


def test_instructions_need_valgrind(monkeypatch, capsys):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(SystemExit):
        steps.parse(["--instructions"])
    assert "needs valgrind, which is not installed" in capsys.readouterr().err


def pytest_bench(*arguments):
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    command = [sys.executable, "-m", "pytest", "bench", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_the_pytest_files_run():
    code, output = pytest_bench("--benchmark-disable", "--batch", "2", "--sets", "resnet-8")
    assert code == 0 and "passed" in output, output
    code, output = pytest_bench("--batch", "0")
    assert code == 4 and "argument --batch: must be a whole number of at least 1, got '0'" in output

"""The benchmarks run, at tiny sizes, and refuse what they cannot measure. No test looks at a time."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import cases
import contenders
import growth
import kernels
import output
import pytest
import report
import steps
import timing
import torch
from layer_sets import LayerSet
from networks import NETWORKS

ROOT = Path(__file__).parent.parent
CLOCK = timing.Clock("cpu", 1)


@pytest.mark.parametrize("name", ["deep-linear", "resnet-8", "transformer"])
@pytest.mark.parametrize("op", cases.BY_LAYERS)
def test_each_op_agrees_with_its_rivals(name, op):
    case = cases.BY_LAYERS[op](LayerSet(name, 2))
    case.check()
    assert {"paper", "torch", "kfac2"} == set(case.functions)
    assert all(case.scale(how) > 1 for how in case.sample.names)


def test_a_disagreement_is_found():
    with pytest.raises(AssertionError):
        cases.agree([torch.ones(3)], [torch.tensor([1.0, 1.0, 1.01])])
    case = cases.BY_LAYERS["layer_maps"](LayerSet("resnet-8", 2))
    with pytest.raises(AssertionError):
        dataclasses.replace(case, paper=lambda: [values + 1 for values in case.plain()]).check()


def test_layer_sets_have_the_layers_of_their_networks():
    counts = {name: len(LayerSet(name, 2).shapes) for name in ("deep-linear", "resnet-20", "resnet-110", "transformer")}
    assert counts == {"deep-linear": 65, "resnet-20": 22, "resnet-110": 112, "transformer": 25}


def test_each_kind_of_step_is_what_it_says():
    contender, x, y = contenders.prepared("kfac2-2", NETWORKS["deep-linear"], 4, "cpu")
    optimizer = contender.optimizers[0]

    def after(kind):
        contender.at[kind]()
        contender.step(x, y, contenders.nothing)
        return optimizer.factors(optimizer.layers[3])[0], str(optimizer.state_dict()["kfac"]["inverses"])

    factor, inverse = after("b")
    for kind, new_factor, new_inverse in (("c", False, False), ("a", True, False), ("b", True, True)):
        before, (factor, inverse_now) = factor, after(kind)
        assert (not torch.equal(before, factor), inverse_now != inverse) == (new_factor, new_inverse), kind
        inverse = inverse_now


def test_schedules_weigh_the_kinds():
    assert contenders.shares("bac", 10, 100) == pytest.approx({"b": 0.01, "a": 0.09, "c": 0.9})
    assert contenders.shares("ac", 10, 100) == pytest.approx({"a": 0.1, "c": 0.9})
    assert contenders.shares("bc", 200, 2000) == pytest.approx({"b": 0.005, "c": 0.995})
    whole = {("sgd", "c"): [1.0], ("kfac2-2", "b"): [10.0], ("kfac2-2", "a"): [5.0], ("kfac2-2", "c"): [2.0]}
    assert steps.mean_at(whole, "kfac2-2", (10, 100)) == pytest.approx([0.1 + 0.45 + 1.8])


def test_steps_without_any_peer(monkeypatch):
    real = importlib.import_module

    def missing(name, *rest):
        if name.partition(".")[0] in ("singd", "pytorch_optimizer"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", missing)
    result = steps.measure("deep-linear", 4, 1, list(contenders.BUILDERS), "cpu", 1)
    assert set(result["optimizers"]) == {"sgd", "adamw", "kfac2-1", "kfac2-2", *contenders.ON_DEVICES}
    assert set(result["missing"]) == {"singd-dense", "singd-diagonal", "soap", "shampoo"}
    assert set(result["levels"]) == set("abc")
    assert "soap: pytorch_optimizer is not installed" in steps.report(result, "CPU time")


@pytest.mark.parametrize(
    "name, module", [("singd-dense", "singd"), ("soap", "pytorch_optimizer"), ("shampoo", "pytorch_optimizer")]
)
def test_peers_that_are_installed(name, module):
    pytest.importorskip(module)
    contender, x, y = contenders.prepared(name, NETWORKS["resnet-8"], 2, "cpu")
    assert len(CLOCK.laps(lambda mark: contender.step(x, y, mark))) == 4


def test_exponents_are_fitted(monkeypatch):
    monkeypatch.setattr(growth, "interleaved", lambda functions, *_: {n: [int(n) ** 2 / 1e3] for n in functions})
    found = growth.measure(2, 34, 1, 0.0, "cpu", 1)
    assert found["layers"] == [10, 22, 34] and found["milliseconds"] == [100, 484, 1156]
    assert found["exponent of milliseconds"] == 2 and 0.5 < found["exponent of megabytes"] < 1.5


def test_the_report_measures_what_is_asked_for(tmp_path, monkeypatch):
    wanted = ("--parts", "kernels", "steps", "--ops", "channel_sums", "precondition", "--nets", "resnet-8")
    assert call(monkeypatch, report, "--tiny", "--out", tmp_path, *wanted) == 0
    found = json.loads((tmp_path / "cpu.json").read_text())
    assert {result["case"].split(",")[0] for result in found["kernels"]} == {"channel_sums", "precondition"}
    assert [result["net"] for result in found["steps"]] == ["resnet-8"] and found["growth"] == []


def test_the_report_goes_on_after_a_failure(tmp_path, monkeypatch, capsys):
    compare = kernels.compare

    def once(build, *arguments):
        monkeypatch.setattr(kernels, "compare", compare)
        raise RuntimeError("out of luck")

    monkeypatch.setattr(kernels, "compare", once)
    assert call(monkeypatch, report, "--tiny", "--out", tmp_path) == 1
    text = (tmp_path / "cpu.md").read_text()
    assert capsys.readouterr().out == text + "\n" and "kernels: RuntimeError: out of luck" in text
    found = json.loads((tmp_path / "cpu.json").read_text())
    assert len(found["kernels"]) > 10 and len(found["steps"]) == 2 and len(found["growth"]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cpu.json", "cpu.md"]


def test_a_spread_is_of_ratios_within_rounds():
    assert str(timing.Spread.of([4.0, 3.0, 5.0], [2.0, 1.0, 1.0])) == "3.00 [2.50, 4.00]"


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "cpu.json"
    output.write(path, "whole")
    with pytest.raises(RuntimeError), output.into_place(path) as part:
        part.write_text("half")
        raise RuntimeError
    assert path.read_text() == "whole" and len(list(path.parent.iterdir())) == 1


def test_functions_take_turns():
    calls = []
    functions = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    times = timing.interleaved(functions, CLOCK, 4, shortest=0)
    assert [len(taken) for taken in times.values()] == [4, 4]
    assert all(set(calls[i : i + 2]) == {"a", "b"} for i in range(4, len(calls), 2))


class Event:
    """Stands for a CUDA event: its time is the number of those before it."""

    now = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Event.now += 1
        self.time = Event.now

    def elapsed_time(self, end):
        return 1e3 * (end.time - self.time)


def test_clocks_time_parts(monkeypatch):
    ticks = iter(range(100))
    clock = timing.Clock("cpu", 2)
    clock.now = lambda: next(ticks)
    assert clock.laps(lambda mark: [mark(), mark(), next(ticks), mark()]) == [1, 2]
    assert (CLOCK.kind, clock.kind) == ("CPU time", "wall time")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    laps = timing.Clock("cuda", 1).laps(lambda mark: [mark(), mark(), Event(True).record(), mark()])
    assert laps == [1, 2]


def call(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    before = torch.get_num_threads()
    try:
        module.main()
    except SystemExit as end:
        return end.code
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("module, arguments, message", [
    (kernels, ("--ops", "nothing"), "invalid choice: 'nothing'"),
    (kernels, ("--sets", "resnet-20", "vgg"), "invalid choice: 'vgg'"),
    (kernels, ("--batch", "0"), "must be a whole number of at least 1, got '0'"),
    (kernels, ("--device", "cuda:99"), "must be a device that torch can use here, got 'cuda:99'"),
    (steps, ("--optimizers", "sgd", "adam"), "invalid choice: 'adam'"),
    (steps, ("--rounds", "few"), "must be a whole number of at least 1, got 'few'"),
    (report, ("--full", "--tiny"), "not allowed with argument"),
])  # fmt: skip
def test_bad_options_are_refused(module, arguments, message, monkeypatch, capsys):
    assert call(monkeypatch, module, *arguments) == 2 and message in capsys.readouterr().err


def test_kernels_and_steps_print(monkeypatch, capsys):
    call(monkeypatch, kernels, "--ops", "cross_layer_sums", "--sets", "deep-linear", "--batch", 2, "--rounds", 1)
    assert "12 of 2145 pairs" in capsys.readouterr().out
    call(monkeypatch, steps, "--net", "deep-linear", "--optimizers", "adamw", "--batch", 4, "--rounds", 1)
    assert "adamw" in capsys.readouterr().out
    laps = {("sgd", "c"): [[1.0, 0.0, 2.0, 1.0]], ("adamw", "c"): [[1.0, 0.0, 2.0, 5.0]]}
    parts = steps.summary(laps)["optimizers"]["adamw"]["kinds"]["c"]
    assert [parts[name].median for name in ("whole", *steps.PARTS)] == [2.0, 0.25, 0.0, 0.5, 1.25]


def test_the_pytest_file_runs():
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    pytest_itself = str(Path(sys.executable).with_name("pytest"))  # -m would import kfac2 from the source tree
    command = [pytest_itself, "bench", "-p", "no:cacheprovider", "--benchmark-disable"]
    command += ["--batch", "2", "--sets", "resnet-8"]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout + done.stderr

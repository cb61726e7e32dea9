"""The runner of `make gpu-check`: what breaks in a stage costs that stage, and the record is written as it goes."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import gpu_check
import launches
import pytest
from stages import Record, Stage, run_all


def python(code, *arguments):
    return (sys.executable, "-c", code, *map(str, arguments))


def stage(name, code, *arguments, limit=60, **options):
    return Stage(name, python(code, *arguments), limit, **options)


GOOD = stage("good: tests/gpu, all", "print('one'); print('two')")


@pytest.fixture
def check(tmp_path):
    def run(*groups, seconds=100):
        record = Record(tmp_path, "card", "A check", {"device": "A card"}, {str(tmp_path): "HERE"})
        run_all([group if isinstance(group, list) else [group] for group in groups], record, tmp_path / "logs", seconds)
        return record

    return run


def lines(folder):
    return [json.loads(line) for line in (folder / "card.jsonl").read_text().splitlines()]


def test_a_crash_costs_one_stage(check, tmp_path):
    record = check(
        stage("crash", "import os; print('before', flush=True); os.abort()"), GOOD, stage("wrong", "exit(3)")
    )
    assert record.statuses() == ["failed", "passed", "failed"]
    assert [result.why for result in record.results] == ["SIGABRT", "", "exit status 3"]
    about, crash, good, _ = lines(tmp_path)
    assert good["stage"] == "good: tests/gpu, all"
    assert about == {"about": {"device": "A card"}}
    assert crash["last_lines"][0] == "before" and good["last_lines"] == ["one", "two"]
    text = (tmp_path / "card.md").read_text()
    assert "**2 failed, 1 passed**" in text and re.search(r"\| crash +\| failed: SIGABRT +\|", text)
    log = (tmp_path / "card.log").read_text()
    assert "=== crash: failed after" in log and "before" in log and "one\ntwo" in log


def assert_ends(process):
    for _ in range(200):  # until its new parent has noticed
        try:
            with open(f"/proc/{process}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return
        except FileNotFoundError:
            return
        time.sleep(0.05)
    os.kill(process, signal.SIGKILL)
    pytest.fail("what the stage started still runs")


HANG = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"


def test_a_hang_is_ended_with_all_that_it_started(check, tmp_path):
    start = time.monotonic()
    record = check(stage("hang", HANG, limit=6), GOOD)
    assert 6 <= time.monotonic() - start < 60
    assert record.statuses() == ["timed out", "passed"] and record.results[0].why == "killed after 6 s"
    assert_ends(int(record.results[0].last_lines[0]))
    assert lines(tmp_path)[1]["status"] == "timed out"


def test_what_ends_the_check_ends_the_stage(tmp_path):
    """As gpu_check does, the program turns SIGTERM into an exit."""
    code = (
        "import pathlib, signal, sys; from stages import Record, Stage, run_all\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(3)); here = pathlib.Path(sys.argv[1])\n"
        "stage = Stage('hang', (sys.executable, '-c', sys.argv[2]), 60)\n"
        "run_all([[stage]], Record(here, 'card', 'A check', {}), here, 60)"
    )
    check = subprocess.Popen(
        python(code, tmp_path, HANG), env={**os.environ, "PYTHONPATH": str(gpu_check.ROOT / "bench")}
    )
    log = tmp_path / "hang.log"
    while not (log.exists() and log.read_text().endswith("\n")):
        time.sleep(0.05)
        assert check.poll() is None
    check.terminate()
    assert check.wait() == 3
    assert_ends(int(log.read_text()))


def test_what_cannot_run_is_skipped_by_name(check):
    record = check(
        Stage("no program", ("no-such-program", "--version"), 60),
        stage("build", "exit(1)"),
        stage("uses the build", "print(1)", needs=["build"]),
        GOOD,
    )
    assert record.statuses() == ["skipped", "failed", "skipped", "passed"]
    assert record.results[0].why == "no-such-program is not installed"
    assert record.results[2].why == "needs 'build', which did not pass"


def test_a_program_without_a_device_says_so(check):
    record = check(
        stage("nothing to run on", "print('no device'); exit(77)"),
        stage("asks first", "exit(1)", probe=python("exit(77)")),
        stage("asks and runs", "print(1)", probe=python("exit(0)")),
        stage("asks nobody", "print(1)", probe=["no-such-program"]),
        GOOD,
    )
    assert record.statuses() == ["no device", "no device", "passed", "passed", "passed"]


def test_the_record_is_written_as_it_goes(check, tmp_path):
    """A stage looks at the record of those before it, and finds itself running."""
    look = "import sys; text = open(sys.argv[1]).read(); assert '| passed ' in text and '| running ' in text, text"
    count = "import sys; assert len(open(sys.argv[1]).readlines()) == 3"
    record = check(GOOD, stage("look", look, tmp_path / "card.md"), stage("count", count, tmp_path / "card.jsonl"))
    assert record.statuses() == ["passed"] * 3, record.results
    assert "| running  " not in (tmp_path / "card.md").read_text()


def test_those_of_a_group_run_side_by_side(check, tmp_path):
    meet = (
        "import pathlib, sys, time\nmine, other = map(pathlib.Path, sys.argv[1:])\nmine.touch()\n"
        "while not other.exists(): time.sleep(0.01)"
    )
    a, b = tmp_path / "a", tmp_path / "b"
    record = check([stage("a", meet, a, b), stage("b", meet, b, a)], GOOD)
    assert record.statuses() == ["passed"] * 3


def test_a_short_stage_beside_a_long_one_has_its_own_seconds(check):
    record = check([stage("long", "import time; time.sleep(5)"), stage("short", "pass")])
    short, long = record.results
    assert (short.stage, long.stage) == ("short", "long") and short.seconds < 4 < 5 <= long.seconds


def test_no_stage_starts_when_the_time_is_over(check):
    record = check(stage("long", "import time; time.sleep(600)"), GOOD, seconds=6)
    assert record.statuses() == ["timed out", "skipped"]
    assert record.results[0].why == "killed after 6 s" and record.results[1].why == "no time was left"


def test_what_was_found_counts_even_after_a_crash_and_no_folder_is_named(check, tmp_path):
    found = tmp_path / "found"
    code = (
        "import os, pathlib, sys; there = pathlib.Path(sys.argv[1])\n"
        "(there / 'x.json').write_text('[1]'); (there / 'x.md').write_text('#' + ' Title\\n## Part\\n\\n42\\n')\n"
        "print(there, flush=True); os.abort()"
    )
    (record,) = check(stage("measured", code, found, found=found)).results
    assert record.status == "failed" and list(record.found) == [[1]]
    text = (tmp_path / "card.md").read_text()
    assert "## Part\n\n42\n" in text and "\n# Title" not in text
    for ending in ("md", "jsonl", "log"):
        text = (tmp_path / f"card.{ending}").read_text()
        assert str(tmp_path) not in text and "HERE/found" in text


@pytest.mark.parametrize(
    "status, output, judged",
    [
        (0, "===== 12 passed, 1 skipped in 3.21s =====", "passed"),
        (0, "===== 12 passed in 75.21s (0:01:15) =====", "passed"),
        (0, "SKIPPED [3] a.py:5: no CUDA device\n===== 3 skipped in 3.21s =====", "no device"),
        (5, "SKIPPED [3] a.py:5: no CUDA device\n===== 3 skipped, 9 deselected in 3.21s =====", "no device"),
        (0, "SKIPPED [3] a.py:5: built without CUDA kernels\n===== 3 skipped in 3.21s =====", "failed"),
        (1, "===== 1 failed, 12 passed, 1 skipped in 3.21s =====", "failed"),
        (99, "===== 12 passed in 3.21s =====\n========= ERROR SUMMARY: 1 error", "failed"),
        (4, "ERROR: file or directory not found", "failed"),
    ],
)
def test_tests_that_were_all_skipped_have_not_passed(status, output, judged):
    assert gpu_check.by_pytest(status, output) == judged


def test_the_exit_status_of_everything():
    assert gpu_check.ending(["passed", "passed"]) == 0
    assert gpu_check.ending(["passed", "no device"]) == 77
    for other in ("failed", "timed out", "skipped"):
        assert gpu_check.ending(["passed", "no device", other]) == 1


def test_the_limits_are_those_of_the_table():
    table = dict(re.findall(r"^\| (.*?) \| ([\d, to]+) \|$", gpu_check.__doc__, re.MULTILINE))
    proofs = [max(s.limit for s in group) for group in (gpu_check.builds("9.0"), *gpu_check.proofs())]
    assert sum(proofs) == int(table["all of the above at most"]) < gpu_check.SECONDS
    assert gpu_check.SECONDS == int(table["everything together"]) <= 8 * 60
    longest = max(s.limit for s in gpu_check.measurements("cuda"))
    assert longest <= gpu_check.SECONDS - sum(proofs)


def test_every_gpu_test_and_every_op_has_its_stage():
    names = [stage.name for group in gpu_check.proofs() for stage in group]
    assert {path.name for path in (gpu_check.ROOT / "tests/gpu").glob("test_*.py")} == {
        name.removeprefix("tests/gpu/") for name in names if name.startswith("tests/gpu/")
    }
    import cases

    measured = [s.name for s in gpu_check.measurements("cuda")]
    assert {f"measure: kernels, {op}" for op in cases.OPS} <= set(measured)


def test_builds_that_are_there_are_not_made_again():
    first, *rest = gpu_check.wanted("9.0", ["tests/gpu"], is_built=False)
    assert [stage.name for stage in first] == [gpu_check.BUILD_TESTS, gpu_check.BUILD_PACKAGE]
    stages = [stage for group in gpu_check.wanted("9.0", ["tests/gpu"], is_built=True) for stage in group]
    needing = [stage for group in rest for stage in group]
    assert [s.name for s in stages] == [s.name for s in needing] and all(s.needs for s in needing)
    assert stages and not any(stage.needs for stage in stages)


def test_some_stages_are_chosen_by_how_their_names_begin():
    groups = gpu_check.everything()
    assert gpu_check.chosen(groups, None) == groups
    chosen = gpu_check.chosen(groups, ["device tests", "measure: steps", "ncu"])
    nets = ("resnet-110", "gpt2-small", "resnet-50", "deep-linear")
    steps = [f"measure: steps, {net}" for net in nets]
    names = [stage.name for group in chosen for stage in group]
    assert names == ["device tests", *steps, "ncu: covariances and cross_layer_sums"]


def test_what_is_profiled_runs_and_hidden_counters_are_no_failure():
    stage = gpu_check.profile()
    exec(stage.command[-1].replace("device='cuda'", "device='cpu'"), {})
    refused = "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission"
    assert [stage.judge(1, refused), stage.judge(1, "a fault"), stage.judge(0, "")] == ["skipped", "failed", "passed"]


def test_kernels_are_listed_by_what_they_add_to_the_plain_step():
    plain = {"void at::native::add_kernel<int>(int)": (3, 1.0), "gemm": (2, 8.0)}
    kinds = {"c": {"gemm": (2, 8.0), "own(float*)": (1, 0.5)}, "a": {"gemm": (4, 20.0)}}
    lines = launches.report(plain, kinds).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["all", "gemm", "own", "add_kernel<int>"]
    assert [cell.strip() for cell in lines[2].split("|")[2:5]] == ["9.00 (5)", "8.50 (3)", "20.0 (4)"]

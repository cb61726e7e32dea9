"""The tests for a device, on emulated CUDA kernels: from Python through the bindings to what a device would compute."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SLOW = (
    "same_each_time", "sizes3", "sizes4", "sizes5", "accuracy", "many_layers", "large_maps", "large_sizes",
    "seed1", "seed2", "128-", "150-", "256-",
)  # fmt: skip


def test_tests_are_named_from_any_folder(monkeypatch):
    run_tests = runpy.run_path(str(HERE / "emulation/run_tests.py"))
    monkeypatch.chdir(HERE.parent)
    of_gpu = str(HERE / "gpu")
    assert run_tests["for_pytest"](["-k", "solves"]) == ["-k", "solves", of_gpu]
    assert run_tests["for_pytest"]([]) == [of_gpu] == run_tests["for_pytest"](["tests/gpu"])
    assert run_tests["for_pytest"](["-x", "tests/test_step.py::one"]) == ["-x", f"{HERE}/test_step.py::one"]


@pytest.mark.slow
def test_the_tests_for_a_device_pass_on_emulated_kernels():
    """All but those that are large; `make emulated` runs these, too, in ten minutes."""
    command = (sys.executable, str(HERE / "emulation/run_tests.py"), str(HERE / "gpu"), "-k")
    done = subprocess.run((*command, f"not ({' or '.join(SLOW)})"), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert int(done.stdout.rsplit(" passed", 1)[0].split()[-1]) > 180

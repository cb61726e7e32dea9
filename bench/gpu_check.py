"""Build kfac2 on a machine with a CUDA device, test it there, measure it, and write down what was found.

The stages, each a process (or more) of its own, in this order:

| stage | limit, seconds |
|---|---|
| build: device tests, beside build: package, both for the device's own architecture alone | 90 |
| device tests: the kernels without torch, on the cases of tests/emulation; beside them each file of tests/gpu | 90 |
| memcheck, racecheck, initcheck, synccheck: the device tests under compute-sanitizer; beside them memcheck: some of \
tests/gpu, without torch's caching of memory | 90 |
| all of the above at most | 270 |
| each measurement: whole steps of each network, large layers, the kernels of each op, growth | 60 to 25 |
| ncu: the two hottest kernels | 40 |
| everything together | 480 |

The time for everything is a bound: a stage gets its own limit or what is left, and is skipped where nothing is left.
Usually most stages need less than half of theirs, which leaves the measurements what they need; those that were left
out, or are wanted again, `--only "measure: steps" ncu` runs. `--built` takes the builds that are there, of an earlier
run or brought from another machine: build/gpu-check, build/device-tests/device_tests. They are meant for a machine
of 16 cores: elsewhere --times multiplies them, and --seconds is another bound.

Nothing depends on a stage but what a build makes. No network is used. In the folder given by --out, written after
each stage: <device>.md to read, <device>.jsonl with a line for each stage, <device>.log with all output. The exit
status is 0 if every stage passed, 77 if there is no device and nothing else was wrong, else 1.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from output import slug
from stages import FAILED, NO_DEVICE, NONE, PASSED, SKIPPED, Record, Stage, by_status, run_all

ROOT = Path(__file__).parent.parent
INSTALLED, LOGS, FOUND = (ROOT / "build" / name for name in ("gpu-check", "gpu-check-logs", "gpu-check-found"))
DEVICE_TESTS = str(ROOT / "build/device-tests/device_tests")
LOOK = (DEVICE_TESTS, "--device")  # looks for a device
SECONDS = 480  # for everything
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
PROOF = 90  # seconds for each test, side by side
BUILD_TESTS, BUILD_PACKAGE = "build: device tests", "build: package"
SANITIZED = (
    "(maps_and_covariances and float32 and (seed01 or seed03 or seed05)) or cross_layer_sums_and_coarse_fisher "
    "or bad_factors or calls_of_a_step or special_matrices"
)
# What is measured, the most telling first: arguments of report.py, and seconds.
MEASUREMENTS = {
    "steps, resnet-110": (("--parts", "steps", "--nets", "resnet-110"), 60),
    "large layers": (("--parts", "large"), 60),
    "steps, gpt2-small": (("--parts", "steps", "--nets", "gpt2-small"), 60),
    **{
        f"kernels, {op}": (("--parts", "kernels", "--ops", op), 25)
        for op in (
            "covariances", "factored_tikhonov_inverse", "cross_layer_sums", "layer_maps", "directional_derivatives",
            "precondition", "average_coarse_sums", "eigendecompose", "input_covariance", "channel_sums",
        )
    },
    "steps, resnet-50": (("--parts", "steps", "--nets", "resnet-50"), 60),
    "steps, deep-linear": (("--parts", "steps", "--nets", "deep-linear"), 40),
    "growth": (("--parts", "growth"), 25),
}  # fmt: skip


def asked(*command: str) -> str:
    """Return the first line that a program prints; nothing where it is not there, or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().split("\n")[0] if done.returncode == 0 else ""


def describe() -> dict[str, str]:
    """Say what the results hold for."""
    name, _, rest = asked(
        "nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"
    ).partition(", ")
    architecture, _, driver = rest.partition(", ")
    versions = "import sys, torch; print(f'torch {torch.__version__}, Python {sys.version.split()[0]}')"
    return {
        "device": name or "none",
        "built for": architecture or "9.0",
        "driver": driver or "none",
        "with": asked(sys.executable, "-c", versions) or "no torch",
        "commit": asked("git", "-C", str(ROOT), "describe", "--always", "--dirty") or "unknown",
    }


def toolkit() -> Path | None:
    """Find the CUDA toolkit as setup.py does."""
    code = "import setup; print(setup.find_toolkit() or '')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    return Path(done.stdout.strip()) if done.stdout.strip() else None


def sanitizer() -> str:
    """Find compute-sanitizer: on PATH, or in the toolkit."""
    home = toolkit()
    places = [home / "bin", home / "compute-sanitizer"] if home else []
    found = (shutil.which("compute-sanitizer", path=path) for path in (os.environ.get("PATH"), *map(str, places)))
    return next(filter(None, found), "compute-sanitizer")


def profiler() -> str:
    """Find ncu: on PATH, in the toolkit, or where its own package puts it."""
    home = toolkit()
    places = [*home.glob("bin"), *home.glob("nsight-compute*")] if home else []
    places += sorted(Path("/opt/nvidia/nsight-compute").glob("*"), reverse=True)
    found = (shutil.which("ncu", path=path) for path in (os.environ.get("PATH"), *map(str, places)))
    return next(filter(None, found), "ncu")


def by_profiler(status: int, output: str) -> str:
    """Judge a run of ncu: on some machines nobody may read the counters."""
    return SKIPPED if "ERR_NVGPUCTRPERM" in output else by_status(status, output)


def by_pytest(status: int, output: str) -> str:
    """Judge a run of pytest: tests that were all skipped have not passed."""
    last = re.findall(r"^=+ (.*) in [\d.]+s.*=+$", output, re.MULTILINE)
    if status == 0 and last and " passed" in last[-1]:
        return PASSED
    return NONE if status in (0, 5) and "no CUDA device" in output else FAILED


def by_report(status: int, output: str) -> str:
    """Judge a measurement."""
    return NONE if status == 2 and "no CUDA device" in output else by_status(status, output)


def builds(architecture: str) -> list[Stage]:
    """Build the torch-free tests, and install kfac2 beside the checkout with what this Python already has."""
    environment = {"TORCH_CUDA_ARCH_LIST": architecture, "KFAC2_CUDA": "1"}
    pip = (
        "-m",
        "pip",
        "install",
        "--no-build-isolation",
        "--no-deps",
        "--upgrade",
        "--target",
        str(INSTALLED),
        str(ROOT),
    )
    script = str(ROOT / "tests/emulation/build_device_tests.py")
    return [
        Stage(BUILD_TESTS, (sys.executable, script, "--arch", architecture), 90, environment),
        Stage(BUILD_PACKAGE, (sys.executable, *pip), 90, environment),
    ]


def in_sight() -> dict[str, str]:
    """Return the variables with which Python sees the build, and not the checkout."""
    paths = [str(INSTALLED), str(ROOT / "bench"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths)}


def sanitized(tool: str) -> Stage:
    """Run the device tests under a tool of compute-sanitizer. To initcheck, what is poisoned would be written."""
    options = (f"--tool={tool}", "--error-exitcode=99", "--target-processes=all")
    padding = ("--padding=256",) if tool == "memcheck" else ()  # an array's end is no other's start
    poison = ("--no-poison",) if tool == "initcheck" else ()
    command = (sanitizer(), *options, *padding, DEVICE_TESTS, *poison)
    return Stage(f"{tool}: device tests", command, PROOF, needs=[BUILD_TESTS], probe=LOOK)


def pytest(*arguments: str) -> tuple[str, ...]:
    """Run tests in a process: a fault of the device lasts as long as that."""
    options = ("-vv", "-rs", "--durations=5", "-p", "no:benchmark", "-p", "no:cacheprovider", "--rootdir", str(ROOT))
    return (sys.executable, "-m", "pytest", *options, *arguments)


def torch_tests(name: str, command: Sequence[str], probe: Sequence[str] = (), **environment: str) -> Stage:
    """Run tests of the build, from a folder where Python does not see the checkout in its place."""
    variables = {**in_sight(), "KFAC2_TEST_DEVICE": "cuda", **environment}
    cwd = ROOT / "tests"
    return Stage(name, command, PROOF, variables, needs=[BUILD_PACKAGE], probe=probe, cwd=cwd, judge=by_pytest)


def proofs() -> list[list[Stage]]:
    """List what shows that the kernels are right: two groups, each of which runs side by side."""
    files = sorted((ROOT / "tests/gpu").glob("test_*.py"))
    memcheck = (sanitizer(), "--tool=memcheck", "--error-exitcode=99", *pytest(*map(str, files), "-k", SANITIZED))
    return [
        [
            Stage("device tests", (DEVICE_TESTS,), PROOF, needs=[BUILD_TESTS]),
            *(torch_tests(f"tests/gpu/{file.name}", pytest(str(file))) for file in files),
        ],
        [
            *(sanitized(tool) for tool in SANITIZERS),
            torch_tests("memcheck: tests/gpu", memcheck, LOOK, PYTORCH_NO_CUDA_MEMORY_CACHING="1"),
        ],
    ]


def measurements(device: str) -> list[Stage]:
    """List what is measured; on the CPU, in one process and at tiny sizes, to see that it runs."""
    wanted = MEASUREMENTS if device != "cpu" else {"everything": (("--tiny",), 300)}
    needs, variables = ([], {}) if device == "cpu" else ([BUILD_PACKAGE], in_sight())
    stages = []
    for name, (options, limit) in wanted.items():
        out = FOUND / slug(name)
        command = (sys.executable, str(ROOT / "bench/report.py"), "--device", device, "--out", str(out), *options)
        stages.append(Stage(f"measure: {name}", command, limit, variables, needs=needs, found=out, judge=by_report))
    return stages


def profile() -> Stage:
    """Profile the kernels behind a ResNet's statistics: covariances of 3x3 patches, and sums over pairs of layers."""
    code = (
        "import torch; from kfac2 import ops; x = torch.randn(128, 16, 32, 32, device='cuda'); "
        "ops.input_covariance(x, 3, padding=1); ops.cross_layer_sums([x[:, i] for i in range(16)] * 14)"
    )
    names = "regex:products_kernel|cross_layer_sums_kernel"
    as_it_is = ("--clock-control", "none")  # the card's clocks are its owner's
    command = (profiler(), *as_it_is, "--set", "full", "--kernel-name", names, sys.executable, "-c", code)
    return Stage("ncu: covariances and cross_layer_sums", command, 40, in_sight(), needs=[BUILD_PACKAGE], probe=LOOK,
                 cwd=ROOT / "tests", judge=by_profiler)  # fmt: skip


def everything() -> list[list[Stage]]:
    """List all but the builds, in their order."""
    return [*proofs(), *([stage] for stage in (*measurements("cuda"), profile()))]


def chosen(groups: Sequence[Sequence[Stage]], texts: Sequence[str] | None) -> list[list[Stage]]:
    """Return the stages whose names begin with one of these texts; None: all."""
    return [[s for s in group if texts is None or s.name.startswith(tuple(texts))] for group in groups]


def wanted(architecture: str, texts: Sequence[str] | None, is_built: bool) -> list[list[Stage]]:
    """Return the builds and the stages that are chosen; where there are builds already, the latter, which need none."""
    groups = chosen(everything(), texts)
    if not is_built:
        return [builds(architecture), *groups]
    return [[replace(stage, needs=[]) for stage in group] for group in groups]


def ending(statuses: Sequence[str]) -> int:
    """Return the exit status of everything from those of the stages."""
    if all(status == PASSED for status in statuses):
        return 0
    return NO_DEVICE if NONE in statuses and set(statuses) <= {PASSED, NONE} else 1


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the record")
    parser.add_argument("--small", action="store_true", help="tiny sizes on the CPU, to see that the measurements run")
    parser.add_argument("--times", type=float, default=1, help="multiplies all limits, for a slow machine (default: 1)")
    parser.add_argument("--seconds", type=float, help=f"for everything together (default: {SECONDS}, by --times)")
    parser.add_argument(
        "--only", nargs="+", metavar="TEXT", help="stages whose names begin with one of these, and the builds"
    )
    parser.add_argument("--built", action="store_true", help="take the builds that are there")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))
    about = describe()
    stem = "cpu" if arguments.small else "no-device" if about["device"] == "none" else slug(about["device"])
    hidden = {
        f"{ROOT}/": "",
        str(ROOT): ".",
        sys.executable: "python3",
        f"{Path(sys.executable).parent}/": "",
        f"{Path.home()}/": "~/",
    }
    record = Record(arguments.out, stem, "kfac2 checked on a CUDA device", about, hidden)
    if arguments.small:
        groups = [[stage] for stage in measurements("cpu")]
    else:
        groups = wanted(about["built for"], arguments.only, arguments.built)
    groups = [[replace(stage, limit=arguments.times * stage.limit) for stage in group] for group in groups]
    run_all(groups, record, LOGS, arguments.seconds or arguments.times * SECONDS)
    print(record.path("md").read_text())
    print(f"{record.verdict()}; written to {record.path('md')}")
    sys.exit(ending(record.statuses()))


if __name__ == "__main__":
    main()

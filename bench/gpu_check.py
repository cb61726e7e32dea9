"""Build kfac2 on a machine with a CUDA device, test it there, measure it, and write down what was found.

No network is used. In the folder given by --out: <device>.json and <device>.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
INSTALLED = ROOT / "build" / "gpu-check"
PYTEST = (sys.executable, "-m", "pytest", "-v", "-p", "no:benchmark")
SANITIZED = (
    "(maps_and_covariances and float32 and (seed01 or seed03 or seed05)) or cross_layer_sums_and_coarse_fisher "
    "or bad_factors or calls_of_a_step or special_matrices"
)


def run(*command: object, limit: int, log: Path | None = None, **environment: str) -> tuple[int, str]:
    """Run a command with the build in sight; return its exit status and output, 124 where it took too long.

    Args:
        command: the words.
        limit: seconds; then the command and all it started are killed.
        log: where the output goes while it runs, so that a hang still tells how far it came.
        environment: further variables.
    """
    paths = [str(INSTALLED), str(ROOT / "bench"), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", **environment}
    log = log or ROOT / "build" / "gpu-check.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        process = subprocess.Popen(
            [str(part) for part in command], cwd=ROOT / "tests", env=variables, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = 124
    return status, log.read_text(errors="replace")


def build(folder: Path) -> tuple[int, str]:
    """Install kfac2 beside the checkout, with what this Python already has."""
    shutil.rmtree(INSTALLED, ignore_errors=True)
    pip = (sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--target", INSTALLED, ROOT)
    return run(*pip, limit=150, log=folder / "build.log", KFAC2_CUDA="1")


def test(folder: Path) -> dict[str, Any]:
    """Run the GPU tests, each file in a process of its own: a fault of the device lasts as long as its process."""
    result: dict[str, Any] = {"passed": 0, "failed": [], "skipped": [], "faults": []}
    for file in sorted((ROOT / "tests/gpu").glob("test_*.py")):
        report = folder / f"{file.stem}.xml"
        report.unlink(missing_ok=True)
        pytest = (*PYTEST, f"gpu/{file.name}", f"--junitxml={report}")
        status, output = run(*pytest, limit=90, log=folder / f"{file.stem}.log")
        if not report.exists():  # killed, or it broke off: the log says where
            result["failed"].append(file.name)
            result["faults"].append(f"status {status}: {output[-1500:]}")
            continue
        for case in ElementTree.parse(report).getroot().iter("testcase"):
            fault = next((found for kind in ("failure", "error") if (found := case.find(kind)) is not None), None)
            if fault is not None:
                result["failed"].append(case.get("name"))
                result["faults"] += [(fault.text or "")[-1500:]] if len(result["faults"]) < 3 else []
            elif case.find("skipped") is not None:
                result["skipped"].append(case.get("name"))
            else:
                result["passed"] += 1
    return result


def sanitize(folder: Path) -> dict[str, str]:
    """Run a few tests of every kernel under compute-sanitizer, where it is installed."""
    if shutil.which("compute-sanitizer") is None:
        return dict.fromkeys(("memcheck", "racecheck"), "compute-sanitizer is not installed")
    results = {}
    for tool in ("memcheck", "racecheck"):
        command = ("compute-sanitizer", f"--tool={tool}", "--error-exitcode=99", *PYTEST)
        status, output = run(*command, "gpu", "-k", SANITIZED, limit=60, log=folder / f"{tool}.log")
        found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY:.*", output)
        results[tool] = {0: "no error", 124: "took longer than 60 s"}.get(status, f"status {status}")
        results[tool] += f" ({found[-1]})" if found else ""
    return results


def measure(device: str, small: bool) -> dict[str, Any]:
    """Measure in a process of its own, which sees the build."""
    options = ("--device", device, *(("--small",) if small else ()))
    status, output = run(sys.executable, ROOT / "bench/gpu_measure.py", *options, limit=240)
    lines = [line for line in output.splitlines() if line.startswith("RESULT")]
    return json.loads(lines[-1].removeprefix("RESULT")) if lines else {"status": status, "output": output[-4000:]}


def markdown(record: dict[str, Any]) -> str:
    """Write the record for people."""
    found, tests, sanitizer = (record.get(key, {}) for key in ("measurements", "tests", "sanitizer"))
    lines = [
        f"# kfac2 on {found.get('device', 'a device that gave no result')}",
        "",
        f"torch {found.get('torch')}, CUDA {found.get('cuda')}, build {found.get('build')}",
        "",
        f"Tests: {tests.get('passed', 0)} passed, {len(tests.get('failed', []))} failed, "
        f"{len(tests.get('skipped', []))} skipped. compute-sanitizer: "
        + "; ".join(f"{tool}: {result}" for tool, result in sanitizer.items())
        + ".",
        "",
        "| what | median | beside it | target | found |",
        "|---|---|---|---|---|",
    ]
    for line in found.get("measured", []):
        versus = f"{line['versus'][0]}: {line['versus'][1]:.0f} µs" if line["versus"] else ""
        cells = (line["name"], f"{line['microseconds']:.0f} µs", versus, line["target"], line["reached"])
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write(record: dict[str, Any], folder: Path) -> Path:
    """Write both files, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^a-z0-9]+", "-", record.get("measurements", {}).get("device", "unknown").lower()).strip("-")
    for ending, text in ((".json", json.dumps(record, indent=1) + "\n"), (".md", markdown(record))):
        partial = folder / f"{stem}{ending}.part"
        partial.write_text(text)
        partial.replace(folder / f"{stem}{ending}")
    return folder / f"{stem}.md"


def main() -> None:
    """Run everything; the exit status is 0 only if the build and all tests passed and all was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the record")
    parser.add_argument("--small", action="store_true", help="tiny sizes on the CPU, to see that the measurements run")
    arguments = parser.parse_args()
    folder = ROOT / "build" / "gpu-record"  # logs, as long as a person may want them
    folder.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {}
    if not arguments.small:
        status, output = build(folder)
        if status != 0:
            sys.exit(f"the build failed:\n{output[-6000:]}")
    # The record is written after each stage: what came later, and broke, does not take the rest with it.
    record["measurements"] = measure("cpu" if arguments.small else "cuda", arguments.small)
    path = write(record, arguments.out)
    if not arguments.small:
        record["tests"] = test(folder)
        write(record, arguments.out)
        record["sanitizer"] = sanitize(folder)
        write(record, arguments.out)
    print(path.read_text())
    measured = record["measurements"].get("measured", [])
    wrong = not measured or any(line["name"] == "a measurement failed" for line in measured)
    if not arguments.small:
        wrong = wrong or bool(record["tests"]["failed"]) or record["tests"]["passed"] == 0
    if wrong:
        sys.exit(f"not all passed: {json.dumps(record, indent=1)[-6000:]}")


if __name__ == "__main__":
    main()

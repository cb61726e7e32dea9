"""Build kfac2 on a machine with a CUDA device, test it there, measure it, and write down what was found.

No network is used. In the folder given by --out: <device>.json and <device>.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
INSTALLED = ROOT / "build" / "gpu-check"


def run(*command: object, limit: int = 300) -> tuple[int, str]:
    """Run a command with the build in sight; return its exit status and output, 124 where it took too long."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(INSTALLED), str(ROOT / "bench")))}
    try:
        done = subprocess.run(
            [str(part) for part in command], cwd=ROOT / "tests", env=environment, timeout=limit, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        return 124, str(error)
    return done.returncode, done.stdout


def build() -> tuple[int, str]:
    """Install kfac2 beside the checkout, with what this Python already has."""
    shutil.rmtree(INSTALLED, ignore_errors=True)
    return run(
        sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--target", INSTALLED, ROOT
    )  # fmt: skip


def test() -> dict[str, Any]:
    """Run the GPU tests; return counts and the names of failures."""
    report = ROOT / "build" / "gpu-tests.xml"
    status, output = run(sys.executable, "-m", "pytest", "gpu", "-p", "no:benchmark", f"--junitxml={report}")
    if not report.exists():
        return {"status": status, "output": output[-4000:]}
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failed = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case.get("name") for case in cases if case.find("skipped") is not None]
    result = {"status": status, "passed": len(cases) - len(failed) - len(skipped), "failed": failed, "skipped": skipped}
    return {**result, "output": output[-4000:]} if failed else result


def sanitize() -> dict[str, str]:
    """Run a few tests under compute-sanitizer, where it is installed."""
    if shutil.which("compute-sanitizer") is None:
        return {tool: "compute-sanitizer is not installed" for tool in ("memcheck", "racecheck")}
    few = "(maps_and_covariances and float32 and (1- or 3- or 5-)) or cross_layer_sums_and_coarse_fisher"
    results = {}
    for tool in ("memcheck", "racecheck"):
        command = ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=99", sys.executable, "-m", "pytest"]
        status, output = run(*command, "gpu/test_cuda_ops.py", "-p", "no:benchmark", "-k", few, limit=90)
        found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY:.*", output)
        results[tool] = {0: "no error", 124: "took longer than 90 s"}.get(status, f"status {status}")
        results[tool] += f" ({found[-1]})" if found else ""
    return results


def measure(device: str, small: bool) -> dict[str, Any]:
    """Measure in a process of its own, which sees the build."""
    code = (
        "import json, torch, kfac2; from dataclasses import asdict; from gpu_kernels import measure_all; "
        f"device = torch.device({device!r}); lines = [asdict(line) for line in measure_all(device, {small})]; "
        "name = torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'; "
        "print('RESULT' + json.dumps({'device': name, 'torch': torch.__version__, 'cuda': torch.version.cuda, "
        "'build': kfac2.build_info(), 'measured': lines}))"
    )
    status, output = run(sys.executable, "-c", code, limit=240)
    lines = [line for line in output.splitlines() if line.startswith("RESULT")]
    return json.loads(lines[-1].removeprefix("RESULT")) if lines else {"status": status, "output": output[-4000:]}


def markdown(record: dict[str, Any]) -> str:
    """Write the record for people."""
    found = record["measurements"]
    tests, sanitizer = record["tests"], record["sanitizer"]
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
    stem = re.sub(r"[^a-z0-9]+", "-", record["measurements"].get("device", "unknown").lower()).strip("-")
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
    if arguments.small:
        tests: dict[str, Any] = {"status": 0}
        sanitizer: dict[str, str] = {}
    else:
        status, output = build()
        if status != 0:
            sys.exit(f"the build failed:\n{output[-6000:]}")
        tests, sanitizer = test(), sanitize()
    record = {"tests": tests, "sanitizer": sanitizer}
    record["measurements"] = measure("cpu" if arguments.small else "cuda", arguments.small)
    path = write(record, arguments.out)
    print(path.read_text())
    if tests["status"] != 0 or "measured" not in record["measurements"]:
        sys.exit(f"not all passed: {json.dumps(record, indent=1)[-6000:]}")


if __name__ == "__main__":
    main()

"""Build kfac2 on a machine with a CUDA device, test it there, measure it, and write down what was found.

No network is used. In the folder given by --out: <device>.json and <device>.md; logs are in build/gpu-check-logs.
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
import tempfile
from pathlib import Path
from typing import Any

from output import slug, write

ROOT = Path(__file__).parent.parent
INSTALLED, LOGS = ROOT / "build/gpu-check", ROOT / "build/gpu-check-logs"
PYTEST = (sys.executable, "-m", "pytest", "-vv", "-p", "no:benchmark")
SANITIZED = (
    "(maps_and_covariances and float32 and (seed01 or seed03 or seed05)) or cross_layer_sums_and_coarse_fisher "
    "or bad_factors or calls_of_a_step or special_matrices"
)


def run(name: str, *command: object, limit: int, **environment: str) -> tuple[int, str]:
    """Run a command with the build in sight; return its exit status and output.

    The log `name` is written while it runs: a hang still tells how far it came. After `limit` seconds the command and
    all it started are killed, and the status is 124.
    """
    paths = [str(INSTALLED), str(ROOT / "bench"), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", **environment}
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"{name}.log"
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


def build() -> None:
    """Install kfac2 beside the checkout, with what this Python already has."""
    shutil.rmtree(INSTALLED, ignore_errors=True)
    pip = (sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--target", INSTALLED, ROOT)
    status, output = run("build", *pip, limit=150, KFAC2_CUDA="1")
    if status != 0:
        sys.exit(f"the build failed:\n{output[-6000:]}")


def measure(device: str) -> dict[str, Any]:
    """Run `report.py` in a process of its own, which sees the build; what it wrote before it broke counts."""
    tiny = ["--tiny"] if device == "cpu" else []
    with tempfile.TemporaryDirectory() as folder:
        command = (sys.executable, ROOT / "bench/report.py", "--device", device, "--out", folder, *tiny)
        status, output = run("report", *command, limit=300)
        written = [*Path(folder).glob("*.json")]
        if not written:
            return {"failed": [f"status {status}: {output[-4000:]}"]}
        record = json.loads(written[0].read_text())
        record["failed"] += [f"report.py: status {status}, after: {output[-200:]}"] if status not in (0, 1) else []
        return {**record, "text": written[0].with_suffix(".md").read_text()}


def test() -> dict[str, Any]:
    """Run the GPU tests, each file in a process of its own: a fault of the device lasts as long as its process."""
    result: dict[str, Any] = {"passed": 0, "skipped": 0, "failed": [], "faults": []}
    for file in sorted((ROOT / "tests/gpu").glob("test_*.py")):
        status, output = run(file.stem, *PYTEST, f"gpu/{file.name}", limit=90)
        result["passed"] += len(re.findall(r" PASSED +\[", output))
        result["skipped"] += len(re.findall(r" SKIPPED .*\[", output))
        if status not in (0, 5):  # 5: no test; 124: killed, and the log tells how far it came
            result["failed"] += re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE) or [file.name]
            result["faults"].append(f"status {status}: {output[-1500:]}")
    return result


def sanitize() -> dict[str, str]:
    """Run a few tests of every kernel under compute-sanitizer, where it is installed."""
    if shutil.which("compute-sanitizer") is None:
        return dict.fromkeys(("memcheck", "racecheck"), "compute-sanitizer is not installed")
    results = {}
    for tool in ("memcheck", "racecheck"):
        command = ("compute-sanitizer", f"--tool={tool}", "--error-exitcode=99", *PYTEST)
        status, output = run(tool, *command, "gpu", "-k", SANITIZED, limit=60)
        found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY:.*", output)
        results[tool] = {0: "no error", 124: "took longer than 60 s"}.get(status, f"status {status}")
        results[tool] += f" ({found[-1]})" if found else ""
    return results


def save(record: dict[str, Any], folder: Path) -> str:
    """Write what was found so far, for programs and for people; return the text."""
    found, tests = record["measurements"], record.get("tests", {})
    counts = f"{tests.get('passed', 0)} passed, {len(tests.get('failed', []))} failed, {tests.get('skipped', 0)}"
    sanitizer = "; ".join(f"{tool}: {result}" for tool, result in record.get("sanitizer", {}).items())
    checked = f"Tests: {counts} skipped. compute-sanitizer: {sanitizer or 'not run'}. Build: {found.get('build')}."
    stem = folder / slug(found.get("machine", {}).get("device", "unknown"))
    text = found.get("text", "\n".join(found["failed"])) + f"\n## Checked\n\n{checked}\n"
    write(stem.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
    write(stem.with_suffix(".md"), text)
    return text


def main() -> None:
    """Run everything; the exit status is 0 only if the build and all tests passed and all was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the record")
    parser.add_argument("--small", action="store_true", help="tiny sizes on the CPU, to see that the measurements run")
    arguments = parser.parse_args()
    if not arguments.small:
        build()
    # The record is written after each stage: what came later, and broke, does not take the rest with it.
    record: dict[str, Any] = {"measurements": measure("cpu" if arguments.small else "cuda")}
    text = save(record, arguments.out)
    wrong = bool(record["measurements"]["failed"])
    if not arguments.small:
        record["tests"] = test()
        save(record, arguments.out)
        record["sanitizer"] = sanitize()
        text = save(record, arguments.out)
        wrong = wrong or bool(record["tests"]["failed"]) or record["tests"]["passed"] == 0
    print(text)
    if wrong:
        sys.exit(f"not all passed: {json.dumps(record, indent=1)[-6000:]}")


if __name__ == "__main__":
    main()

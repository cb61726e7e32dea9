"""Run tests on emulated CUDA kernels, from Python through the bindings: tests/gpu, or what is given to pytest.

The package is put together in build/emulated/package, with an op library in which every call goes to an emulated kernel:
what a device would compute, on the memory of a CPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent.parent
BUILT = ROOT / "build/emulated"


def build() -> Path:
    """Build the op library; what is newer than its sources is not built again."""
    options = ("-DCMAKE_BUILD_TYPE=Release", "-DKFAC2_SANITIZE=OFF", f"-DKFAC2_TORCH={Path(torch.__file__).parent}")
    scripts = Path(sys.executable).parent  # where a virtual environment has cmake and ninja
    path = os.pathsep.join([str(scripts), os.environ["PATH"]])
    for command in (
        ("cmake", "-S", str(ROOT), "-B", str(BUILT), "-G", "Ninja", *options),
        ("cmake", "--build", str(BUILT), "--target", "emulated_ops"),
    ):
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path})
        if done.returncode != 0:
            sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return BUILT / "libemulated_ops.so"


def put_together(library: Path) -> Path:
    """Return a folder to import the package with this op library from."""
    package = BUILT / "package"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "kfac2", package / "kfac2", ignore=shutil.ignore_patterns("__pycache__", "_ops.*"))
    shutil.copy(library, package / "kfac2/_ops.abi3.so")
    return package


def for_pytest(arguments: Sequence[str]) -> list[str]:
    """Return arguments as they read in any folder; where they name no tests, those of tests/gpu are added."""
    given, names_tests = [], False
    for text in arguments:
        path, *rest = text.split("::")
        if Path(path).exists():
            text, names_tests = "::".join([str(Path(path).resolve()), *rest]), True
        given.append(text)
    return given if names_tests else [*given, str(ROOT / "tests/gpu")]


def main(arguments: list[str]) -> int:
    """Build, and run pytest from a folder where Python does not see the checkout in place of the package."""
    package = put_together(build())
    command = (sys.executable, "-m", "pytest", "-p", "no:benchmark", "--rootdir", str(ROOT), *for_pytest(arguments))
    return subprocess.run(command, cwd=ROOT / "tests", env={**os.environ, "PYTHONPATH": str(package)}).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

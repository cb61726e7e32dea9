"""Build the tests of tests/emulation for a CUDA device, with nvcc and without torch: build/device-tests/device_tests.

The architecture is that of the device here, sm_90 without one. What is newer than its sources is not built again.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
BUILT = ROOT / "build/device-tests"
HERE = ROOT / "tests/emulation"
FILES = ("directions", "eigendecompose", "kernels", "solves", "step")
SOURCES = (
    *sorted((ROOT / "csrc/kernels").glob("*.cu"), key=lambda path: -path.stat().st_size),  # the longest first
    *(HERE / f"test_{name}.cpp" for name in FILES),
    HERE / "run_cases.cpp",
    *sorted((ROOT / "csrc/cpu").glob("*.cpp")),
)
INCLUDES = ("csrc/include", "csrc/kernels", "csrc/cpu", "tests/emulation", "tests/native")
FLAGS = ("-std=c++17", "-O2", "-g", "-Werror", "all-warnings")
HOST_FLAGS = "-Wall,-Wextra,-Werror,-Wno-psabi,-fopenmp-simd,-ffp-contract=fast"
OF_KERNELS = ("-O3", "-lineinfo", "--expt-relaxed-constexpr")


def nvcc() -> str:
    """Find the compiler of the toolkit that setup.py would take."""
    sys.path.insert(0, str(ROOT))
    from setup import find_toolkit

    home = find_toolkit()
    if home is None or not (home / "bin/nvcc").exists():
        sys.exit("no CUDA toolkit (nvcc) here: name it with CUDA_HOME")
    return str(home / "bin/nvcc")


def architecture() -> str:
    """Ask for the device's architecture, such as sm_90."""
    query = ("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.split()
    except (OSError, subprocess.SubprocessError):
        found = []
    return "sm_" + (found[0] if found else "9.0").replace(".", "")


def run(command: list[str]) -> None:
    """Run a command; stop with what it printed where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def compiled(compiler: str, arch: str, source: Path, newest: float) -> str:
    """Compile a source unless it is older than its object, as is every header; return the object."""
    target = BUILT / arch / f"{source.parent.name}-{source.stem}.o"
    if not target.exists() or target.stat().st_mtime < max(newest, source.stat().st_mtime):
        includes = [f"-I{ROOT / folder}" for folder in INCLUDES]
        flags = OF_KERNELS if source.suffix == ".cu" else ("-Xcompiler", HOST_FLAGS)
        part = target.with_suffix(".part.o")
        run([compiler, *FLAGS, *flags, f"-arch={arch}", *includes, "-c", str(source), "-o", str(part)])
        os.replace(part, target)
    return str(target)


def main() -> None:
    """Compile side by side, link."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", help="such as sm_90 or 9.0 (default: the device's)")
    jobs = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
    parser.add_argument("--jobs", type=int, default=jobs, help="at a time (default: MAX_JOBS, or all cores)")
    arguments = parser.parse_args()
    arch = "sm_" + arguments.arch.removeprefix("sm_").replace(".", "") if arguments.arch else architecture()
    compiler = nvcc()
    headers = (path for folder in INCLUDES for path in (ROOT / folder).glob("*.h"))
    newest = max(path.stat().st_mtime for path in (*headers, Path(__file__)))
    (BUILT / arch).mkdir(parents=True, exist_ok=True)
    try:
        with ThreadPoolExecutor(arguments.jobs) as pool:
            objects = list(pool.map(lambda source: compiled(compiler, arch, source, newest), SOURCES))
        program = str(BUILT / "device_tests")
        run([compiler, f"-arch={arch}", *objects, "-Xlinker", "--wrap=cudaLaunchKernelExC", "-o", program])
    except RuntimeError as error:
        sys.exit(str(error))
    print(f"{program} is built for {arch}")


if __name__ == "__main__":
    main()

"""Compile every CUDA kernel with nvcc, warnings as errors, and print registers, shared memory and spills.

Needs a CUDA toolkit and no device. Fails on a warning or a spill; says so and passes where there is no nvcc.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
FLAGS = ("-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Werror", "all-warnings", "-Xptxas", "-v", "-c")
INCLUDES = tuple(f"-I{ROOT / 'csrc' / folder}" for folder in ("include", "kernels"))


def compile_kernel(job: tuple[Path, str]) -> str:
    """Return what nvcc and ptxas print for one file and architecture; stop on an error or a warning."""
    source, architecture = job
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", *FLAGS, f"-arch={architecture}", *INCLUDES, str(source), "-o", f"{folder}/kernel.o"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{source.name} for {architecture}:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def readable(symbol: str) -> str:
    """Return a kernel's name without its arguments."""
    name = subprocess.run(["c++filt", symbol], capture_output=True, text=True).stdout.strip()
    name = name.replace("(anonymous namespace)::", "").replace("kfac2::cuda::", "").removeprefix("void ")
    return name.split("(")[0]


def rows(job: tuple[Path, str], output: str) -> list[tuple[str, str, int, int, int]]:
    """Read ptxas -v: architecture, kernel, registers, static shared memory and bytes spilled."""
    pattern = (
        r"Compiling entry function '(\w+)' for.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)"
    )
    result = []
    for symbol, stores, loads, registers, rest in re.findall(pattern, output, re.S):
        shared = re.search(r"(\d+) bytes smem", rest)
        result.append(
            (job[1], readable(symbol), int(registers), int(shared[1]) if shared else 0, int(stores) + int(loads))
        )
    return result


def main() -> None:
    """Compile all, print a table."""
    if shutil.which("nvcc") is None:
        print("no nvcc here: the kernels were not compiled for a device")
        return
    jobs = list(product(sorted((ROOT / "csrc/kernels").glob("*.cu")), ARCHITECTURES))
    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(compile_kernel, jobs))
    table = [row for job, output in zip(jobs, outputs, strict=True) for row in rows(job, output)]
    if not table:
        sys.exit("nvcc compiled no kernel: nothing was checked")
    print(f"{'arch':8}{'kernel':48}{'registers':>10}{'static shared':>15}{'spilled':>9}")
    for architecture, kernel, registers, shared, spilled in sorted(table, key=lambda row: (row[1], row[0])):
        print(f"{architecture:8}{kernel:48}{registers:10}{shared:15}{spilled:9}")
    if any(spilled for *_, spilled in table):
        sys.exit("a kernel spills registers")


if __name__ == "__main__":
    main()

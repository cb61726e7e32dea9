"""Builds kfac2 against the torch that is already installed in the environment.

pip builds in an isolated environment without torch. Asking for torch there would download a second one,
perhaps of another version; so this file looks for the installed one itself: in the environment's
site-packages, in the base interpreter's (for a venv with --system-site-packages) and in the user's.

CUDA kernels are built where torch is a CUDA build and a toolkit is found, whether or not there is a device.
KFAC2_CUDA=0 leaves them out, KFAC2_CUDA=1 insists on them; TORCH_CUDA_ARCH_LIST chooses the architectures.
"""

import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent
NO_TORCH = """kfac2 needs an installed torch (2.10 or newer) to build against, and found none in:
  {places}
Install torch first, for example:  pip install torch
Then build again:                  pip install ."""
NO_TOOLKIT = """kfac2 found torch {torch}, a build for CUDA {cuda}, but no CUDA toolkit (nvcc).
Name the toolkit:                  CUDA_HOME=/usr/local/cuda-{cuda} pip install .
Or build for the CPU alone:        KFAC2_CUDA=0 pip install ."""
NO_CUDA_TORCH = "KFAC2_CUDA=1 needs a CUDA build of torch, got torch {torch}: install one, or leave KFAC2_CUDA out."
OTHER_CUDA = """kfac2 found torch {torch}, a build for CUDA {cuda}, but the toolkit in {home} is CUDA {toolkit}.
Name one of the same major version:  CUDA_HOME=/usr/local/cuda-{cuda} pip install .
Or build for the CPU alone:          KFAC2_CUDA=0 pip install ."""
ARCHITECTURES = "8.0;9.0;10.0+PTX"  # Ampere, Hopper, Blackwell, and what comes after


def site_packages() -> list[str]:
    """Where the environment that pip installs into keeps its packages, nearest first."""
    places = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    config = Path(sys.prefix) / "pyvenv.cfg"
    isolated = config.is_file() and "include-system-site-packages = true" not in config.read_text().lower()
    if not isolated:
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        places += [sysconfig.get_path(name, vars=base) for name in ("purelib", "platlib")]
        places.append(site.getusersitepackages())
    return list(dict.fromkeys(places))


def find_torch() -> None:
    """Make `import torch` work; append, so that the build's own setuptools comes first."""
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError:
        places = site_packages()
        found = [place for place in places if (Path(place) / "torch").is_dir()]
        if not found:
            sys.exit(NO_TORCH.format(places="\n  ".join(places)))
        sys.path += places  # all: what torch itself needs may lie in another of them


def find_toolkit() -> Path | None:
    """Find the CUDA toolkit: named by the environment, or the one that nvcc on PATH says it works from."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            return Path(os.environ[variable])
    if shutil.which("nvcc"):  # perhaps a script that calls another: ask it
        asked = subprocess.run(["nvcc", "--dryrun", "-c", "any.cu"], capture_output=True, text=True)
        here = re.search(r"_HERE_=(.+)", asked.stdout + asked.stderr)
        if here:
            return Path(here[1].strip()).parent
    usual = Path("/usr/local/cuda")
    return usual if (usual / "bin/nvcc").exists() else None


def choose_cuda() -> bool:
    """Decide whether CUDA kernels are built; stop with what to type rather than leave them out in silence."""
    import torch

    asked, cuda = os.environ.get("KFAC2_CUDA", "auto"), torch.version.cuda
    if asked == "0" or (cuda is None and asked != "1"):
        return False
    if cuda is None:
        sys.exit(NO_CUDA_TORCH.format(torch=torch.__version__))
    home = find_toolkit()
    if home is None or not (home / "bin/nvcc").exists():
        sys.exit(NO_TOOLKIT.format(torch=torch.__version__, cuda=cuda))
    version = subprocess.run([home / "bin/nvcc", "--version"], capture_output=True, text=True).stdout
    toolkit = re.search(r"release (\d+)\.(\d+)", version)
    if toolkit is None or toolkit[1] != cuda.split(".")[0]:
        found = f"{toolkit[1]}.{toolkit[2]}" if toolkit else "of an unknown version"
        sys.exit(OTHER_CUDA.format(torch=torch.__version__, cuda=cuda, home=home, toolkit=found))
    os.environ["CUDA_HOME"] = str(home)  # read by torch when its extension builder is imported
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    return True


def sources(folder: str, ending: str = "cpp") -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / folder).glob(f"*.{ending}"))


def shared_cpp_library() -> list[str]:
    """Name torch's own C++ library to the linker, where it has one.

    Some toolchains link in another one statically: where the two meet, as an error is thrown and worded, they crash.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    try:
        asked = subprocess.run([*compiler, "-print-file-name=libstdc++.so.6"], capture_output=True, text=True)
    except OSError:
        return []
    return ["-l:libstdc++.so.6"] if Path(asked.stdout.strip()).is_absolute() else []


def extensions(cuda: bool) -> list[Extension]:
    """The op library (LibTorch's stable ABI) and, apart from it, the pybind11 module of build information."""
    import pybind11
    import torch
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    # 2.10: one build serves every later torch. -fopenmp-simd needs no OpenMP runtime.
    flags = ["-O3", "-std=c++17", "-fopenmp-simd", "-ffp-contract=fast", "-fvisibility=hidden", "-Wno-psabi"]
    defined = ["-DTORCH_TARGET_VERSION=0x020a000000000000"] + (["-DKFAC2_WITH_CUDA", "-DUSE_CUDA"] if cuda else [])
    build_info = "csrc/torch/build_info.cpp"
    ops = (CUDAExtension if cuda else CppExtension)(
        "kfac2._ops",
        [source for source in sources("torch") if source != build_info]
        + sources("cpu")
        + (sources("kernels", "cu") if cuda else []),
        include_dirs=[str(ROOT / "csrc" / folder) for folder in ("include", "cpu", "kernels")],
        extra_compile_args={"cxx": flags + defined, "nvcc": ["-O3", "-std=c++17", "--expt-relaxed-constexpr"]},
        extra_link_args=shared_cpp_library(),
        py_limited_api=True,
        # all of csrc: a source distribution made beside a CPU build of torch carries the CUDA kernels, too
        depends=[str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.*"))],
    )
    architectures = os.environ["TORCH_CUDA_ARCH_LIST"].replace(" ", ";") if cuda else ""
    known = [f'-DKFAC2_BUILT_WITH_TORCH="{torch.__version__}"', f'-DKFAC2_CUDA_ARCH="{architectures}"']
    info = Extension(
        "kfac2._C",
        [build_info],
        include_dirs=[pybind11.get_include(), str(ROOT / "csrc/include")],
        extra_compile_args=["-O2", "-std=c++17", "-fvisibility=hidden", *known],
        extra_link_args=shared_cpp_library(),
        language="c++",
    )
    return [ops, info]


if __name__ == "__main__":
    os.chdir(ROOT)
    find_torch()
    with_cuda = choose_cuda()
    from torch.utils.cpp_extension import BuildExtension

    setup(ext_modules=extensions(with_cuda), cmdclass={"build_ext": BuildExtension})

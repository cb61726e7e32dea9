"""Builds kfac2 against the torch that is already installed in the environment.

pip builds in an isolated environment without torch. Asking for torch there would download a second one,
perhaps of another version; so this file looks for the installed one itself: in the environment's
site-packages, in the base interpreter's (for a venv with --system-site-packages) and in the user's.
"""

import os
import site
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent
NO_TORCH = """kfac2 needs an installed torch (2.10 or newer) to build against, and found none in:
  {places}
Install torch first, for example:  pip install torch
Then build again:                  pip install ."""


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
        sys.path.append(found[0])


def sources(folder: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / folder).glob("*.cpp"))


def extensions() -> list[Extension]:
    """The op library (LibTorch's stable ABI) and, apart from it, the pybind11 module of build information."""
    import pybind11
    import torch
    from torch.utils.cpp_extension import CppExtension

    # 2.10: one build serves every later torch. -fopenmp-simd needs no OpenMP runtime.
    flags = ["-O3", "-std=c++17", "-fopenmp-simd", "-ffp-contract=fast", "-fvisibility=hidden", "-Wno-psabi"]
    torch_flags = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
    build_info = "csrc/torch/build_info.cpp"
    ops = CppExtension(
        "kfac2._ops",
        [source for source in sources("torch") if source != build_info] + sources("cpu"),
        include_dirs=[str(ROOT / "csrc/include"), str(ROOT / "csrc/cpu")],
        extra_compile_args=flags + torch_flags,
        py_limited_api=True,
        depends=[str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h")],
    )
    version = f'-DKFAC2_BUILT_WITH_TORCH="{torch.__version__}"'
    info = Extension(
        "kfac2._C",
        [build_info],
        include_dirs=[pybind11.get_include()],
        extra_compile_args=["-O2", "-std=c++17", "-fvisibility=hidden", version],
        language="c++",
    )
    return [ops, info]


if __name__ == "__main__":
    os.chdir(ROOT)
    find_torch()
    from torch.utils.cpp_extension import BuildExtension

    setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})

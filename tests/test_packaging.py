"""Installation as a user does it, and the commands of the README."""

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import kfac2

ROOT = Path(__file__).parent.parent


def run(*command, cwd, **environment):
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_plain_pip_install_builds_against_the_torch_that_is_there(tmp_path):
    """Build isolation on, no torch in build requirements, an environment that sees torch through its base."""
    source = tmp_path / "kfac2-source"
    code, output = run("git", "clone", "-q", ROOT, source, cwd=tmp_path)
    assert code == 0, output
    site = tmp_path / "site"
    code, output = run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, ".", cwd=source)
    assert code == 0, output
    script = (
        f"import torch, kfac2; assert kfac2.__file__.startswith({str(site)!r}), kfac2.__file__; "
        "print(kfac2.build_info()['torch'], kfac2.ops.channel_sums(torch.ones(2, 3, 4)).sum().item())"
    )
    code, output = run(sys.executable, "-c", script, cwd=tmp_path, PYTHONPATH=str(site))
    assert code == 0, output
    assert output.split() == [torch.__version__, "24.0"]


def test_a_source_distribution_holds_every_source(tmp_path):
    source = tmp_path / "source"
    code, output = run("git", "clone", "-q", ROOT, source, cwd=tmp_path)
    assert code == 0, output
    code, output = run(sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path, cwd=source, KFAC2_CUDA="0")
    assert code == 0, output
    (archive,) = tmp_path.glob("kfac2-*.tar.gz")
    with tarfile.open(archive) as files:
        held = {name.partition("/")[2] for name in files.getnames()}
    wanted = {str(path.relative_to(source)) for path in (source / "csrc").rglob("*.*")}
    assert wanted | {"setup.py", "pyproject.toml", "README.md", "LICENSE", "kfac2/py.typed"} <= held


def test_without_torch_setup_says_what_to_type(tmp_path):
    """setup.py under an interpreter that sees no site-packages at all."""
    nowhere = str(tmp_path)
    code = f"""
import site, sys, sysconfig, types
sys.path.insert(0, {str(ROOT)!r})
sys.prefix = sys.base_prefix = {nowhere!r}
sysconfig.get_path = lambda *args, **options: {nowhere!r}
site.getusersitepackages = lambda: {nowhere!r}
sys.modules["setuptools"] = types.SimpleNamespace(Extension=object, setup=None)
import setup
setup.find_torch()
"""
    status, output = run(sys.executable, "-S", "-c", code, cwd=tmp_path)
    assert status == 1
    assert "found none in" in output and "pip install torch" in output


def choose_cuda(torch_cuda, home, **environment):
    """setup.py's decision for a torch built with `torch_cuda`, in a process of its own."""
    code = f"""
import sys, types
sys.path.insert(0, {str(ROOT)!r})
sys.modules["torch"] = types.SimpleNamespace(__version__="2.99", version=types.SimpleNamespace(cuda={torch_cuda!r}))
import setup
print(setup.choose_cuda())
"""
    settings = {"KFAC2_CUDA": "auto", "CUDA_HOME": str(home), "CUDA_PATH": "", **environment}
    return run(sys.executable, "-c", code, cwd=ROOT, **settings)


def toolkit(folder, release):
    """A toolkit as far as setup.py looks at it."""
    (folder / "bin").mkdir(parents=True)
    nvcc = folder / "bin/nvcc"
    nvcc.write_text(f'#!/bin/sh\necho "Cuda compilation tools, release {release}, V{release}.1"\n')
    nvcc.chmod(0o755)
    return folder


def test_cuda_is_decided_by_torch_and_toolkit_and_never_left_out_in_silence(tmp_path):
    home, older = toolkit(tmp_path / "13", "13.0"), toolkit(tmp_path / "12", "12.8")
    assert choose_cuda(None, home) == (0, "False\n")
    assert choose_cuda("13.0", home) == (0, "True\n")
    assert choose_cuda("13.0", home, KFAC2_CUDA="0") == (0, "False\n")
    for cuda, place, environment, message in (
        (None, home, {"KFAC2_CUDA": "1"}, "needs a CUDA build of torch, got torch 2.99"),
        ("13.0", tmp_path / "none", {}, "no CUDA toolkit (nvcc)"),
        ("13.0", older, {}, f"the toolkit in {older} is CUDA 12.8"),
    ):
        status, output = choose_cuda(cuda, place, **environment)
        assert status == 1 and message in output, output
        assert cuda is None or ("CUDA_HOME=" in output and "KFAC2_CUDA=0" in output)


def test_the_toolkit_behind_a_wrapper_script_is_found(tmp_path):
    script = tmp_path / "bin/nvcc"
    script.parent.mkdir()
    script.write_text('#!/bin/sh\necho "#$ _HERE_=/opt/some-cuda/bin" >&2\n')
    script.chmod(0o755)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import setup; print(setup.find_toolkit())"
    path = os.pathsep.join((str(script.parent), os.environ["PATH"]))
    assert run(sys.executable, "-c", code, cwd=ROOT, PATH=path, CUDA_HOME="", CUDA_PATH="") == (0, "/opt/some-cuda\n")


def test_the_cpp_library_is_the_one_that_torch_has(tmp_path):
    """With another one, linked in statically, words of an error crashed on a machine with an H100."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import setup; print(setup.shared_cpp_library())"
    for answer, expected in (("/usr/lib/libstdc++.so.6", ["-l:libstdc++.so.6"]), ("libstdc++.so.6", [])):
        compiler = tmp_path / "compiler"
        compiler.write_text(f'#!/bin/sh\n[ "$1$2" = "-m64-print-file-name=libstdc++.so.6" ] && echo {answer}\n')
        compiler.chmod(0o755)
        assert run(sys.executable, "-c", code, cwd=ROOT, CXX=f"{compiler} -m64") == (0, f"{expected}\n")
    assert run(sys.executable, "-c", code, cwd=ROOT, CXX=str(tmp_path / "no-compiler")) == (0, "[]\n")
    if sys.platform == "linux":
        (library,) = Path(kfac2.__file__).parent.glob("_ops*.so")
        assert b"libstdc++.so.6" in library.read_bytes()


def test_each_line_of_contributing_uses_only_those_below_it():
    cells = re.findall(r"^\| (`kfac2/[^|]*)\|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    line = {part: number for number, cell in enumerate(cells) for part in re.findall(r"`(?:kfac2/)?(\w+)/?`", cell)}
    imports = re.compile(r"^\s*from kfac2(?:\.(\w+)\S*)? import ([^#\n]*)", re.MULTILINE)
    paths = [path.relative_to(ROOT / "kfac2") for path in (ROOT / "kfac2").rglob("*.py")]
    parts = {path: path.parts[0].removesuffix(".py") for path in paths if not path.parts[0].startswith("_")}
    assert {*parts.values()} == {*line}
    for path, part in parts.items():
        for module, names in imports.findall((ROOT / "kfac2" / path).read_text()):
            for other in [module] if module else re.findall(r"\w+", names):
                assert other.startswith("_") or line[part] <= line[other], f"{path} uses {other}"


def test_gpu_check_measures_and_writes_its_record(tmp_path):
    """On the CPU and at tiny sizes: that the command works where there is a device is for the device to say."""
    status, output = run(sys.executable, ROOT / "bench/gpu_check.py", "--small", "--out", tmp_path, cwd=tmp_path)
    assert status == 0, output
    assert "input_covariance" in (tmp_path / "cpu.md").read_text()
    about, record = (json.loads(line) for line in (tmp_path / "cpu.jsonl").read_text().splitlines())
    assert about["about"]["commit"] and record["stage"] == "measure: everything" and record["status"] == "passed"
    (measurements,) = record["found"]
    cases = [found["case"] for found in measurements["kernels"]]
    for op in ("channel_sums", "covariances", "cross_layer_sums", "average_coarse_sums", "factored_tikhonov_inverse"):
        assert any(case.startswith(op) for case in cases), cases
    assert [found["net"] for found in measurements["steps"]] == ["deep-linear", "resnet-8"]
    assert measurements["growth"][0]["exponent of milliseconds"] > 0 and not measurements["failed"]


@pytest.mark.slow
def test_demo(tmp_path):
    code, output = run(
        sys.executable,
        ROOT / "bench/demo.py",
        "--steps",
        20,
        "--nets",
        "mlp-12-tanh",
        "cnn-6",
        "--out",
        tmp_path / "demo.png",
        cwd=tmp_path,
    )
    assert code == 0, output
    assert "No worse than the best AdamW on" in output
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("arguments, message", [
    (("--steps", "0"), "must be a whole number of at least 1, got '0'"),
    (("--seeds", "many"), "must be a whole number of at least 1, got 'many'"),
    (("--nets", "vgg"), "invalid choice: 'vgg'"),
])  # fmt: skip
def test_demo_refuses_bad_arguments(arguments, message):
    code, output = run(sys.executable, ROOT / "bench/demo.py", *arguments, cwd=ROOT)
    assert code == 2 and message in output

"""Installation as a user does it, and the commands of the README."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


@pytest.mark.slow
def test_demo(tmp_path):
    code, output = run(
        sys.executable,
        ROOT / "bench/demo.py",
        "--epochs",
        1,
        "--seeds",
        1,
        "--out",
        tmp_path / "demo.png",
        cwd=tmp_path,
    )
    assert code == 0, output
    assert output.count("K-FAC, two levels") >= 2
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("arguments, message", [
    (("--epochs", "0"), "must be a whole number of at least 1, got '0'"),
    (("--seeds", "many"), "must be a whole number of at least 1, got 'many'"),
    (("--device", "cuda:99"), "must be a device that torch can use here, got 'cuda:99'"),
])  # fmt: skip
def test_demo_refuses_bad_arguments(arguments, message):
    code, output = run(sys.executable, ROOT / "bench/demo.py", *arguments, cwd=ROOT)
    assert code == 2 and message in output

"""The example of several processes, as a user starts it, on real images."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

TRAIN = Path(__file__).parents[1] / "bench" / "torchrun" / "train.py"
IMAGES = Path("/usr/share/datasets/fashion-mnist")


def _run(processes, folder, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [str(TRAIN), "--checkpoints", str(folder), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return float(re.search(r"test accuracy ([\d.]+)", result.stdout)[1])


@pytest.mark.slow
@pytest.mark.skipif(not IMAGES.is_dir(), reason="the Debian package dataset-fashion-mnist is not installed")
def test_two_processes_train_and_one_goes_on(tmp_path):
    assert _run(2, tmp_path, "--steps", "50", "--batch", "256", "--share", "gradients") > 0.7
    assert [path.name for path in tmp_path.iterdir()] == ["50"]
    (tmp_path / "75").mkdir()  # what was not written to its end
    assert _run(1, tmp_path, "--steps", "100", "--batch", "256") > 0.75
    assert {path.name for path in tmp_path.iterdir()} == {"75", "100"}

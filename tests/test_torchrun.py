"""The example of several processes, as a user starts it, on real images."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TRAIN = Path(__file__).parents[1] / "bench" / "torchrun" / "train.py"
IMAGES = Path("/usr/share/datasets/fashion-mnist")


def _run(processes, checkpoint, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [str(TRAIN), "--checkpoint", str(checkpoint), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return float(re.search(r"test accuracy ([\d.]+)", result.stdout)[1])


@pytest.mark.slow
@pytest.mark.skipif(not IMAGES.is_dir(), reason="the Debian package dataset-fashion-mnist is not installed")
def test_two_processes_train_and_one_goes_on(tmp_path):
    checkpoint = tmp_path / "state.pt"
    assert _run(2, checkpoint, "--steps", "50", "--batch", "256", "--share", "gradients") > 0.7
    assert torch.load(checkpoint, weights_only=True)["step"] == 50
    assert _run(1, checkpoint, "--steps", "100", "--batch", "256") > 0.75

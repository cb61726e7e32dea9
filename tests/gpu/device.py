"""Where the GPU tests run, and why they may not."""

import pytest
import torch

import kfac2

DEVICE = torch.device("cuda")


def _why_not() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    if not kfac2.build_info()["cuda"]:
        return "kfac2 was built without CUDA kernels"
    return None


needs_device = pytest.mark.skipif(_why_not() is not None, reason=str(_why_not()))

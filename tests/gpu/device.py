"""Where the tests of this folder run: on a CUDA device; where there is none, on the CPU, so that the tests are known to
be right before they meet one, or on emulated kernels (tests/emulation/run_tests.py). KFAC2_TEST_DEVICE=cuda asks for
the device: without one all are skipped then.
"""

import os

import pytest
import torch

import kfac2


def _why_not() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    if not kfac2.build_info()["cuda"]:
        return "kfac2 was built without CUDA kernels"
    return None


DEVICE = torch.device(os.environ.get("KFAC2_TEST_DEVICE") or ("cpu" if _why_not() else "cuda"))
IS_CUDA = DEVICE.type == "cuda"
HAS_DEVICE = IS_CUDA and _why_not() is None
# An op that there is for a device alone is there on the CPU where that is emulated.
IS_EMULATED = torch._C._dispatch_has_kernel_for_dispatch_key("kfac2::eigendecompose", "CPU")

_reason = _why_not() or "asked to run on the CPU"
anywhere = pytest.mark.skipif(IS_CUDA and not HAS_DEVICE, reason=_reason)
needs_cuda = pytest.mark.skipif(not HAS_DEVICE, reason=_reason)
needs_kernels = pytest.mark.skipif(not (HAS_DEVICE or IS_EMULATED), reason=_reason)

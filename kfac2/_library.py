"""Loads the compiled half of kfac2 and tells how it was built."""

from __future__ import annotations

import importlib.util
from importlib import metadata
from typing import Any

import torch

_REBUILD = "Build kfac2 again in this environment: pip install --force-reinstall --no-deps <path to kfac2>"


def _load_ops() -> None:
    spec = importlib.util.find_spec("kfac2._ops")
    if spec is None or spec.origin is None:
        raise ImportError(
            "kfac2's op library was not found: this is the source tree, or a build for another Python. " + _REBUILD
        )
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        built = f"torch {build_info()['torch']}"
        raise ImportError(
            f"kfac2's op library was built with {built} and does not load into torch {torch.__version__}: "
            f"{error}. {_REBUILD}"
        ) from error


def build_info() -> dict[str, Any]:
    """Tell how this copy of kfac2 was built.

    Returns:
        `version`: kfac2's own; `torch`: the version it was built with (it runs with that and later ones);
        `cuda`: whether CUDA kernels were compiled in; `cuda_arch`: the list of architectures they were
        compiled for.
    """
    from kfac2 import _C  # type: ignore[attr-defined]

    return {
        "version": metadata.version("kfac2"),
        "torch": _C.torch_version,
        "cuda": bool(_C.cuda_arch),
        "cuda_arch": _C.cuda_arch.split(";") if _C.cuda_arch else [],
    }


_load_ops()

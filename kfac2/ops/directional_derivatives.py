"""Derivatives of each sample's log-likelihood in directions of the weights, for all layers in one native call.

Wide layers on a CUDA device go to the library's products, see `applied_directions`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfac2.ops._checks import check_one_device, check_same_length, check_tensors, detached
from kfac2.ops.applied_directions import applied_directions, is_faster
from kfac2.window import Window


def directional_derivatives(
    inputs: Sequence[Tensor], windows: Sequence[Window], grads: Sequence[Tensor], directions: Sequence[Tensor]
) -> list[Tensor]:
    """Sum g_ntᵀ D_k ā_nt over the places of each sample: s[k, n], without the gradient of any sample.

    Where g is the gradient of the log-likelihood at the output of a layer, s[k, n] is its derivative as the layer's
    weight matrix moves along D_k, and 1/M Σ_n (Σ_layers s[k, n])² is dᵀFd (Fisher-vector products without vectors).

    Args:
        inputs: one for each layer, (N, C, *spatial) with up to three spatial axes; float32, float64, float16
            or bfloat16; any strides.
        windows: one for each input: how rows ā are taken from it.
        grads: one for each layer, (N, C_out, *grid): an output gradient at each place of the window's grid; any
            dtype and strides of `inputs`, float64 where the input is.
        directions: one for each layer, (K, groups, C_out / groups, d_in): K ≥ 1 matrices for each group, d_in counting
            channels slowest, then kernel offsets, bias last; float64 for float64 inputs, else float32.

    Returns:
        For each layer (K, N), float64, summed over its groups. Products are float32 for other than float64 inputs, and
        added up in float64.

    Raises:
        TypeError: if a list is not one of tensors.
        ValueError: if a list is empty, lengths differ, or tensors are on several devices.
        RuntimeError: if a tensor does not fit its window, or gradients or directions do not fit an input.
    """
    for name, tensors in (("inputs", inputs), ("grads", grads), ("directions", directions)):
        check_tensors(name, tensors)
        check_same_length(name, tensors, "inputs", inputs)
    check_same_length("windows", windows, "inputs", inputs)
    check_one_device(inputs=inputs[0], grads=grads[0], directions=directions[0])
    layers = list(zip(detached(inputs), windows, detached(grads), detached(directions), strict=True))
    by_library = [is_faster(*layer) for layer in layers]
    native = [layer for layer, other in zip(layers, by_library, strict=True) if not other]
    rest = iter(_native(native) if native else [])
    return [
        applied_directions(*layer) if other else next(rest) for layer, other in zip(layers, by_library, strict=True)
    ]


def _native(layers: Sequence[tuple[Tensor, Window, Tensor, Tensor]]) -> list[Tensor]:
    inputs, windows, grads, directions = map(list, zip(*layers, strict=True))
    numbers = [number for window in windows for number in window.encode()]
    return torch.ops.kfac2.directional_derivatives(inputs, numbers, grads, directions)


@torch.library.register_fake("kfac2::directional_derivatives")
def _(
    inputs: Sequence[Tensor], windows: Sequence[int], grads: Sequence[Tensor], directions: Sequence[Tensor]
) -> list[Tensor]:
    return [
        x.new_empty((matrices.shape[0], x.shape[0]), dtype=torch.float64)
        for x, matrices in zip(inputs, directions, strict=True)
    ]

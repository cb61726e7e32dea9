"""What the native ops refuse on a CUDA device, in words: errors have to come through torch from there, too."""

import pytest
import torch
from device import DEVICE, anywhere, needs_cuda, needs_kernels

from kfac2 import ops
from kfac2.ops import Window
from kfac2.ops.fold_products import Product, fold_products

pytestmark = anywhere
PLACES = Window.places(0)


def eye(*shape):
    return torch.eye(2, device=DEVICE).expand(*shape, 2, 2)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ops.covariances([eye()], [Window.places(0, groups=3)]), "divisible by groups = 3"),
        (lambda: ops.layer_maps([eye(1, 1, 1, 1)], [PLACES]), "at most three spatial axes"),
        (lambda: fold_products([Product([eye(), eye()])]), r"panel 1 of product 0 has shape \[2, 2\]"),
        (lambda: ops.cross_layer_sums([eye(1), eye(2)]), "expected all maps to have N = 1"),
    ],
)
def test_shapes_are_refused(call, message):
    with pytest.raises((RuntimeError, ValueError), match=message):
        call()


@needs_kernels
@pytest.mark.parametrize(
    "matrices, message",
    [
        (lambda: [eye()[0]], r"tensor 0 of shape \[d, d\] or \[q, d, d\] .*got \[2\]"),
        (lambda: [torch.zeros(1, 257, 257, device=DEVICE)], r"tensor 0 .* d from 1 to 256, got \[1, 257, 257\]"),
        (lambda: [eye(1), torch.ones(1, 2, 3, device=DEVICE)], r"tensor 1 of shape .*got \[1, 2, 3\]"),
        (lambda: [eye()[:0, :0]], r"d from 1 to 256, got \[0, 0\]"),
        (lambda: [eye(1), eye(1).double()], "one dtype, .* tensor 1 has another"),
        (lambda: [eye(1).half()], "of one dtype, float32 or float64, tensor 0"),
    ],
)
def test_what_the_eigendecomposition_cannot_do_is_refused(matrices, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.kfac2.eigendecompose(matrices())


@needs_cuda
def test_tensors_on_two_devices_are_refused():
    here, there = torch.randn(3, 2), torch.randn(3, 2, device=DEVICE)
    with pytest.raises(ValueError, match=r"tensors\[1\] must be on the device of tensors\[0\]"):
        ops.covariances([there, here], [PLACES] * 2)
    with pytest.raises(RuntimeError, match="expected tensor 1 on the device of tensor 0"):
        torch.ops.kfac2.covariances([there, here], PLACES.encode() * 2, [], 1.0, [])
    with pytest.raises(RuntimeError, match="expected tensor 1 on the device of tensor 0"):
        torch.ops.kfac2.eigendecompose([eye(1), torch.zeros(1, 2, 2)])

"""`factored_tikhonov_inverse`, `eigendecompose` and `precondition` of all layers."""

import cases
import pytest

HOW = ("paper", "torch", "kfac2")


@pytest.mark.parametrize("how", HOW)
def test_factored_tikhonov_inverse(compare, layer_set, how):
    compare(how, cases.factored_tikhonov_inverse, layer_set)


@pytest.mark.parametrize("how", HOW)
def test_eigendecompose(compare, layer_set, how):
    compare(how, cases.eigendecompose, layer_set)


@pytest.mark.parametrize("how", HOW)
def test_precondition(compare, layer_set, how):
    compare(how, cases.precondition, layer_set)

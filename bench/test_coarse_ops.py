"""`cross_layer_sums` and `coarse_fisher`: all pairs of layers."""

import cases
import pytest

HOW = ("paper", "torch", "kfac2")


@pytest.mark.parametrize("how", HOW)
def test_cross_layer_sums(compare, layer_set, how):
    compare(how, cases.cross_layer_sums, layer_set)


@pytest.mark.parametrize("how", HOW)
def test_coarse_fisher(compare, layer_set, how):
    compare(how, cases.coarse_fisher, layer_set)

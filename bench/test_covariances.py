"""`covariances` of all layers, and `input_covariance` of the three stages of a ResNet."""

import cases
import pytest

HOW = ("paper", "torch", "kfac2")


@pytest.mark.parametrize("how", HOW)
def test_covariances(compare, layer_set, how):
    compare(how, cases.covariances, layer_set)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("size", cases.CONVOLUTIONS)
def test_input_covariance(compare, batch, device, size, how):
    compare(how, cases.input_covariance, *cases.CONVOLUTIONS[size], batch, device)

"""`layer_maps` of all layers, and `channel_sums` of one tensor that is larger than the caches."""

import cases
import pytest

HOW = ("paper", "torch", "kfac2")


@pytest.mark.parametrize("how", HOW)
def test_layer_maps(compare, layer_set, how):
    compare(how, cases.layer_maps, layer_set)


@pytest.mark.parametrize("how", (*HOW, "x.sum(), one number"))
def test_channel_sums(compare, batch, device, how):
    compare(how, cases.channel_sums, batch, device)

"""Each op beside its rivals: of all layers of a network, and of single tensors."""

import cases
import pytest

HOW = ("paper", "torch", "kfac2")


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("op", cases.BY_LAYERS)
def test_all_layers(compare, layer_set, op, how):
    compare(how, cases.BY_LAYERS[op], layer_set)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("op, which", [(op, i) for op, builds in cases.SINGLE.items() for i in range(len(builds))])
def test_one_tensor(compare, pytestconfig, op, which, how):
    where = (pytestconfig.getoption("--batch"), pytestconfig.getoption("--device"))
    compare(how, cases.SINGLE[op][which], *where)

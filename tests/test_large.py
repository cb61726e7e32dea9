"""What is measured of large layers and networks on a device: that it runs at tiny sizes, and is what is predicted."""

import json

import contenders
import large
import networks
import pytest
import report
import roofline_nets
import torch
from compare import error
from layer_sets import shapes_of
from networks import NETWORKS
from test_bench import call

from kfac2.triangles import packed


def small_gpt2():
    return networks.GPT2(width=8, blocks=2, heads=2, words=11, places=6)


def words(size, generator):
    return torch.randint(11, (size, 6), generator=generator), torch.randint(11, (size, 6), generator=generator)


@pytest.mark.parametrize("name", contenders.LARGE)
def test_a_language_model_in_bfloat16_is_trained_by_each(name):
    """Its head is tied to the embedding, which K-FAC and Muon leave alone, and AdamW trains."""
    network = networks.Network("GPT-2", small_gpt2, words, networks.TOKENS, 2, torch.bfloat16)
    try:
        contender, x, y = contenders.prepared(name, network, 2, "cpu")
    except contenders.NotInstalledError as error:
        pytest.skip(str(error))
    seen = []
    contender.model.head.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    before = [p.detach().clone() for p in contender.model.parameters()]
    for kind in contender.at:
        contender.at[kind]()
        contender.step(x, y, contenders.nothing)
    assert set(seen) == {torch.bfloat16}
    assert all(
        p.isfinite().all() and not torch.equal(p, b) for p, b in zip(contender.model.parameters(), before, strict=True)
    )
    handled = {id(p) for g in contender.optimizers[0].param_groups for p in g["params"]}
    assert name in ("adamw-fused", "soap") or name.startswith("kfac2") or id(contender.model.head.weight) not in handled


@pytest.mark.parametrize(
    "name, net", [("resnet-50", roofline_nets.resnet_50(2)), ("gpt2-small", roofline_nets.gpt2_small(2))]
)
def test_the_large_networks_are_those_that_are_predicted(name, net):
    shapes = shapes_of(name, 2)
    shapes = shapes[:-1] if name == "gpt2-small" else shapes  # the head is tied to the embedding
    sizes = [sorted((s.d_in, s.d_out, s.rows, s.x, s.g) for s in some) for some in (shapes, net.shapes)]
    assert sizes[0] == sizes[1]
    with torch.device("meta"):
        model = NETWORKS[name].make()
    assert sum(p.numel() for p in model.parameters()) == net.parameters
    assert NETWORKS[name].is_large and f"{NETWORKS[name].title}, batch 2" == net.title


def test_large_layers_are_compared_by_every_route(tmp_path, monkeypatch):
    assert call(monkeypatch, report, "--tiny", "--out", tmp_path, "--parts", "large") == 0
    found = json.loads((tmp_path / "cpu.json").read_text())["large"]
    assert [result["group"] for result in found] == list(large.GROUPS)
    assert all(row["milliseconds"] for result in found for row in result["rows"])
    text = (tmp_path / "cpu.md").read_text()
    assert "kfac2 TF32" in text and "kernel, bf16" in text and "TFLOP/s" in text


@pytest.mark.parametrize("group", list(large.GROUPS)[:3])
def test_the_routes_of_large_layers_agree(group):
    for one in large.GROUPS[group]("cpu", True):
        ours, theirs = one.kfac2["fp32"](), one.torch["fp32"]()
        theirs = [theirs] if isinstance(theirs, torch.Tensor) else theirs
        theirs = [packed(whole[None]) for whole in theirs] if group.startswith("covariances") else theirs
        assert all(error(a.reshape(b.shape), b) < 1e-5 for a, b in zip(ours, theirs, strict=True))

"""How many ops of torch a step dispatches: by shapes of layers, not by layers."""

import dispatches
import pytest
import torch
import torch.nn as nn


def deep(layers, of_shape):
    """Layers of two shapes, which lose no signal."""
    torch.manual_seed(0)
    made = [of_shape(4, 4) for _ in range(layers)] + [of_shape(4, 6)]
    for layer in made:
        nn.init.orthogonal_(layer.weight.view(layer.weight.shape[0], -1))
    return nn.Sequential(*(one for layer in made for one in (layer, nn.Tanh())), nn.Flatten())


KINDS_OF_LAYERS = {
    "linear": (nn.Linear, (5, 4)),
    "conv": (lambda i, o: nn.Conv2d(i, o, 3, padding=1, bias=False), (5, 4, 3, 3)),
}
SETTINGS = [{}, {"inverse": "eigh"}, {"damping": 0.1, "kl_bound": None}, {"levels": 2}]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", KINDS_OF_LAYERS)
def test_more_layers_of_the_same_shapes_take_no_more_launches(name, settings):
    of_shape, shape = KINDS_OF_LAYERS[name]
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    few, many = (dispatches.counted(deep(n, of_shape), x, torch.arange(5), **settings) for n in (3, 30))
    for kind, found in few.items():
        assert 0 < many[kind].added <= found.added + 4, kind  # how stacks are put together follows their sizes
        assert many[kind].launches[dispatches.MODEL] > found.launches[dispatches.MODEL]


def test_views_and_memory_are_no_launches():
    with dispatches.Dispatches() as found:
        x = torch.empty(2, 3)
        x.view(6)[1:].unsqueeze(0)
        torch.ones(2, 2, device="meta").sum()
        (x * 2).add_(1)
    assert (found.launches.total(), found.others.total()) == (2, 6)


def test_the_table_is_written(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["dispatches.py", "--nets", "gpt2-small", "--lines", "3"])
    dispatches.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines if line][:3] == ["gpt2-small", "-" * 42, "all"]
    assert dispatches.SECOND_BACKWARD in lines[5] and len(lines) == 8

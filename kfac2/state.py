"""K-FAC's state as plain dicts of tensors and numbers, and back.

It lies outside the optimizer's per-parameter state, which `Optimizer.load_state_dict` would cast to the dtype of
the parameter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from kfac2.inverses import Inverses
from kfac2.layers import Layer
from kfac2.options import STRUCTURAL, Options
from kfac2.statistics import Statistics

_KEYS = ("iteration", "options", "layers", "dropped", "statistics", "inverses")
State = dict[str, Any]


def from_statistics(statistics: Statistics | None) -> State | None:
    """Write running averages, layers by name."""
    if statistics is None:
        return None
    factors = {layer.name: {"A": A, "G": statistics.G[layer]} for layer, A in statistics.A.items()}
    return {
        "updates": statistics.updates,
        "factors": factors,
        "input_sums": statistics.input_sums,
        "grad_sums": statistics.grad_sums,
    }


def to_statistics(state: State | None, layers: Sequence[Layer]) -> Statistics | None:
    """Read what `from_statistics` wrote."""
    if state is None:
        return None
    A, G = (
        {layer: _here(state["factors"][layer.name][key], layer) for layer in layers if layer.name in state["factors"]}
        for key in ("A", "G")
    )
    input_sums, grad_sums = (_here(state[key], layers[0]) for key in ("input_sums", "grad_sums"))
    return Statistics(state["updates"], A, G, input_sums, grad_sums)


def from_inverses(inverses: Inverses | None) -> State | None:
    """Copy inverses, layers by name: a step may overwrite them where they are."""
    if inverses is None:
        return None
    fine = {
        layer.name: {name: value.to(layer.factor_dtype, copy=True) for name, value in fields.items()}
        for layer, fields in inverses.fine.items()
    }
    return {"damping": inverses.damping, "fine": fine, "coarse": inverses.coarse}


def to_inverses(state: State | None, layers: Sequence[Layer]) -> Inverses | None:
    """Read what `from_inverses` wrote."""
    if state is None:
        return None
    fine = {
        layer: {name: _here(value, layer) for name, value in state["fine"][layer.name].items()}
        for layer in layers
        if layer.name in state["fine"]
    }
    return Inverses(state["damping"], fine, _here(state["coarse"], layers[0]))


def check(state: Mapping[str, Any], layers: Sequence[Layer], dropped: Sequence[str], options: Options) -> None:
    """Check that a state fits the model and the options that state depends on.

    Args:
        state: what `Preconditioner.state_dict` returned.
        layers: the layers handled now.
        dropped: names of layers given up during training so far.
        options: the options of now.

    Raises:
        ValueError: naming what does not fit.
    """
    missing = [key for key in _KEYS if key not in state]
    if missing:
        raise ValueError(f"state_dict must be one of kfac2, got one without {missing}")
    for name in STRUCTURAL:
        mine, theirs = getattr(options, name), state["options"][name]
        if theirs != mine:
            raise ValueError(f"state_dict must have been saved with {name}={mine!r}, got {theirs!r}")
    names = [layer.name for layer in layers]
    expected = [name for name in names if name not in state["dropped"]]
    if list(state["layers"]) != expected or not set(state["dropped"]) <= {*names, *dropped}:
        raise ValueError(
            f"state_dict must hold the layers {names}, got {list(state['layers'])} and {state['dropped']} left to SGD"
        )
    shapes = {layer.name: layer.matrix_shape for layer in layers}
    for name, factors in (state["statistics"] or {"factors": {}})["factors"].items():
        blocks, d_out, d_in = shapes[name]
        for key, d in (("A", d_in), ("G", d_out)):
            shape = tuple(factors[key].shape)
            if shape != (blocks, d, d):
                raise ValueError(f"state_dict must have {key} of {name} in shape {(blocks, d, d)}, got {shape}")


def _here(tensor: Tensor | None, layer: Layer) -> Any:
    """Copy a tensor to the layer's device, its dtype as it is."""
    return None if tensor is None else tensor.detach().clone().to(layer.weight.device)

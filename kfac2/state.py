"""What curvature keeps, as plain dicts of tensors and numbers, and back; layers by name.

It lies outside the optimizer's per-parameter state, which `Optimizer.load_state_dict` would cast to the dtype of
the parameter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kfac2.fine import Damping
from kfac2.inverses import Inverses, Solvers
from kfac2.layout import Layout
from kfac2.options import STRUCTURAL, CurvatureOptions
from kfac2.spread import by_batch, unknown
from kfac2.statistics import Averages
from kfac2.triangles import packed, packed_shape

KEYS = ("options", "layers", "dropped", "statistics", "inverses")
State = dict[str, Any]


def from_averages(layout: Layout, averages: Averages, solvers: Solvers) -> State | None:
    """Copy running averages; None before the first update."""
    if averages.updates == 0:
        return None
    factors = {
        layer.name: {"A": layout.view(averages.A, i).clone(), "G": layout.view(averages.G, i).clone()}
        for i, layer in enumerate(layout.layers)
        if averages.seen[i]
    }
    coarse = {name: tensor.clone() for name, tensor in zip(solvers.coarse.names, averages.coarse, strict=False)}
    state = {"updates": averages.updates, "factors": factors, **coarse}
    if averages.spread is not None:
        stacks = [by_batch(layout, side) for side in averages.spread]
        own = [torch.stack([layout.view(side, i) for side in stacks]) for i in range(len(layout.layers))]
        state["spread"] = {layer.name: numbers for layer, numbers in zip(layout.layers, own, strict=True)}
    return state


def to_averages(state: Mapping[str, Any], layout: Layout, solvers: Solvers) -> Averages:
    """Read what `from_averages` wrote, and which layers are in the coarse space."""
    averages = Averages.none(layout)
    in_coarse = tuple(bool(state["layers"][layer.name]["in_coarse"]) for layer in layout.layers)
    saved = state["statistics"]
    if saved is None:
        return replace(averages, in_coarse=in_coarse)
    for i, layer in enumerate(layout.layers):
        for key, stacks in (("A", averages.A), ("G", averages.G)):
            if layer.name in saved["factors"]:
                target, factor = layout.view(stacks, i), saved["factors"][layer.name][key]
                target.copy_(factor if factor.shape == target.shape else packed(factor))
    seen = tuple(layer.name in saved["factors"] for layer in layout.layers)
    coarse = tuple(_here(saved[name], layout) for name in solvers.coarse.names if name in saved)
    spread = _to_spread(saved["spread"], layout) if "spread" in saved else None
    return Averages(saved["updates"], averages.A, averages.G, seen, in_coarse, coarse, spread)


def _to_spread(saved: Mapping[str, Tensor], layout: Layout) -> Tensor:
    spread = unknown(layout)
    for i, layer in enumerate(layout.layers):
        for side, numbers in zip(spread, saved[layer.name], strict=True):
            layout.view(by_batch(layout, side), i).copy_(numbers)
    return spread


def from_inverses(held: Layout, inverses: Inverses | None, layout: Layout | None = None) -> State | None:
    """Copy inverses, in the dtype of the factors; of a layer that has none nothing.

    Args:
        held: of the layers whose inverses these are.
        inverses: the inverses.
        layout: of all layers, if there are others.
    """
    if inverses is None:
        return None
    layout = held if layout is None else layout
    usable = [layer for layer, number in zip(layout.layers, inverses.usable.tolist(), strict=True) if number]
    fine = {
        layer.name: {
            name: held.view(stacks, held.number(layer)).to(layer.factor_dtype, copy=True)
            for name, stacks in inverses.fields.items()
        }
        for layer in usable
        if layer in held.layers
    }
    return {
        "damping": [number.clone() if isinstance(number, Tensor) else number for number in inverses.damping],
        "fine": fine,
        "usable": [layer.name for layer in usable],
        "coarse": None if inverses.coarse is None else inverses.coarse.clone(),
        "observations": inverses.observations,
        "observed": [layer.name for i, layer in enumerate(layout.layers) if inverses.observed[i]],
    }


def to_inverses(state: State | None, layout: Layout, solvers: Solvers) -> Inverses | None:
    """Read what `from_inverses` wrote, of the layers that this process is to hold."""
    if state is None:
        return None
    held = solvers.division.held(layout)
    fields = solvers.fine.zeros(held)
    for i, layer in enumerate(held.layers):
        for name, value in state["fine"].get(layer.name, {}).items():
            held.view(fields[name], i).copy_(value)
    with_inverse = state["usable"] if "usable" in state else state["fine"]  # states of earlier versions lack it
    usable = layout.spans.new_tensor([layer.name in with_inverse for layer in layout.layers]).double()
    coarse = None if state["coarse"] is None else _here(state["coarse"], layout).double()
    damping = Damping(*state["damping"]).to(layout.device)
    return Inverses(
        damping,
        fields,
        usable.to(layout.device),
        coarse,
        solvers.fine.derived_of(held, fields, damping),
        None,
        state["observations"],
        tuple(layer.name in state["observed"] for layer in layout.layers),
    )


def check(
    state: Mapping[str, Any],
    keys: Sequence[str],
    layout: Layout,
    dropped: Sequence[str],
    options: CurvatureOptions,
    names: Sequence[str],
) -> None:
    """Check that a state fits the model and the options that state depends on.

    Args:
        state: what `state_dict` returned.
        keys: that it must have.
        layout: of the layers handled now.
        dropped: names of layers given up during training so far.
        options: the options of now.
        names: what the averages of the coarse space are called.

    Raises:
        ValueError: naming what does not fit.
    """
    missing = [key for key in keys if key not in state]
    if missing:
        raise ValueError(f"state_dict must be one of kfac2, got one without {missing}")
    has_coarse = any(name in (state["statistics"] or ()) for name in names)  # not where layers have just changed
    names = names if has_coarse else ()
    wanted = {"statistics": ("updates", "factors", *names), "inverses": ("damping", "fine", "observed", "observations")}
    for part, inner in wanted.items():
        missing = [key for key in inner if key not in (state[part] or inner)]
        if missing:
            raise ValueError(f"state_dict must be one of this version of kfac2, got {part} without {missing}")
    for name in STRUCTURAL:
        mine, theirs = getattr(options, name), state["options"].get(name)  # `coarse` came later
        if theirs != mine:
            raise ValueError(f"state_dict must have been saved with {name}={mine!r}, got {theirs!r}")
    options.with_saved(state["options"])
    layers = [layer.name for layer in layout.layers]
    expected = [name for name in layers if name not in state["dropped"]]
    if list(state["layers"]) != expected or not set(state["dropped"]) <= {*layers, *dropped}:
        raise ValueError(
            f"state_dict must hold the layers {layers}, got {list(state['layers'])} and {state['dropped']} left to SGD"
        )
    shapes = {layer.name: layer.matrix_shape for layer in layout.layers}
    for name, factors in (state["statistics"] or {"factors": {}})["factors"].items():
        blocks, d_out, d_in = shapes[name]
        for key, d in (("A", d_in), ("G", d_out)):
            shape, triangle = tuple(factors[key].shape), (blocks, *packed_shape(d))
            if shape not in (triangle, (blocks, d, d)):  # whole ones were saved by earlier versions
                raise ValueError(f"state_dict must have {key} of {name} in shape {triangle}, got {shape}")


def _here(tensor: Tensor, layout: Layout) -> Tensor:
    """Copy a tensor to the device of the layers, its dtype as it is."""
    return tensor.detach().clone().to(layout.device)

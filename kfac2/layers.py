"""Which modules of a model K-FAC handles; why others are left alone."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized

from kfac2.kinds import KINDS, Layer

FROZEN = "its weight is frozen"
SKIPPED = "it is named by skip"
UNGROUPED = "its weight is in no parameter group"


class Left(NamedTuple):
    """A module of a handled kind that is left alone.

    Attributes:
        name: in the model.
        module: the module.
        reason: why.
    """

    name: str
    module: nn.Module
    reason: str


class Found(NamedTuple):
    """The layers of a model.

    Attributes:
        layers: those that are handled, in the order of `model.named_modules()`.
        left: those that are not.
        places: of the handled modules and of those that they are in: the children of a module, a name among them, and
            who has it.
    """

    layers: list[Layer]
    left: list[Left]
    places: list[tuple[dict[str, nn.Module | None], str, nn.Module]]

    def has_changed(self) -> bool:
        """Tell whether a module, a weight or a bias is another now, or was frozen or unfrozen."""
        for layer in self.layers:
            if not layer.is_current():
                return True
        for children, name, module in self.places:
            if children.get(name) is not module:
                return True
        return any(
            reason == FROZEN and module.weight is not None and module.weight.requires_grad
            for _, module, reason in self.left
        )


def find_layers(
    model: nn.Module,
    trained: Collection[nn.Parameter],
    skip: Iterable[str],
    coarse_max_groups: int,
    is_first: bool = True,
) -> Found:
    """Return the handled layers, and why others are left alone.

    Args:
        model: the model.
        trained: the parameters that the optimizer holds.
        skip: full names of modules, or regular expressions that match them in full.
        coarse_max_groups: above so many groups a convolution gives one summed map.
        is_first: whether each of `skip` must match; what it has matched may be gone later.

    Raises:
        TypeError: if `skip` is not made of strings.
        ValueError: if an entry of `skip` matches no module, or layers are on two devices.
    """
    patterns = _skip_patterns(model, skip, is_first)
    owners = _owners(model)
    ids = {id(parameter) for parameter in trained}
    layers: list[Layer] = []
    left = []
    for name, module in model.named_modules():
        kind = next((kind for kind in KINDS if isinstance(module, kind.modules)), None)
        if kind is None:
            continue
        reason = _reason_against(kind, module, owners, ids)
        if any(pattern.fullmatch(name) for pattern in patterns):
            reason = SKIPPED
        if reason is None:
            if any(layer.weight is module.weight for layer in layers):
                continue  # one layer for a weight, however many modules have it
            bias = module.bias
            is_trained = bias is not None and bias.requires_grad and id(bias) in ids
            layers.append(kind(name, module, bias if is_trained else None, coarse_max_groups))
        elif module.weight is not None:
            left.append(Left(name, module, reason))
    for layer in layers:
        if layer.weight.device != layers[0].weight.device:
            raise ValueError(
                f"model must have all handled layers on one device, got {layers[0].name} on "
                f"{layers[0].weight.device} and {layer.name} on {layer.weight.device}"
            )
    return Found(layers, left, _places(model, layers))


def _places(model: nn.Module, layers: Iterable[Layer]) -> list[tuple[dict[str, nn.Module | None], str, nn.Module]]:
    places = {}
    for layer in layers:
        parent = model
        for name in layer.name.split(".") if layer.name else ():
            child = parent.get_submodule(name)
            places[id(parent), name] = (parent._modules, name, child)
            parent = child
    return list(places.values())


def why_it_left(layer: Layer, found: Found) -> str:
    """Say why a layer is none any more, and what follows, to go on "it leaves K-FAC" with."""
    left = next((left for left in found.left if left.name == layer.name), None)
    if left is None:
        return ": it is no part of the model any more"
    if left.reason != UNGROUPED:
        return f", and takes its plain gradient: {left.reason}"
    if left.module.weight is layer.weight:
        return ", and is trained no more: its weight is in no parameter group any more"
    return (
        ", and is trained no more: its weight was replaced by another tensor, which is in no parameter group; add it "
        "to one, or build the optimizer anew"
    )


def _skip_patterns(model: nn.Module, skip: Iterable[str], must_match: bool) -> list[re.Pattern[str]]:
    entries = [skip] if isinstance(skip, str) else list(skip)
    names = [name for name, _ in model.named_modules()]
    patterns = []
    for entry in entries:
        if not isinstance(entry, str):
            raise TypeError(
                f"skip must hold names or regular expressions, got {entry!r} of type {type(entry).__name__}"
            )
        pattern = re.compile(re.escape(entry) if entry in names else entry)
        if must_match and not any(pattern.fullmatch(name) for name in names):
            raise ValueError(
                f"skip must name modules of the model in full, got {entry!r}, which matches none "
                "(to skip what is inside a container, write for example 'encoder\\..*')"
            )
        patterns.append(pattern)
    return patterns


def _owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Return the modules that have each parameter, by its id, and the names that they have it under."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, name))
    return owners


def _reason_against(
    kind: type[Layer], module: nn.Module, owners: dict[int, list[tuple[nn.Module, str]]], trained: Collection[int]
) -> str | None:
    """Return the reason why a layer is left to SGD, or None where it is handled."""
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention uses its out_proj inside of one function, where it is not seen"
    if is_parametrized(module) or "weight" not in module._parameters:
        return "its weight is parametrised"
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    if isinstance(weight, UninitializedParameter):
        return "its weight has no shape yet (run the lazy module once before building the optimizer)"
    if weight is None or not weight.requires_grad:
        return FROZEN
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}"
    if id(weight) not in trained:
        return UNGROUPED
    others = [owner for owner, name in owners[id(weight)] if not (name == "weight" and isinstance(owner, kind.modules))]
    if others:
        return f"its weight is tied to another module's, a {type(others[0]).__name__}"
    sharing = [owner._parameters["bias"] for owner, _ in owners[id(weight)]]
    if any(other is not bias for other in sharing) or (bias is not None and len(owners[id(bias)]) != len(sharing)):
        return "its weight or its bias is tied to another module's, but not both"
    return None

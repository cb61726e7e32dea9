"""Which modules of a model K-FAC handles; why others are left alone."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized

from kfac2.kinds import KINDS, Layer

logger = logging.getLogger("kfac2")


def find_layers(
    model: nn.Module, trained: Collection[nn.Parameter], skip: Iterable[str], coarse_max_groups: int
) -> list[Layer]:
    """Return the handled layers in the order of `model.named_modules()`; log why others are left to SGD.

    Args:
        model: the model.
        trained: the parameters that the optimizer holds.
        skip: full names of modules, or regular expressions that match them in full.
        coarse_max_groups: above so many groups a convolution gives one summed map.

    Raises:
        TypeError: if `model` is no module, or `skip` is not made of strings.
        ValueError: if an entry of `skip` matches no module, no layer is left, or layers are on two devices.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    patterns = _skip_patterns(model, skip)
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    ids = {id(parameter) for parameter in trained}
    layers = []
    for name, module in model.named_modules():
        kind = next((kind for kind in KINDS if isinstance(module, kind.modules)), None)
        if kind is None:
            continue
        reason = _reason_against(kind, module, owners, ids)
        if any(pattern.fullmatch(name) for pattern in patterns):
            reason = "it is named by skip"
        if reason is None:
            bias = module.bias
            is_trained = bias is not None and bias.requires_grad and id(bias) in ids
            layers.append(kind(name, module, bias if is_trained else None, coarse_max_groups))
        elif module.weight is not None:
            logger.warning("%s (%s) is left to SGD: %s", name or "the model", type(module).__name__, reason)
    if not layers:
        raise ValueError(
            "model must have a Linear or Conv layer that K-FAC can handle (trainable weight, not skipped), "
            f"got none in {type(model).__name__}"
        )
    for layer in layers:
        if layer.weight.device != layers[0].weight.device:
            raise ValueError(
                f"model must have all handled layers on one device, got {layers[0].name} on "
                f"{layers[0].weight.device} and {layer.name} on {layer.weight.device}"
            )
    return layers


def _skip_patterns(model: nn.Module, skip: Iterable[str]) -> list[re.Pattern[str]]:
    entries = [skip] if isinstance(skip, str) else list(skip)
    names = [name for name, _ in model.named_modules()]
    patterns = []
    for entry in entries:
        if not isinstance(entry, str):
            raise TypeError(
                f"skip must hold names or regular expressions, got {entry!r} of type {type(entry).__name__}"
            )
        pattern = re.compile(re.escape(entry) if entry in names else entry)
        if not any(pattern.fullmatch(name) for name in names):
            raise ValueError(
                f"skip must name modules of the model in full, got {entry!r}, which matches none "
                "(to skip what is inside a container, write for example 'encoder\\..*')"
            )
        patterns.append(pattern)
    return patterns


def _reason_against(kind: type[Layer], module: nn.Module, owners: Counter[int], trained: Collection[int]) -> str | None:
    """Return the reason why a layer is left to SGD, or None where it is handled."""
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention calls its out_proj without running hooks"
    if is_parametrized(module) or "weight" not in module._parameters:
        return "its weight is parametrised"
    if type(module).forward not in {cls.forward for cls in kind.modules}:
        return "its class has a forward of its own"
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    if isinstance(weight, UninitializedParameter):
        return "its weight has no shape yet (run the lazy module once before building the optimizer)"
    if weight is None or not weight.requires_grad:
        return "its weight is frozen"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}"
    if id(weight) not in trained:
        return "its weight is in no parameter group"
    if owners[id(weight)] > 1 or (bias is not None and owners[id(bias)] > 1):
        return "its parameters are tied to another module's"
    return kind.reason_against(module)

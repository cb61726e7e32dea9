"""Parameter groups and rates as users write them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from kfac2.descent import Rate
from kfac2.kinds import Layer
from kfac2.layers import FROZEN, Found
from kfac2.options import NUMBER, check_option


def as_groups(params: Iterable[Any]) -> list[dict[str, Any]]:
    """Write parameters, or groups of them, as groups that hold lists."""
    entries = list(params)
    groups = entries if entries and isinstance(entries[0], dict) else [{"params": entries}]
    result = []
    for group in groups:
        members = group["params"]
        members = [members] if isinstance(members, Tensor) else list(members)
        named = [member for member in members if isinstance(member, tuple)]
        result.append({**group, "params": [p for _, p in named] if named else members})
    return result


def handled_by(found: Found) -> set[int]:
    """Return the ids of the parameters that are K-FAC's, once they are no longer frozen."""
    modules = [layer.module for layer in found.layers]
    modules += [left.module for left in found.left if left.reason == FROZEN]
    return {id(parameter) for module in modules for parameter in (module.weight, module.bias)}


def check_group(settings: dict[str, Any]) -> None:
    """Check the hyper-parameters of a group."""
    for name in ("lr", "momentum", "weight_decay", "rest_lr", "eps"):
        value = settings[name].item() if isinstance(settings[name], Tensor) else settings[name]
        check_option(name, value, NUMBER, lambda v: 0 <= v < float("inf"), "a number of at least 0")
    for value in settings["betas"]:
        check_option("betas", value, NUMBER, lambda v: 0 <= v < 1, "two numbers in [0, 1)")
    if not isinstance(settings["nesterov"], bool):
        raise TypeError(f"nesterov must be True or False, got {settings['nesterov']!r}")
    if settings["nesterov"] and settings["momentum"] == 0:
        raise ValueError("nesterov must be False without momentum, got nesterov=True with momentum=0")


def rates_of(lr: Rate | Mapping[str, float] | None, names: Sequence[str], is_needed: bool) -> Callable[[Layer], Rate]:
    """Return what gives η of a layer.

    Args:
        lr: one for all, or one for each layer by name; None: 1.
        names: of the layers.
        is_needed: whether it must not be None.

    Raises:
        ValueError: if it is missing or negative.
        TypeError: if it is no number.
        KeyError: if a mapping lacks a layer.
    """
    if lr is None:
        if is_needed:
            raise ValueError("lr must be given, since the KL clip depends on it; got None (or set kl_clip=None)")
        lr = 1.0
    for rate in [lr[name] for name in names] if isinstance(lr, Mapping) else [lr]:
        if not isinstance(rate, Tensor):
            check_option("lr", rate, NUMBER, lambda v: v >= 0, "a number of at least 0")
    return lambda layer: lr[layer.name] if isinstance(lr, Mapping) else lr


def settings_of(groups: Iterable[Mapping[str, Any]]) -> dict[str, object]:
    """Return the settings of groups by name, for comparison; numbers that lie on a device are read."""
    return {
        f"{name} of group {number}": float(value) if isinstance(value, Tensor) else value
        for number, group in enumerate(groups)
        for name, value in group.items()
        if name not in ("params", "kfac")
    }

"""What `torch.distributed.checkpoint.state_dict` wants of an optimizer.

Its `get_optimizer_state_dict` keeps `state` and `param_groups` of a state dict and nothing else, and asks an optimizer
that has no state yet to make some, by a step along gradients of zeros at a rate of 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

Groups = Sequence[Mapping[str, Any]]


def in_groups_too(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict whose first group has K-FAC's state, too: the same object, so that it is saved once.

    Without statistics there is none: what is read into the groups of a new optimizer then lacks it, and is refused.
    """
    if state_dict["kfac"]["statistics"] is None:
        return state_dict
    first, *others = state_dict["param_groups"]
    return {**state_dict, "param_groups": [{**first, "kfac": state_dict["kfac"]}, *others]}


def out_of_groups(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict as `torch.optim` wants it, K-FAC's state beside the groups.

    Raises:
        ValueError: if it has none.
    """
    groups = [dict(group) for group in state_dict.get("param_groups", ())]
    states = [group.pop("kfac") for group in groups if "kfac" in group]
    state = state_dict.get("kfac", states[0] if states else None)
    if state is None:
        raise ValueError(
            "state_dict must be one of kfac2.KFAC, with K-FAC's state in 'kfac' or in the first of 'param_groups', got "
            f"one with the keys {sorted(state_dict)} (from torch.distributed.checkpoint: flattened, of an optimizer "
            "without statistics, or read by load() into the state of one)"
        )
    return {**state_dict, "param_groups": groups, "kfac": state}


def is_for_its_state(groups: Groups, state: Mapping[Tensor, Any]) -> bool:
    """Tell whether a step is asked for only to make state: the first one, all rates 0, all gradients zeros."""
    if state or any(float(group["lr"]) != 0 for group in groups):
        return False
    gradients = [parameter.grad for group in groups for parameter in group["params"] if parameter.requires_grad]
    return all(gradient is not None and not gradient.any() for gradient in gradients)

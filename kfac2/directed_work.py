"""What a step in the space of directions is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfac2.brought import brought
from kfac2.descent import Rate, State
from kfac2.divergence import KeptPass
from kfac2.kinds import Layer
from kfac2.processes import Processes


class Settings(NamedTuple):
    """η and μ of each layer, float64 on the device."""

    rates: Tensor
    momentum: Tensor

    @staticmethod
    def of(groups: Sequence[Mapping[str, Any]], device: torch.device) -> Settings:
        """Read them from the group of each layer's weight."""
        return Settings(*(_column([group[name] for group in groups], device) for name in ("lr", "momentum")))


def _column(values: Sequence[Rate], device: torch.device) -> Tensor:
    if not any(isinstance(value, Tensor) for value in values):
        return brought(values, torch.float64, device)  # type: ignore[arg-type]
    return torch.stack([torch.as_tensor(value, device=device).double().reshape(()) for value in values])


class Work(NamedTuple):
    """What a step is made of.

    Attributes:
        passes: kept rows of this iteration; this process may have none.
        layers: that have a fine direction, in `.grad`.
        gradient: gives ∇ of a layer, one dimension.
        groups: of the optimizer: `lr`, `momentum` and `weight_decay`.
        state: the optimizer's, whose `momentum_buffer` is d, the last update.
        tau: τ; None: 3.
        bound: K; the step's ηc holds to cᵀZᵀFZc ≤ ℓ² K/5, with the signal's length ℓ. None: to nothing.
        factor: of all rates.
        found: on the device, 1 where the step is to be skipped; None where it is not.
        processes: whose rows count together.
        has_rows: whether some process has rows.
    """

    passes: Sequence[KeptPass]
    layers: list[Layer]
    gradient: Callable[[Layer], Tensor]
    groups: Sequence[Mapping[str, Any]]
    state: State
    tau: float | None
    bound: float | None
    factor: Rate
    found: Tensor | None
    processes: Processes
    has_rows: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layers."""
        return tuple(layer.name for layer in self.layers)

    def gradients(self) -> list[Tensor]:
        """Return ∇ of all layers."""
        return [self.gradient(layer) for layer in self.layers]

    def parameters(self) -> dict[int, Tensor]:
        """Return the parameters of the layers that have a gradient, by id."""
        parameters = (p for layer in self.layers for p in (layer.weight, layer.bias) if p is not None)
        return {id(p): p for p in parameters if p.grad is not None}

    def settings(self) -> Settings:
        """Return η and μ of the layers."""
        groups = self._groups()
        return Settings.of([groups[id(layer.weight)] for layer in self.layers], self.layers[0].weight.device)

    def last_updates(self, was_taken: bool) -> dict[int, Tensor | None]:
        """Return d of the parameters, by id.

        Args:
            was_taken: whether the last step was one in the space. One level's without momentum is not kept: the buffer
                is then that of a step long ago.
        """
        groups = self._groups()
        return {
            key: self.state[p].get("momentum_buffer") if was_taken or groups[key]["momentum"] else None
            for key, p in self.parameters().items()
        }

    def _groups(self) -> dict[int, Mapping[str, Any]]:
        return {id(p): group for group in self.groups for p in group["params"]}

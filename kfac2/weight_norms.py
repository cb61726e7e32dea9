"""How large the weights of layers are, with a floor: the scale of a step where the Fisher gives none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfac2.kinds import Layer

FLOOR = 1e-3  # r


class WeightNorms:
    """The norms |W_i| of some layers, weight and bias together.

    Args:
        layers: the layers.
        device: theirs.

    Attributes:
        parameters: their weights and biases.
        floors: r √n_i of a layer of n_i numbers, float64, (L,).
    """

    def __init__(self, layers: Sequence[Layer], device: torch.device) -> None:
        parts = [(i, p) for i, layer in enumerate(layers) for p in (layer.weight, layer.bias) if p is not None]
        self.parameters = [parameter for _, parameter in parts]
        self._count = len(layers)
        self._layer_of_part = torch.tensor([i for i, _ in parts], device=device)
        counts = torch.tensor([p.numel() for p in self.parameters], dtype=torch.float64, device=device)
        self.floors = FLOOR * self._added(counts).sqrt()

    def _added(self, parts: Tensor) -> Tensor:
        return parts.new_zeros(self._count).index_add_(0, self._layer_of_part, parts)

    @torch.no_grad()
    def now(self) -> Tensor:
        """Take |W_i| as the weights are now, float64, (L,)."""
        norms = torch._foreach_norm(self.parameters)
        return self._added(torch.stack(norms).double().square()).sqrt()

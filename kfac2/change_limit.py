"""A limit of each layer's direction: a share of its weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kfac2.layout import Layout

FLOOR = 1e-3  # r


class Limits(NamedTuple):
    """The limits of one step, |v_i| ≤ max(ρ |W_i|, r √n_i); infinity for a layer without statistics.

    Attributes:
        weight_norms: |W_i|, float64, (L,).
        values: the limits, float64, (L,).
        share: ρ.
        seen: by layer, whether it has statistics.
    """

    weight_norms: Tensor
    values: Tensor
    share: float
    seen: tuple[bool, ...]


class _Weights:
    """The weights and biases of all layers, and how many numbers there are of each layer."""

    def __init__(self, layout: Layout) -> None:
        parts = [(i, p) for i, layer in enumerate(layout.layers) for p in (layer.weight, layer.bias) if p is not None]
        self.layout = layout
        self._parameters = [parameter.detach() for _, parameter in parts]
        self._layer_of_part = torch.tensor([i for i, _ in parts], device=layout.device)
        counts = torch.tensor([p.numel() for p in self._parameters], dtype=torch.float64, device=layout.device)
        self.floors = FLOOR * self._added(counts).sqrt()

    def _added(self, parts: Tensor) -> Tensor:
        return parts.new_zeros(len(self.layout.layers)).index_add_(0, self._layer_of_part, parts)

    def norms(self) -> Tensor:
        """Take |W_i| as the weights are now."""
        norms = torch._foreach_norm(self._parameters)
        return self._added(torch.stack([norm.double() for norm in norms]).square()).sqrt()


class ChangeLimit:
    """Holds each layer's direction to a share of its weights: |v_i| ≤ max(ρ |W_i|, r √n_i), norms of weight and bias.

    Where the Fisher is nearly nothing (layers that hardly pass a signal, or saturated ones) the divergence bounds no
    step in the parameters. The floor r √n_i, which AdamW at the rate r would take, lets weights leave 0. Norms of the
    weights are taken at each statistics update: they change little from one to the next. It is `shift_and_scale` that
    shortens the directions.

    Attributes:
        current: the limits of the last step; later ones overwrite them in place, since a CUDA graph reads them there.
        norms: |v_i| of the last step, before the limit.
    """

    def __init__(self) -> None:
        self.current: Limits | None = None
        self.norms: Tensor | None = None
        self._weights: _Weights | None = None

    @property
    def names(self) -> list[str]:
        """Names of the layers that the limits are of."""
        return [] if self._weights is None else [layer.name for layer in self._weights.layout.layers]

    def prepared(self, layout: Layout, share: float | None, seen: tuple[bool, ...], renew: bool) -> Limits | None:
        """Return the limits of a step; commit nothing.

        Args:
            layout: of the layers.
            share: ρ; None: no limits.
            seen: by layer, whether it has statistics.
            renew: whether the norms of the weights are taken anew.
        """
        if share is None:
            return None
        weights = self._weights_of(layout)
        last = self.current
        if last is not None and not renew and (last.share, last.seen) == (share, seen):
            return last
        return self._limits(weights, weights.norms() if last is None or renew else last.weight_norms, share, seen)

    def _weights_of(self, layout: Layout) -> _Weights:
        if self._weights is None or self._weights.layout is not layout:
            self._weights, self.current = _Weights(layout), None
        return self._weights

    def _limits(self, weights: _Weights, norms: Tensor, share: float, seen: tuple[bool, ...]) -> Limits:
        values = torch.maximum(share * norms, weights.floors)
        return Limits(norms, torch.where(torch.tensor(seen, device=norms.device), values, torch.inf), share, seen)

    def commit(self, limits: Limits | None, norms: Tensor | None) -> None:
        """Go on with what `prepared` returned.

        Args:
            limits: those of the step.
            norms: |v_i|.
        """
        self.norms = None if limits is None else norms
        if self.current is None or limits is None:
            self.current = limits
        elif limits is not self.current:
            for kept, value in zip(self.current[:2], limits[:2], strict=True):
                kept.copy_(value)
            self.current = self.current._replace(share=limits.share, seen=limits.seen)

    # -- state ----------------------------------------------------------------------------------------------

    def state(self, layout: Layout) -> Tensor | None:
        """Copy |W_i| of the layers with statistics, (number of these,); None where the next step takes them anew."""
        if self.current is None or self._weights is None or self._weights.layout is not layout:
            return None
        return self.current.weight_norms[torch.tensor(self.current.seen, device=self.current.values.device)]

    def load(self, state: Tensor | None, layout: Layout, share: float | None, seen: tuple[bool, ...]) -> None:
        """Go on from what `state` returned; None: the norms are taken anew.

        Args:
            state: |W_i| of the layers with statistics.
            layout: of the layers.
            share: ρ, or None.
            seen: by layer, whether it has statistics.
        """
        limits = None
        if share is not None and any(seen):
            weights = self._weights_of(layout)
            norms = weights.norms()
            if state is not None:
                norms[torch.tensor(seen, device=norms.device)] = state.to(norms)
            limits = self._limits(weights, norms, share, seen)
        self.commit(limits, None)

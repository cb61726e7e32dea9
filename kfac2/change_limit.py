"""A limit of each layer's direction: a share of its weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kfac2.brought import brought
from kfac2.layout import Layout
from kfac2.weight_norms import WeightNorms


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
        self._weights: WeightNorms | None = None
        self._layout: Layout | None = None  # that they are of

    @property
    def names(self) -> list[str]:
        """Names of the layers that the limits are of."""
        return [] if self._layout is None else [layer.name for layer in self._layout.layers]

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
        return self._limits(weights, weights.now() if last is None or renew else last.weight_norms, share, seen)

    def _weights_of(self, layout: Layout) -> WeightNorms:
        if self._weights is None or self._layout is not layout:
            self._weights, self._layout, self.current = WeightNorms(layout.layers, layout.device), layout, None
        return self._weights

    def _limits(self, weights: WeightNorms, norms: Tensor, share: float, seen: tuple[bool, ...]) -> Limits:
        values = torch.maximum(share * norms, weights.floors)
        return Limits(norms, torch.where(brought(seen, torch.bool, norms.device), values, torch.inf), share, seen)

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
        if self.current is None or self._layout is not layout:
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
            norms = weights.now()
            if state is not None:
                norms[torch.tensor(seen, device=norms.device)] = state.to(norms)
            limits = self._limits(weights, norms, share, seen)
        self.commit(limits, None)

"""What holds a step: a measured divergence, and a share of each layer's weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfac2.kinds import Layer


class ChangeLimit:
    """Holds each layer's direction to a share of its weights: |v_i| ≤ max(ρ |W_i|, r √n_i), norms of weight and bias.

    Where the Fisher is nearly nothing (layers that hardly pass a signal, or saturated ones) the divergence bounds no
    step in the parameters. The floor r √n_i, which AdamW at the rate r would take, lets weights leave 0.

    Args:
        layers: the layers.

    Attributes:
        layers: the layers.
        weight_norms: |W_i|, (L,), as of the last statistics update: weights change little from one to the next.
        norms: |v_i| of the last step, before the limit.
    """

    FLOOR = 1e-3  # r

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = list(layers)
        self._parts = [(i, p) for i, layer in enumerate(layers) for p in (layer.weight, layer.bias) if p is not None]
        device = layers[0].weight.device
        self._layer_of_part = torch.tensor([i for i, _ in self._parts], device=device)
        counts = torch.tensor([p.numel() for _, p in self._parts], dtype=torch.float32, device=device)
        self._count = len(layers)
        self._floors = self.FLOOR * self._added(counts).sqrt()
        self.weight_norms: Tensor | None = None
        self.norms: Tensor | None = None

    def _added(self, parts: Tensor) -> Tensor:
        return parts.new_zeros(self._count).index_add_(0, self._layer_of_part, parts)

    def _norms(self, tensors: list[Tensor | None]) -> Tensor:
        """Norms by layer of one tensor for each part; one that is not there counts nothing."""
        norms = iter(torch._foreach_norm([tensor for tensor in tensors if tensor is not None]))
        zero = self._floors.new_zeros(())
        return self._added(torch.stack([zero if t is None else next(norms).float() for t in tensors]).square()).sqrt()

    def go_on_with(self, weight_norms: Tensor) -> None:
        """Take norms of the weights, to where a CUDA graph reads the last ones."""
        if self.weight_norms is None:
            self.weight_norms = torch.zeros_like(self._floors)
        self.weight_norms.copy_(weight_norms)

    def apply(self, share: float, renew: bool, at_once: bool) -> None:
        """Shorten the directions, which stand in `.grad`.

        Args:
            share: ρ.
            renew: whether the norms of the weights are taken anew.
            at_once: whether the host may wait for the norms.
        """
        if renew or self.weight_norms is None:
            self.go_on_with(self._norms([p.detach() for _, p in self._parts]))
        assert self.weight_norms is not None
        gradients = [p.grad for _, p in self._parts]
        if all(gradient is None for gradient in gradients):
            return
        limits = torch.maximum(share * self.weight_norms, self._floors)
        self.norms = self._norms(gradients)
        factors = torch.where(self.norms > limits, limits / self.norms, 1.0)
        if not at_once or bool((factors < 1).any()):
            of_parts = zip(gradients, factors[self._layer_of_part].unbind(), strict=True)
            there = [(gradient, factor) for gradient, factor in of_parts if gradient is not None]
            torch._foreach_mul_([gradient for gradient, _ in there], [factor for _, factor in there])


class Bound:
    """The factor that holds the step to the bound. It falls at once, and rises slowly.

    Attributes:
        factor: by which the learning rate is multiplied: a number, or on a CUDA device a tensor, so that nothing waits.
        squared: the last measurement, or None.
    """

    RISE = 1.5  # the factor grows by this at most from one measurement to the next

    def __init__(self) -> None:
        self.factor: float | Tensor = 1.0
        self.squared: Tensor | None = None

    def go_on_with(self, factor: float) -> None:
        """Take a factor, to where a CUDA graph reads the last one."""
        if isinstance(self.factor, Tensor):
            self.factor.fill_(factor)
        else:
            self.factor = factor

    def measured(self, squared: Tensor, bound: float, at_once: bool) -> None:
        """Take a measurement into account.

        Args:
            squared: η² dᵀFd of the step as it would be with the factor 1.
            bound: K.
            at_once: whether the host may wait for it.
        """
        self.squared = squared
        wanted = (bound / squared.clamp(min=1e-300)).sqrt().nan_to_num(nan=1.0).clamp(max=1.0)
        if at_once:
            self.factor = min(float(wanted), self.RISE * float(self.factor))
        elif isinstance(self.factor, Tensor):  # where a CUDA graph reads it
            self.factor.copy_(torch.minimum(wanted.to(self.factor), self.RISE * self.factor))
        else:
            self.factor = wanted.clamp(max=self.RISE * self.factor).float()

"""Where the gain of the second level comes from: its step in a window of steps only, and how large it is."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from training import finite

import kfac2
from experiments.settings import Settings

_EACH_STEP, _EVERY = 200, 10  # all of the first steps are measured, and then every tenth


class Follower:
    """Takes the coarse step in its window only, and measures it beside the fine one.

    From the gradients ∇_i and what the optimizer made of them, ν v_i, it takes ν (the KL clip's) and the coarse
    step c = (F_coarse + λ I)⁻¹ y, with the F_coarse of the last inverses; what is left of v_i is the fine step.
    """

    def __init__(self, model: nn.Module, optimizer: kfac2.KFAC, settings: Settings) -> None:
        self.rows: list[dict[str, float | None]] = []  # of each step that was measured
        self._optimizer, self._settings = optimizer, settings
        self._layers = [list(model.get_submodule(name).parameters(recurse=False)) for name in optimizer.layers]
        self._inverse = torch.empty(0)  # (F_coarse + λ I)⁻¹

    @torch.no_grad()
    def step(self, number: int, logits: Tensor) -> None:
        """Take a step, with ω = 1 inside the window and 0 outside, and measure it."""
        assert self._settings.inv_every and self._settings.damping
        first, last = self._settings.coarse_from, self._settings.coarse_until
        weight = float(first <= number and (last is None or number < last))
        self._optimizer.options.coarse_weight = weight
        before = self._gradients()
        self._optimizer.step()
        if number % self._settings.inv_every == 0:  # as the optimizer has it: eigenvalues floored at 0
            values, vectors = torch.linalg.eigh(self._optimizer.coarse_fisher().double())
            self._inverse = vectors / (values.clamp_min(0) + self._settings.damping) @ vectors.mT
        if number >= _EACH_STEP and number % _EVERY:
            return
        ratio, clip = self._ratio(before, weight)
        weights = [layer[0].double() for layer in self._layers[:-1]]  # of hidden layers
        all_ones = torch.stack([w.sum().square() / (w.numel() * w.square().sum()) for w in weights]).mean().item()
        scale = logits.double().square().mean().sqrt().item()
        found = {"coarse_to_fine": ratio, "clip": clip, "all_ones": all_ones, "logits": scale}
        self.rows.append({"step": number, **{name: finite(value) for name, value in found.items()}})

    def _ratio(self, before: list[list[Tensor]], weight: float) -> tuple[float, float]:
        """Return |coarse step| / |fine step|, of all handled weights as the step is or would be with ω = 1, and ν."""
        shifts = self._inverse @ torch.stack([_total([grad.sum() for grad in layer]) for layer in before])
        after = self._gradients()
        clip, layers = self._clip(before, after), list(zip(after, shifts, strict=True))
        fine = [(g.double() / clip - weight * shift).square().sum() for layer, shift in layers for g in layer]
        coarse = [shift.square() * sum(g.numel() for g in layer) for layer, shift in layers]
        return (_total(coarse) / _total(fine)).sqrt().item(), clip

    def _clip(self, before: list[list[Tensor]], after: list[list[Tensor]]) -> float:
        """ν. Σ η²|ν v_i · ∇_i| is ν Σ; where Σ is above κ it is √(κ Σ), above κ too, and ν is κ / (ν Σ)."""
        kappa, rate = self._settings.kl_clip, self._optimizer.param_groups[0]["lr"]
        layers = [zip(*layer, strict=True) for layer in zip(after, before, strict=True)]
        products = [_total([(a.double() * b).sum() for a, b in layer]).abs() for layer in layers]
        clipped = rate**2 * torch.stack(products).sum().item()
        return min(1.0, kappa / clipped) if kappa is not None and clipped > 0 else 1.0

    def _gradients(self) -> list[list[Tensor]]:
        return [[p.grad.clone() for p in layer if p.grad is not None] for layer in self._layers]


def _total(numbers: list[Tensor]) -> Tensor:
    return torch.stack(numbers).double().sum()

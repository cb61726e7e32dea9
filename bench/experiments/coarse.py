"""Where the gain of the second level comes from: its step in a window of steps only, and how large it is.

Only what `kfac2.KFAC` shows is used: the gradients before and after a step, and `coarse_fisher()`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import kfac2
from experiments.records import Row, finite
from experiments.settings import Settings

_EACH_STEP, _EVERY = 200, 10  # all of the first steps are measured, and then every tenth


def weight_at(settings: Settings, step: int) -> float:
    """ω of a step: 1 inside the window, 0 outside."""
    return float(settings.coarse_from <= step and (settings.coarse_until is None or step < settings.coarse_until))


class Follower:
    """Measures the coarse step beside the fine one.

    From the gradients ∇_i and what the optimizer made of them, ν v_i, it takes ν (the KL clip's) and the coarse
    step c = (F_coarse + λ I)⁻¹ y, with the F_coarse of the last inverses; what is left of v_i is the fine step.

    Args:
        model: of the run.
        optimizer: of two levels.
        settings: of the run.
    """

    def __init__(self, model: nn.Module, optimizer: kfac2.KFAC, settings: Settings) -> None:
        self._optimizer = optimizer
        self._layers = [list(model.get_submodule(name).parameters(recurse=False)) for name in optimizer.layers]
        self._settings = settings
        self._inverse: Tensor | None = None
        self._before: list[list[Tensor]] = []
        self.rows: list[Row] = []

    def state_dict(self) -> dict[str, Any]:
        """Return what the next epoch needs."""
        return {"inverse": self._inverse}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        inverse = state["inverse"]
        self._inverse = None if inverse is None else inverse.to(self._layers[0][0].device)

    def before(self) -> None:
        """Keep the gradients; to be called before the optimizer's step."""
        self._before = [[self._grad(p).clone() for p in layer] for layer in self._layers]

    @torch.no_grad()
    def after(self, step: int, logits: Tensor) -> None:
        """Measure a step that was just taken; renew the coarse inverse when the optimizer has."""
        settings = self._settings
        assert settings.inv_every is not None
        if step % settings.inv_every == 0:
            self._inverse = self._inverted()
        if self._inverse is None or (step >= _EACH_STEP and step % _EVERY):
            return
        ratio, clip = self._ratio(self._inverse, weight_at(settings, step))
        self.rows.append(
            {
                "step": step,
                "coarse_to_fine": finite(ratio),
                "clip": finite(clip),
                "all_ones": finite(self._all_ones()),
                "logits": finite(logits.double().square().mean().sqrt().item()),
            }
        )

    def _inverted(self) -> Tensor:
        """(F_coarse + λ I)⁻¹ as the optimizer has it: eigenvalues floored at 0."""
        assert self._settings.damping is not None
        values, vectors = torch.linalg.eigh(self._optimizer.coarse_fisher().double())
        return vectors / (values.clamp_min(0) + self._settings.damping) @ vectors.mT

    def _ratio(self, inverse: Tensor, weight: float) -> tuple[float, float]:
        """Return |coarse step| / |fine step|, of all handled weights as the step is or would be with ω = 1, and ν."""
        y = torch.stack([_total([grad.sum() for grad in layer]) for layer in self._before])
        c = inverse @ y
        after = [[self._grad(p).double() for p in layer] for layer in self._layers]
        clip = self._clip(after)
        fine = coarse = torch.zeros((), dtype=torch.float64, device=c.device)
        for grads, shift in zip(after, c, strict=True):
            fine = fine + _total([(grad / clip - weight * shift).square().sum() for grad in grads])
            coarse = coarse + shift.square() * sum(grad.numel() for grad in grads)
        return (coarse / fine).sqrt().item(), clip

    def _clip(self, after: list[list[Tensor]]) -> float:
        """ν. Σ η²|ν v_i · ∇_i| is ν Σ; where Σ is above κ it is √(κ Σ), above κ too, and ν is κ / (ν Σ)."""
        kappa, rate = self._settings.kl_clip, self._optimizer.param_groups[0]["lr"]
        if kappa is None:
            return 1.0
        products = [
            _total([(a * b).sum() for a, b in zip(layer, before, strict=True)]).abs()
            for layer, before in zip(after, self._before, strict=True)
        ]
        clipped = rate**2 * torch.stack(products).sum().item()
        return min(1.0, kappa / clipped) if clipped > 0 else 1.0

    def _all_ones(self) -> float:
        """Of the hidden layers' weights, the mean share of |W|² that lies along the matrix of ones."""
        weights = [layer[0].double() for layer in self._layers[:-1]]
        shares = [w.sum().square() / (w.numel() * w.square().sum()) for w in weights]
        return torch.stack(shares).mean().item()

    @staticmethod
    def _grad(parameter: Tensor) -> Tensor:
        assert parameter.grad is not None
        return parameter.grad


def _total(numbers: list[Tensor]) -> Tensor:
    return torch.stack(numbers).double().sum()

"""What the losses given to a closure tell: a rise out of bounds shortens the step."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("kfac2")

DECAY = 0.95  # of the running mean m and spread s of the losses
SPREADS, MARGIN = 8.0, 1.0  # a loss above both m + 8 s and m + |m| is out of bounds
FIRST = 3  # losses before any is judged by them
FALL, GROWTH, LEAST = 0.5, 1.5, 2.0**-20  # the factor's
START = [0.0, 0.0, 0.0, 1.0, 0.0]


class Rise:
    """The factor by which a rise of the loss shortens the step. It is halved by each loss that is out of bounds.

    A loss L_k is out of bounds where it is not finite, or L_k > m + max(8 s, |m|) with the running mean m and spread s
    of the losses before it: noise of batches whose losses differ by their own size is none. It counts in mean and
    spread as if it lay on the bound, and little, so that these follow in time where losses stay high; one that is not
    finite does not count. After any other loss the factor grows by 1.5, to at most 1.

    All arithmetic is that of tensors on the device of the layers, in place, so that nothing waits for it.
    """

    def __init__(self) -> None:
        # m, s², how many losses counted, the factor, and whether the last one was out of bounds
        self._numbers = torch.tensor(START, dtype=torch.float64)
        self._active = False  # no loss was given yet

    def factor(self, at_once: bool) -> float | Tensor:
        """Return the factor: a number where the host may wait for it, else on the device.

        Args:
            at_once: whether it may.
        """
        if not self._active:
            return 1.0
        return float(self._numbers[3]) if at_once else self._numbers[3].float()

    def follow(self, loss: Any, device: torch.device, at_once: bool) -> None:
        """Take a loss into account; what is no number, or no tensor of one, tells nothing.

        Args:
            loss: what the closure returned.
            device: of the layers.
            at_once: whether the host may wait for it, and say what it saw.
        """
        self._numbers = self._numbers.to(device)
        if isinstance(loss, (int, float)):
            value = torch.full_like(self._numbers[0], loss)  # a copy from the host would wait
        elif isinstance(loss, Tensor) and loss.numel() == 1:
            value = loss.detach().to(self._numbers).reshape(())
        else:
            return
        before = float(self._numbers[4]) if at_once else 0.0
        self._numbers.copy_(_followed(self._numbers, value))
        self._active = True
        if at_once and not before and float(self._numbers[4]):
            logger.warning("the loss rose out of bounds, to %.3g: steps are shortened until it falls", value)

    def state(self) -> list[float]:
        """Return the numbers, for a saved state."""
        return self._numbers.tolist()

    def load(self, state: list[float] | None) -> None:
        """Go on from what `state` returned; None: from the start."""
        numbers = START if state is None else state
        self._numbers.copy_(torch.tensor(numbers, dtype=torch.float64))
        self._active = self._active or numbers[2] > 0 or numbers[3] < 1


def _followed(numbers: Tensor, loss: Tensor) -> Tensor:
    """Return the numbers of a `Rise` with one more loss."""
    mean, square, count, factor, _ = numbers.unbind()
    bound = mean + torch.maximum(SPREADS * square.sqrt(), MARGIN * mean.abs())
    bound = torch.where(count >= FIRST, bound, math.inf)
    finite = loss.isfinite()
    out = ~(finite & (loss <= bound))
    share = torch.where(out, 1 - DECAY, (1 / (count + 1)).clamp(min=1 - DECAY)) * finite
    distance = torch.where(finite, torch.minimum(loss, bound) - mean, 0.0)
    return torch.stack([
        mean + share * distance,
        (1 - share) * (square + share * distance.square()),
        count + finite,
        torch.where(out, FALL * factor, GROWTH * factor).clamp(LEAST, 1.0),
        out.double(),
    ])  # fmt: skip

"""When the space of directions pays: as long as a step goes along what the next batch confirms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

KEPT, KEPT_OFF = 0.93, 0.8  # of the share so far, at each measurement; while the space is left these are few
START = 0.7  # of the share: with much noise a few steps are enough to tell
OFF, OF_ROWS, MOST_ROWS, ON = 0.45, 0.4, 0.5, 0.05  # it is left below OFF + 0.4 min(rows, ½), taken again 0.05 above
STALL, PROGRESS = -0.5, -0.3  # s₁ / DᵀFD: a step of the model's length has come to nothing; it has gone down
SHORTER, LONGER, LEAST = 0.7, 1.15, 0.1  # what a decision makes of the length; no step is shorter for its sake
SURE, TRUST, MOST = 0.9, 1.2, 10.0  # above this share each step makes the length so much longer; no longer than this
PROBE = 20  # iterations from one trial to the next while it is left


class SignalShare:
    """The share of a step's slope that is there on the next batch as well, and what follows from it.

    A step D that was made of a batch's own gradient goes down steeper on that batch than anywhere else: coefficients
    fit its noise. The next batch is independent. Its slope along D is s₁ after the step, and was s₁ + DᵀFD before it if
    the model is right: the share is φ = (s₁ + DᵀFD) / s₀ with s₀ = bᵀc, 1 without noise. Where it is small, one level's
    constant step, whose length noise does not move, does better.

    A step in the space costs the more, the larger the part of the batch is whose rows it takes: about twice one level's
    where that is all of it. So it must gain more: it is left below a share of 0.45 where the part is small, and below
    0.65 where it is half of the batch or more.

    The length is a trust region. Where the slope s₁ is so far below 0 that the step has come to nothing, s₁ < -½ DᵀFD,
    steps are too long for the model, or for the noise, and become shorter, down to a tenth; where they go down they
    become longer again. Where next batches confirm nearly all of the slope, the bound of a step grows, to ten times.

    It costs nothing: s₁ is part of the next step. Trials tell when it pays again. Read from the device when statistics
    are due, which wait for it anyway.

    Attributes:
        share: the running mean of φ.
        is_on: whether the space is taken.
        length: what steps are multiplied by where it is below 1; their bound is K/5 times its square.
        rows: the part of the batch whose rows are taken.
    """

    def __init__(self) -> None:
        self.share, self.length, self.rows = START, 1.0, 1.0
        self.is_on = True
        self._last: Tensor | None = None  # s₀ and DᵀFD of the last step in the space; ∞ if only skipped ones are known
        self._before: Tensor | None = None  # the same, once it is measured
        self._measured: list[Tensor] = []

    def wants_step(self, iteration: int) -> bool:
        """Tell whether an iteration's step is one in the space."""
        return self.is_on or iteration % PROBE == 0

    @property
    def waits(self) -> bool:
        """Whether the last step was one in the space, so that the slope along it is wanted."""
        return self._last is not None

    def took(self, slope: Tensor, divergence: Tensor, found: Tensor | None = None) -> None:
        """Note a step in the space.

        Args:
            slope: s₀, of its own batch.
            divergence: DᵀFD.
            found: on the device, 1 where the step is to be skipped: the one before is still the last; None where it is
                not.
        """
        new = torch.stack([slope, divergence])
        if found is not None:
            before = torch.full_like(new, torch.inf) if self._before is None else self._before
            new = torch.where(found.reshape(()) > 0, before, new)
        self._last = new

    def measured(self, slope: Tensor | None, found: Tensor | None = None) -> None:
        """Take the slope along the last step on the next batch, s₁; None where it is not known.

        Args:
            slope: s₁.
            found: on the device, 1 where this batch is not finite, and says nothing; None where the host has looked.
        """
        if slope is not None and self._last is not None:
            before, divergence = self._last.unbind()
            numbers = torch.stack([(slope + divergence) / before, slope / divergence]).clamp(-2, 2)
            if found is not None:
                numbers = torch.where((found.reshape(()) > 0) | before.isinf(), torch.nan, numbers)
            self._measured.append(numbers)
        self._before, self._last = self._last, None

    def decide(self) -> None:
        """Read what was measured, and say whether the space is taken from now on."""
        if not self._measured:
            return
        numbers = torch.stack(self._measured)
        self._measured = []
        numbers = numbers[numbers.isfinite().all(1)]  # of steps that were neither skipped nor failed
        if not len(numbers):
            return
        kept = (KEPT if self.is_on else KEPT_OFF) ** len(numbers)
        share, slope = numbers.mean(0).tolist()
        if slope < STALL and self.length > LEAST:
            self.length = SHORTER * min(1.0, self.length)
            return
        if share > SURE and self.is_on:
            self.length = min(MOST, TRUST ** len(numbers) * self.length)
        elif slope > PROGRESS and self.length < 1:
            self.length = min(1.0, LONGER * self.length)
        self.share = kept * self.share + (1 - kept) * share
        was_on = self.is_on
        self.is_on = self.share > OFF + OF_ROWS * min(self.rows, MOST_ROWS) + (0.0 if was_on else ON)
        if was_on and not self.is_on:
            self.length = 1.0  # it was not the length

    def state(self) -> dict[str, object]:
        """Return what a saved state holds."""
        last = self._last.tolist() if self._last is not None else None
        return {
            "share": self.share,
            "is_on": self.is_on,
            "last": last,
            "measured": [m.tolist() for m in self._measured],
            "length": self.length,
            "rows": self.rows,
        }

    def load(
        self,
        share: float,
        is_on: bool,
        last: Sequence[float] | None,
        measured: Sequence[Sequence[float]],
        length: float,
        rows: float = 1.0,
    ) -> None:
        """Go on from what `state` returned."""
        self.share, self.is_on, self.length, self.rows = share, is_on, length, rows
        self._last = None if last is None else torch.tensor(last, dtype=torch.float64)
        self._before = None
        self._measured = [torch.tensor(m, dtype=torch.float64) for m in measured]

    def to(self, device: torch.device) -> None:
        """Move what is measured to the device of the layers."""
        if self._last is not None:
            self._last = self._last.to(device)
        self._measured = [m.to(device) for m in self._measured]

"""When the space of directions pays: as long as a step goes along what the next batch confirms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

KEPT = 0.93  # of the share so far, at each measurement
START, FIRST = 0.7, 0.5  # of the share; what the first look must show
OFF, OF_ROWS, MOST_ROWS, ON = 0.45, 0.4, 0.5, 0.05  # it is left below OFF + 0.4 min(rows, ½), taken again 0.05 above
STALL, PROGRESS = -0.5, -0.3  # s₁ / DᵀFD: a step of the model's length has come to nothing; it has gone down
SHORTER, LONGER, LEAST = 0.7, 1.15, 0.1  # what a decision makes of the length; no step is shorter for its sake
SURE, TRUST, MOST = 0.9, 1.2, 10.0  # above this share each step makes the length so much longer; no longer than this
SOON, LATE = 20, 80  # iterations from one look to the next, while the space is left


class SignalShare:
    """The share of a step's slope that is there on the next batch as well, and what follows from it.

    A step D that was made of a batch's own gradient goes down steeper on that batch than anywhere else: coefficients
    fit its noise. The next batch is independent. Where its slope along D is s₁ after a step D₁, it was s₁ + DᵀFD₁
    before it if the model is right: the share is φ = (s₁ + DᵀFD₁) / s₀ with s₀ = bᵀc, 1 without noise. Where it is
    small, one level's constant step, whose length noise does not move, does better.

    D₁ is D where that was taken. Where the space is left, D is only looked at now and then: one level's step is taken,
    and the slope along D is measured all the same, so that a look costs time and nothing else. The first iteration is a
    look. Each later look doubles the time to the next one, up to 80 iterations; each decision to stay halves it.

    A step in the space costs the more, the larger the part of the batch is whose rows it takes: about twice one level's
    where that is all of it. So it must gain more: it is left below a share of 0.45 where the part is small, and below
    0.65 where it is half of the batch or more.

    The length is a trust region. Where the slope s₁ is so far below 0 that the step has come to nothing, s₁ < -½ DᵀFD,
    steps are too long for the model, or for the noise, and become shorter, down to a tenth; where they go down they
    become longer again. Where next batches confirm nearly all of the slope, the bound of a step grows, to ten times.

    It costs nothing: s₁ is part of the next step. Read from the device when statistics are due, which wait for it
    anyway, and after the first look.

    Attributes:
        share: the running mean of φ.
        is_on: whether the space is taken.
        is_new: whether nothing was decided so far.
        length: what steps are multiplied by where it is below 1; their bound is K/5 times its square.
        rows: the part of the batch whose rows are taken.
        interval: iterations from one look to the next.
    """

    def __init__(self) -> None:
        self.share, self.length, self.rows, self.interval = START, 1.0, 1.0, SOON
        self.is_on, self.is_new = False, True
        self._last: Tensor | None = None  # s₀, DᵀFD₁, and DᵀFD, NaN of a look; ∞ if only skipped ones are known
        self._before: Tensor | None = None  # the same of a step that was taken, once it is measured
        self._was_taken = False  # whether the last one is such a step
        self._measured: list[Tensor] = []

    def wants_step(self, iteration: int) -> bool:
        """Tell whether an iteration has a step in the space, or a look at one."""
        return self.is_on or self.is_new or iteration % self.interval == 0

    @property
    def waits(self) -> bool:
        """Whether the slope along the last step in the space is wanted, be it taken or only looked at."""
        return self._last is not None

    @property
    def was_taken(self) -> bool:
        """Whether the last step was one in the space."""
        return self.waits and self._was_taken

    def took(self, slope: Tensor, divergence: Tensor, found: Tensor | None = None) -> None:
        """Note a step in the space.

        Args:
            slope: s₀, of its own batch.
            divergence: DᵀFD.
            found: on the device, 1 where the step is to be skipped: the one before is still the last; None where it is
                not.
        """
        self._note([slope, divergence, divergence], found, self._before)
        self._was_taken = True

    def looked(self, slope: Tensor, across: Tensor, found: Tensor | None = None) -> None:
        """Note a step in the space that was only looked at.

        Args:
            slope: s₀.
            across: DᵀFD₁, with the step D₁ that is taken in its place.
            found: on the device, 1 where that is skipped; None where it is not.
        """
        self._note([slope, across, torch.full_like(slope, torch.nan)], found, None)
        self._was_taken = False

    def shortened(self, factor: float | Tensor) -> None:
        """Note that D₁ was multiplied by a factor, after a look."""
        if self._last is not None and not self._was_taken and not (isinstance(factor, float) and factor == 1):
            before, across, divergence = self._last.unbind()
            self._last = torch.stack([before, across * factor, divergence])

    def _note(self, numbers: list[Tensor], found: Tensor | None, before: Tensor | None) -> None:
        self._last = torch.stack(numbers)
        if found is not None:
            before = torch.full_like(self._last, torch.inf) if before is None else before
            self._last = torch.where(found.reshape(()) > 0, before, self._last)

    def measured(self, slope: Tensor | None, found: Tensor | None = None) -> None:
        """Take the slope along the last step on the next batch, s₁; None where it is not known.

        Args:
            slope: s₁.
            found: on the device, 1 where this batch is not finite, and says nothing; None where the host has looked.
        """
        if slope is not None and self._last is not None:
            before, across, divergence = self._last.unbind()
            numbers = torch.stack([(slope + across) / before, slope / divergence]).clamp(-2, 2)
            if found is not None:
                numbers = torch.where((found.reshape(()) > 0) | before.isinf(), torch.nan, numbers)
            self._measured.append(numbers)
        self._before, self._last = self._last if self._was_taken else None, None

    def decide(self) -> None:
        """Read what was measured, and say whether the space is taken from now on."""
        if not self._measured:
            return
        numbers = torch.stack(self._measured)
        self._measured = []
        numbers = numbers[numbers[:, 0].isfinite()]  # of steps that were neither skipped nor failed
        if not len(numbers):
            return
        share, slope = numbers.nanmean(0).tolist()
        least = OFF + OF_ROWS * min(self.rows, MOST_ROWS)
        if self.is_on:
            self._follow(share, slope, len(numbers), least)
        else:
            self._return(share, least + ON)

    def _follow(self, share: float, slope: float, count: int, least: float) -> None:
        """Go on in the space, with another length, or leave it."""
        if slope < STALL and self.length > LEAST:
            self.length = SHORTER * min(1.0, self.length)
            return
        if share > SURE:
            self.length = min(MOST, TRUST**count * self.length)
        elif slope > PROGRESS and self.length < 1:
            self.length = min(1.0, LONGER * self.length)
        kept = KEPT**count
        self.share = kept * self.share + (1 - kept) * share
        self.is_on = self.share > least
        if self.is_on:
            self.interval = max(SOON, self.interval // 2)
        else:
            self.length = 1.0  # it was not the length

    def _return(self, share: float, least: float) -> None:
        """Take the space after a look, or look again later."""
        self.is_on = share > (FIRST if self.is_new else least)
        if not self.is_new:
            self.interval = min(LATE, 2 * self.interval)
        self.share = (START if self.is_new else least) if self.is_on else share
        self.is_new = False

    def state(self) -> dict[str, object]:
        """Return what a saved state holds."""
        return {
            "share": self.share,
            "is_on": self.is_on,
            "is_new": self.is_new,
            "last": self._last.tolist() if self._last is not None else None,
            "was_taken": self._was_taken,
            "measured": [m.tolist() for m in self._measured],
            "length": self.length,
            "rows": self.rows,
            "interval": self.interval,
        }

    def load(
        self,
        share: float,
        is_on: bool,
        last: Sequence[float] | None,
        measured: Sequence[Sequence[float]],
        length: float,
        rows: float = 1.0,
        is_new: bool = False,
        was_taken: bool = True,
        interval: int = SOON,
    ) -> None:
        """Go on from what `state` returned; states of before there were looks lack the last three."""
        self.share, self.is_on, self.length, self.rows = share, is_on, length, rows
        self.is_new, self.interval, self._was_taken = is_new, interval, was_taken
        self._last = None if last is None else torch.tensor([*last, *last[1:]][:3], dtype=torch.float64)
        self._before = None
        self._measured = [torch.tensor(m, dtype=torch.float64) for m in measured]

    def to(self, device: torch.device) -> None:
        """Move what is measured to the device of the layers."""
        if self._last is not None:
            self._last = self._last.to(device)
        self._measured = [m.to(device) for m in self._measured]

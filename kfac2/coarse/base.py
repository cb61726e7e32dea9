"""A coarse space: what the second level adds to the blocks (eq. 5-7)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kfac2.layout import Layout
from kfac2.ops.shift_and_scale import ShiftAndScale, shift_and_scale
from kfac2.statistics import Averages, Pass, Sums, Use


@dataclass(frozen=True)
class FineStep:
    """A step before the coarse correction, the KL clip and the limits; the arguments of `shift_and_scale`.

    Attributes:
        gradients: ∇ of all layers, one dimension.
        directions: the fine update v, in the same places.
        spans: (L, 3): begin, end and numbers of each layer, see `shift_and_scale`.
        rates: η_i, on the CPU.
        device_rates: what the rates are multiplied by, or None.
        usable: (L,): 0 for a layer that has no inverse.
        first_bad: what `gather_gradients` returned.
        none_bad: what it is where all gradients are finite.
        kl_clip: κ, or None.
        skipped: where steps that are not finite are counted.
        limits: of |v_i|, (L,), or None.
        largest: (L,), on the CPU: the largest number that the gradients of a layer hold, or infinity.
    """

    gradients: Tensor
    directions: Tensor
    spans: Tensor
    rates: Tensor
    device_rates: Tensor | None
    usable: Tensor
    first_bad: Tensor
    none_bad: int
    kl_clip: float | None
    skipped: Tensor
    limits: Tensor | None
    largest: Tensor | None


class CoarseSpace(ABC):
    """The second level. What it sums and averages are tuples of tensors, which only the space itself reads."""

    names: ClassVar[tuple[str, ...]] = ()
    """What the averages are called in a saved state."""

    per_layer: ClassVar[int]
    """Unknowns of each layer."""

    @abstractmethod
    def add(self, layout: Layout, sums: Sums, passed: Pass) -> None:
        """Add the rows of one pass to `sums.coarse`; note in `sums.misfits` a layer with a use that does not fit.

        Args:
            layout: of the layers.
            sums: of the iteration so far.
            passed: the pass.
        """

    def no_sums(self, layout: Layout) -> tuple[Tensor, ...]:
        """Return `sums.coarse` of no rows: symmetric matrices, or nothing."""
        return ()

    def maps_of(self, uses: Sequence[Use]) -> list[list[Tensor]]:
        """Return of each use what is to be known of its gradients once they are let go: here, nothing."""
        return [[] for _ in uses]

    @abstractmethod
    def averaged(self, layout: Layout, averages: Averages, sums: Sums, kept: float) -> tuple[Tensor, ...]:
        """Return `averages.coarse` with the sums of one iteration averaged in.

        Args:
            layout: of the layers.
            averages: those of this iteration, of which only `coarse` is still that of the last.
            sums: of the iteration.
            kept: ε.
        """

    @abstractmethod
    def without(self, layout: Layout, averages: tuple[Tensor, ...], number: int) -> tuple[Tensor, ...]:
        """Return averages, or sums, without a layer.

        Args:
            layout: that it is still part of.
            averages: `Averages.coarse`, or `Sums.coarse`.
            number: of the layer.
        """

    def invert(self, averages: tuple[Tensor, ...], damping: float | Tensor) -> tuple[Tensor, Tensor]:
        """Return the damped inverse of the coarse Fisher, float64, and whether that failed, both on the device.

        A space without averages is not asked.

        Args:
            averages: `Averages.coarse`.
            damping: λ_c, one number or (L,).
        """
        raise NotImplementedError

    def correct(self, step: FineStep, inverse: Tensor | None, in_coarse: Tensor, weight: float) -> ShiftAndScale:
        """Restrict the gradients, solve, prolong onto the directions, and compute clip and limits: one native call.

        Args:
            step: gradients and directions.
            inverse: what `invert` returned; None: no second level in this step.
            in_coarse: float64 on the CPU, (L,).
            weight: ω.
        """
        return shift_and_scale(
            step.gradients,
            step.directions,
            step.spans,
            step.rates,
            step.device_rates,
            in_coarse,
            step.usable,
            inverse if weight != 0 else None,
            step.first_bad,
            step.none_bad,
            weight,
            step.kl_clip,
            step.skipped,
            step.limits,
            step.largest,
        )

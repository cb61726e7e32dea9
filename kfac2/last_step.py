"""What the last step was like."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kfac2.change_limit import Limits
from kfac2.directed import Directed


@dataclass(frozen=True)
class LastStep:
    """Numbers of the last step of a `KFAC`. They are read from the device when they are asked for, not before."""

    _damping: Tensor | float
    _scale: Tensor
    _squared: Tensor | float | None
    _factor: Tensor | float
    _rise: Tensor | float
    _norms: Tensor | None
    _limits: Limits | None
    _names: list[str]
    _directed: Directed

    @property
    def damping(self) -> float:
        """λ, or c with relative damping, of the inverses in use."""
        return float(self._damping)

    @property
    def nu(self) -> float:
        """The factor ν of the KL clip: 1 where it did not act."""
        return float(self._scale[0])

    @property
    def block_divergence(self) -> float:
        """Σ_i η_i² |v_i · ∇_i|, the divergence as the blocks see it, before the clip: κ bounds it."""
        return float(self._scale[1])

    @property
    def divergence(self) -> float | None:
        """η² dᵀFd of the last statistics update, measured over all layers, as the step was before the bound K."""
        return None if self._squared is None else float(self._squared)

    @property
    def bound_factor(self) -> float:
        """What the bound K multiplies the step by now: 1 where it does not act."""
        return float(self._factor)

    @property
    def rise_factor(self) -> float:
        """What a rise of the loss given to `step(closure)` multiplies the step by now: 1 where none is near."""
        return float(self._rise)

    @property
    def changes(self) -> dict[str, float]:
        """By layer |v_i| / |W_i|, before the limit ρ; empty without a limit."""
        if self._norms is None or self._limits is None:
            return {}
        changes = zip(self._names, (self._norms / self._limits.weight_norms).tolist(), self._limits.seen, strict=True)
        return {name: change for name, change, seen in changes if seen}

    @property
    def coefficients(self) -> dict[str, tuple[float, float]]:
        """By layer α and β of the last step in the space of directions; empty where there was none."""
        latest = self._directed.latest
        if latest is None:
            return {}
        pairs = zip(latest.fine.tolist(), latest.last.tolist(), strict=True)
        return dict(zip(latest.names, pairs, strict=True))

    @property
    def signal_share(self) -> float:
        """The share of the slope of steps in the space of directions that the next batch confirms."""
        return self._directed.signal.share

    @property
    def is_directed(self) -> bool:
        """Whether steps are taken in the space of directions for now."""
        return self._directed.latest is not None and self._directed.signal.is_on

    def __repr__(self) -> str:
        most = max(self.changes.items(), key=lambda change: change[1], default=None)
        return (
            f"LastStep(damping={self.damping:.3g}, nu={self.nu:.3g}, block_divergence={self.block_divergence:.3g}, "
            f"divergence={self.divergence}, bound_factor={self.bound_factor:.3g}, "
            f"rise_factor={self.rise_factor:.3g}, largest change={most})"
        )

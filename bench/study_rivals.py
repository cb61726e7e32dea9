"""The rivals of `study.py`: what each optimizer is, which box is searched for it, and the points of that box.

This is the place to change a box. Point 0 is the rival as it comes; the others are of one scrambled Sobol sequence,
equally many for every rival. All kinds of K-FAC have the same box, hence the same points: what differs between them is
their second level. `again` is one level with other labels drawn for its Fisher: what differs there is chance.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

import kfac2

SEED, TRIES = 2026, 16  # of the sequence; draws for each point, some of which are alike
Settings = dict[str, Any]  # a point: arguments by name; those not named are as they come


class Axis(Protocol):
    """One side of a box."""

    def at(self, place: float, nats: float) -> Any:
        """Return the value at a place in [0, 1), for a problem whose case has a loss of about `nats`."""


class Uniform(NamedTuple):
    """All numbers from low to high alike."""

    low: float
    high: float

    def at(self, place: float, nats: float) -> float:
        """Return a number, rounded so that the record tells all of it."""
        return rounded(self.low + place * (self.high - self.low))


class Log(NamedTuple):
    """All orders of magnitude from low to high alike."""

    low: float
    high: float
    is_divergence: bool = False  # whether it is in nats, which a case with a larger loss has more of

    def at(self, place: float, nats: float) -> float:
        """Return a number, times `nats` if it is a divergence."""
        return rounded(self.low * (self.high / self.low) ** place * (nats if self.is_divergence else 1.0))


class Choice(NamedTuple):
    """Each of some values alike."""

    values: tuple[Any, ...]

    def at(self, place: float, nats: float) -> Any:
        """Return one of them."""
        return self.values[int(place * len(self.values))]


class Either(NamedTuple):
    """One value in the lower half, an axis in the upper."""

    value: Any
    axis: Axis

    def at(self, place: float, nats: float) -> Any:
        """Return the value, or what the axis has at the rest of the place."""
        return self.value if place < 0.5 else self.axis.at(2 * place - 1, nats)


def rounded(number: float) -> float:
    return float(f"{number:.3g}")


class Rival(NamedTuple):
    """An optimizer, and where its settings are searched."""

    title: str
    make: Callable[[nn.Module, Settings], Optimizer]
    box: dict[str, Axis]
    missing: Callable[[], str | None] = lambda: None  # what it lacks here, if it cannot run
    labels: int = 2000  # added to the seed of a run, the seed of the labels that K-FAC draws


def _kfac(model: nn.Module, settings: Settings, **fixed: Any) -> Optimizer:
    return kfac2.KFAC(model, **fixed, **settings)


def _adamw(model: nn.Module, settings: Settings) -> Optimizer:
    rest = {"lr": 1e-3, "beta1": 0.9, **settings}
    return AdamW(model.parameters(), betas=(rest.pop("beta1"), 0.999), weight_decay=0.0, **rest)


def _soap(model: nn.Module, settings: Settings) -> Optimizer:
    from pytorch_optimizer import SOAP  # an extra

    return SOAP(model.parameters(), precondition_frequency=10, weight_decay=0.0, **settings)


def _no_soap() -> str | None:
    return None if importlib.util.find_spec("pytorch_optimizer") else "pytorch_optimizer (pip install .[bench-peers])"


_DAMPING = Either("auto", Log(1e-3, 1.0))
_LAYERWISE: dict[str, Axis] = {
    "kl_clip": Log(5e-4, 0.1, is_divergence=True),
    "damping": _DAMPING,
    "momentum": Uniform(0.4, 0.9),
    "max_change": Choice((None, 0.02)),
}
RIVALS = {
    "one": Rival("K-FAC, one level", partial(_kfac, levels=1), _LAYERWISE),
    "again": Rival("K-FAC, one level, other labels drawn", partial(_kfac, levels=1), _LAYERWISE, labels=3000),
    "ones": Rival("K-FAC, the paper's two levels", partial(_kfac, levels=2), _LAYERWISE),
    "directions": Rival("K-FAC, directions", partial(_kfac, coarse="directions"), _LAYERWISE),
    "pair": Rival(
        "K-FAC, one step size and momentum for all", partial(_kfac, coarse="directions", coarse_damping=math.inf),
        _LAYERWISE,
    ),
    "adamw": Rival("AdamW", _adamw, {"lr": Log(3e-4, 3e-2), "beta1": Choice((0.8, 0.9, 0.95))}),
    "soap": Rival("SOAP", _soap, {"lr": Log(1e-3, 3e-2)}, _no_soap),
}  # fmt: skip


def points(rival: str, count: int, nats: float) -> list[Settings]:
    """Return the rival as it comes, then count − 1 points of its box, no two alike; more of them begin with the same.

    Raises:
        ValueError: if the box has not so many.
    """
    box = RIVALS[rival].box
    sequence = torch.quasirandom.SobolEngine(len(box), scramble=True, seed=SEED)
    result: list[Settings] = [{}]
    for _ in range(TRIES * count):
        if len(result) >= count:
            return result
        (row,) = sequence.draw(1, dtype=torch.float64).tolist()
        point = {name: axis.at(place, nats) for (name, axis), place in zip(box.items(), row, strict=True)}
        if point not in result:
            result.append(point)
    raise ValueError(f"the box of {rival} must have {count} points, got {len(result)} in {TRIES * count} draws")

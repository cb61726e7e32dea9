"""The grid of section 4 of the paper, the same for every optimizer, and its winners."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from experiments.records import Group, Record, by_settings
from experiments.settings import Settings


@dataclass(frozen=True)
class Grid:
    """What is tried. Damping and clip are K-FAC's alone, so that its grid is the larger one."""

    rates: Sequence[float] = (1e-2, 1e-3, 1e-4)  # η
    momenta: Sequence[float] = (0.0, 0.9)  # μ; Adam's β₁
    dampings: Sequence[float] = (1e-2, 1e-3)  # λ
    clips: Sequence[float] = (1e-2, 1e-3)  # κ

    def of(self, base: Settings) -> list[Settings]:
        """Return all points of the grid, the rest as in `base`."""
        points = itertools.product(self.rates, self.momenta)
        if not base.is_kfac:
            return [replace(base, lr=lr, momentum=momentum) for lr, momentum in points]
        return [
            replace(base, lr=lr, momentum=momentum, damping=damping, kl_clip=clip)
            for (lr, momentum), damping, clip in itertools.product(points, self.dampings, self.clips)
        ]


def mean_at_end(records: Group, metric: str) -> float:
    """Return the mean of the last epoch's number over seeds; NaN if one is not finite."""
    return sum(record.values(metric)[-1] for record in records) / len(records)


def ranked(records: Iterable[Record], metric: str) -> dict[str, list[Group]]:
    """Group finished records by optimizer, and order the points of each grid, the best first.

    A point one of whose seeds diverged comes last.

    Args:
        records: of any grids.
        metric: what decides; losses should be small, accuracies large.
    """
    sign = -1 if metric.endswith("accuracy") else 1

    def key(group: Group) -> float:
        value = sign * mean_at_end(group, metric)
        return math.inf if math.isnan(value) else value

    result: dict[str, list[Group]] = {}
    for group in by_settings(records):
        result.setdefault(group[0].settings.label, []).append(group)
    return {label: sorted(groups, key=key) for label, groups in result.items()}


def winners(records: Iterable[Record], metric: str) -> list[Settings]:
    """Return the best point of each optimizer's grid."""
    return [groups[0][0].settings for groups in ranked(records, metric).values()]

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


def base_of(settings: Settings) -> Settings:
    """Return what all points of a grid have in common."""
    return replace(settings, seed=0, lr=0.0, momentum=0.0, damping=None, kl_clip=None)


def mean_at_end(records: Group, metric: str) -> float:
    """Return the mean of the last epoch's number over seeds; NaN if one is not finite."""
    return sum(record.values(metric)[-1] for record in records) / len(records)


def ranked(records: Iterable[Record], metric: str) -> dict[Settings, list[Group]]:
    """Sort finished records into grids, by what their points have in common, and order the points, the best first.

    Points are compared over the seeds that all of their grid have; one of whose seeds diverged comes last.

    Args:
        records: of any grids.
        metric: what decides; losses should be small, accuracies large.
    """
    grids: dict[Settings, list[Group]] = {}
    for group in by_settings(records):
        grids.setdefault(base_of(group[0].settings), []).append(group)
    return {base: _ordered(groups, metric) for base, groups in grids.items()}


def _ordered(groups: Sequence[Group], metric: str) -> list[Group]:
    sign = -1 if metric.endswith("accuracy") else 1
    seeds = set.intersection(*({record.settings.seed for record in group} for group in groups))

    def key(group: Group) -> float:
        if any(record.has_diverged for record in group):
            return math.inf
        value = sign * mean_at_end([record for record in group if record.settings.seed in seeds] or group, metric)
        return math.inf if math.isnan(value) else value

    return sorted(groups, key=key)


def winners(records: Iterable[Record], metric: str) -> list[Settings]:
    """Return the best point of each grid."""
    return [groups[0][0].settings for groups in ranked(records, metric).values()]

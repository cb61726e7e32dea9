"""The grid of section 4 of the paper, the same for every optimizer, a region more for K-FAC, and their winners."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain, product

from experiments.records import Group, Record, by_settings
from experiments.settings import Settings

RATES, MOMENTA = (1e-2, 1e-3, 1e-4), (0.0, 0.9)  # η; μ, Adam's β₁
DAMPINGS, CLIPS = (1e-2, 1e-3), (1e-2, 1e-3)  # λ and κ, K-FAC's alone, so that its grid is the larger one
# Beside the paper's grid, for one level and two alike: the KL clip as the step length.
REGION = ((1.0,), (0.5, 0.8), (1e-2,), (1e-3, 3e-3, 1e-2))  # η, μ, λ, κ


def points(base: Settings) -> list[Settings]:
    """Return all points of the grid, the rest as in `base`."""
    if not base.is_kfac:
        return [replace(base, lr=lr, momentum=momentum) for lr, momentum in product(RATES, MOMENTA)]
    return [
        replace(base, lr=lr, momentum=momentum, damping=damping, kl_clip=clip)
        for lr, momentum, damping, clip in chain(product(RATES, MOMENTA, DAMPINGS, CLIPS), product(*REGION))
    ]


def ranked(records: Iterable[Record]) -> list[list[Group]]:
    """Sort records into grids, by what their points have in common, and order the points by the final training loss.

    Points are compared over the seeds that all of their grid have; one of whose seeds diverged comes last.
    """
    grids: dict[Settings, list[Group]] = {}
    for group in by_settings(records):
        common = replace(group[0].settings, seed=0, lr=0.0, momentum=0.0, damping=None, kl_clip=None)
        grids.setdefault(common, []).append(group)
    return [_ordered(groups) for groups in grids.values()]


def _ordered(groups: Sequence[Group]) -> list[Group]:
    seeds = set.intersection(*({record.settings.seed for record in group} for group in groups))

    def key(group: Group) -> float:
        ends = [record.values("train_loss")[-1] for record in group if record.settings.seed in seeds or not seeds]
        return math.inf if any(record.has_diverged for record in group) else sum(ends) / len(ends)

    return sorted(groups, key=key)


def tuned(base: Settings, records: Iterable[Record]) -> Settings:
    """Give a run the numbers of its optimizer's winner on its network; there must be one such grid."""
    winners = [groups[0][0].settings for groups in ranked(records)]
    found = [winner for winner in winners if (winner.label, winner.network) == (base.label, base.network)]
    if len(found) != 1:
        raise ValueError(f"--tuned needs one grid of {base.label} on {base.network}, and there are {len(found)}")
    (best,) = found
    return replace(base, lr=best.lr, momentum=best.momentum, damping=best.damping, kl_clip=best.kl_clip)

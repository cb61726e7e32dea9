"""From options to runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from experiments import recipes
from experiments.data import FASHION_MNIST
from experiments.grid import Grid, winners
from experiments.records import load_all, networks
from experiments.settings import Settings

# Options that replace an entry of the recipe where they are given.
_ENTRIES = ("epochs", "train", "test", "layers", "width", "batch", "milestones", "data", "shortcut")
_KFAC_ENTRIES = ("cov_every", "inv_every")


class PlanError(ValueError):
    """Options that do not go together."""


@dataclass(frozen=True)
class Plan:
    """Runs to do.

    Attributes:
        runs: seed by seed, so that an early stop leaves whole comparisons.
        images: the folder of images; None for data that is drawn.
        out: the folder of records.
    """

    runs: Sequence[Settings]
    images: Path | None
    out: Path


def plan_of(options: argparse.Namespace) -> Plan:
    """Turn options into runs.

    Raises:
        PlanError: if options do not go together.
        RecordError: if a record of the grid cannot be read.
    """
    bases = [_changed(base, options) for base in _bases(options)]
    name = options.command
    if options.command == "grid":
        name = f"grid-{options.problem}"
        grid = Grid(options.etas, options.momenta, options.dampings, options.clips)
        bases = [point for base in bases for point in grid.of(base)]
    elif options.command != "coarse" and options.tuned:
        name += "-tuned"
        bases = _tuned(bases, options)
    images = _folder(bases[0], options) if options.problem == "resnet" else None
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    return Plan([base.of_seed(seed) for seed in seeds for base in bases], images, options.out / name)


def _bases(options: argparse.Namespace) -> list[Settings]:
    if options.command == "coarse":
        return [recipes.coarse(window) for window in _windows(options)]
    bases = []
    for optimizer in options.optimizers:
        for inverse in options.inverses if optimizer.startswith("kfac") else options.inverses[:1]:
            if options.problem == "deep-linear":
                base = recipes.deep_linear(optimizer, inverse)
            else:
                base = recipes.resnet(optimizer, inverse)
            bases.append(replace(base, lr=getattr(options, "rates", {}).get(optimizer, base.lr)))
    return bases


def _windows(options: argparse.Namespace) -> Sequence[tuple[int, int | None]]:
    if options.coarse_from is None and options.coarse_until is None:
        return recipes.WINDOWS
    return [(options.coarse_from or 0, options.coarse_until)]


def _changed(base: Settings, options: argparse.Namespace) -> Settings:
    names = _ENTRIES + _KFAC_ENTRIES * base.is_kfac
    given = {name: getattr(options, name, None) for name in names}
    changed = replace(base, **{name: value for name, value in given.items() if value is not None})
    changed = replace(changed, device=options.device, threads=options.threads)
    return replace(changed, augment=False) if getattr(options, "no_augment", False) else changed


def _tuned(bases: Sequence[Settings], options: argparse.Namespace) -> list[Settings]:
    """Give each optimizer the numbers of its grid's winner: of the same network's grid, or of the only one."""
    folder = options.out / f"grid-{options.problem}"
    grids = networks(load_all(folder))
    if len(grids) > 1 and bases[0].network not in grids:
        found = "; ".join(grids)
        raise PlanError(f"--tuned needs one grid, or one of {bases[0].network}; in {folder} there are: {found}")
    records = grids[bases[0].network] if len(grids) > 1 else [record for some in grids.values() for record in some]
    won = {(s.optimizer, s.inverse): s for s in winners(records, options.by)}
    missing = [base.label for base in bases if (base.optimizer, base.inverse) not in won]
    if missing:
        raise PlanError(f"--tuned needs finished grids in {folder}, and there is none of {', '.join(missing)}")
    tuned = []
    for base in bases:
        best = won[base.optimizer, base.inverse]
        numbers = {name: getattr(best, name) for name in ("lr", "momentum", "damping", "kl_clip")}
        tuned.append(replace(base, **numbers))
    return tuned


def _folder(base: Settings, options: argparse.Namespace) -> Path:
    if options.folder is not None:
        return options.folder
    if base.data != "fashion-mnist":
        raise PlanError(f"--data {base.data} needs --folder, the folder of its files")
    if not FASHION_MNIST.is_dir():
        raise PlanError(f"--folder is needed: {FASHION_MNIST}, of Debian's dataset-fashion-mnist, is not there")
    return FASHION_MNIST

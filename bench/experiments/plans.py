"""From options to runs."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from experiments import recipes
from experiments.data import FASHION_MNIST
from experiments.grid import Grid, base_of, winners
from experiments.records import load_all
from experiments.settings import DRAWN_SAMPLES, Settings

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
    bases = [_checked(_changed(base, options)) for base in _bases(options)]
    name = options.command
    if options.command == "grid":
        name = f"grid-{options.problem}"
        grid = Grid(options.etas, options.momenta, options.dampings, options.clips)
        bases = [point for base in bases for point in grid.of(base)]
    elif options.command != "coarse" and options.tuned:
        if options.rates:
            raise PlanError("--rates and --tuned both choose learning rates: give one of them")
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
    first, last = options.coarse_from or 0, options.coarse_until
    if last is not None and last <= first and (first, last) != (0, 0):
        raise PlanError(f"--coarse-until must be above --coarse-from, {first}, or both 0 for never; got {last}")
    return [(first, last)]


def _changed(base: Settings, options: argparse.Namespace) -> Settings:
    names = _ENTRIES + _KFAC_ENTRIES * base.is_kfac
    given = {name: getattr(options, name, None) for name in names}
    changed = replace(base, **{name: value for name, value in given.items() if value is not None})
    changed = replace(changed, device=options.device, threads=options.threads)
    return replace(changed, augment=False) if getattr(options, "no_augment", False) else changed


def _checked(settings: Settings) -> Settings:
    samples = settings.train or DRAWN_SAMPLES[0]
    if settings.problem == "deep-linear" and samples % settings.batch == 1:
        raise PlanError(
            f"--train {samples} with --batch {settings.batch} leaves one sample for the last step, of which batch "
            "normalisation can take no variance"
        )
    return settings


def _tuned(bases: Sequence[Settings], options: argparse.Namespace) -> list[Settings]:
    """Give each optimizer the numbers of its grid's winner."""
    folder = options.out / f"grid-{options.problem}"
    records = load_all(folder)
    if not all(record.is_done for record in records):
        raise PlanError(f"--tuned needs finished grids, and {folder} holds runs that are not: go on with them first")
    best = {base_of(settings): settings for settings in winners(records, options.by)}
    tuned = []
    for base in bases:
        winner = _winner_for(base, best, folder)
        numbers = {name: getattr(winner, name) for name in ("lr", "momentum", "damping", "kl_clip")}
        tuned.append(replace(base, **numbers))
    return tuned


def _winner_for(base: Settings, best: Mapping[Settings, Settings], folder: Path) -> Settings:
    """Take the grid that has all else in common with a run, or the only one of its optimizer."""
    if base_of(base) in best:
        return best[base_of(base)]
    found = [winner for winner in best.values() if winner.label == base.label]
    if len(found) != 1:
        raise PlanError(
            f"--tuned needs in {folder} a grid of {base.label} with the same options but for the tuned ones, or a "
            f"single one with other options; there are {len(found)}"
        )
    return found[0]


def _folder(base: Settings, options: argparse.Namespace) -> Path:
    if options.folder is not None:
        return options.folder
    if base.data != "fashion-mnist":
        raise PlanError(f"--data {base.data} needs --folder, the folder of its files")
    if not FASHION_MNIST.is_dir():
        raise PlanError(f"--folder is needed: {FASHION_MNIST}, of Debian's dataset-fashion-mnist, is not there")
    return FASHION_MNIST

"""Markdown tables of records."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from output import table

from experiments.grid import ranked
from experiments.records import Group, Record, by_settings, clock_of, labels, mean_and_half, networks, survivors
from experiments.settings import Settings

_ENDS = (
    ("train_loss", "train loss", ".4f"),
    ("train_accuracy", "train acc.", ".2%"),
    ("test_loss", "test loss", ".4f"),
    ("test_accuracy", "test acc.", ".2%"),
)
_END_NAMES = [name for _, name, _ in _ENDS]


def comparison(records: Sequence[Record], what: str = "") -> str:
    """Write a section for each network: the last epoch of each optimizer, mean ± 95 % interval.

    The last column tells when the mean training loss first is where one-level K-FAC's ends (the lower one's, if
    several were run): the gain by epoch and by time. `what` is added to the title.
    """
    return "\n\n".join(_section(title + what, by_settings(some)) for title, some in networks(records).items())


def _section(title: str, groups: Sequence[Group]) -> str:
    alive = [group for group in groups if survivors(group)]
    ends = [_curve(group, "train_loss")[-1] for group in alive if group[0].settings.optimizer == "kfac1"]
    goal = min(ends, default=None)
    seconds, clock = clock_of(groups)
    header = ["optimizer", "η", "seeds", "epochs", *_END_NAMES, f"seconds ({clock})"]
    header += [f"to {goal:.4f}: epoch / s"] if goal is not None else []
    rows = []
    for group, label in zip(groups, labels(groups), strict=True):
        settings = group[0].settings
        row = [label, f"{settings.lr:g}", str(len(group)), str(settings.epochs)]
        row += [_end(group, metric, spec) for metric, _, spec in (*_ENDS, (seconds, clock, ".1f"))]
        rows.append(row + ([_reached(group, goal, seconds)] if goal is not None else []))
    where = ", ".join(dict.fromkeys(_where(record) for group in groups for record in group))
    return f"### {title[0].upper()}{title[1:]}\n\n{table(header, rows)}\n\nOn {where}."


def _where(record: Record) -> str:
    machine = record.machine
    place = machine["cpu"] if machine["device"] == "cpu" else machine["device"]
    return f"{place} (torch {machine['torch']}, threads: {machine['threads']})"


def _curve(group: Group, metric: str) -> np.ndarray:
    return mean_and_half([record.values(metric) for record in survivors(group)])[0]


def _end(group: Group, metric: str, spec: str) -> str:
    """Write the last epoch's mean over the seeds that did not diverge, with its interval."""
    some = survivors(group)
    if not some:
        return "diverged"
    means, halves = mean_and_half([record.values(metric)[-1:] for record in some])
    spec = spec if abs(means[0]) < 1e4 else ".2e"
    return f"{means[0]:{spec}}" + (f" ± {halves[0]:{spec}}" if np.isfinite(halves[0]) else "")


def _reached(group: Group, goal: float, seconds: str) -> str:
    if not survivors(group):
        return "never"
    there = np.flatnonzero(_curve(group, "train_loss") <= goal)
    return f"{there[0] + 1} / {_curve(group, seconds)[there[0]]:.1f}" if len(there) else "never"


def winners(records: Sequence[Record]) -> str:
    """Write the winner of each grid, with the second beside it, for each network."""
    header = ["optimizer", "points", "η", "μ", "λ", "κ", *_END_NAMES, "second best"]
    sections = []
    for title, some in networks(records).items():
        rows, grids = [], ranked(some)
        for label, groups in zip(labels([groups[0] for groups in grids]), grids, strict=True):
            numbers = _numbers(groups[0][0].settings)
            second = ", ".join(_numbers(groups[1][0].settings)) if len(groups) > 1 else "none"
            ends = [_end(groups[0], name, spec) for name, _, spec in _ENDS]
            rows.append([label, str(len(groups)), *numbers, *ends, second])
        sections.append(f"### Grid: {title}, by train loss\n\n{table(header, rows)}")
    return "\n\n".join(sections)


def _numbers(settings: Settings) -> list[str]:
    values = (settings.lr, settings.momentum, settings.damping, settings.kl_clip)
    return ["none" if value is None else f"{value:g}" for value in values]


def windows(records: Sequence[Record]) -> str:
    """Write what each window of the coarse step leads to, and what the first step and the last epoch look like."""
    places = {
        "coarse / fine, first step": ("coarse_to_fine", 0),
        "in step 100": ("coarse_to_fine", 99),
        "all-ones share, first step": ("all_ones", 0),
        "at the end": ("all_ones", -1),
        "logits at the end": ("logits", -1),
    }
    header = ["coarse step taken", "seeds", *_END_NAMES, *places]
    sections = []
    for title, some in networks(records).items():
        groups, rows = by_settings(some), []
        for group, label in zip(groups, labels(groups, lambda settings: settings.window), strict=True):
            row = [label, str(len(group)), *(_end(group, metric, spec) for metric, _, spec in _ENDS)]
            rows.append(row + [_of_step(survivors(group), metric, place) for metric, place in places.values()])
        sections.append(f"### Where the gain of the second level comes from: {title}\n\n{table(header, rows)}")
    return "\n\n".join(sections)


def _of_step(records: Sequence[Record], metric: str, place: int) -> str:
    """Mean over seeds of a number of one step; a run that is too short gives its last."""
    values = [record.values(metric) for record in records]
    return f"{np.mean([some[min(place, len(some) - 1)] for some in values]):.3g}" if values else "diverged"
